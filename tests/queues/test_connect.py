"""Connecting to a cluster: what is refused, and whose client it is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest

import cellimg_dask as ci
from cellimg_dask.queues.connect import check_address, connect, is_local

distributed = pytest.importorskip("distributed")

LOCAL = [
    "tcp://127.0.0.1:8786",
    "tcp://127.0.0.2:8786",
    "tcp://localhost:8786",
    "tcp://LOCALHOST:8786",
    "tcp://[::1]:8786",
    "ucx://127.0.0.1:13337",
    "ws://127.0.0.1:8786",
    "inproc://192.168.1.7/4711/1",
]
WITH_TLS = ["tls://10.0.0.1:8786", "tls://head.example.org:8786", "wss://head.example.org:8786"]
OPEN = [
    "tcp://10.0.0.1:8786",
    "tcp://192.168.1.7:8786",
    "tcp://0.0.0.0:8786",
    "tcp://[::]:8786",
    "tcp://[2001:db8::1]:8786",
    "tcp://head:8786",
    "tcp://head.example.org:8786",
    "tcp://localhost.example.org:8786",
    "tcp://127.0.0.1.example.org:8786",
    "tcp://127.0.0.1@10.0.0.1:8786",
    "ucx://10.0.0.1:13337",
    "ws://head.example.org:8786",
]


@pytest.mark.parametrize("address", LOCAL + WITH_TLS)
def test_what_only_this_machine_reaches_and_what_has_tls_is_accepted(address: str) -> None:
    check_address(address, insecure=False)
    assert is_local(address) == (address in LOCAL)


@pytest.mark.parametrize("address", OPEN)
def test_an_open_scheduler_on_another_host_is_refused(address: str) -> None:
    with pytest.raises(PermissionError, match=r"without TLS.*insecure=True") as got:
        check_address(address, insecure=False)
    assert address in str(got.value)
    assert not is_local(address)
    check_address(address, insecure=True)


@pytest.mark.parametrize("address", OPEN)
def test_a_queue_refuses_before_it_connects(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> Any:
        raise AssertionError("nothing may be sent there")

    monkeypatch.setattr(distributed.Client, "__init__", refused)
    with pytest.raises(PermissionError, match="insecure=True"):
        ci.BlockQueue(backend=address)
    # A cluster object has an address too.
    with pytest.raises(PermissionError, match="insecure=True"):
        ci.BlockQueue(backend=SimpleNamespace(scheduler_address=address))
    with pytest.raises(AssertionError, match="nothing may be sent there"):
        ci.BlockQueue(backend=address, insecure=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        dashboard_address=":0",
    ) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Any) -> Iterator[Any]:
    with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
        yield client


def test_a_client_of_an_open_scheduler_is_refused(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.scheduler, "addr", "tcp://10.0.0.1:8786")
    with pytest.raises(PermissionError, match=r"tcp://10\.0\.0\.1:8786"):
        ci.BlockQueue(backend=client)
    assert connect(client, timeout_s=1, insecure=True) == (client, False)


def test_a_closed_client_is_refused(cluster: Any) -> None:
    client = distributed.Client(cluster.scheduler_address, set_as_default=False)
    client.close()
    with pytest.raises(ValueError, match="the client is closed"):
        ci.BlockQueue(backend=client)


def test_an_asynchronous_client_is_refused(cluster: Any) -> None:
    async def try_it() -> None:
        async with distributed.Client(
            cluster.scheduler_address, asynchronous=True, set_as_default=False
        ) as client:
            with pytest.raises(TypeError, match="asynchronous"):
                ci.BlockQueue(backend=client)

    import asyncio

    asyncio.run(try_it())


@pytest.mark.parametrize("backend", [7, object(), np.zeros(2)])
def test_what_is_no_cluster_is_refused(backend: Any) -> None:
    with pytest.raises(TypeError, match="backend must be"):
        ci.BlockQueue(backend=backend)


@pytest.mark.parametrize("backend", ["127.0.0.1:8786", "thread", ""])
def test_a_name_that_is_no_address_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=r'an address such as "tcp://127\.0\.0\.1:8786"'):
        ci.BlockQueue(backend=backend)


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ci.NoWorkersError, match=f"no scheduler answers at {address}") as got:
            ci.BlockQueue(backend=address, timeout_s=0.5)
    assert isinstance(got.value, TimeoutError)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_timeout_must_be_positive(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        ci.BlockQueue(backend="tcp://127.0.0.1:1", timeout_s=timeout_s)


def squares(queue: ci.BlockQueue) -> Any:
    image = ci.map_cells(
        lambda a: a * a, np.arange(9), dtype=int, cell_shape=2, queue=queue, cache=None
    )
    return image[...]


@pytest.mark.parametrize("kind", ["cluster", "address"])
def test_a_queue_makes_a_client_of_its_own_that_ends_with_it(cluster: Any, kind: str) -> None:
    backend = cluster if kind == "cluster" else cluster.scheduler_address
    before = dask.config.get("scheduler", None)
    with ci.BlockQueue(backend=backend) as queue:
        own = queue.cells.client  # type: ignore[union-attr]
        # It is nobody's default: dask computes as it did.
        with pytest.raises(ValueError, match="No clients found"):
            distributed.default_client()
        assert dask.config.get("scheduler", None) == before
        np.testing.assert_array_equal(squares(queue), np.arange(9) ** 2)
        assert own.status == "running"
    assert own.status == "closed"
    queue.close()
    with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
        assert client.submit(sum, [1, 2]).result(30) == 3


def test_a_given_client_goes_on_after_the_queue(client: Any) -> None:
    with ci.BlockQueue(backend=client) as queue:
        assert queue.cells.client is client  # type: ignore[union-attr]
        np.testing.assert_array_equal(squares(queue), np.arange(9) ** 2)
    assert client.status == "running"
    assert client.submit(sum, [1, 2]).result(30) == 3


def test_a_client_of_its_own_is_closed_if_the_queue_cannot_be_made(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    init = distributed.Client.__init__

    def noted(self: Any, *args: Any, **options: Any) -> None:
        made.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(distributed.Client, "__init__", noted)
    with pytest.raises(ci.InitError, match="no licence"):
        ci.BlockQueue(1, "raise OSError('no licence')", cluster)
    with pytest.raises(ci.NoWorkersError, match="1 of 9 workers"):
        ci.BlockQueue(9, None, cluster, timeout_s=0.1)
    assert [client.status for client in made] == ["closed", "closed"]


def test_threads_of_this_process_are_a_cluster_too() -> None:
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=3, processes=False, dashboard_address=":0"
        ) as cluster,
        ci.BlockQueue(backend=cluster) as queue,
    ):
        assert queue.num_workers == 1
        np.testing.assert_array_equal(squares(queue), np.arange(9) ** 2)


def test_a_scheduler_with_tls_needs_no_permission() -> None:
    pytest.importorskip("cryptography")
    security = distributed.Security.temporary()
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            protocol="tls://",
            security=security,
            dashboard_address=":0",
        ) as cluster,
        ci.BlockQueue(backend=cluster) as queue,
    ):
        assert cluster.scheduler_address.startswith("tls://")
        np.testing.assert_array_equal(squares(queue), np.arange(9) ** 2)
