"""A master that forks functions and itself alike; what it forks obeys either way."""

from prefork import cluster
from tests.programs.telling import *  # noqa: F403 - what an order may use
from tests.programs.telling import hear, obey, say, tell_all


def worker():
    cluster.worker.on("message", hear)
    cluster.worker.run()


if cluster.is_worker:
    worker()
elif __name__ == "__main__":
    tell_all()
    obey()
    say("returned", code=cluster.run())
