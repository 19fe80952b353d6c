"""A server for a demo's folder on this machine alone: static files, standard library only."""

from __future__ import annotations

import contextlib
import http.server
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from erde.common.errors import UserError

HOST = "127.0.0.1"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".json": "application/json",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
}
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    # Isolated from other pages, a page gets a clock of microseconds.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",
}


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = TYPES

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        # A page of another name that leads to this machine is none of ours.
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self.send_error(403)
            return False
        return True

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve_folder(folder: Path, port: int, when_ready: Callable[[str], None]) -> None:
    """Serve ``folder`` on 127.0.0.1 until interrupted; ``when_ready`` gets the address. Port 0 is a free one."""
    try:
        server = http.server.ThreadingHTTPServer((HOST, port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise UserError(
            f"port {port} of {HOST} cannot be used ({error.strerror}): choose another --port, or 0 for a free one"
        ) from error
    with server, contextlib.suppress(KeyboardInterrupt):
        when_ready(f"http://{HOST}:{server.server_address[1]}/")
        server.serve_forever()
