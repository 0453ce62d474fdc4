"""Every test of this room is watched for descriptors that it leaves open; some need a directory of their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.descriptors import in_child, no_descriptor_leaks

__all__ = ["directory", "in_child", "no_descriptor_leaks"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose path is short, as a unix socket's must be, and that every user may use."""
    with tempfile.TemporaryDirectory(prefix="prefork-", dir="/tmp") as path:
        os.chmod(path, 0o777)
        yield Path(path)
