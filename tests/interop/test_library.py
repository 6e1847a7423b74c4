"""The package as a library: the example of its docstring, what importing costs, our own folders."""

import doctest
import json
import subprocess
import sys

import pytest
import torch

import clipsae
from clipsae.interop import read


def test_the_example_in_ten_lines_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(clipsae)
    assert found.attempted > 8
    assert found.failed == 0


def test_importing_needs_no_torch_and_loading_neither_hydra_nor_lightning(tmp_path, make):
    make(activation="relu").save(tmp_path)
    code = (
        "import sys, clipsae; assert 'torch' not in sys.modules; clipsae.load(sys.argv[1]);"
        "assert not any(m in sys.modules for m in ('hydra', 'lightning', 'sae_lens'))"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = clipsae.nonsense


def test_what_was_saved_is_loaded_the_same(tmp_path, sae, x):
    sae.save(tmp_path)
    for source in (tmp_path, str(tmp_path), tmp_path / "sae.json"):
        again = clipsae.load(source)
        assert not again.training
        assert torch.equal(again.encode(x), sae.encode(x))
        assert torch.equal(again(x).reconstruction, sae(x).reconstruction)
    assert read(tmp_path).lost == ()


def damaged(folder, **changes):
    about = json.loads((folder / "sae.json").read_text())
    about["config"] |= changes.pop("config", {})
    (folder / "sae.json").write_text(json.dumps({**about, **changes}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: damaged(f, surprise=1), "surprise=1 is an option that is not known"),
        (lambda f: damaged(f, config={"surprise": 1}), "surprise=1"),
        (lambda f: damaged(f, config={"d": None}), "d=None"),
        (lambda f: damaged(f, config={"latents": "many"}), "latents='many'"),
        (lambda f: damaged(f, config={"latents": 41}), "does not fit its config"),
        (lambda f: damaged(f, config={"activation": "softplus"}), "may be a plugin's: give plug"),
        (lambda f: damaged(f, version=99), "up to 4"),
        (lambda f: (f / "sae.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "sae.json").write_text("[" * 100_000), "is not valid JSON"),
        (lambda f: (f / "sae.json").write_text("[1]"), "expected a JSON object"),
        (lambda f: (f / "sae.json").write_text("{}"), "has no config"),
        (lambda f: (f / "sae.safetensors").unlink(), "holds no sae.safetensors"),
        (
            lambda f: (f / "sae.safetensors").write_bytes(b"12345678{}"),
            "complete safetensors",
        ),
        (lambda f: (f / "sae.safetensors").write_bytes(bytes(4)), "complete safetensors"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(tmp_path, make, change, words):
    make(activation="relu").save(tmp_path)
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        clipsae.load(tmp_path)
    assert words in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_that_are_nan_are_refused(tmp_path, make):
    sae = make(activation="topk", k=3)
    with torch.no_grad():
        sae.architecture.W_enc[3, 4] = torch.nan
    sae.save(tmp_path)
    with pytest.raises(ValueError, match=r"W_enc holds 1 numbers that are NaN"):
        clipsae.load(tmp_path)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "what is this?", ""])
def test_what_is_neither_here_nor_an_id_is_said_at_once(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Hugging Face id|holds no SAE"):
        clipsae.load(source)
