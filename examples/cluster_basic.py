"""One worker for each processor, and a new one for each that dies.

    python -m examples.cluster_basic
    curl http://127.0.0.1:3000/

The best known listing of Node's cluster. `fork()` without a function starts this very program again, in
a fresh interpreter that finds itself to be a worker; examples/cluster.py forks a function instead, which
shares the memory of the master. Try `kill -9` on the pid of an answer. Who only wants the workers kept
writes `cluster.keep(os.cpu_count(), work)`, which also slows down a crash loop.
"""

import os

from prefork import Request, cluster


async def app(request: Request) -> dict[str, int]:
    return {"pid": os.getpid(), "worker": cluster.worker.id}


if cluster.is_master:
    # Fork workers
    for _ in range(os.cpu_count() or 1):
        cluster.fork()

    @cluster.on("listening")
    def listening(worker, address):
        print(f"worker {worker.process.pid} listens on {address}", flush=True)

    @cluster.on("exit")
    def restart(worker, code, signal):
        print(f"worker {worker.process.pid} died", flush=True)
        if not worker.exited_after_disconnect:  # nobody asked it to: Ctrl-C ends them all
            cluster.fork()

    cluster.run()
else:
    # Run the application
    cluster.listen(app, os.environ.get("BIND", "127.0.0.1:3000"))
