"""A master that tells every event and does what it is told, with workers that do so too."""

from prefork import cluster
from tests.programs.telling import *  # noqa: F403 - what an order may use
from tests.programs.telling import hear, obey, say, tell_all, tell_own


async def app(request):
    return f"worker {cluster.worker.id}\n"


def worker(bind=None, settings=None):
    """Obeys; serves as well if *bind* says where."""
    current = cluster.worker
    current.on("message", hear)
    current.on("draining", lambda: say("drains", worker=current.id))
    current.on("disconnect", lambda: say("disconnects", worker=current.id, asked=current.exited_after_disconnect))
    if bind is not None:
        cluster.listen(app, bind, **(settings or {}))


def fork(*args, **options):
    """cluster.fork whose worker's own events are told as well."""
    handle = cluster.fork(*args, **options)
    tell_own(handle)
    return handle


if __name__ == "__main__":
    tell_all()
    obey()
    say("returned", code=cluster.run())
