"""SAEs that are not trained go the way of all others: the store, the table, the report."""

import json

import pandas as pd
import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data import FeatureDataModule
from clipsae.data.scenes import ScenesDataset
from clipsae.sae import SAE
from clipsae.sae.linear import geometric_median
from clipsae.store.files import read_json
from tests.warm import run_py

SMALL = [
    "model.initial_images=8",
    "features.batch_size=4",
    "features.num_workers=0",
    "trainer.val_check_interval=300",
    "+train_dataset.size=24",
    "dataset.size=20",
    "evaluation.ns=[1]",
    "measurement.sample_tokens=200",
    "measurement.sample_images=4",
    "logger=none",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A sweep over fitted SAEs and one that takes no step."""
    folder = tmp_path_factory.mktemp("baselines")
    sweep = ["-m", "model=neurons,text,batch_topk", "trainer.max_steps=0", "together=true"]
    done = run_py(*sweep, f"paths.output_dir={folder}", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 cells are finished" in done.stdout
    return folder


def sae_of(store, model: str):
    (folder,) = (store / "sae").glob(f"{model}-*")
    return folder


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """Those of the first images of the first epoch."""
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    return FeatureDataModule(clip, ScenesDataset("all", "train", 24), batch_size=4).first_batch(8)


@torch.no_grad()
def test_a_fitted_sae_is_one_like_all_others(store, tokens):
    sae = SAE.load(sae_of(store, "neurons"))
    torch.testing.assert_close(sae.decoder_bias, tokens.flatten(0, 1).mean(0))
    torch.testing.assert_close(sae.decode(sae.encode(tokens)), tokens, atol=1e-4, rtol=0)
    numbers = read_json(sae_of(store, "neurons") / "training.json")
    assert numbers == {"fitted": "neurons", "images": 8}
    (evaluation,) = (store / "evaluation").glob("neurons-*")
    rows = pd.read_csv(evaluation / "results.csv")
    assert set(rows.latents) == {256}  # 2 d, for which nobody asked
    on = rows[rows.setting == "on"].set_index("n").accuracy
    assert on[256] == rows.accuracy[rows.setting == "no_sae"].iloc[0]
    metrics = pd.read_csv(evaluation / "metrics.csv").set_index("metric").value
    assert metrics.fvu < 1e-8
    assert metrics.l0 == pytest.approx(128, abs=0.01)


def test_the_latents_of_texts_are_the_concepts(store):
    sae = SAE.load(sae_of(store, "text"))
    assert sae.latents == 8 + 10 + 5 + 2 + 8 + 9 + 3  # shapes, colours, patterns, ...


def test_what_decides_a_fit_is_in_its_key_and_nothing_of_a_training(store):
    key = read_json(sae_of(store, "neurons") / "meta.json")["key"]
    assert key["sae"] == {"architecture": "linear", "activation": "relu", "fit": "neurons"}
    assert set(key["training"]) == {"features", "seed", "initial_images"}
    assert key["training"]["initial_images"] == 8


@torch.no_grad()
def test_an_untrained_sae_is_as_initialised_and_has_a_threshold(store, tokens):
    sae = SAE.load(sae_of(store, "batch_topk"))
    median = geometric_median(tokens.flatten(1)).view(tokens.shape[1:]).mean(0)
    torch.testing.assert_close(sae.decoder_bias, median)
    assert torch.equal(sae.architecture.W_enc, sae.architecture.W_dec)  # tied at the start
    scores = sae.scores(tokens).flatten()
    kept = scores.topk(20 * tokens.shape[0] * tokens.shape[1]).values
    torch.testing.assert_close(sae.activation.inference_threshold, kept.min())
    assert read_json(sae_of(store, "batch_topk") / "training.json") == {"steps": 0}


def test_status_and_report_show_them(store):
    done = run_py("task=status", "task.json=true", f"paths.output_dir={store}")
    stages = json.loads(done.stdout)["stages"]
    assert {s["state"] for s in stages} == {"done"}
    done = run_py("task=report", f"paths.output_dir={store}", "logger=none")
    assert done.returncode == 0, done.stderr
    for row in ("BatchTopK (k = 20), untrained", "Raw neurons  ", "Text directions  "):
        assert row in done.stdout, done.stdout
