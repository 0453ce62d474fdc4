"""Picks of a user's own."""

from __future__ import annotations

NUMBER = 1


def by_port(connection, workers):
    """Odd ports to the last worker, even ones to the first."""
    return workers[-1] if connection.client[1] % 2 else workers[0]


def by_query(connection, workers):
    """?last to the last worker, everything else to the first."""
    path = connection.head.split(b" ", 2)[1] if connection.head else b""
    return workers[-1] if path.endswith(b"?last") else workers[0]


by_query.needs_head = True


def broken(connection, workers):
    raise RuntimeError("no idea")
