"""One file of each format, and a server of files."""

from __future__ import annotations

import functools
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
from image_files import write_everything

SHAPE = (6, 40, 50)


@pytest.fixture(scope="session")
def volume():
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    return (2000 * z + 50 * y + x).astype(np.uint16)


@pytest.fixture(scope="session")
def _written(tmp_path_factory, volume):
    folder = tmp_path_factory.mktemp("formats")
    write_everything(folder, volume)
    return folder


@pytest.fixture
def files(_written):
    """One file of each kind, by name; the same for all tests, which must not change them."""
    return {path.name: path for path in sorted(_written.iterdir())}


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # Many connect at once; who is not let in tries again after a second.


@pytest.fixture
def http_server():
    """Serve folders: ``http_server(folder)`` gives the URL, and a list of what was asked for."""
    servers = []

    def serve(folder, *, has_ranges=True, status=404):
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Head and body in one packet, as the second waits for the first otherwise.
            wbufsize = 1 << 16

            def log_message(self, *arguments):
                asked.append(self.requestline)

            def send_head(self):
                path = Path(self.translate_path(self.path))
                if path.is_dir():
                    self.send_error(404)
                    return None
                if status != 404:
                    self.send_error(status)
                    return None
                wanted = self.headers.get("Range")
                if not has_ranges or wanted is None or not path.is_file():
                    return super().send_head()
                return self.send_part(path, wanted)

            def send_part(self, path, wanted):
                size = path.stat().st_size
                low, high = wanted.removeprefix("bytes=").split("-")
                if not low:
                    low, high = size - int(high), size
                low, high = int(low), min(int(high or size), size - 1)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {low}-{high}/{size}")
                self.send_header("Content-Length", str(high - low + 1))
                self.end_headers()
                with path.open("rb") as file:
                    file.seek(low)
                    self.wfile.write(file.read(high - low + 1))

            def end_headers(self):
                if has_ranges:
                    self.send_header("Accept-Ranges", "bytes")
                super().end_headers()

        server = _Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}", asked

    yield serve
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()
