"""Explainers: the oracle against the truth, a recording, and a server on this machine."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipsae.data.scenes import ScenesDataset
from clipsae.errors import ConfigError
from clipsae.evaluation.truth import IMAGE_ATTRIBUTES, concept_names, concept_words
from clipsae.naming.explainers import EXPLAINERS, Answers, Evidence, Example, OpenAI, Oracle
from clipsae.naming.explainers.openai import marked, name_of

GRID = 8


@pytest.fixture(scope="module")
def scenes() -> ScenesDataset:
    return ScenesDataset("all", "test", 200)


def examples_of(scenes: ScenesDataset, attribute: str, value: str, n: int = 8) -> list[Example]:
    """Images and patches that show a value, as those of a latent that detects it."""
    label = scenes.concepts[attribute].index(value)
    truth = scenes.patch_truth(range(len(scenes)), grid=GRID)[attribute] == label
    found = truth.any(dim=1).nonzero().squeeze(1)[:n].tolist()
    images = scenes.images(found)[0]
    return [
        Example(index, image, image, truth[index].view(GRID, GRID).float(), 1.0)
        for index, image in zip(found, images, strict=True)
    ]


@pytest.mark.parametrize(
    ("attribute", "value"), [("colour", "red"), ("shape", "ring"), ("pattern", "dotted")]
)
def test_the_oracle_names_what_is_there(scenes, attribute, value):
    oracle = Oracle(dataset=scenes)
    shown = examples_of(scenes, attribute, value)
    assert oracle.describe(Evidence(3, shown[:4], shown[4:])) == value
    others = examples_of(scenes, attribute, scenes.concepts[attribute][1])
    truth = [
        bool(
            (
                scenes.attributes([e.index])[attribute] == scenes.concepts[attribute].index(value)
            ).any()
        )
        for e in [*shown, *others]
    ]
    assert oracle.detect(value, [*shown, *others]) == truth
    assert all(truth[: len(shown)])
    assert not all(truth)


def test_the_oracle_names_nothing_where_nothing_stands_out(scenes):
    everywhere = torch.ones(GRID, GRID)
    shown = [
        Example(i, torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), everywhere, 1.0) for i in range(40)
    ]
    assert Oracle(dataset=scenes).describe(Evidence(0, shown)) == ""
    assert Oracle(dataset=scenes).describe(Evidence(0, [])) == ""
    assert Oracle(dataset=scenes).detect("zebra", shown[:2]) == [False, False]


def test_words_of_concepts():
    named = dict(zip(concept_names(IMAGE_ATTRIBUTES), concept_words(), strict=True))
    assert named["colour=red"] == "red"
    assert named["count=two"] == "two objects"
    assert len(set(named.values())) == len(named)


def test_the_oracle_needs_truth():
    with pytest.raises(ConfigError, match="ground truth"):
        Oracle(dataset=object())


def test_recording(tmp_path):
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"names": {"12": "wheel"}, "true": {"wheel": [0, 5]}}))
    recording = EXPLAINERS["recording"](recording=str(file))
    images = [
        Example(i, torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), torch.ones(1, 1)) for i in (5, 6)
    ]
    assert recording.describe(Evidence(12, images)) == "wheel"
    assert recording.describe(Evidence(13, images)) == ""
    assert recording.detect("wheel", images) == [True, False]
    file.write_text('{"names": {}}')
    with pytest.raises(ConfigError, match="another content; expected"):
        EXPLAINERS["recording"](recording=str(file))
    with pytest.raises(ConfigError, match="No such file"):
        EXPLAINERS["recording"](recording=str(tmp_path / "none.json"))


def test_answers_survive_a_kill(tmp_path):
    file = tmp_path / "answers.jsonl"
    answers = Answers(file)
    answers.add("a", "wheel", model="m")
    answers.add("b", "sky\n\u2028blue")
    with file.open("ab") as cut:
        cut.write(b'{"key": "c", "ans')
    again = Answers(file)
    assert (again.get("a"), again.get("b"), again.get("c")) == ("wheel", "sky\n\u2028blue", None)
    again.add("c", "tree")
    assert Answers(file).known == {"a": "wheel", "b": "sky\n\u2028blue", "c": "tree"}


class Server(ThreadingHTTPServer):
    """Answers "Red things.", or to detections "2, 3"; keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.status = 200
        self.says_errors_with_200 = False


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(sent | {"key": self.headers["Authorization"], "path": self.path})
        question = sent["messages"][0]["content"][0]["text"]
        said = "2, 3" if question.startswith("In which") else '"Red things."'
        message = {"role": "assistant", "content": said}
        body = json.dumps(
            {"error": {"message": "no such model"}}
            if self.server.says_errors_with_200
            else {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": sent["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }
        ).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()


