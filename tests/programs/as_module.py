"""Started as `python -m tests.programs.as_module`: forks itself."""

from prefork import cluster
from tests.programs.telling import obey, say, tell_all

if cluster.is_master:
    tell_all()
    obey()
    cluster.fork()
    cluster.run()
else:
    say("ran", package=__package__, worker=cluster.worker.id)
