"""The process group in which the ranks' forward passes add up what each computes."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch
from torch import distributed

TIMEOUT = timedelta(hours=1)
"""A rank waits this long for another one that lives: loading may take ranks different times."""

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


Store = Any
"""A `torch.distributed.TCPStore`, which torch's types do not name."""

_store: Any = distributed.TCPStore  # type: ignore[attr-defined]


def offer_store(host: str, size: int) -> tuple[Store, int]:
    """The store at which `size` ranks meet, which rank 0 keeps, and its port, of `host` alone."""
    listener = socket.create_server((host, 0))
    port: int = listener.getsockname()[1]
    store = _store(
        host,
        port,
        size,
        is_master=True,
        wait_for_workers=False,
        timeout=TIMEOUT,
        master_listen_fd=listener.detach(),
    )
    return store, port


def find_store(host: str, port: int, size: int) -> Store:
    """The store that rank 0 offers, for another rank."""
    return _store(host, port, size, is_master=False, timeout=TIMEOUT)


def join(store: Store, host: str, rank: int, size: int, device: torch.device) -> None:
    """Join the process group of `size` ranks, over the network of this machine's address `host`.

    Returns when all have joined. Gloo adds up on a CPU, NCCL on CUDA devices.
    """
    interface = _interface(host)
    for variable in _INTERFACES if interface else ():
        os.environ.setdefault(variable, interface)
    cuda = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if cuda else None,
    )


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _interface(host: str) -> str:
    """The network interface that has the address `host`, empty if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return str(name)
    return ""
