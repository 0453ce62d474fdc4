// What apps.work serves, by node:cluster: node cluster.mjs PORT WORKERS
import cluster from "node:cluster";
import http from "node:http";

const [port, workers] = process.argv.slice(2).map(Number);
const nothing = new Int32Array(new SharedArrayBuffer(4));

if (cluster.isPrimary) {
  cluster.on("listening", (worker) => console.log(`worker ${worker.process.pid} listens`));
  for (let i = 0; i < workers; i++) cluster.fork();
} else {
  http
    .createServer((request, response) => {
      const milliseconds = Number(request.url.split("?")[1] ?? 0);
      if (milliseconds) Atomics.wait(nothing, 0, 0, milliseconds);
      response.end(String(process.pid));
    })
    .listen(port, "127.0.0.1");
}
