// The same over fork() and process.send: node ipc.mjs SERIALIZATION MODE SECONDS, which prints a rate.
import { fork } from "node:child_process";

const [serialization, mode, seconds, role] = process.argv.slice(2);
const SMALL = "x".repeat(100);
const LARGE = "x".repeat(1e6);

if (role === "child") {
  process.on("message", mode === "trips" ? (message) => process.send(message) : () => process.send(null));
} else {
  const child = fork(process.argv[1], [serialization, mode, seconds, "child"], { serialization });
  const window = mode === "trips" ? 1 : 4;
  const message = mode === "trips" ? SMALL : LARGE;
  const warm = performance.now() + 200;
  let count = 0;
  let start = 0;
  child.on("message", () => {
    const now = performance.now();
    if (start) count++;
    else if (now > warm) start = now;
    if (start && now > start + seconds * 1000) {
      const rate = count / ((now - start) / 1000);
      console.log(rate);
      child.disconnect();
    } else if (child.connected) child.send(message);
  });
  for (let i = 0; i < window; i++) child.send(message);
}
