"""Rank 0's side: tells the other ranks what its runner does, and notices when one of them ends."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as SequenceOf
from multiprocessing.connection import Connection

from reft_runtime.errors import EngineDead
from reft_runtime.kv.choice import Places
from reft_runtime.parallel.channel import end, receive, send
from reft_runtime.parallel.messages import (
    Keep,
    Message,
    NewSequence,
    Release,
    Step,
    ToldChunk,
)
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy
from reft_runtime.schedule.request import AppliedIntervention
from reft_runtime.schedule.sequence import Sequence, Status

KEPT_BYTES = 256 << 20
"""Bytes of tensors of interventions that the other ranks keep although no request uses them."""

NOTICE_SECONDS = 3.0
"""A collective that fails because a rank has ended may be noticed this long before that end."""

_log = logging.getLogger(__name__)


class Leader:
    """The followers of this rank; see `Followers`. One thread at a time may call it.

    `connections` lead to the other ranks, by number. `why` says how a rank came to its end, as far
    as that is known. When one ends before `close`, `on_loss` is called once, on a thread of its
    own, with a line that says which.
    """

    def __init__(
        self,
        connections: dict[int, Connection],
        why: Callable[[int], str],
        on_loss: Callable[[str], None],
    ) -> None:
        self._connections = connections
        self._why = why
        self._on_loss = on_loss
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._noticed = threading.Event()
        self._closing = False
        self._numbers: dict[Sequence, int] = {}
        self._told: dict[Sequence, int] = {}  # number of tokens
        self._count = itertools.count()
        self._versions = _Versions()
        self._places: _Read | None = None
        for rank in connections:
            threading.Thread(
                target=self._watch, args=(rank,), name=f"reft-rank-{rank}", daemon=True
            ).start()

    def seen_by(self, places: Places) -> Places:
        """See `Followers.seen_by`."""
        self._places = _Read(places)
        return self._places

    def step(self, chunks: SequenceOf[Chunk], rows: SequenceOf[int]) -> None:
        """See `Followers.step`."""
        taking_part = [s for chunk in chunks for s in (chunk.sequence, *chunk.forks)]
        added = tuple(self._added(s) for s in taking_part if s not in self._numbers)
        tokens: dict[int, tuple[int, ...]] = {}
        for sequence in taking_part:
            if unknown := sequence.tokens[self._told[sequence] :]:
                tokens[self._numbers[sequence]] = tuple(unknown)
                self._told[sequence] = len(sequence.tokens)
        versions, dropped = self._versions.changes()
        freed, vacant = (frozenset[int](), ()) if self._places is None else self._places.taken()
        self._send(
            Step(
                added,
                versions,
                dropped,
                tokens,
                {self._numbers[sequence]: sequence.computed for sequence in taking_part},
                tuple(self._chunk(chunk) for chunk in chunks),
                tuple(rows),
                freed,
                vacant,
            )
        )

    def keep(self, copies: Iterable[BlockCopy]) -> None:
        """See `Followers.keep`."""
        copies = list(copies)
        left = {c.sequence for c in copies if c.sequence.status is not Status.RUNNING}
        self._send(
            Keep(
                tuple((self._numbers[c.sequence], c.block, c.place) for c in copies),
                frozenset(self._numbers[sequence] for sequence in left),
            )
        )

    def release(self, sequences: Iterable[Sequence]) -> None:
        """See `Followers.release`."""
        numbers = []
        for sequence in sequences:
            if sequence in self._numbers:
                numbers.append(self._numbers.pop(sequence))
                del self._told[sequence]
                self._versions.let_go(sequence.request.interventions)
        if numbers:
            self._send(Release(tuple(numbers)))

    def broken(self, error: Exception) -> EngineDead:
        """See `Followers.broken`."""
        lost = self.lost(NOTICE_SECONDS)
        if lost is None:
            _log.error("A step failed on rank 0", exc_info=error)
        return EngineDead(lost or f"a step failed on rank 0: {error}")

    def lost(self, seconds: float = 0.0) -> str | None:
        """Why a rank has ended, None if none has; waits up to `seconds` for such news."""
        self._noticed.wait(seconds)
        return self._lost

    def setup(self, message: Message) -> None:
        """Send what comes before all steps. Raises as `step`."""
        self._send(message)

    def close(self) -> None:
        """End the connections, at which the other ranks end; it may be called again."""
        self._closing = True
        for connection in self._connections.values():
            end(connection)

    def _send(self, message: Message) -> None:
        try:
            send(self._connections.values(), message)
        except OSError as error:
            lost = self.lost(NOTICE_SECONDS)
            raise EngineDead(lost or f"a rank cannot be reached: {error}") from error

    def _added(self, sequence: Sequence) -> NewSequence:
        number = self._numbers[sequence] = next(self._count)
        self._told[sequence] = sequence.prompt_length
        uses = self._versions.use(sequence.request.interventions)
        return NewSequence(number, sequence.request.prompt, uses)

    def _chunk(self, chunk: Chunk) -> ToldChunk:
        return ToldChunk(
            self._numbers[chunk.sequence],
            chunk.start,
            chunk.length,
            tuple((copy.block, copy.place) for copy in chunk.reused),
            tuple(self._numbers[fork] for fork in chunk.forks),
        )

    def _watch(self, rank: int) -> None:
        """Wait for a rank's fault, or for its end."""
        fault = ""
        try:
            while True:
                fault = receive(self._connections[rank])
        except (EOFError, OSError):
            pass
        with self._lock:
            if self._closing or self._lost is not None:
                return
            self._lost = f"Rank {rank} of --tensor-parallel {fault or self._why(rank)}"
        self._noticed.set()
        self._on_loss(self._lost)


