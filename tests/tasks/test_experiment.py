"""The main job as a user runs it: a real process each, on the built-in model and scenes."""

import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from tests.warm import run_py, start_py

SMALL = [
    "model.latents=128",
    "trainer.max_steps=12",
    "trainer.log_every_n_steps=5",
    "trainer.val_check_interval=6",
    "trainer.limit_val_batches=1",
    "features.batch_size=4",
    "features.num_workers=0",
    "dataset.size=40",
]


def small(folder: Path, *overrides: str, **options) -> subprocess.CompletedProcess:
    return run_py(*overrides, f"paths.output_dir={folder}", *SMALL, **options)


@pytest.mark.slow
def test_the_default_job_ends_with_a_table_and_says_where_things_are(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = small(tmp_path / "out", "logger.mode=offline", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert list(elsewhere.iterdir()) == []

    (evaluation,) = (tmp_path / "out").glob("evaluation/*")
    (sae,) = (tmp_path / "out").glob("sae/*")
    assert str(evaluation) in done.stdout
    assert str(sae) in done.stdout
    rows = pd.read_csv(evaluation / "results.csv")
    assert set(rows.setting) == {"no_sae", "on", "off", "self"}
    assert sorted(rows.n[rows.setting == "on"]) == [1, 5, 10, 50, 128]
    assert set(rows.model) == {"sparsemax"}
    assert {"k", "seed", "protocol", "dataset", "micro_accuracy"} <= set(rows.columns)
    assert f"{rows.accuracy[rows.setting == 'no_sae'].iloc[0]:.2f}" in done.stdout
    assert (evaluation / "config.yaml").is_file()
    meta = json.loads((evaluation / "meta.json").read_text())
    assert meta["key"]["sae"] == sae.name
    assert set(meta) >= {"versions", "git_commit", "host"}

    metrics = pd.read_csv(evaluation / "metrics.csv").set_index("metric").value
    diagnostics = json.loads((evaluation / "diagnostics.json").read_text())
    assert set(diagnostics) == {"count_threshold", "share_above_threshold", "class_accuracy"}
    assert {"cknna", "monosemanticity_mean", "l0_dense", "patch_concepts_found"} <= set(
        metrics.index
    )
    assert "shape_colour" in evaluation.name
    assert set(pd.read_csv(evaluation / "concepts.csv").level) == {
        *("patch", "object", "image", "localization")
    }

    # The offline W&B runs hold the same numbers, the config, and no path of this machine.
    inspected = {}
    for stage in (sae, evaluation):
        (record,) = (tmp_path / "out" / "wandb").glob(f"offline-run-*/*{stage.name[-10:]}.wandb")
        told = ["wandb", "leet", "inspect", record, "--summary", "--json"]
        read = subprocess.run(told, capture_output=True, text=True)
        assert read.returncode == 0, read.stderr
        inspected[stage] = json.loads(read.stdout)
    summary = inspected[evaluation]["summary"]
    on = rows[rows.setting == "on"].set_index("n").accuracy
    for n in on.index:
        assert float(find(summary, f"topn/on_{n:.0f}")) == pytest.approx(on[n])
    assert float(find(inspected[sae]["summary"], "val/fvu")) > 0
    assert float(find(summary, "measure/cknna")) == pytest.approx(metrics["cknna"])
    for told in inspected.values():
        assert find(told["config"], "model")["name"] == "sparsemax"
        assert str(tmp_path) not in json.dumps(told["config"])


def find(tree: dict, name: str):
    """A value by its flat name, where the tree may be nested at slashes."""
    if name in tree:
        return tree[name]
    first, rest = name.split("/", 1)
    return find(tree[first], rest)


@pytest.mark.slow
def test_a_backbone_without_texts_is_trained_and_measured(tmp_path):
    backbone = ("clip=dinov2_s_14", "clip.pretrained=null", "clip.image_size=56", "logger=csv")
    scenes = ("dataset=image_folder", f"dataset.root={tmp_path / 'images'}")
    for split in ("train", "val"):
        for c, colour in enumerate(("red", "blue")):
            folder = tmp_path / "images" / split / colour
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (64, 64), (255 * (c == 0), 40 * i, 255 * c)).save(
                    folder / f"{i}.png"
                )
    size = [option for option in SMALL if not option.startswith("dataset.")]
    options = (*backbone, *scenes, f"paths.output_dir={tmp_path / 'out'}", *size)
    refused = run_py(*options)
    assert refused.returncode == 1
    said = refused.stdout.splitlines()[-1]
    assert "has no text tower" in said
    assert "evaluation=none" in said
    assert not (tmp_path / "out" / "sae").exists()

    done = run_py(*options, "evaluation=none")
    assert done.returncode == 0, done.stderr
    (evaluation,) = (tmp_path / "out").glob("evaluation/*")
    assert "timm_vit_small_patch14_dinov2" in evaluation.name
    metrics = pd.read_csv(evaluation / "metrics.csv").set_index("metric").value
    assert f"FVU {metrics['fvu']:.3f}" in done.stdout
    assert not (evaluation / "results.csv").exists()


@pytest.mark.slow
def test_two_sweeps_at_once_share_one_store(tmp_path):
    sweep = [
        *("-m", "model=topk,relu", "dataset=scenes_shape,scenes_colour", "logger=none"),
        *("evaluation.settings=[no_sae,on]", "measurement=none"),
        "optimizer.sparsity_warmup_steps=0",
    ]

    def start(store: str, name: str) -> subprocess.Popen:
        more = [f"paths.output_dir={tmp_path / store}", f"sweep_name={name}"]
        return start_py(*sweep, *SMALL, *more)

    said = ""
    for sweeps in (("shared", "a"), ("shared", "b")), (("alone", "a"),):
        running = [start(*one) for one in sweeps]
        told = [process.communicate(timeout=300)[0] for process in running]
        assert [process.returncode for process in running] == [0] * len(running), told
        said = said or "".join(told)
    assert said.count("training topk") == said.count("training relu") == 1
    for kind, file, count in ("sae", "sae.safetensors", 2), ("evaluation", "results.csv", 4):
        found = [
            {
                path.parent.name: path.read_bytes()
                for path in tmp_path.glob(f"{store}/{kind}/*/{file}")
            }
            for store in ("shared", "alone")
        ]
        assert len(found[0]) == count
        assert found[0] == found[1]
    assert not list(tmp_path.glob("shared/*/.*partial*"))


@pytest.mark.slow
def test_ways_of_ranking_lie_side_by_side_and_clip_alone_can_be_evaluated(tmp_path):
    more = ("logger=none", "dataset=scenes_colour", "measurement=none")
    for overrides, words in (
        (["evaluation.protocol=heldout"], "heldout protocol, ranked by contrast)"),
        (["evaluation.ranking=frequency"], "paper protocol)"),
        (["evaluation.settings=[no_sae]"], "CLIP without an SAE"),
    ):
        done = small(tmp_path, *more, *overrides)
        assert done.returncode == 0, done.stderr
        assert words in " ".join(done.stdout.split())
    tables = [pd.read_csv(file) for file in tmp_path.glob("evaluation/*/results.csv")]
    ways = [tuple(*set(zip(t.protocol, t.ranking, strict=True))) for t in tables]
    expected = [("heldout", "contrast"), ("paper", "contrast"), ("paper", "frequency")]
    assert sorted(ways) == expected
    assert ["no_sae"] in [list(table.setting) for table in tables]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset=image_folder", "dataset.root=nowhere"], "nowhere"),
        (["model=topk", "model.k=0"], "model.k=0: expected an integer of at least 1"),
        (["clip=vit_b_16", "clip.name=ViT-B-16"], "use clip.name=ViT-B-16-quickgelu"),
        (["clip=vit_b_16", "clip.name=RN50"], "ResNet"),
        (["optimizer.learning_rate=-1"], "learning_rate"),
        (["features.batch_size=0"], "batch_size=0"),
        (["evaluation.protocol=papre"], "expected paper or heldout"),
        (["measurement.metrics=[cknna,l00]"], "l00"),
        (["measurement.image_encoder=dino"], "open_clip:MODEL/WEIGHTS"),
        (["model=topk", "model.k=auto"], "run the same command with model=sparsemax first"),
        (["model=toppk"], "topk"),
        (["model.kk=3"], "kk"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_before_anything_begins(tmp_path, overrides, words):
    done = run_py(f"paths.output_dir={tmp_path}", "logger=none", *overrides)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert words in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("sae/*"))
    assert not list(tmp_path.glob("sae/.*"))
