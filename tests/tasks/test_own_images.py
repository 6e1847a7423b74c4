"""A user's own folder, from its files to the table."""

import json
from pathlib import Path

import pandas as pd
import pytest
from torchvision.io import write_png

from clipsae.data.image_folder import wnids
from clipsae.data.scenes import ScenesDataset
from tests.warm import run_py

SMALL = (
    "model.latents=64",
    "trainer.max_steps=3",
    "trainer.val_check_interval=3",
    "features.batch_size=4",
    "features.num_workers=0",
    "callbacks.prediction_images=0",
    "evaluation.ns=[1]",
    "measurement=none",
    "logger=none",
)


@pytest.fixture
def images(tmp_path):
    """Scenes of five colours, train and test, in class folders."""
    for split in ("train", "test"):
        scenes = ScenesDataset(kind="colour", split=split, size=20)
        for i, (image, label) in enumerate(scenes):
            file = tmp_path / "images" / split / scenes.classnames[label] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_png(image, str(file))
    return tmp_path / "images"


def run(root: Path, *overrides: str):
    out = f"paths.output_dir={root.parent / 'out'}"
    return run_py("dataset=image_folder", f"dataset.root={root}", out, *SMALL, *overrides)


def made(root: Path, kind: str) -> list[Path]:
    return sorted((root.parent / "out" / kind).glob("[!.]*"))


def refused(done, *words: str) -> bool:
    """Whether a run ended with one line that has these words, without a traceback."""
    said = (done.stdout + done.stderr).splitlines()
    return (
        done.returncode == 1
        and all(word in said[-1] for word in words)
        and not any("Traceback" in line for line in said)
    )


def test_nothing_is_left_out_of_a_set_that_is_whole(images):
    assert run(images).returncode == 0
    (sae,), (evaluation,) = made(images, "sae"), made(images, "evaluation")
    done = run(images, "dataset.on_bad_image=skip")
    assert f"using the finished {sae}" in done.stdout + done.stderr
    assert made(images, "sae") == [sae]
    assert made(images, "evaluation") == [evaluation]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_image_is_named_before_the_training_and_can_be_skipped(images, split):
    file = next((images / split).glob("*/*.png"))
    file.write_bytes(file.read_bytes()[:100])
    assert refused(run(images), str(file), "on_bad_image=skip")
    assert made(images, "sae") == []

    done = run(images, "dataset.on_bad_image=skip")
    assert done.returncode == 0, done.stderr
    assert f"1 images could not be read and were {'replaced' if split == 'train' else 'left'}" in (
        done.stdout + done.stderr
    )
    (sae,), (evaluation,) = made(images, "sae"), made(images, "evaluation")
    for folder, name in ((sae, "train_dataset"), (evaluation, "dataset")):
        key = json.loads((folder / "meta.json").read_text())["key"]
        assert key[name]["left_out"] == ((split == "train") == (name == "train_dataset"))
    # What lacks an image is not used where none may be lacking.
    assert refused(run(images), str(file), "on_bad_image=skip")


def test_the_table_says_how_many_classes_compete(images):
    test = images / "test"
    for folder, wnid in zip(sorted(test.iterdir()), wnids()[100:], strict=False):
        folder.rename(test / wnid)
    classes = len(list(test.iterdir()))
    for choice, title, competing in (
        ("all", f"{classes} of 1,000 classes", 1000),
        ("present", f"{classes} classes", classes),
    ):
        done = run(
            test, f"dataset.classes={choice}", "train_dataset=scenes", "clip.pretrained=null"
        )
        assert done.returncode == 0, done.stderr
        assert title in " ".join(done.stdout.split())
        (found,) = [
            rows
            for folder in made(test, "evaluation")
            if (rows := pd.read_csv(folder / "results.csv")).competing.iloc[0] == competing
        ]
        assert set(found.classes) == {classes}


def test_one_class_is_worth_a_warning(images):
    (alone, *others) = sorted((images / "test").iterdir())
    for folder in others:
        for file in folder.iterdir():
            file.rename(alone / f"{folder.name}-{file.name}")
        folder.rmdir()
    done = run(images / "test", "train_dataset=scenes", "evaluation.settings=[no_sae]")
    assert done.returncode == 0, done.stderr
    assert "every accuracy will be 100 %" in done.stdout + done.stderr
    done = run(images / "test", "train_dataset=scenes", "evaluation=none")
    assert done.returncode == 0, done.stderr
    assert "every accuracy" not in done.stdout + done.stderr
