"""An HTTP server of files: slow, narrow or broken where a test wants it, and it keeps a log."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 1 << 14


@dataclass(frozen=True)
class Request:
    """What was asked for, and when: bytes [begin, end) of a file, all of it where `end` is None."""

    file: str
    begin: int
    end: int | None
    when: float


@dataclass
class Server:
    """Files of a folder under `url`.

    latency: seconds before each answer. rate: bytes a second, over all connections; 0: no limit.
    ranges: whether it knows of them. errors, cuts: for a file, how often it fails: with status 500,
    or in the middle of an answer. stalls: seconds before each answer, for a file. requests: all
    that came; sent: bytes that left, the last of them at `last`.
    """

    folder: Path
    latency: float = 0.0
    rate: float = 0.0
    ranges: bool = True
    errors: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    stalls: dict[str, float] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    sent: int = 0
    last: float = 0.0
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free: float = 0.0

    def asked(self, suffix: str) -> list[Request]:
        """Return the requests for files whose names end so."""
        return [request for request in self.requests if request.file.endswith(suffix)]

    def due(self, faults: dict[str, int], file: str) -> bool:
        """Tell whether a file is to fail once more, and count it."""
        with self._lock:
            left = faults.get(file, 0)
            faults[file] = left - 1
            return left > 0

    def pace(self, count: int) -> None:
        """Wait until so many bytes may be sent."""
        with self._lock:
            now = time.monotonic()
            self._free = max(self._free, now) + (count / self.rate if self.rate else 0.0)
            self.sent, self.last, pause = self.sent + count, self._free, self._free - now
        time.sleep(pause)


@contextmanager
def serve(folder: Path, **options: float) -> Iterator[Server]:
    """Serve a folder from threads of this process."""
    server = Server(folder, **options)  # type: ignore[arg-type]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            answer(self, server)

    class Quiet(ThreadingHTTPServer):
        request_queue_size = 256

        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing when a client goes away."""

    with Quiet(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


def answer(handler: BaseHTTPRequestHandler, server: Server) -> None:
    """Answer one request as the server is told to."""
    file = handler.path.lstrip("/")
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    begin, end = (int(asked[1]), int(asked[2]) + 1) if asked and server.ranges else (0, None)
    server.requests.append(Request(file, begin, end, time.monotonic()))
    time.sleep(server.latency + server.stalls.get(file, 0.0))
    path = server.folder / file
    if server.due(server.errors, file):
        handler.send_error(500)
        return
    if not path.is_file():
        handler.send_error(404)
        return
    with path.open("rb") as data:
        data.seek(begin)
        found = data.read() if end is None else data.read(end - begin)
    handler.send_response(200 if end is None else 206)
    handler.send_header("Content-Length", str(len(found)))
    handler.end_headers()
    if server.due(server.cuts, file):
        found = found[: len(found) // 2]
        handler.close_connection = True
    for at in range(0, len(found), PIECE):
        piece = found[at : at + PIECE]
        server.pace(len(piece))
        handler.wfile.write(piece)
