"""How many workers "auto" is: the CPUs that this process may use.

Counting the machine's CPUs is what makes sixty-four workers share the one CPU of a
container. What binds is the affinity mask and the cgroup's quota; both are read once,
when the server starts.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path


def available_cpus(environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> int:
    """The CPUs this process may use, at least 1.

    PYTHON_CPU_COUNT decides where it is set, as for `os.process_cpu_count` since Python
    3.13. Otherwise it is the affinity mask, and no more than the cgroup's quota rounded
    up: 1.5 CPUs keep two workers busy part of the time, one worker could not use them.
    """
    asked = (os.environ if environ is None else environ).get("PYTHON_CPU_COUNT", "")
    if re.fullmatch("[1-9][0-9]{0,5}", asked):
        return int(asked)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([usable, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """CPUs allowed by the process's cgroup and each above it (cgroups(7); versions 1 and 2)."""
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        # In a container the path may be the host's; what is mounted at the top is then ours.
        for level in (group.strip("/"), *map(str, Path(group.strip("/")).parents)):
            quota = _quota_v1(top / level) if controllers else _quota_v2(top / level)
            if quota is not None:
                quotas.append(quota)
    return quotas


def _quota_v2(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    """None where there is no quota: "max" in version 2, -1 in version 1, no file at all."""
    if not (quota.strip().isdecimal() and period.strip().isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # no cgroups, or none for the CPU
        return ""
