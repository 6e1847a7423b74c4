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
from urllib.parse import parse_qs, urlsplit

ADDRESS = "127.0.0.1"
MOST_BYTES = 10_000  # of a request
MOST_PICTURE_BYTES = 30_000_000
MOST_LATENTS = 64  # that are set at a time

# (SAE, image, {latent: strength}) -> [[class, probability], ...]
Steer = Callable[[str, int, dict[int, float]], list[tuple[int, float]]]
# (SAE, content of an image file) -> what the page of an image shows, `write.image_content`
Explain = Callable[[str, bytes], dict[str, Any]]


class PageServer(ThreadingHTTPServer):
    """Serves a page's folder, and answers POST /steer and POST /explain?sae=NAME.

    Args:
        folder: a page.
        steer: predictions for an image of the page; ValueError where there are none. Called by one
            request at a time.
        explain: what an SAE sees in a picture of one's own; ValueError for what is none; None:
            pictures are not taken.
        port: 0: any free one.
    """

    daemon_threads = True

    def __init__(
        self, folder: Path, steer: Steer, explain: Explain | None = None, port: int = 0
    ) -> None:
        super().__init__((ADDRESS, port), partial(_Handler, directory=str(folder)))
        self.folder = folder
        self.steer = steer
        self.explain = explain
        self.lock = Lock()
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}
        self.url = f"http://{ADDRESS}:{self.server_port}/"


class _Handler(SimpleHTTPRequestHandler):
    server: PageServer

    def parse_request(self) -> bool:
        """Refuse requests of other pages (by their origin), or under a name that was only lately
        pointed to this address."""
        if not super().parse_request():
            return False
        origin = self.headers.get("Origin")
        here = self.headers.get("Host") in self.server.hosts
        if here and (origin is None or origin.removeprefix("http://") in self.server.hosts):
            return True
        self._json(HTTPStatus.FORBIDDEN, {"error": "this server answers its own page only"})
        return False

    def do_GET(self) -> None:
        if self.path.partition("?")[0] in ("/", "/index.html"):
            live = "explain" if self.server.explain else "steer"
            page = (self.server.folder / "index.html").read_text()
            page = page.replace('<html lang="en"', f'<html lang="en" data-live="{live}"', 1)
            self._answer(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        asked = urlsplit(self.path)
        try:
            if asked.path == "/steer":
                said: Any = {"clip": self._steer()}
            elif asked.path == "/explain" and self.server.explain is not None:
                name = parse_qs(asked.query).get("sae", [""])[0]
                picture = self._body(MOST_PICTURE_BYTES)
                with self.server.lock:
                    said = self.server.explain(name, picture)
            else:
                self._json(HTTPStatus.NOT_FOUND, {"error": f"{asked.path} is not answered here"})
                return
        except ValueError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
            return
        self._json(HTTPStatus.OK, said)

    def _steer(self) -> list[tuple[int, float]]:
        content: Any = json.loads(self._body(MOST_BYTES))
        try:
            name, image = str(content["sae"]), int(content["image"])
            strengths = {int(m): float(s) for m, s in content["strengths"].items()}
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(
                'expected {"sae": "topk", "image": 5, "strengths": {"12": 0.5}}'
            ) from error
        if len(strengths) > MOST_LATENTS or not all(map(math.isfinite, strengths.values())):
            raise ValueError(f"strengths: expected up to {MOST_LATENTS}, each a finite number")
        with self.server.lock:
            return self.server.steer(name, image, strengths)

    def _body(self, most: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > most:
            raise ValueError(f"a request of {length or 'unknown'} bytes: expected up to {most}")
        return self.rfile.read(int(length))

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
        """No lines in the terminal, which shows the page's address."""
