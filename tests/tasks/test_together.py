"""`together=true`: several SAEs on one stream of tokens, each the same as alone, bit for bit."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from clipsae.clip import FrozenCLIP
from clipsae.errors import ConfigError
from clipsae.sae import SAE
from clipsae.store import Stage, put_checkpoint
from clipsae.store.files import checkpoint_step
from clipsae.store.lease import begin
from clipsae.tasks import experiment
from clipsae.tasks.experiment import Experiment, produce
from clipsae.tasks.stages import evaluation
from clipsae.tasks.together import by_stream
from run import ROOT
from tests.warm import run_py, start_py

MODELS = [
    *("relu", "jumprelu", "gated", "topk", "batch_topk", "sparsemax"),
    *("attention_relu", "linear_sparsemax"),
]
SMALL = [
    "model.latents=64",
    "optimizer.warmup_steps=4",
    "optimizer.decay=linear",
    "optimizer.sparsity_warmup_steps=0",
    "model.dead_after=300",
    "model.initial_images=4",
    "features.batch_size=4",
    "features.num_workers=0",
    "+train_dataset.size=14",  # three batches an epoch
    "dataset=scenes_shape",
    "trainer.max_steps=10",
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=3",
    "callbacks.progress_bar=false",
    "callbacks.prediction_images=0",
    "evaluation=none",
    "measurement=none",
    "logger=none",
]
TWO = [
    ["model=relu", "optimizer.sparsity_warmup_steps=8"],
    ["model=topk", "trainer.accumulate_grad_batches=2"],
]


@pytest.fixture(scope="module", autouse=True)
def clip():
    """Kept, so that every cell shares it."""
    return FrozenCLIP.load("clipsae-tiny", "builtin")


@pytest.fixture
def prepare() -> Callable[..., list[Experiment]]:
    def prepare(root: Path, *cells: list[str]) -> list[Experiment]:
        found = []
        for overrides in cells:
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                cfg = compose(
                    "config",
                    [f"paths.output_dir={root}", *SMALL, *overrides],
                    return_hydra_config=True,
                )
            with open_dict(cfg):
                cfg.hydra.runtime.output_dir = str(root / "job")
            HydraConfig.instance().set_config(cfg)
            cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
            found.append(experiment.prepare(cfg))
        return found

    yield prepare
    HydraConfig.instance().cfg = None


@pytest.fixture
def signalled_at(monkeypatch):
    """Send this process a signal when a model reaches a step."""
    progress = Stage.progress

    def arrange(model: str, step: int, number: int = signal.SIGTERM) -> None:
        def report(stage: Stage, done: int, total: int) -> None:
            progress(stage, done, total)
            if stage.about["model"] == model and done == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Stage, "progress", report)

    return arrange


def alone(cells: list[Experiment]) -> list[bytes]:
    for cell in cells:
        produce([cell])
    return weights(cells)


def weights(cells: list[Experiment]) -> list[bytes]:
    return [(cell.trained.path / "sae.safetensors").read_bytes() for cell in cells]


def steps(cells: list[Experiment]) -> list[int | None]:
    """Of the checkpoints."""
    return [checkpoint_step(cell.trained.scratch) for cell in cells]


def interrupted(cells: list[Experiment]) -> None:
    with pytest.raises(SystemExit) as stop:
        produce(cells)
    assert stop.value.code in (None, 128 + signal.SIGTERM)  # None: Lightning's


@pytest.mark.slow
def test_every_variant_is_as_alone_also_when_interrupted_and_continued(
    tmp_path, prepare, signalled_at
):
    cells = [[f"model={model}"] for model in MODELS]
    expected = alone(prepare(tmp_path / "alone", *cells))
    shared = dict(zip(MODELS, prepare(tmp_path / "shared", *cells), strict=True))
    several = list(shared.values())
    produce([shared["relu"]])  # one is finished before, two were interrupted at different steps
    for model, step in (("topk", 4), ("batch_topk", 7)):
        signalled_at(model, step)
        interrupted([shared[model]])
    for step in (2, 6):  # twice all of them
        signalled_at("sparsemax", step)
        interrupted(several)
        assert steps([shared["sparsemax"], shared["gated"]]) == [step, step]
    assert steps([shared["topk"], shared["batch_topk"]]) == [6, 7]
    signalled_at("none", 0)
    produce([shared["gated"]])  # one goes on alone
    produce(several)
    assert weights(several) == expected


@pytest.mark.parametrize(
    # An epoch has three batches, of which the last is a step of its own where two are accumulated.
    ("step", "shuffle", "other"),
    [(1, 0, 0), (2, 8, 1), (3, 0, 2), (4, 8, 2), (7, 0, 4)],
)
def test_wherever_it_is_interrupted(tmp_path, prepare, signalled_at, step, shuffle, other):
    cells = [[*one, f"features.shuffle_buffer_images={shuffle}"] for one in TWO]
    expected = alone(prepare(tmp_path / "alone", *cells))
    shared = prepare(tmp_path / "shared", *cells)
    signalled_at("relu", step)
    interrupted(shared)
    assert steps(shared) == [step, other]
    signalled_at("none", 0)
    produce(shared)
    assert weights(shared) == expected


def test_cells_that_learn_their_sparsity_train_after_the_others(prepare, tmp_path):
    cells = [
        *(["model=jumprelu", "model.target_l0=auto"], ["model=relu"]),
        *(["model=topk", "model.k=auto"], ["model=sparsemax"], ["model=topk"]),
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        configs = [compose("config", [*SMALL, *cell]) for cell in cells]
    assert by_stream(configs) == [[1, 3, 4], [0, 2]]


def test_random_numbers_of_a_step_are_those_of_the_sae_alone(
    tmp_path, prepare, signalled_at, monkeypatch
):
    forward = SAE.forward

    def noisy(sae, tokens):
        noise = 0.1 * torch.randn_like(tokens)
        return forward(sae, tokens + noise if sae.training else tokens)

    monkeypatch.setattr(SAE, "forward", noisy)
    expected = alone(prepare(tmp_path / "alone", *TWO))
    shared = prepare(tmp_path / "shared", *TWO)
    signalled_at("relu", 5)
    interrupted(shared)
    signalled_at("none", 0)
    produce(shared)
    assert weights(shared) == expected


def test_a_checkpoint_of_an_earlier_version_is_ignored(tmp_path, prepare, caplog):
    (cell,) = prepare(tmp_path, ["model=topk"])
    cell.trained.scratch.mkdir(parents=True)
    aside = tmp_path / "aside"
    torch.save({"global_step": 3, "state_dict": {}}, aside)
    put_checkpoint(aside, cell.trained.scratch / "last.ckpt", 3)
    produce([cell])
    assert "checkpoint of an earlier version" in caplog.text
    assert cell.trained.finished


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_mixed_precision_clips_gradients(tmp_path, prepare, algorithm):
    mixed = ["model=topk", "precision=bf16"]
    how = f"+trainer.gradient_clip_algorithm={algorithm}"
    cells = [[*mixed, how, f"trainer.gradient_clip_val={value}"] for value in (1e-9, 1e9)]
    assert len(set(alone(prepare(tmp_path, *cells)))) == 2


@pytest.mark.parametrize(
    "common", [[], ["task=cache", "features.block_images=2", "features.buffer_images=8"]]
)
def test_lengths_rates_sizes_and_clipping_may_differ(tmp_path, prepare, common, monkeypatch):
    cells = [
        ["model=topk", "model.k=4", "trainer.max_steps=5", *common],
        ["model=topk", "optimizer.learning_rate=3e-3", "trainer.gradient_clip_val=0.1", *common],
        ["model=sparsemax", "optimizer.decay=cosine", "trainer.max_steps=13", *common],
        ["model=relu", "model.latents=32", "trainer.accumulate_grad_batches=2", *common],
    ]
    cells = [[one for one in cell if not one.startswith("task=")] for cell in cells]
    if common:
        cells = [[*cell, "features=cached"] for cell in cells]
    expected = alone(prepare(tmp_path / "alone", *cells))
    calls = []
    prefix = FrozenCLIP.prefix
    monkeypatch.setattr(FrozenCLIP, "prefix", lambda *a, **b: calls.append(0) or prefix(*a, **b))
    shared = prepare(tmp_path / "shared", *cells)
    produce(shared)
    assert weights(shared) == expected
    if not common:  # the tokens of each batch are computed once
        assert len(calls) == 1 + 15 + 15 // 4  # the first images, the batches, the validations


@pytest.mark.parametrize("features", ["online", "cached", "images"])
def test_layers_are_read_in_one_pass_and_each_is_as_alone(
    tmp_path, prepare, features, monkeypatch, signalled_at
):
    common = [f"features={features}", "features.tokens=patches", "trainer.max_steps=5"]
    if features == "cached":
        common += ["features.block_images=2", "features.buffer_images=8"]
    cells = [
        ["model=topk", "clip.layer=-1", *common],
        ["model=relu", "clip.layer=1", *common],  # of four
        ["model=batch_topk", "clip.layer=-2", "model.k=4", *common],
        ["model=topk", "clip.layer=-2", *common],
    ]
    expected = alone(prepare(tmp_path / "alone", *cells))
    single, several = [], []
    prefix, prefixes = FrozenCLIP.prefix, FrozenCLIP.prefixes
    monkeypatch.setattr(FrozenCLIP, "prefix", lambda *a, **k: single.append(0) or prefix(*a, **k))
    monkeypatch.setattr(
        FrozenCLIP,
        "prefixes",
        lambda clip, x, at, **k: several.append(list(at)) or prefixes(clip, x, at, **k),
    )
    shared = prepare(tmp_path / "shared", *cells)
    assert len(by_stream([cell.cfg for cell in shared])) == 1
    if features == "online":
        signalled_at("relu", 3)
        interrupted(shared)
        signalled_at("none", 0)
    produce(shared)
    assert weights(shared) == expected
    assert all(at == [-3, -2, -1] for at in several)
    assert not single
    if features == "cached":  # a folder for each layer, the same as alone
        assert len(several) == 1 + 1  # all images, and a validation
        folders = [
            sorted((tmp_path / at / "features").glob("[!.]*/tokens*")) for at in ("alone", "shared")
        ]
        assert [f.parent.name for f in folders[0]] == [f.parent.name for f in folders[1]]
        assert len(folders[0]) == 3
        assert [f.read_bytes() for f in folders[0]] == [f.read_bytes() for f in folders[1]]


def test_one_that_goes_on_in_another_precision_does_so_by_itself(tmp_path, prepare):
    cells = [["model=topk", "precision=tf32"], ["model=relu", "precision=float32"]]
    expected = alone(prepare(tmp_path / "alone", *cells))
    begun, _ = prepare(tmp_path / "shared", *cells)
    begun.trained.partial.mkdir(parents=True)  # on a GPU, then
    shared = prepare(tmp_path / "shared", ["model=topk"], ["model=relu"])
    assert [cell.cfg.precision for cell in shared] == ["tf32", "float32"]
    produce(shared)
    assert weights(shared) == expected


def test_one_that_fails_ends_alone(tmp_path, prepare):
    bad = ["model=relu", "optimizer.learning_rate=1e38", "trainer.log_every_n_steps=3"]
    (expected,) = alone(prepare(tmp_path / "alone", ["model=topk"]))
    diverged, good = prepare(tmp_path / "shared", bad, ["model=topk"])
    produce([diverged, good])
    with pytest.raises(ConfigError, match="the loss became NaN or infinite at step"):
        diverged.show()
    assert weights([good]) == [expected]
    assert good.training_error is None
    assert not diverged.trained.finished


def test_what_another_process_makes_is_left_out_until_the_end(tmp_path, prepare, monkeypatch):
    theirs, mine = prepare(tmp_path, ["model=relu"], ["model=topk"])
    theirs.trained.path.parent.mkdir(parents=True)
    held = begin(theirs.trained.partial, 15.0)
    make = Stage.make

    def release(stage: Stage, *args, **options):
        if stage is theirs.trained and options["wait"]:
            assert mine.trained.finished
            held.release()
        return make(stage, *args, **options)

    monkeypatch.setattr(Stage, "make", release)
    produce([theirs, mine])
    assert theirs.trained.finished


def test_cells_are_grouped_by_what_decides_the_tokens(tmp_path, prepare):
    cells = (
        "model=topk model.k=8",
        "model=topk seed=1",
        "model=relu trainer.max_steps=7 dataset=scenes_colour",  # another dataset to evaluate on
        "clip.layer=-1",
        "features.batch_size=2",
        "features.shuffle_buffer_images=8",
        "precision=bf16",
        "seed=1 trainer.accumulate_grad_batches=2",
    )
    found = prepare(tmp_path, *(cell.split() for cell in cells))
    # (Another layer is read in the same pass.)
    assert by_stream([cell.cfg for cell in found]) == [[0, 2, 3], [1, 7], [4], [5], [6]]


def test_one_pass_evaluates_all_with_the_numbers_of_each_alone(tmp_path, prepare, monkeypatch):
    few = [
        *("evaluation=default", "evaluation.ns=[1,5]", "measurement=default", "dataset.size=24"),
        *("measurement.metrics=[sparsity,cknna,monosemanticity]", "trainer.max_steps=1"),
    ]
    cells = [
        ["model=relu", *few, "evaluation.count_threshold=0.5"],
        ["model=topk", *few],
        ["model=sparsemax", *few, "model.latents=32"],
    ]
    passes = []
    run = evaluation.evaluate

    def counted(clip, saes, *args, **options):
        passes.append(len(saes))
        return run(clip, saes, *args, **options)

    monkeypatch.setattr(evaluation, "evaluate", counted)
    found = {}
    for name in ("alone", "shared"):
        several = prepare(tmp_path / name, *cells)
        for some in [several] if name == "shared" else [[cell] for cell in several]:
            produce(some)
        found[name] = {
            f"{cell.cfg.model.name}/{path.name}": path.read_bytes()
            for cell in several
            for path in cell.evaluated.path.iterdir()
            if path.name not in ("meta.json", "config.yaml")
        }
    assert passes == [1, 1, 1, 3]
    assert len(found["alone"]) == 3 * 5
    assert found["shared"] == found["alone"]


def test_where_sigusr2_has_a_handler_checkpoints_are_written_and_the_work_goes_on(
    tmp_path, prepare, signalled_at, monkeypatch
):
    """As under submitit and SLURM: SIGTERM announces SIGKILL, SIGUSR2 is for submitit."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    expected = alone(prepare(tmp_path / "alone", *TWO))
    found = []
    before = signal.signal(signal.SIGUSR2, lambda *_: found.append(steps(shared)))
    try:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            shared = prepare(tmp_path / number.name, *TWO)
            signalled_at("relu", 4, number)
            produce(shared)
            assert weights(shared) == expected
        # On this machine nothing follows a SIGTERM: the training ends.
        monkeypatch.delenv("SLURM_JOB_ID")
        shared = prepare(tmp_path / "local", *TWO)
        signalled_at("relu", 4)
        interrupted(shared)
        assert steps(shared) == [4, 2]
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert found == [[4, 2]]


