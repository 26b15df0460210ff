"""Starts the ranks of a model, of which this process is the first, and ends them."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from torch import distributed
from transformers import PreTrainedModel

from reft_runtime.base.demo import locate
from reft_runtime.base.pretrained import read_config
from reft_runtime.base.stages import stage
from reft_runtime.engine.sizing import Limits
from reft_runtime.loading.loader import choose_dtype
from reft_runtime.machine.dtypes import name_of
from reft_runtime.parallel import group
from reft_runtime.parallel.channel import accept, listener
from reft_runtime.parallel.launch import Launcher, Rank, ThisMachine
from reft_runtime.parallel.leader import NOTICE_SECONDS, Leader
from reft_runtime.parallel.messages import Setup
from reft_runtime.parallel.refusals import check_devices, check_shards, refused

CONNECT_SECONDS = 120.0
"""A process that becomes a rank has imported what it needs after this time."""

START_SECONDS = 30.0
"""A start that fails because a rank has ended says so in this time, or the process ends."""

_log = logging.getLogger(__name__)


class Ranks:
    """The other ranks of a model, which load their shards from here on, as this one must.

    `model` is "demo", a hub id or a folder; the other arguments are those of `Engine`. Raises
    `ConfigError` for a model or devices that do not go with `ranks`, before anything is loaded, and
    if a rank does not come up. `launcher` says where they run, by default on this machine.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        ranks: int,
        limits: Limits,
        *,
        device: str,
        dtype: str,
        launcher: Launcher | None = None,
    ) -> None:
        if isinstance(model, PreTrainedModel):
            raise refused("give the model's folder or hub id: an object is in one process")
        if distributed.is_initialized():
            raise refused("this process is in a process group already; it can have only one")
        launcher = launcher or ThisMachine()
        check_devices(device, 1 + max(map(launcher.device, range(ranks))))
        check_shards(read_config(locate(str(model))[0]), ranks)
        own, here = torch.device(device, launcher.device(0)), launcher.host
        self._on_loss: Callable[[str], None] | None = None
        self._served = threading.Event()
        self._ranks: dict[int, Rank] = {}
        key = secrets.token_bytes(32)
        with listener(here, key, ranks) as place:
            _, port = place.address
            for rank in range(1, ranks):
                self._ranks[rank] = launcher.launch(rank, here, port, key)
            with stage("Starting the ranks"):
                connections = self._connections(place)
        store, port = group.offer_store(here, ranks)
        self.leader = Leader(connections, self._why, self._lost)
        setup = Setup(
            store=(here, port),
            ranks=ranks,
            model=str(model),
            device=device,
            devices=tuple(map(launcher.device, range(ranks))),
            dtype=name_of(choose_dtype(dtype, own)),
            limits=limits,
            threads=torch.get_num_threads(),
        )
        try:
            with self.starting():
                self.leader.setup(setup)
                group.join(store, here, 0, ranks, own)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def starting(self) -> Iterator[None]:
        """A part of the start: if it fails because another rank did, say what that one says."""
        try:
            yield
        except Exception as error:
            lost = self.leader.lost(NOTICE_SECONDS)
            if lost is None or str(error) in lost:  # all ranks refuse it with the same words
                raise
            raise refused(lost) from error

    def serve(self, on_loss: Callable[[str], None]) -> None:
        """End the start: from now on `on_loss` is told, on another thread, if a rank ends."""
        self._on_loss = on_loss
        self._served.set()

    def close(self) -> None:
        """End the other ranks; no step may follow. It may be called again."""
        self._served.set()
        lost = self.leader.lost()
        self.leader.close()
        for rank in self._ranks.values():
            rank.end()
        if lost is None:  # else what waits for that rank could keep this one
            group.leave()

    def _connections(self, place: Listener) -> dict[int, Connection]:
        """Wait until every process has connected."""
        arrived: SimpleQueue[tuple[int, Connection]] = SimpleQueue()

        def wait() -> None:
            while True:
                try:
                    arrived.put(accept(place))
                except (AuthenticationError, EOFError):  # it was none of the ranks
                    continue
                except OSError:  # nothing listens any more
                    return

        threading.Thread(target=wait, name="reft-ranks", daemon=True).start()
        found: dict[int, Connection] = {}
        waited = 0.0
        while len(found) < len(self._ranks):
            try:
                rank, connection = arrived.get(timeout=0.5)
                found[rank] = connection
            except Empty:
                waited += 0.5
                ends = [(number, rank.how_ended()) for number, rank in self._ranks.items()]
                ended = [f"rank {number} {how}" for number, how in ends if how is not None]
                if ended or waited > CONNECT_SECONDS:
                    for each in self._ranks.values():
                        each.kill()
                    why = ended[0] if ended else "the other ranks do not come up"
                    raise refused(why) from None
        return found

    def _why(self, rank: int) -> str:
        return self._ranks[rank].how_ended(NOTICE_SECONDS) or "closed its connection"

    def _lost(self, line: str) -> None:
        """Say which rank has ended, and see to it that nobody waits for it."""
        if not self._served.wait(START_SECONDS):
            _log.critical("%s", line)
            os._exit(1)  # the start waits for that rank in a collective, and nothing ends that
        if self._on_loss is not None:
            _log.critical("%s", line)
            self._on_loss(line)
