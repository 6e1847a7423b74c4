"""The stage of names: made once, under a key of what decides them; what cannot be named is refused
in a sentence."""

import csv
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from clipsae.errors import ConfigError
from clipsae.naming import Names
from clipsae.sae import SAE
from clipsae.store import Store
from clipsae.tasks import build, name, pictures
from clipsae.tasks.stages import names
from clipsae.training.logging import csv_logger, log_table
from clipsae.visualization import collect_references
from run import ROOT


@cache
def base() -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        small = ["dataset.size=24", "naming.images=20", "precision=float32", "task=name"]
        return compose("config", small)


def composed(*options: str) -> DictConfig:
    return OmegaConf.merge(base(), OmegaConf.from_dotlist(list(options)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store with an SAE of random weights and its pictures."""
    torch.manual_seed(0)
    cfg, store = composed(), Store(tmp_path_factory.mktemp("store"))
    clip = build.build_clip(cfg)
    dataset = build.build_dataset(cfg.dataset, "test", clip.image_size)
    trained = store.stage("sae", ["random"], {"weights": "random"})
    trained.make(SAE(clip.width, 40, activation="topk", k=4).save)
    shown = pictures.stage(cfg, store, trained, dataset)

    def collect(folder: Path) -> None:
        sae = SAE.load(trained.path)
        found = collect_references(clip, {"": sae}, dataset, name="scenes", split="test")
        found[""].save(folder)

    shown.make(collect)
    return cfg, store, clip, dataset, shown, trained


def test_names_are_made_once_and_written_as_a_table(world, tmp_path):
    _, store, *rest = world
    place = names.make_names(*world)
    assert names.make_names(*world).path == place.path
    found = Names.load(place.path)
    assert len(found) == 40
    assert set(found.numbers) == {"named", "right", "right_shuffled", "right_oracle", "concepts"}
    with (place.path / "names.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == found.text
    assert {"latent", "score", "low", "high", "control", "named", "judge", "source"} < set(rows[0])
    console = Console(width=110, record=True, file=(tmp_path / "out").open("w"))
    all_trusted = {"text": ["[/b]"] * 40, "low": torch.ones(40), "threshold": 0.5}
    console.print(name.table(replace(found, **all_trusted), 5))
    for line in name.summary(found):
        console.print(line, soft_wrap=True)
    said = console.export_text()
    assert "[/b]" in said
    assert f"named       {int(found.named.sum())} of 40 latents" in said
    assert "concepts have their name on their best latent" in said
    logger = csv_logger(run_folder=tmp_path)
    log_table(logger, "names", found.rows(), found.numbers)
    logger.finalize("success")
    assert "right_oracle" in (tmp_path / "metrics.csv").read_text()
    # What decides the names is in the key.
    others = [
        names.stage(composed(option), store, *rest[1:3]).path
        for option in ("naming.regions=true", "naming.judge=truth", 'naming.prompts=["a {}"]')
    ]
    assert len({place.path, *others}) == 4
    same = names.stage(composed("evaluation.batch_size=3"), store, *rest[1:3])
    assert same.path == place.path


def test_the_vocabulary_is_known_by_its_words(world, tmp_path):
    _, store, _, dataset, shown, _ = world
    paths = []
    for file, text in (("a.txt", "red\nblue\n"), ("b.txt", "red\n\nblue"), ("c.txt", "red\nsea")):
        (tmp_path / file).write_text(text)
        cfg = composed(f"naming.vocabulary={tmp_path / file}")
        paths.append(names.stage(cfg, store, dataset, shown).path)
    assert paths[0] == paths[1] != paths[2]


def test_what_cannot_be_named_is_refused(world, tmp_path):
    _, _, clip, dataset, _, _ = world

    def refusal(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            names.check(composed(*overrides), clip, dataset)
        return str(caught.value)

    assert "none.txt: No such file" in refusal(f"naming.vocabulary={tmp_path / 'none.txt'}")
    assert "naming.prompts has 'a photo'" in refusal('naming.prompts=["{}","a photo"]')
    assert "naming.prompts has '{} }'" in refusal('naming.prompts=["{} }"]')

    class Photos:
        classnames = ("a dog", "a dog")

    with pytest.raises(ConfigError, match=r"set naming\.vocabulary to a text file"):
        names.vocabulary(composed(), Photos())
    Photos.classnames = ("a dog", "a cat", "a dog")
    (words,) = names.vocabulary(composed(), Photos())
    assert list(words.words) == ["a dog", "a cat"]
    with pytest.raises(ConfigError, match=r"naming\.judge=truth: what the images of"):
        names.check(composed("naming.judge=truth"), clip, Photos())
    embedding = SimpleNamespace(has_patches=False, has_text=True)
    with pytest.raises(ConfigError, match=r"naming\.regions=true with clip\.hook=embedding"):
        names.check(composed("naming.regions=true"), embedding, dataset)
    silent = SimpleNamespace(name="timm:vit", has_text=False)
    with pytest.raises(ConfigError, match=r"clip\.name='timm:vit' has no text tower"):
        names.check(composed(), silent, dataset)
