"""Two workers that count their requests, and leave after the third.

    python -m examples.cluster
    for i in 1 2 3 4 5 6 7; do curl http://127.0.0.1:8080/; done

The twin of the classic listing for Node's cluster: the master follows fork, online, listening
and exit; each worker answers with its id, its pid and its count, and leaves after three
requests. Leaving is graceful: the third answer arrives whole, and new connections go to the other
worker. `keep` forks another one for each that leaves, with the next id; without it the program would
end with its last worker. Clients that come while both are being replaced wait, and are served.
"""

import os

from prefork import Request, cluster

BIND = os.environ.get("BIND", "127.0.0.1:8080")

count = 0  # each worker has its own: they share nothing but the listening socket


async def handler(request: Request) -> str:
    global count
    count += 1
    worker = cluster.worker
    print(f"worker {worker.id}: is incrementing count to {count}", flush=True)
    if count == 3:
        worker.disconnect()
    return f"hello world from worker number: {worker.id} pid {worker.process.pid} and the count: {count}\n"


def work() -> None:
    print(f"worker {cluster.worker.id}: is ready", flush=True)
    cluster.listen(handler, BIND)


def main() -> int:
    @cluster.on("fork")
    def forked(worker):
        print(f"master: fork event (worker: {worker.id})", flush=True)

    @cluster.on("online")
    def online(worker):
        print(f"master: online event (worker: {worker.id})", flush=True)

    @cluster.on("listening")
    def listening(worker, address):
        print(f"master: listening event (worker: {worker.id}, pid {worker.process.pid}, {address})", flush=True)

    @cluster.on("exit")
    def exited(worker, code, signal):
        print(f"master: exit event (worker: {worker.id}, {worker.exit_cause}, code {code})", flush=True)

    print("master: about to fork two workers", flush=True)
    cluster.keep(2, work)
    return cluster.run()


if __name__ == "__main__":
    raise SystemExit(main())
