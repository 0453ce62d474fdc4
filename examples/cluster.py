"""Two workers that count their requests, and leave after the third.

    python -m examples.cluster
    for i in 1 2 3 4 5 6 7; do curl http://127.0.0.1:8080/; done

The twin of the classic listing for Node's cluster: the master follows fork, online, listening
and exit; each worker answers with its id, its pid and its count, and asks to leave after three
requests. Leaving is graceful: the third answer arrives whole, new connections go to the other
worker, and a replacement with the next id takes the place.
"""

import os

from prefork import Request, cluster, serve

count = 0  # each worker has its own: they share nothing but the listening socket


async def handler(request: Request) -> str:
    global count
    count += 1
    if count == 3:
        cluster.worker.disconnect()
    worker = request.worker
    return f"hello world from worker number: {worker.id} pid {worker.pid} and the count: {count}\n"


if __name__ == "__main__":
    cluster.on("fork", lambda worker: print(f"master: fork event (worker: {worker.id})", flush=True))
    cluster.on("online", lambda worker: print(f"master: online event (worker: {worker.id})", flush=True))
    cluster.on(
        "listening",
        lambda worker, address: print(
            f"master: listening event (worker: {worker.id}, pid {worker.process.pid}, {address})", flush=True
        ),
    )
    cluster.on(
        "exit",
        lambda worker, code, signal: print(
            f"master: exit event (worker: {worker.id}, {worker.exit_cause}, code {code})", flush=True
        ),
    )
    serve(handler, bind=os.environ.get("BIND", "127.0.0.1:8080"), workers=2)
