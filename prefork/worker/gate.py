"""The gate: workers that accept from one socket leave each connection to the one with the least to do.

Left to the kernel, the worker that slept last wakes first, which is the busiest. So
each worker says on the scoreboard how many connections it holds, and one that holds
more than the least loaded gives that one a moment before it takes the next.

Nobody is asked and nobody is locked out: the moment is bounded, so whatever the board
says, the worst it can cost is a few milliseconds. What is counted is connections, not
requests: a connection is placed once and stays, and whoever has work in hand does not
come to the gate, or comes late.

`decide` and `excess` are the decisions; `Gate` sees to it that they are asked when
their answers may have changed.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from enum import Enum, auto
from time import monotonic

from prefork.scoreboard import ACCEPTING, LOAD, Scoreboard, Slot

# A connection waits this long for the least loaded worker, in seconds; then whoever is there takes it. Long enough for a
# worker to finish a small request, and too short to be noticed.
LONGEST_WAIT = 0.003

# Between two looks at the board, in seconds: the resolution of uvloop's timers.
LOOK = 0.001

# A new connection's first request is worth waiting for, since it may occupy the worker: this long, in seconds, so that a
# client that sends nothing stops nobody.
EXPECTATION = 0.002

# A turn of the loop that has run this long has held up others already, in seconds. What it has read is done first.
LONG_TURN = 0.002

# Turns of the loop that look on before the socket is taken out of the loop, which costs two system calls. Mostly the
# next turn brings the first request, or a sibling has taken the connection.
GLANCES = 3

# A worker takes connections as long as it holds no more than this part above the least: of few connections none, and of
# hundreds not every one is worth a wait.
TOLERANCE = 1 / 16

# Who lets turn after turn pass and does nothing else for so long, in seconds, is stopped, or has work in hand that takes
# long. On a machine with too much to do a process may well get no processor for a few milliseconds: that is no reason.
SILENCE = 0.02

# A worker whose heart has not beaten for so long does not count, in seconds: five beats.
STALE = 0.5

# Kept-alive connections are closed only by who holds this much more than the mean, and this many: below it, the next
# connections bring the balance about, and closing costs the client a new connection.
TOO_MUCH = 1.25
TOO_MANY = 2

# Of what is too much this part is closed with a beat of the heart, which is level in a second or two. Clients come
# back at once, and all at a time would be a burst.
SHED = 0.1


class Verdict(Enum):
    TAKE = auto()
    WAIT = auto()  # and look again soon
    FULL = auto()  # wait until something has ended, however long


def decide(load: int, least: int, is_full: bool, is_expecting: bool, turn: float, waited: float) -> Verdict:
    """What to do with a connection that waits to be accepted.

    *load* is what we hold and *least* the least that anybody holds who accepts, *is_full* whether
    another request would have to wait for a thread, *is_expecting* whether the connection accepted
    last has not sent its first request, *turn* for how many seconds this turn of the loop has run
    and *waited* for how many the connection has waited for us.
    """
    if is_full:
        return Verdict.FULL
    if waited >= LONGEST_WAIT:
        return Verdict.TAKE
    if is_expecting or turn > LONG_TURN or (load > least and load > least + int(least * TOLERANCE)):
        return Verdict.WAIT
    return Verdict.TAKE


def excess(load: int, loads: Sequence[int]) -> int:
    """How many connections a worker that holds *load* has to give up, *loads* being those of all that accept, its own too."""
    mean = sum(loads) / len(loads) if loads else load
    return math.floor(load - mean) if load > mean * TOO_MUCH and load - mean >= TOO_MANY else 0


Said = tuple[int, float]  # the load and the beat of a slot


class State(Enum):
    OPEN = auto()  # the loop watches the sockets
    WAITING = auto()  # it does not; a timer is set
    FULL = auto()  # it does not, until there is room
    CLOSED = auto()


class Gate:
    """Says when a worker accepts. One per worker, for all its sockets."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        board: Scoreboard,
        slot: Slot,
        *,
        workers: int,
        is_full: Callable[[], bool] | None = None,
        set_shedding: Callable[[bool], object] = lambda _: None,
    ) -> None:
        """*workers*: how many there are at first. *is_full*: of threads, None without; whoever ends that calls `on_room`.

        *set_shedding* is told whether `sheds` is worth asking.
        """
        self._loop = loop
        self._board = board
        self._slot = slot
        self._words = slot.whole
        self._is_full = is_full
        self._is_plain = is_full is None  # and nobody is silent
        self.is_waiting = False
        self._set_shedding = set_shedding
        self._takes: dict[int, Callable[[], bool]] = {}  # by descriptor
        self._state = State.OPEN
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0  # when the connection in front was first left to others, on the loop's clock; 0: it was not
        self._glances = 0  # turns in a row that have left it to them
        self._glanced_at = 0.0
        self._expected_until = 0.0  # on the loop's clock
        self._to_shed = 0
        self._loads = board.loads[: max(workers, slot.index + 1)]  # of the slots in use
        # Those that did not move when it was their turn, with what their slots said, and when that was first seen.
        self._suspects: dict[int, tuple[Said, float]] = {}
        self._silent: dict[int, Said] = {}  # they do not count until that changes
        slot.load -= ACCEPTING

    # ---- what the server says ----

    def watch(self, descriptor: int, take: Callable[[], bool]) -> None:
        """Have *take* accept one connection when *descriptor* has one for us; it returns whether there was any."""
        self._takes[descriptor] = take
        if self._state is State.OPEN:
            self._loop.add_reader(descriptor, self._on_readable, take)

    def unwatch(self, descriptor: int) -> None:
        if self._takes.pop(descriptor, None) is not None and self._state is State.OPEN:
            self._loop.remove_reader(descriptor)

    def close(self) -> None:
        """Accept nothing more. Siblings do not wait for us from here on."""
        if self._state is State.CLOSED:
            return
        for descriptor in list(self._takes):
            self.unwatch(descriptor)
        self._leave_open(State.CLOSED)
        self._to_shed = 0
        if self._slot.load < 0:
            self._slot.load += ACCEPTING
        self._loads.release()

    def on_first_request(self) -> None:
        """A connection's first request has been read, and will have been begun when the loop next looks at its sockets."""
        self._expected_until = 0.0
        if self.is_waiting:
            self._open()

    def on_left(self) -> None:
        """A connection has ended. Needs to be called only while `is_waiting`."""
        if self.is_waiting and self._words[LOAD] <= min(self._loads):
            self._open()

    def on_room(self) -> None:
        """A thread may have become free."""
        if self._state is State.FULL and self._is_full is not None and not self._is_full():
            self._slot.load -= ACCEPTING
            self._open()

    # ---- accepting ----

    def _on_readable(self, take: Callable[[], bool]) -> None:
        now = self._loop.time()
        if self._glances and now - self._glanced_at > LOOK:
            self._glances, self._since = 0, 0.0  # a sibling took that one, and this is another
        if now < self._expected_until and self._glances < GLANCES:
            self._glances += 1  # what `decide` would say, without a look at the board
            self._glanced_at = now
            return
        if (
            self._is_plain
            and not self._since
            and monotonic() - now < LONG_TURN
            and self._words[LOAD] <= min(self._loads)
        ):
            # Again what `decide` would say, and nearly always does: asking costs a twentieth of a short connection.
            self._glances = 0
            if take():
                self._expected_until = now + EXPECTATION
            return
        verdict = self._look(now)
        if verdict is Verdict.TAKE:
            self._take(take, now)
        elif verdict is Verdict.FULL:
            self._shut_full()
        else:
            self._since = self._since or now
            self._glances += 1
            self._glanced_at = now
            if self._glances > GLANCES:
                self._leave_open(State.WAITING)
                self._timer = self._loop.call_later(LOOK, self._look_again)

    def _look(self, now: float) -> Verdict:
        return decide(
            self._words[LOAD] + ACCEPTING,
            (self._least() if self._silent else min(self._loads)) + ACCEPTING,
            self._is_full is not None and self._is_full(),
            now < self._expected_until,
            monotonic() - now,
            now - self._since if self._since else 0.0,
        )

    def _look_again(self) -> None:
        self._timer = None
        now = self._loop.time()
        match self._look(now):
            case Verdict.WAIT:
                self._timer = self._loop.call_later(LOOK, self._look_again)
            case Verdict.FULL:
                self._shut_full()
            case Verdict.TAKE:
                has_waited = now - self._since >= LONGEST_WAIT
                if any(self._take(take, now) for take in tuple(self._takes.values())) and has_waited:
                    self._note_silent()
                if self.is_waiting:
                    self._open()

    def _take(self, take: Callable[[], bool], now: float) -> bool:
        self._since = 0.0
        self._glances = 0
        taken = take()
        if taken:
            self._expected_until = now + EXPECTATION
        return taken

    def _open(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._state = State.OPEN
        self.is_waiting = False
        self._since = 0.0
        self._glances = 0
        for descriptor, take in self._takes.items():
            self._loop.add_reader(descriptor, self._on_readable, take)

    def _leave_open(self, state: State) -> None:
        if self._state is State.OPEN:
            for descriptor in self._takes:
                self._loop.remove_reader(descriptor)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._state = state
        self.is_waiting = state is State.WAITING

    def _shut_full(self) -> None:
        """Nobody shall wait for us."""
        self._leave_open(State.FULL)
        self._slot.load += ACCEPTING

    # ---- the others ----

    def _least(self) -> int:
        words = self._loads.tolist()
        for index, said in list(self._silent.items()):
            if said == (words[index], self._board[index].beat):
                words[index] = 0
            else:
                del self._silent[index]
        self._is_plain = not self._silent and self._is_full is None
        return min(words)

    def _note_silent(self) -> None:
        """Those with less than we had did not come in all the time that we waited."""
        now, ours = self._loop.time(), self._slot.load - 1
        for index, word in enumerate(self._loads):
            if word < ours:
                said = (word, self._board[index].beat)
                before, since = self._suspects.get(index, (None, now))
                if before != said:
                    self._suspects[index] = (said, now)
                elif now - since >= SILENCE:
                    self._silent[index] = said
                    self._is_plain = False

    def survey(self, now: float) -> None:
        """With each beat of the heart: who is there, who is silent, and whether we hold too much."""
        if self._state is State.CLOSED:
            return
        words = self._board.loads.tolist()
        used = max((index for index, word in enumerate(words) if word), default=0) + 1
        if used > len(self._loads):
            self._loads.release()
            self._loads = self._board.loads[:used]
        for index, word in enumerate(words[:used]):
            if word < 0 and now - self._board[index].beat > STALE:
                self._silent[index] = (word, self._board[index].beat)
        self._least()
        loads = [word + ACCEPTING for i, word in enumerate(words[:used]) if word < 0 and i not in self._silent]
        too_many = excess(self._slot.load % ACCEPTING, loads)
        # A chance, so that siblings that see the same do not all do the same.
        self._to_shed = math.ceil(too_many * SHED * 2 * random.random()) if too_many else 0
        self._set_shedding(self._to_shed > 0)

    def sheds(self) -> bool:
        """Whether a connection that could be kept is closed with this answer."""
        if self._to_shed <= 0:
            return False
        self._to_shed -= 1
        if not self._to_shed:
            self._set_shedding(False)
        return True