# --- as a user runs it ---

SWEEP = [
    "model.latents=128",
    "trainer.max_steps=12",
    "optimizer.sparsity_warmup_steps=0",
    "trainer.log_every_n_steps=4",
    "trainer.val_check_interval=6",
    "trainer.limit_val_batches=1",
    "features.batch_size=4",
    "dataset.size=40",
    "evaluation.settings=[no_sae,on]",
    "measurement=none",
    "logger=csv",
]


def sweep_of(folder: Path, *more: str) -> list[str]:
    return ["-m", *SWEEP, *more, f"paths.output_dir={folder}"]


@pytest.mark.slow
def test_results_are_those_of_each_alone_and_what_fails_harms_no_other(tmp_path):
    cells = [
        "model=relu,topk",
        "optimizer.learning_rate=1e-3,1e38",
        "dataset=scenes_shape,scenes_colour",
    ]
    found = {}
    for name in ("shared", "alone"):
        done = run_py(*sweep_of(tmp_path / name, *cells, f"together={name == 'shared'}"))
        assert done.returncode == 1, done.stdout
        assert "4 of 8 jobs failed" in done.stdout
        assert "the loss became NaN or infinite" in done.stdout
        assert "Traceback" not in done.stdout
        found[name] = {
            path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
            for kind in ("sae/[!.]*/sae.safetensors", "evaluation/[!.]*/results.csv")
            for path in (tmp_path / name).glob(kind)
        }
    assert len(found["alone"]) == 2 + 4
    assert found["shared"] == found["alone"]
    # Each cell's folder has its log, with the lines of all, and its numbers, as alone.
    logs = {
        path.parent: path.read_text()
        for path in (tmp_path / "shared").glob("sweeps/*/*/clipsae.log")
    }
    assert [text.count("training topk") for text in logs.values()] == [2] * 8
    numbers = [pd.read_csv(path) for path in (tmp_path / "shared").glob("sweeps/*/*/metrics.csv")]
    curves = [table["train/loss"].notna().sum() for table in numbers if "train/loss" in table]
    assert sorted(curves) == [3, 3]
    assert sum(table.get("topn/on_128", pd.Series()).notna().sum() for table in numbers) == 4


@pytest.mark.slow
def test_ctrl_c_saves_all_and_the_same_command_continues(tmp_path):
    sweep = ["model=relu,topk", "together=true", "trainer.max_steps=200"]
    process = start_py(*sweep_of(tmp_path, *sweep, "callbacks.checkpoint_every_n_steps=10"))
    while not list(tmp_path.glob("sae/.*/*/scratch/last.ckpt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130, said
    assert "interrupted: run the same command again" in said
    assert "Traceback" not in said
    assert len(list(tmp_path.glob("sae/.*/free/scratch/last.ckpt"))) == 2
    again = run_py(*sweep_of(tmp_path, *sweep), check=True)
    assert again.stdout.count("continuing the training") == 2
