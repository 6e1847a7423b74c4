"""`task=data` and the configs of the eleven."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from clipsae.data.eleven import ELEVEN
from clipsae.errors import ConfigError
from clipsae.tasks import build, data
from tests.data.eleven.toys import BUILDERS, LAYOUTS

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
    assert list(rows(shown)) == list(ELEVEN)
    assert rows(shown)["dtd"] == ["not there", "", "- 47", "- 2,820", "- 1,692"]
    for name, cls in ELEVEN.items():
        assert f"{name}: not there: expected {cls.about.layout}; get it from" in shown


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_of_toys(tmp_path, capsys, layout):
    for builder in BUILDERS.values():
        builder(tmp_path, layout)
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
    assert len(wrong) == len(ELEVEN)  # toys have few of the classes, and all the rest
    assert all("published" in said or "without images" in said for said in wrong)


def test_sizes_as_published_are_marked(tmp_path, capsys, monkeypatch):
    BUILDERS["eurosat"](tmp_path, "coop")
    about = ELEVEN["eurosat"].about
    toy = type(about)(**{**vars(about), "classes": 3, "coop": (15, 9)})
    monkeypatch.setattr(ELEVEN["eurosat"], "about", toy)
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
    assert "imagenet/train is not there" in shown


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
    assert rows(shown)["food101"][2:] == [
        "3 train, 2 test ≠ 101",
        "17 ≠ 75,750",
        "6 ≠ 25,250",
    ]
    assert "food101: train: " in shown
    assert f"names 1 images that are not there (of 18), such as {gone}" in shown
    assert "names 3 images that are not there (of 9)" in shown
    assert "food101: test: 1 of 3 classes without images: bibimbap" in shown
    assert "food101: train and test: 3 classes compete, of the published 101" in shown


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"task.datasets has 'cifar10': expected names among"):
        data.run(config(tmp_path, ["cifar10"]))


@pytest.mark.parametrize("name", BUILDERS)
def test_the_config_builds_the_dataset(tmp_path, name):
    built = BUILDERS[name](tmp_path, "coop")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"dataset={name}", f"paths.data_dir={tmp_path}"])
        chosen = compose("config", [f"dataset={name}", "train_dataset=scenes"])
    assert cfg.dataset.name == name
    assert cfg.train_dataset.name == "imagenet"
    assert chosen.train_dataset.name == "scenes"
    OmegaConf.resolve(cfg.dataset)
    dataset = build.build_dataset(cfg.dataset, "test", 32)
    assert dataset.labels.tolist() == built.labels["test"]
    assert dataset[0][0].shape == torch.Size([3, 32, 32])


def test_the_builders_command_line(tmp_path):
    script = Path(__file__).with_name("builders.py")
    command = [sys.executable, script, tmp_path, "--layout", "official", "--only", "dtd"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "dtd: 12 train, 9 test\n"
    assert len(ELEVEN["dtd"](tmp_path / "dtd")) == 9
