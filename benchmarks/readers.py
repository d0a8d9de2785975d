"""Clients of a server: ``python -m benchmarks.readers PORT CLIENTS``.

Each line of the input is a list of paths for each client. Each line of the output says how long
each request took, how long all did, and what was read, as sums of bytes.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter


class Reader:
    """One client with its connection."""

    def __init__(self, port: int) -> None:
        self._stream = socket.create_connection(("127.0.0.1", port))
        self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = memoryview(bytearray(1 << 24))

    def ask(self, paths: list[str], start: threading.Barrier) -> tuple[list[float], list[int]]:
        """Ask for paths one after the other, as soon as all clients are ready."""
        requests = [f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode() for path in paths]
        seconds, sums = [], []
        start.wait()
        for request in requests:
            began = perf_counter()
            body = self._exchange(request)
            seconds.append(perf_counter() - began)
            sums.append(zlib.crc32(body))
        return seconds, sums

    def _exchange(self, request: bytes) -> memoryview:
        self._stream.sendall(request)
        have, end = 0, -1
        while end < 0:
            have += self._receive(have)
            end = bytes(self._buffer[: min(have, 4096)]).find(b"\r\n\r\n")
        head = bytes(self._buffer[:end])
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        whole = end + 4 + length
        while have < whole:
            have += self._receive(have)
        return self._buffer[end + 4 : whole]

    def _receive(self, have: int) -> int:
        count = self._stream.recv_into(self._buffer[have:])
        if not count:
            raise EOFError("the server has closed the connection")
        return count


def main(port: int, clients: int) -> None:
    """Ask as the lines of the input say."""
    readers = [Reader(port) for _ in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        for line in sys.stdin:
            start = threading.Barrier(clients + 1)
            asked = [
                pool.submit(reader.ask, share, start)
                for reader, share in zip(readers, json.loads(line), strict=True)
            ]
            start.wait()
            began = perf_counter()
            results = [each.result() for each in asked]
            whole = perf_counter() - began
            seconds = [second for found, _ in results for second in found]
            sums = [one for _, found in results for one in found]
            print(json.dumps({"seconds": seconds, "whole": whole, "sums": sums}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
