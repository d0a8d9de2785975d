"""Connecting to a cluster, and what is refused."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from cellimg_dask.blocks.errors import NoWorkersError

__all__ = ["check_address", "connect", "is_local"]


def connect(backend: Any, *, timeout_s: float, insecure: bool) -> tuple[Any, bool]:
    """Return a client of a cluster, and whether it was made here.

    Parameters
    ----------
    backend : distributed.Client, Cluster or address
        What to connect to.
    timeout_s : float
        How long to try.
    insecure : bool
        Whether a scheduler on another host needs no TLS.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError(
            "a queue on a cluster needs distributed: pip install 'cellimg-dask[cluster]'"
        ) from error
    if isinstance(backend, Client):
        if backend.asynchronous:
            raise TypeError("the client is asynchronous; give one made with asynchronous=False")
        if backend.status != "running":
            raise ValueError(f"the client is {backend.status}; give one that is running")
        check_address(backend.scheduler.address, insecure=insecure)
        return backend, False
    address = backend if isinstance(backend, str) else getattr(backend, "scheduler_address", None)
    if not isinstance(address, str):
        raise TypeError(
            f'backend must be "threads", "processes", a distributed.Client, a cluster or the '
            f"address of a scheduler, got {type(backend).__name__}"
        )
    check_address(address, insecure=insecure)
    try:
        return Client(backend, set_as_default=False, timeout=timeout_s), True
    except OSError as error:
        raise NoWorkersError(f"no scheduler answers at {address}: {error}") from error


def check_address(address: str, *, insecure: bool) -> None:
    """Refuse a scheduler on another host that has no TLS.

    Raises
    ------
    PermissionError
        Unless ``insecure`` is true.
    """
    if insecure or is_local(address) or urlsplit(address).scheme in ("tls", "wss"):
        return
    raise PermissionError(
        f"the scheduler at {address} is open to the network without TLS: whoever reaches it can "
        f"run any code there, and here. Give it TLS (distributed.Security, or "
        f"Security.temporary() for a new cluster), let it listen on 127.0.0.1, or, in a network "
        f"that you trust, say BlockQueue(…, insecure=True)"
    )


def is_local(address: str) -> bool:
    """Whether only this machine can reach an address."""
    parts = urlsplit(address)
    if parts.scheme in ("inproc", "unix"):
        return True
    host = parts.hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
