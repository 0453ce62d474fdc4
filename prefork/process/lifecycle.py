"""The states of a worker, and the only ways between them.

    FORKED -> ONLINE -> LISTENING -> DRAINING -> DISCONNECTED -> EXITED

A state may be skipped on the way down (a worker can die at any time), never
revisited.
"""

from __future__ import annotations

from enum import IntEnum


class State(IntEnum):
    FORKED = 1  # the process exists; none of our code has run in it yet
    ONLINE = 2  # its first message has arrived; the application is being loaded
    LISTENING = 3  # it accepts on all its addresses
    DRAINING = 4  # it finishes what is in flight and accepts nothing
    DISCONNECTED = 5  # its channel has ended; the process may still be at work
    EXITED = 6  # reaped


def may_become(state: State, successor: State) -> bool:
    """Whether a worker in *state* may enter *successor*. A late message asks for an illegal one."""
    return successor > state and (successor is not State.LISTENING or state is State.ONLINE)
