"""A stage is there whole or not at all, and named by what produced it."""

import json

import pytest

from clipsae.store import MARK, Store, digest


def test_the_name_depends_on_the_content_of_the_key_alone():
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"a": 1}) != digest({"a": 1.5})


def test_a_key_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError):
        Store(tmp_path).stage("sae", ["x"], {"a": object()})


def test_made_once_and_then_used(tmp_path):
    stage = Store(tmp_path).stage("sae", ["TopK", "ViT-B/16"], {"k": 32})
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "result.txt").write_text("done")

    assert not stage.finished
    path = stage.make(build)
    assert stage.make(build) == path
    assert len(calls) == 1
    assert (path / "result.txt").read_text() == "done"
    assert path.name.startswith("topk-vit-b_16-")
    meta = json.loads((path / MARK).read_text())
    assert meta["key"] == {"k": 32}
    assert meta["versions"]["torch"]
    assert not stage.work.exists()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interrupted_stage_is_not_there_and_finds_its_scratch_again(tmp_path):
    stage = Store(tmp_path).stage("sae", ["x"], {"a": 1})

    def interrupted(folder):
        (stage.scratch / "step").write_text("7")
        (folder / "half").write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.make(interrupted)
    assert not stage.finished
    assert not stage.path.exists()
    assert Store(tmp_path).finished("sae") == []

    seen = []
    stage.make(lambda folder: seen.append((stage.scratch / "step").read_text()))
    assert seen == ["7"]
    assert Store(tmp_path).finished("sae") == [stage.path]
    assert not (stage.path / "scratch").exists()


def test_a_folder_without_its_mark_is_never_read(tmp_path):
    stage = Store(tmp_path).stage("sae", ["x"], {"a": 1})
    stage.path.mkdir(parents=True)
    (stage.path / "result.txt").write_text("half")
    assert not stage.finished
    assert Store(tmp_path).finished("sae") == []
