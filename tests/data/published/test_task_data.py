"""`task=data` and the configs of the published datasets."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from clipsae.data.published import DATASETS
from clipsae.errors import ConfigError
from clipsae.tasks import build, data
from tests.data.published.toys import BUILDERS, LAYOUTS

ROOT = Path(__file__).resolve().parents[3]


def config(folder, names=None):
    return OmegaConf.create({"paths": {"data_dir": str(folder)}, "task": {"datasets": names}})


def rows(text):
    """The table's rows: dataset -> cells."""
    cells = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def test_the_table_without_any_data(tmp_path, capsys):
    data.run(config(tmp_path / "nothing"))
    shown = capsys.readouterr().out
    assert list(rows(shown)) == list(DATASETS)
    assert rows(shown)["dtd"] == ["not there", "", "- 47", "- 2,820", "- 1,692"]
    for name, cls in DATASETS.items():
        assert f"{name}: not there: expected {cls.about.layout}; get it from" in shown


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_and_the_configs_of_toys(tmp_path, capsys, layout):
    built = {name: builder(tmp_path, layout) for name, builder in BUILDERS.items()}
    data.run(config(tmp_path))
    shown = capsys.readouterr().out
    found = rows(shown)
    expected = {
        "coop": ["food-101", "CoOp's split", "3 ≠ 101", "12 ≠ 50,500", "9 ≠ 30,300"],
        "official": ["food-101", "official split", "3 ≠ 101", "18 ≠ 75,750", "9 ≠ 25,250"],
    }
    assert found["food101"] == expected[layout]
    assert found["imagenet"][2:] == ["5 ≠ 1,000", "80 ≠ 1,281,167", "10 ≠ 50,000"]
    wrong = re.findall("^[a-z0-9_]+: (.*)", shown, re.MULTILINE)
    assert len(wrong) == len(DATASETS)  # toys have few of the classes, and nothing else is wrong
    assert all("published" in problem or "without images" in problem for problem in wrong)
    if layout == "official":
        return
    for name, cls in DATASETS.items():
        node = OmegaConf.load(ROOT / "conf" / "dataset" / f"{name}.yaml")
        assert (node.name, get_class(node._target_)) == (name, cls)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["dataset=food101", f"paths.data_dir={tmp_path}"])
        chosen = compose("config", ["dataset=food101", "train_dataset=scenes"])
    assert cfg.train_dataset.name == "imagenet"
    assert chosen.train_dataset.name == "scenes"
    dataset = build.build_dataset(cfg.dataset, "test", 32)
    assert dataset.labels.tolist() == built["food101"].labels["test"]


def test_sizes_as_published_are_marked(tmp_path, capsys, monkeypatch):
    BUILDERS["eurosat"](tmp_path, "coop")
    about = DATASETS["eurosat"].about
    toy = type(about)(**{**vars(about), "classes": 3, "coop": (15, 9)})
    monkeypatch.setattr(DATASETS["eurosat"], "about", toy)
    data.run(config(tmp_path, ["eurosat"]))
    assert rows(capsys.readouterr().out) == {
        "eurosat": ["eurosat", "CoOp's split", "3 ✓", "15 ✓", "9 ✓"]
    }


def test_half_a_dataset(tmp_path, capsys):
    BUILDERS["imagenet"](tmp_path, "official")
    (tmp_path / "imagenet" / "train").rename(tmp_path / "elsewhere")
    data.run(config(tmp_path, ["imagenet"]))
    shown = capsys.readouterr().out
    assert rows(shown)["imagenet"][2:] == ["5 ≠ 1,000", "- 1,281,167", "10 ≠ 50,000"]
    assert "imagenet/train is missing" in shown


def test_what_a_partial_copy_lacks_is_shown_split_by_split(tmp_path, capsys):
    built = BUILDERS["food101"](tmp_path, "official")
    images = tmp_path / "food-101" / "images"
    for file in built.files["test"]:
        if file.startswith("bibimbap"):
            (images / file).unlink()
    gone = images / built.files["train"][0]
    gone.unlink()
    data.run(config(tmp_path, ["food101"]))
    shown = capsys.readouterr().out
    assert rows(shown)["food101"][2:] == ["3 train, 2 test ≠ 101", "17 ≠ 75,750", "6 ≠ 25,250"]
    assert "food101: train: " in shown
    assert f"lists 1 images that do not exist (of 18), such as {gone}" in shown
    assert "lists 3 images that do not exist (of 9)" in shown
    assert "food101: test: 1 of 3 classes without images: bibimbap" in shown
    assert "food101: train and test: 3 classes, not the published 101" in shown


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"task.datasets has 'cifar10': expected names among"):
        data.run(config(tmp_path, ["cifar10"]))


def test_the_command_that_makes_toys(tmp_path, capsys, monkeypatch):
    script = Path(__file__).with_name("toys.py")
    options = [str(tmp_path), "--layout", "official", "--only", "dtd"]
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == "dtd: 12 train, 9 test\n"
    assert len(DATASETS["dtd"](tmp_path / "dtd")) == 9