def openai(server: Server, tmp_path: Path, requests: int = 10) -> OpenAI:
    pytest.importorskip("openai")
    return OpenAI(
        model="seer",
        address=f"http://127.0.0.1:{server.server_port}/v1",
        answers=tmp_path / "answers.jsonl",
        requests=requests,
    )


def test_a_server_is_shown_the_examples_and_asked_once(server, scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    shown = examples_of(scenes, "colour", "red", 5)
    explainer = openai(server, tmp_path)
    assert explainer.describe(Evidence(7, shown[:3], shown[3:])) == "Red things"
    assert explainer.detect("red things", shown[:4]) == [False, True, True, False]
    assert explainer.source == "openai:seer"
    describing, detecting = server.asked
    assert describing["path"] == "/v1/chat/completions"
    assert describing["key"] == "Bearer secret"
    pictures = [c for c in describing["messages"][0]["content"] if c["type"] == "image_url"]
    assert len(pictures) == 5
    encoded = pictures[0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert picture.size == (128, 64)
    texts = [c["text"] for c in detecting["messages"][0]["content"] if c["type"] == "text"]
    assert '"red things"' in texts[0]
    assert texts[1:] == [f"Image {i}:" for i in range(1, 5)]
    # Another process asks nothing again.
    again = openai(server, tmp_path, requests=0)
    assert again.describe(Evidence(7, shown[:3], shown[3:])) == "Red things"
    assert len(server.asked) == 2
    with pytest.raises(ConfigError, match="as many as it allows"):
        again.detect("blue things", shown)
    assert "secret" not in (tmp_path / "answers.jsonl").read_text()


def test_a_server_that_refuses(server, scenes, tmp_path):
    server.status = 401
    with pytest.raises(ConfigError, match="no answer of naming"):
        openai(server, tmp_path).describe(Evidence(0, examples_of(scenes, "colour", "red", 1)))
    server.status, server.says_errors_with_200 = 200, True
    with pytest.raises(ConfigError, match="no such model"):
        openai(server, tmp_path).describe(Evidence(0, examples_of(scenes, "colour", "red", 1)))
    assert not (tmp_path / "answers.jsonl").exists()


def test_openai_needs_a_key(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        OpenAI(model="seer", answers=tmp_path / "a.jsonl", requests=1)


def test_pictures_are_dark_where_a_latent_does_not_act():
    heat = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    image = torch.full((3, 4, 4), 200, dtype=torch.uint8)
    left, right = marked(Example(0, image, image, heat)).split(4, dim=2)
    assert left.equal(image)
    assert right[0].tolist() == [[200, 200, 30, 30]] * 2 + [[30, 30, 200, 200]] * 2


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ('"Red wheels."\nBecause ...', "Red wheels"),
        ("Nothing in common", ""),
        ("<think>Is it 3\nwheels?</think>\n\nwheels", "wheels"),
        ("", ""),
        ("x" * 99, "x" * 60),
    ],
)
def test_names_of_answers(answer, name):
    assert name_of(answer) == name
