"""Setting codes, and the server that does it for the page."""

import http.client
import json
import threading
from collections.abc import Iterator

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.sae import SAE
from clipsae.visualization.page.serve import ADDRESS, PageServer
from clipsae.visualization.page.steer import steered_logits


@torch.no_grad()
def test_codes_are_set_and_the_rest_of_the_stream_stays():
    torch.manual_seed(0)
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    sae = SAE(clip.width, 40, "attention", "sparsemax", normalize_input=True, scale=0.1).eval()
    image = ScenesDataset("colour", "test", 3)[0][0]
    classifier = torch.nn.functional.normalize(torch.randn(10, clip.embed_dim), dim=-1)
    stream = clip.prefix(clip.normalize(image[None]))
    codes = sae.encode(stream)
    scale = sae.input_scale(stream)
    best = int(codes.mean(dim=1)[0].argmax())
    changed = codes.clone()
    changed[..., best] = 0
    changed[..., 5] = 0.7
    moved = stream + sae.decode(changed, scale) - sae.decode(codes, scale)
    for strengths, of in (({}, stream), ({best: 0.0, 5: 0.7}, moved)):
        unit = torch.nn.functional.normalize(clip.tail(of), dim=-1)
        expected = clip.logit_scale * (unit @ classifier.T)[0]
        found = steered_logits(clip, sae, image, strengths, classifier)
        assert torch.allclose(found, expected, atol=1e-3)
    with pytest.raises(ValueError, match="expected 0 to 39"):
        steered_logits(clip, sae, image, {40: 1.0}, classifier)


@pytest.fixture
def server(tmp_path) -> Iterator[PageServer]:
    (tmp_path / "index.html").write_text('<!doctype html>\n<html lang="en">\n</html>')
    (tmp_path / "app.js").write_text("1")
    (tmp_path.parent / "secret.txt").write_text("not for the page")

    def steer(image: int, strengths: dict[int, float]) -> list[tuple[int, float]]:
        if image > 9:
            raise ValueError("no such image")
        return list(strengths.items())

    with PageServer(tmp_path, steer) as made:
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
    assert 'data-live="yes"' in text
    assert ask(server, "GET", "/app.js") == (200, "1")
    assert ask(server, "GET", "/../secret.txt")[0] == 404
    assert server.server_address[0] == "127.0.0.1"


def test_latents_are_set(server):
    status, text = ask(server, "POST", "/steer", {"image": 3, "strengths": {"5": 0, "7": 1.5}})
    assert status == 200
    assert json.loads(text) == {"clip": [[5, 0.0], [7, 1.5]]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"image": 30, "strengths": {}}, "no such image"),
        ({"image": 3}, "expected {"),
        ([1], "expected {"),
        ({"image": 3, "strengths": {"5": float("nan")}}, "finite"),
        ({"image": 3, "strengths": dict.fromkeys(map(str, range(65)), 1)}, "up to 64"),
        (b"{", "Expecting"),
        (b" " * 10_001, "10001 bytes"),
    ],
)
def test_what_cannot_be_is_said(server, body, words):
    status, text = ask(server, "POST", "/steer", body)
    assert status == 400
    assert words in json.loads(text)["error"]


def test_other_pages_are_refused(server):
    body = {"image": 3, "strengths": {}}
    port = server.server_port
    assert ask(server, "POST", "/steer", body, Origin="http://elsewhere.example")[0] == 403
    assert ask(server, "POST", "/steer", body, Origin="null")[0] == 403
    # A name that its owner lets point to this machine.
    assert ask(server, "GET", "/", Host=f"elsewhere.example:{port}")[0] == 403
    assert ask(server, "POST", "/steer", body, Origin=f"http://localhost:{port}")[0] == 200
