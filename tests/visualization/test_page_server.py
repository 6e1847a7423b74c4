"""The server behind the page: it answers what a static page cannot, and its own page alone."""

import http.client
import json
import threading
from collections.abc import Iterator

import pytest

from clipsae.visualization.page.serve import ADDRESS, PageServer

ASKED = {"sae": "topk", "image": 3, "strengths": {}}


@pytest.fixture
def server(tmp_path) -> Iterator[PageServer]:
    (tmp_path / "index.html").write_text('<!doctype html>\n<html lang="en">\n</html>')
    (tmp_path / "app.js").write_text("1")
    (tmp_path.parent / "secret.txt").write_text("not for the page")

    def steer(name: str, image: int, strengths: dict[int, float]) -> list[tuple[int, float]]:
        if image > 9:
            raise ValueError("no such image")
        return list(strengths.items())

    def explain(name: str, picture: bytes) -> dict:
        if picture == b"no picture":
            raise ValueError("not an image file")
        return {"sae": name, "bytes": len(picture)}

    with PageServer(tmp_path, steer, explain) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: PageServer, method: str, path: str, body: object = None, **headers: str):
    connection = http.client.HTTPConnection(ADDRESS, server.server_port, timeout=10)
    content = None if body is None else body if isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, content, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_the_page_knows_that_it_is_live(server):
    status, text = ask(server, "GET", "/")
    assert status == 200
    assert 'data-live="explain"' in text
    assert ask(server, "GET", "/app.js") == (200, "1")
    assert ask(server, "GET", "/../secret.txt")[0] == 404
    assert server.server_address[0] == "127.0.0.1"


def test_latents_are_set(server):
    status, text = ask(
        server, "POST", "/steer", {"sae": "topk", "image": 3, "strengths": {"5": 0, "7": 1.5}}
    )
    assert status == 200
    assert json.loads(text) == {"clip": [[5, 0.0], [7, 1.5]]}


def test_pictures_are_explained(server):
    status, text = ask(server, "POST", "/explain?sae=relu%20one", b"a picture" * 2000)
    assert status == 200
    assert json.loads(text) == {"sae": "relu one", "bytes": 18_000}
    assert ask(server, "POST", "/explain?sae=relu", b"no picture")[0] == 400
    server.explain = None
    assert ask(server, "POST", "/explain?sae=relu", b"a picture")[0] == 404
    assert 'data-live="steer"' in ask(server, "GET", "/")[1]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"sae": "topk", "image": 30, "strengths": {}}, "no such image"),
        ({"image": 3}, "expected {"),
        ([1], "expected {"),
        ({**ASKED, "image": float("inf")}, "expected {"),
        ({**ASKED, "strengths": {"5": float("nan")}}, "finite"),
        ({**ASKED, "strengths": dict.fromkeys(map(str, range(65)), 1)}, "up to 64"),
        (b"{", "Expecting"),
        (b" " * 10_001, "10001 bytes"),
    ],
)
def test_invalid_requests_are_refused(server, body, words):
    status, text = ask(server, "POST", "/steer", body)
    assert status == 400
    assert words in json.loads(text)["error"]


def test_other_pages_are_refused(server):
    body = ASKED
    port = server.server_port
    assert ask(server, "POST", "/steer", body, Origin="http://elsewhere.example")[0] == 403
    assert ask(server, "POST", "/steer", body, Origin="null")[0] == 403
    # A name that its owner lets point to this machine.
    assert ask(server, "GET", "/", Host=f"elsewhere.example:{port}")[0] == 403
    assert ask(server, "POST", "/steer", body, Origin=f"http://localhost:{port}")[0] == 200
