"""Hooks that print every event, and applications that misbehave on purpose."""

import os
import time


def register(cluster):
    cluster.on("fork", lambda worker: print(f"event fork {worker.id}", flush=True))
    cluster.on("online", lambda worker: print(f"event online {worker.id}", flush=True))
    cluster.on("listening", lambda worker, address: print(f"event listening {worker.id} {address}", flush=True))

    @cluster.on("exit")
    def exited(worker, code, signal):
        print(f"event exit {worker.id} {code} {signal} {worker.exit_cause}", flush=True)


def failing(cluster):
    raise RuntimeError("these hooks fail")


def failing_listener(cluster):
    @cluster.on("fork")
    def listener(worker):
        raise RuntimeError("this listener fails")


def stubborn(cluster):
    """Marks the instant at which hooks run: before the first fork."""
    print(f"hooks run with {len(cluster.workers)} workers, master {cluster.is_master}", flush=True)
    register(cluster)


async def hello(request):
    return "hello"


def slot_one_dies():
    """A factory: the worker in slot 1 crashes soon after it listens, the others are sound."""
    import threading

    from prefork import cluster

    async def app(request):
        return f"{request.worker.id} {request.worker.slot}"

    if cluster.worker.slot == 1:
        timer = threading.Timer(0.1, os._exit, [9])
        timer.daemon = True
        timer.start()
    return app


def slow_import():
    """A factory that takes its time; TERM has to get through."""
    print("importing", flush=True)
    time.sleep(60)


def second_slow_import():
    """A factory that takes a second."""
    print("importing", flush=True)
    time.sleep(1)
    return hello
