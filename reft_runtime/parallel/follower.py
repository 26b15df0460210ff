"""Every rank but the first: does what rank 0's runner does, and ends when rank 0 ends."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Collection, Iterable
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from reft_runtime.base.demo import locate
from reft_runtime.engine.device import tables_for
from reft_runtime.engine.runner import Runner
from reft_runtime.engine.sizing import config_for
from reft_runtime.errors import ReftError
from reft_runtime.kv.choice import storage_for
from reft_runtime.loading.loader import load_model
from reft_runtime.machine.cores import use_threads
from reft_runtime.machine.memory import keep_freed_memory
from reft_runtime.parallel import group
from reft_runtime.parallel.channel import address, connect, receive, send
from reft_runtime.parallel.messages import Keep, Message, Release, Setup, Step
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy
from reft_runtime.schedule.request import AppliedIntervention, Request
from reft_runtime.schedule.sequence import Sequence, Status

_log = logging.getLogger(__name__)


def follow(host: str, port: int, key: bytes, rank: int) -> None:
    """Be a rank of the model that rank 0, which listens at `host` and `port`, serves.

    It ends the process: with status 0 when rank 0 has closed the connection, else with 1, after
    rank 0 was told why.
    """
    connection = connect(host, port, key, rank)
    messages: SimpleQueue[Message] = SimpleQueue()
    # The main thread may never come back from a collective whose other ranks are gone.
    threading.Thread(
        target=_listen, args=(connection, messages), name="reft-leader", daemon=True
    ).start()
    try:
        _serve(rank, address(connection), messages)
    except BaseException as error:
        if isinstance(error, ReftError):
            fault = f"cannot serve: {error.message}"
        else:
            _log.error("Rank %d failed", rank, exc_info=error)
            fault = f"failed: {type(error).__name__}: {error}"[:500]
        send([connection], fault)
        _end(1)


def _listen(connection: Connection, messages: SimpleQueue[Message]) -> None:
    try:
        while True:
            messages.put(receive(connection))
    except (EOFError, OSError):
        _end(0)


def _end(status: int) -> None:
    """End the process without taking down what may wait for ranks that are gone."""
    sys.stderr.flush()
    os._exit(status)


def _serve(rank: int, own: str, messages: SimpleQueue[Message]) -> None:
    setup = messages.get()
    assert isinstance(setup, Setup)
    use_threads(setup.threads)
    number = setup.devices[rank]
    os.environ["LOCAL_RANK"] = str(number)  # the device that transformers takes
    device = torch.device("cuda", number) if setup.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    host, port = setup.store
    group.join(group.find_store(host, port, setup.ranks), own, rank, setup.ranks, device)
    path, _ = locate(setup.model)
    loaded = load_model(
        path, setup.dtype, setup.limits.max_model_len, device=str(device), ranks=setup.ranks
    )
    keep_freed_memory()
    config = config_for(loaded, setup.limits)
    places = ToldPlaces() if config.prefix_cache else None
    storage = storage_for(loaded, BlockBudget(config.kv_tokens), config.max_running, places)
    mirror = Mirror(Runner(loaded, storage, tables_for(loaded, config.max_running)), places)
    while True:
        mirror.do(messages.get())


class ToldPlaces:
    """What rank 0 has read of its prefix cache; see `Places`."""

    def __init__(self) -> None:
        self.freed: frozenset[int] = frozenset()
        self.places: tuple[int, ...] = ()

    def take_freed(self) -> Collection[int]:
        """See `Places.take_freed`."""
        return self.freed

    def vacant(self) -> Iterable[int]:
        """See `Places.vacant`."""
        return self.places


class Mirror:
    """Does with its runner what rank 0 does with its own.

    `places` are those that the runner's storage asks, None if nothing is kept.
    """

    def __init__(self, runner: Runner, places: ToldPlaces | None) -> None:
        self._runner = runner
        self._places = places
        self._sequences: dict[int, Sequence] = {}
        self._versions: dict[int, AppliedIntervention] = {}

    @torch.inference_mode()
    def do(self, message: Message) -> None:
        """Do what a message says."""
        match message:
            case Step():
                self._step(message)
            case Keep():
                for number in message.left:
                    self._sequences[number].status = Status.FINISHED
                self._runner.keep(
                    [
                        BlockCopy(self._sequences[number], block, place)
                        for number, block, place in message.copies
                    ],
                    [],
                )
            case Release():
                self._runner.release([self._sequences.pop(number) for number in message.sequences])

    def _step(self, step: Step) -> None:
        for number in step.dropped:
            del self._versions[number]
        self._versions |= step.versions
        for new in step.sequences:
            applied = tuple(
                replace(self._versions[number], strength=strength) for number, strength in new.uses
            )
            name = str(new.number)
            request = Request(name, new.prompt, SamplingParams(), seed=0, interventions=applied)
            sequence = Sequence(request, 0, new.number, list(new.prompt))
            sequence.status = Status.RUNNING
            self._sequences[new.number] = sequence
        for number, tokens in step.tokens.items():
            self._sequences[number].tokens.extend(tokens)
        for number, computed in step.computed.items():
            self._sequences[number].computed = computed
        if self._places is not None:
            self._places.freed, self._places.places = step.freed, step.vacant
        chunks = []
        for told in step.chunks:
            sequence = self._sequences[told.sequence]
            reused = [BlockCopy(sequence, block, place) for block, place in told.reused]
            forks = [self._sequences[number] for number in told.forks]
            chunks.append(Chunk(sequence, told.start, told.length, reused, forks))
        chunks = self._runner.storage.prepare(chunks)
        self._runner.compute(chunks, step.rows)
        self._runner.fork(chunks)
