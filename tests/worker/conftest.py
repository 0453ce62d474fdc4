"""A client of the module's own server: most tests of this room need one connection to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.client import Client
from tests.harness.server import Server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.port) as client:
        yield client
