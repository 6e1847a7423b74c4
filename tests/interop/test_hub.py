"""The Hub without a network: ids from its cache, refusals offline, and what is published."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants

import clipsae
from clipsae.interop import hub, model_card, saelens
from tests.interop.foreign import MATRICES, container, weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No request can be made, and the cache is an empty folder of the test's own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    fetch = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **options: fetch(repo, cache_dir=tmp_path / "cache", **options),
    )


@pytest.fixture
def cached(tmp_path):
    """A repository as the Hub's cache holds it: the folder of its one snapshot."""
    root = tmp_path / "cache" / "models--someone--saes"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def test_ids_are_read_from_the_cache(cached, make, x):
    sae = make(activation="topk", k=4)
    sae.save(cached)
    saelens.write(sae, cached / "foreign" / "topk")
    container(cached, {}, weights(**MATRICES)).rename(cached / "patchsae.pt")
    for source in ("someone/saes", "someone/saes@main", f"someone/saes@{COMMIT}"):
        assert torch.equal(clipsae.load(source).encode(x), sae.encode(x))
    inside = clipsae.load("someone/saes/foreign/topk")
    assert torch.allclose(inside.encode(x), sae.encode(x), atol=1e-5)
    assert clipsae.load("someone/saes/patchsae.pt").latents == 40
    with pytest.raises(FileNotFoundError, match="has no nowhere"):
        clipsae.load("someone/saes/nowhere")


def test_only_what_may_be_needed_is_fetched(monkeypatch, tmp_path):
    asked = []

    def fetch(repo, **options):
        asked.append((repo, options))
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    hub.fetch("a/b", ("sae.json", "sae.safetensors"), (".pt",))
    (tmp_path / "file.pt").touch()
    hub.fetch("a/b/file.pt@v1", ("sae.json",), (".pt",))
    assert [o["allow_patterns"] for _, o in asked] == [
        ["sae.json", "sae.safetensors"],
        ["file.pt"],
    ]
    assert [o["revision"] for _, o in asked] == [None, "v1"]


def test_an_id_that_cannot_be_had_is_said_in_one_sentence():
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is not a folder") as refused:
        clipsae.load("nobody/nothing")
    assert "\n" not in str(refused.value)


class FakeHub:
    """What an `HfApi` was asked to upload."""

    def __init__(self, **options):
        type(self).options = options

    def create_repo(self, repo_id, **options):
        type(self).created = (repo_id, options)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        type(self).files = {p.name: p.read_bytes() for p in folder_path.iterdir()}
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


def test_publishing_uploads_the_sae_and_its_card(monkeypatch, tmp_path, make, x):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    sae = make(activation="topk", k=4)
    address = clipsae.push_to_hub(sae, "someone/topk", private=True)
    assert address == "https://huggingface.co/someone/topk/commit/1"
    assert FakeHub.created == ("someone/topk", {"private": True, "exist_ok": True})
    assert set(FakeHub.files) == {"sae.json", "sae.safetensors", "README.md"}
    for name, content in FakeHub.files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(clipsae.load(tmp_path).encode(x), sae.encode(x))
    assert "load('someone/topk')" in (tmp_path / "README.md").read_text()


def test_publishing_offline_or_under_no_name_is_refused(make):
    with pytest.raises(ValueError, match="someone/topk was not published") as refused:
        clipsae.push_to_hub(make(activation="relu"), "someone/topk", token="hf_none")
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="expected owner/name"):
        clipsae.push_to_hub(make(activation="relu"), "topk")


def test_the_card_tells_the_results_of_its_store(tmp_path, make):
    folder = tmp_path / "sae" / "topk-tiny-abc"
    sae = make(activation="topk", k=4)
    sae.save(folder)
    config = {
        "clip": {"name": "clipsae-tiny", "pretrained": "builtin", "layer": -2},
        "train_dataset": {"name": "scenes"},
        "trainer": {"max_steps": 600},
        "seed": 3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    results = "dataset,images,protocol,setting,n,accuracy\nshapes,50,paper,no_sae,,99.5\n"
    results += "shapes,50,paper,on,5.0,87.25\n"
    put(tmp_path / "evaluation" / "one", folder.name, "results.csv", results)
    put(tmp_path / "evaluation" / "other", "another-sae", "results.csv", results)
    metrics = "dataset,images,metric,value\nshapes,50,fvu,0.125\nshapes,50,active,4.0\n"
    metrics += "shapes,50,cknna,\n"  # undefined
    put(tmp_path / "evaluation" / "one", folder.name, "metrics.csv", metrics)

    card = model_card(sae, "someone/topk", folder)
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "clipsae"
    assert "| shapes (50 images) | 99.50 | 87.25 |" in card
    assert card.count("99.50") == 1
    assert "| shapes (50 images) | 4.0 | 0.125 |" in card
    assert "trained for 600 steps on scenes, seed 3" in card
    assert "FrozenCLIP.load('clipsae-tiny', 'builtin', layer=-2)" in card
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == sae.config
    assert str(tmp_path) not in card


def put(folder, sae, name, text, finished=0, **key):
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"key": {"sae": sae, **key}, "finished": finished}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / name).write_text(text)


def test_evaluations_with_other_settings_are_rows_of_their_own(tmp_path, make):
    sae = make(architecture="attention", activation="relu")
    place = tmp_path / "evaluation"
    for name, accuracy, finished, threshold, ns in (
        ("a", 3.0, 9, 0.2, [1, 5]),  # in place of b
        ("b", 1.0, 8, 0.2, [5]),
        ("c", 2.0, 7, 0.5, [5]),
    ):
        key = {
            "evaluation": {"count_threshold": threshold, "ns": ns},
            "measurement": {"k": accuracy},
        }
        results = "dataset,images,protocol,setting,n,accuracy\n"
        put(
            place / name,
            "s",
            "results.csv",
            f"{results}x,5,paper,on,5,{accuracy}\n",
            finished,
            **key,
        )
    card = model_card(sae, "someone/topk", tmp_path / "sae" / "s")
    assert "An attention sparse autoencoder" in card
    assert "| x (5 images, evaluation.count_threshold=0.2) | 3.00 |" in card
    assert "| x (5 images, evaluation.count_threshold=0.5) | 2.00 |" in card


@pytest.mark.parametrize("hook", ["resid", "attn_out", "embedding", "towers"])
def test_the_cards_example_runs(hook, tmp_path):
    """Its lines, on an SAE of the built-in CLIP."""
    sae = clipsae.SAE(d=128, latents=64, activation="topk", k=4).eval()
    clip = {"name": "ViT-B-16-quickgelu", "pretrained": "openai", "layer": -2, "hook": hook}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"clip": clip}))
    card = model_card(sae, "someone/topk", tmp_path)
    assert ("of the attention of block -2" in card) == (hook == "attn_out")
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("'ViT-B-16-quickgelu', 'openai'", "'clipsae-tiny', 'builtin'")
    code = code.replace("sae = load('someone/topk')\n", "")
    names = {"sae": sae, "images": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)}
    exec(code, names)
    assert names["embedding"].shape == (2, 128)