class _Read:
    """A prefix cache's places, and what was read of them since the last step was sent."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._freed: set[int] = set()
        self._vacant: tuple[int, ...] = ()

    def take_freed(self) -> Collection[int]:
        """See `Places.take_freed`."""
        freed = self._places.take_freed()
        self._freed.update(freed)
        return freed

    def vacant(self) -> Iterable[int]:
        """See `Places.vacant`."""
        self._vacant = tuple(self._places.vacant())
        return self._vacant

    def taken(self) -> tuple[frozenset[int], tuple[int, ...]]:
        """Return what was read, the places freed and those vacant, and begin anew."""
        freed, vacant = frozenset(self._freed), self._vacant
        self._freed, self._vacant = set(), ()
        return freed, vacant


_Key = tuple[str, tuple[int, ...] | None]


class _Versions:
    """Which interventions the other ranks have, by digest and subspace: each is sent once.

    Beside those that sequences use, the last used ones stay, up to `KEPT_BYTES`.
    """

    def __init__(self) -> None:
        self._sent: OrderedDict[_Key, tuple[int, int]] = OrderedDict()  # number and bytes
        self._users: Counter[_Key] = Counter()
        self._bytes = 0
        self._new: dict[int, AppliedIntervention] = {}
        self._count = itertools.count()

    def use(self, applied: Iterable[AppliedIntervention]) -> tuple[tuple[int, float], ...]:
        """The numbers and strengths of what a sequence applies."""
        uses = []
        for one in applied:
            key = one.digest, one.subspace
            if key not in self._sent:
                size = sum(edit.nbytes for edit in one.edits)
                self._sent[key] = next(self._count), size
                self._bytes += size
                self._new[self._sent[key][0]] = one
            self._sent.move_to_end(key)
            self._users[key] += 1
            uses.append((self._sent[key][0], one.strength))
        return tuple(uses)

    def let_go(self, applied: Iterable[AppliedIntervention]) -> None:
        """Note that a sequence that applies these is gone."""
        self._users.subtract((one.digest, one.subspace) for one in applied)
        self._users = +self._users  # without those that nobody uses

    def changes(self) -> tuple[dict[int, AppliedIntervention], tuple[int, ...]]:
        """What is new since the last call, by number, and the numbers of what is needed no more."""
        new, self._new = self._new, {}
        dropped = []
        for key in [key for key in self._sent if key not in self._users]:
            if self._bytes <= KEPT_BYTES:
                break
            number, size = self._sent.pop(key)
            self._bytes -= size
            dropped.append(number)
        return new, tuple(dropped)
