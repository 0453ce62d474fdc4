"""Makes orphans: processes whose parent ends before they do."""

import os
from pathlib import Path


async def app(request):
    match request.path:
        case "/pid1":
            return str(os.getppid())
        case "/orphan":
            child = os.fork()
            if child == 0:
                if os.fork() == 0:
                    os.write(1, b"orphan is gone\n")
                os._exit(0)
            os.waitpid(child, 0)  # noqa: ASYNC222 - it ends at once
            return "made"
        case "/zombies":
            # Stays a zombie only until the master's next turn: ask until it had one.
            while count := sum(map(is_zombie, Path("/proc").iterdir())):  # noqa: ASYNC240 - procfs does not block
                os.sched_yield()
            return str(count)


def is_zombie(process):
    try:
        return process.name.isdecimal() and (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
