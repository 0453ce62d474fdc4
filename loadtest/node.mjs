// What apps.py serves, by node:http: node node.mjs APP PORT [CERTIFICATE KEY]
import { createReadStream, readFileSync, statSync } from "node:fs";
import http from "node:http";
import https from "node:https";
import { pipeline } from "node:stream/promises";

const HELLO = "Hello, world!\n";
const TEXT = "text/plain; charset=utf-8";
const BINARY = "application/octet-stream";
const LARGE = Buffer.from("0123456789abcdef".repeat(4096));
const PIECES = 1600;
const CHUNK = "data: a few words at a time\n\n";
const CHUNKS = 1000;

const head = (response, type, length) => response.writeHead(200, { "content-type": type, "content-length": length });

const drained = (response) => new Promise((resolve) => response.once("drain", resolve));

const apps = {
  hello(request, response) {
    head(response, TEXT, HELLO.length).end(HELLO);
  },
  large(request, response) {
    head(response, BINARY, LARGE.length).end(LARGE);
  },
  echo(request, response) {
    const pieces = [];
    request.on("data", (piece) => pieces.push(piece));
    request.on("end", () => {
      const body = Buffer.concat(pieces);
      head(response, "application/json", body.length).end(body);
    });
  },
  upload(request, response) {
    let size = 0;
    request.on("data", (piece) => (size += piece.length));
    request.on("end", () => head(response, TEXT, String(size).length).end(String(size)));
  },
  async download(request, response) {
    head(response, BINARY, PIECES * LARGE.length);
    for (let i = 0; i < PIECES && !response.destroyed; i++) if (!response.write(LARGE)) await drained(response);
    response.end();
  },
  async file(request, response) {
    head(response, BINARY, statSync(process.env.RACE_FILE).size);
    await pipeline(createReadStream(process.env.RACE_FILE, { highWaterMark: LARGE.length }), response).catch(() => {});
  },
  async chunks(request, response) {
    response.writeHead(200, { "content-type": TEXT });
    for (let i = 0; i < CHUNKS && !response.destroyed; i++) if (!response.write(CHUNK)) await drained(response);
    response.end();
  },
};

const [app, port, certificate, key] = process.argv.slice(2);
const server = certificate
  ? https.createServer({ cert: readFileSync(certificate), key: readFileSync(key) }, apps[app])
  : http.createServer(apps[app]);
server.listen(Number(port), "127.0.0.1");
