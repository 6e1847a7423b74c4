"""The page with a small server behind it, which answers what a static page cannot: what CLIP says
when latents are switched off, or on.

For one's own machine: it listens on the loopback address alone, and answers only requests that
name it, so that no other page in the browser can use it.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

ADDRESS = "127.0.0.1"
MOST_BYTES = 10_000  # of a request
MOST_LATENTS = 64  # that are set at a time

# (image, {latent: strength}) -> [[class, probability], ...]
Steer = Callable[[int, dict[int, float]], list[tuple[int, float]]]


class PageServer(ThreadingHTTPServer):
    """Serves a page's folder, and answers POST /steer.

    Args:
        folder: what `write_page` wrote.
        steer: predictions for an image of the page; ValueError where it cannot. Called by one
            request at a time.
        port: 0: any free one.
    """

    daemon_threads = True

    def __init__(self, folder: Path, steer: Steer, port: int = 0) -> None:
        super().__init__((ADDRESS, port), partial(_Handler, directory=str(folder)))
        self.folder = folder
        self.steer = steer
        self.lock = Lock()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}/"

    @property
    def hosts(self) -> set[str]:
        """The names under which it may be asked."""
        return {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}


class _Handler(SimpleHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        if not self._asked_here():
            return
        if self.path.partition("?")[0] in ("/", "/index.html"):
            page = (self.server.folder / "index.html").read_text()
            page = page.replace('<html lang="en"', '<html lang="en" data-live="yes"', 1)
            self._answer(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8")
            return
        super().do_GET()

    def do_HEAD(self) -> None:
        if self._asked_here():
            super().do_HEAD()

    def do_POST(self) -> None:
        if not self._asked_here():
            return
        if self.path != "/steer":
            self._json(HTTPStatus.NOT_FOUND, {"error": "expected POST /steer"})
            return
        try:
            image, strengths = self._request()
            with self.server.lock:
                said = self.server.steer(image, strengths)
        except ValueError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
            return
        self._json(HTTPStatus.OK, {"clip": said})

    def _asked_here(self) -> bool:
        """Refuse what another page sent (its origin), or a name that only now leads here."""
        origin = self.headers.get("Origin")
        here = self.headers.get("Host") in self.server.hosts
        if here and (origin is None or origin.removeprefix("http://") in self.server.hosts):
            return True
        self._json(HTTPStatus.FORBIDDEN, {"error": "this server answers its own page only"})
        return False

    def _request(self) -> tuple[int, dict[int, float]]:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MOST_BYTES:
            raise ValueError(
                f"a request of {length or 'unknown'} bytes: expected up to {MOST_BYTES}"
            )
        content: Any = json.loads(self.rfile.read(int(length)))
        try:
            image = int(content["image"])
            strengths = {int(m): float(s) for m, s in content["strengths"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError('expected {"image": 5, "strengths": {"12": 0.5}}') from error
        if len(strengths) > MOST_LATENTS or not all(map(math.isfinite, strengths.values())):
            raise ValueError(f"strengths: expected up to {MOST_LATENTS}, each a finite number")
        return image, strengths

    def _json(self, status: HTTPStatus, content: Any) -> None:
        self._answer(status, json.dumps(content).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing: the terminal shows the page's address."""
