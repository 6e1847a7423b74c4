"""Several SAEs on one stream of tokens: each the same as alone, bit for bit, whatever happens."""

import os
import signal
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.errors import ConfigError
from clipsae.sae import SAE
from clipsae.store import Stage, Store
from clipsae.store.files import checkpoint_step
from clipsae.store.lease import begin
from clipsae.tasks import build, together
from clipsae.tasks.stages import evaluation, sae
from clipsae.tasks.together import EVALUATE, RETRY, TRAIN, Need, Turns, by_stream, meet
from run import ROOT

MODELS = [
    *("relu", "jumprelu", "gated", "topk", "batch_topk", "sparsemax"),
    *("attention_relu", "linear_sparsemax"),
]
SMALL = [
    "model.latents=64",
    "optimizer.warmup_steps=4",
    "optimizer.decay=linear",
    "model.dead_after=300",
    "model.initial_images=4",
    "features.batch_size=4",
    "+train_dataset.size=14",  # three batches an epoch
    "trainer.max_steps=10",
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=3",
    "callbacks.progress_bar=false",
]


@pytest.fixture(scope="module")
def clip():
    return FrozenCLIP.load("clipsae-tiny", "builtin")


@pytest.fixture(scope="module")
def scenes():
    return ScenesDataset(kind="all", split="train", size=14)


class Training:
    """One SAE of a sweep, in a store."""

    def __init__(self, root: Path, clip, scenes, *overrides: str) -> None:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            self.cfg = compose("config", [f"paths.output_dir={root}", *SMALL, *overrides])
        self.clip, self.scenes = clip, scenes
        self.held_out = ScenesDataset(kind="all", split="test", size=14)
        self.stage = sae.stage(self.cfg, Store(root), scenes)

    def __call__(self) -> Path:
        return together.make(
            self.stage,
            lambda folder: sae.make(
                self.cfg, self.clip, self.scenes, self.held_out, None, self.stage, folder
            ),
        )

    @property
    def weights(self) -> bytes:
        return (self.stage.path / "sae.safetensors").read_bytes()


@pytest.fixture
def make(clip, scenes):
    return lambda root, *overrides: Training(root, clip, scenes, *overrides)


@pytest.fixture
def signalled_at(monkeypatch):
    """Send this process a signal when a model reaches a step."""
    progress = Stage.progress

    def arrange(model: str, step: int, number: int = signal.SIGTERM) -> None:
        def tell(stage: Stage, done: int, total: int) -> None:
            progress(stage, done, total)
            if stage.about["model"] == model and done == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Stage, "progress", tell)

    return arrange


def interrupted(run, status: int = 128 + signal.SIGTERM) -> None:
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code in (None, status)  # None: Lightning's, of a training alone


@pytest.mark.slow
def test_every_variant_is_as_alone_also_when_interrupted_and_continued(
    tmp_path, make, signalled_at
):
    alone = {m: make(tmp_path / "alone", f"model={m}") for m in MODELS}
    shared = {m: make(tmp_path / "shared", f"model={m}") for m in MODELS}
    for training in alone.values():
        training()

    shared["relu"]()  # one is finished before, two were interrupted at different steps
    for model, step in (("topk", 4), ("batch_topk", 7)):
        signalled_at(model, step)
        interrupted(shared[model])
    for step in (2, 6):  # twice all of them
        signalled_at("sparsemax", step)
        interrupted(lambda: Turns().run(list(shared.values())))
        assert checkpoint_step(shared["sparsemax"].stage.scratch) == step
    assert checkpoint_step(shared["gated"].stage.scratch) == 6
    assert checkpoint_step(shared["batch_topk"].stage.scratch) == 7
    signalled_at("none", 0)
    shared["gated"]()  # one goes on alone
    Turns().run(list(shared.values()))
    for model in MODELS:
        assert shared[model].weights == alone[model].weights, model


@pytest.mark.parametrize("shuffle", [0, 8])
@pytest.mark.parametrize(
    # An epoch has three batches; of two that are accumulated no checkpoint can hold the first.
    ("step", "behind"),
    [(1, None), (2, None), (3, 1), (4, 2), (5, None), (7, 4)],
)
def test_wherever_it_is_interrupted(tmp_path, make, signalled_at, step, behind, shuffle):
    more = [f"features.shuffle_buffer_images={shuffle}"]
    two = [["model=relu"], ["model=topk", "trainer.accumulate_grad_batches=2"]]
    alone = [make(tmp_path / "alone", *own, *more) for own in two]
    shared = [make(tmp_path / "shared", *own, *more) for own in two]
    for training in alone:
        training()
    signalled_at("relu", step)  # before the other has its turn
    interrupted(lambda: Turns().run(shared))
    assert [checkpoint_step(s.stage.scratch) for s in shared] == [step, behind]
    signalled_at("none", 0)
    Turns().run(shared)
    assert [s.weights for s in shared] == [a.weights for a in alone]


def test_lengths_rates_and_clipping_may_differ(tmp_path, make):
    own = [
        ["model=topk", "model.k=4", "trainer.max_steps=5"],
        [
            "model=topk",
            "model.k=8",
            "optimizer.learning_rate=3e-3",
            "trainer.gradient_clip_val=0.1",
        ],
        ["model=sparsemax", "optimizer.decay=cosine", "trainer.max_steps=13", "model.latents=32"],
    ]
    alone = [make(tmp_path / "alone", *some) for some in own]
    shared = [make(tmp_path / "shared", *some) for some in own]
    for training in alone:
        training()
    Turns().run(shared)
    assert [s.weights for s in shared] == [a.weights for a in alone]


def test_from_a_cache(tmp_path, make):
    more = ["task=cache", "features.block_images=2", "features.buffer_images=8"]
    alone = [make(tmp_path / "alone", f"model={m}", *more) for m in ("relu", "topk")]
    shared = [make(tmp_path / "shared", f"model={m}", *more) for m in ("relu", "topk")]
    for training in alone:
        training()
    Turns().run(shared)
    assert [s.weights for s in shared] == [a.weights for a in alone]


def test_the_prefix_runs_once_a_batch(tmp_path, make, monkeypatch):
    calls = []
    prefix = FrozenCLIP.prefix
    monkeypatch.setattr(FrozenCLIP, "prefix", lambda *a: calls.append(0) or prefix(*a))
    models = [make(tmp_path, f"model={m}") for m in ("relu", "topk", "gated")]
    Turns().run(models)
    own = 1 + 2  # the first images, and two looks at held-out ones
    assert len(calls) == 10 + 3 * own


def test_one_that_diverges_stops_alone(tmp_path, make):
    bad = make(
        tmp_path, "model=relu", "optimizer.learning_rate=1e38", "trainer.log_every_n_steps=1"
    )
    good = make(tmp_path, "model=topk")
    alone = make(tmp_path / "alone", "model=topk")
    alone()
    with pytest.raises(ConfigError, match="the loss became NaN or infinite at step"):
        Turns().run([bad, good])
    assert good.weights == alone.weights
    assert not bad.stage.finished


def test_what_another_process_makes_is_left_out_until_the_end(tmp_path, make, monkeypatch):
    theirs, mine = make(tmp_path, "model=relu"), make(tmp_path, "model=topk")
    begun = []

    def watch(need):
        begun.append(need.order[0])
        if need.order[0] == together.WAIT:
            assert mine.stage.finished
            held.release()
        return meet(need)

    theirs.stage.path.parent.mkdir(parents=True)
    held = begin(theirs.stage.partial, 15.0)
    monkeypatch.setattr(together, "meet", watch)
    Turns().run([theirs, mine])
    assert theirs.stage.finished
    assert begun.index(RETRY) < begun.index(together.WAIT)


def test_cells_are_grouped_by_what_decides_the_tokens(tmp_path, make):
    def groups(*cells: str) -> list[list[int]]:
        return by_stream([make(tmp_path, *cell.split()).cfg for cell in cells])

    assert groups(
        "model=topk model.k=8",
        "model=topk seed=1",
        "model=relu trainer.max_steps=7 dataset=scenes_shape",  # another dataset to evaluate on
        "clip.layer=-1",
        "features.batch_size=2",
        "features.shuffle_buffer_images=8",
        "task=cache",
        "seed=1 trainer.accumulate_grad_batches=2",
    ) == [[0, 2], [1, 7], [3], [4], [5], [6]]


def test_one_pass_evaluates_all_with_the_numbers_of_each_alone(tmp_path, make, clip, monkeypatch):
    images = ScenesDataset(kind="shape", split="test", size=24)
    classifier = torch.randn(8, clip.embed_dim, generator=torch.Generator().manual_seed(0))
    few = ["evaluation.ns=[1,5]", "measurement.metrics=[sparsity,cknna,monosemanticity]"]
    cells = [
        make(tmp_path, "dataset=scenes_shape", *few, *own)
        for own in (
            ["model=relu", "evaluation.count_threshold=0.5"],
            ["model=topk"],
            ["model=sparsemax", "model.latents=32"],
        )
    ]
    passes = []
    run = evaluation.evaluate

    def counted(clip, saes, *args, **options):
        passes.append(len(saes))
        return run(clip, saes, *args, **options)

    monkeypatch.setattr(evaluation, "evaluate", counted)

    def job(i: int, folder: Path):
        folder.mkdir()
        trained, own = (
            Store(tmp_path).stage("sae", [str(i)], {}),
            Store(tmp_path).stage("evaluation", [], {}),
        )
        return lambda: evaluation.make(cells[i].cfg, clip, trained, classifier, images, own, folder)

    for i, cell in enumerate(cells):
        of = SAE(d=clip.width, **build.sae_options(cell.cfg))
        Store(tmp_path).stage("sae", [str(i)], {}).make(of.save)
        job(i, tmp_path / f"alone{i}")()
    Turns().run([job(i, tmp_path / f"shared{i}") for i in range(3)])
    assert passes == [1, 1, 1, 3]
    for i in range(3):
        found = {path.name: path.read_bytes() for path in (tmp_path / f"shared{i}").iterdir()}
        assert len(found) == 6
        for path in (tmp_path / f"alone{i}").iterdir():
            assert found[path.name] == path.read_bytes(), path


# --- turns ---


def test_the_one_that_is_furthest_behind_comes_first_and_equals_share():
    served = []

    def cell(start: int):
        def job():
            return [needs(position) for position in range(start, 3)]

        def needs(position: int):
            def serve(own):
                served.append((position, own))
                return [10 * o for o in own]

            return meet(Need((TRAIN, 0, position), start, serve))

        return job

    assert Turns().run([cell(2), cell(0), cell(2), cell(3)]) == [[20], [0, 0, 0], [20], []]
    assert served == [(0, [0]), (1, [0]), (2, [2, 0, 2])]


def test_random_numbers_are_the_cells_own():
    def cell(seed: int):
        def job():
            torch.manual_seed(seed)
            found = []
            for i in range(4):
                found.append(float(torch.rand(())))
                meet(Need((TRAIN, i), None, lambda own: own))
            return found

        return job

    assert Turns().run([cell(1), cell(2)]) == [cell(1)(), cell(2)()]


def test_a_piece_that_fails_for_all_is_tried_for_each():
    def cell(own):
        def serve(all_of_them):
            if 0 in all_of_them:
                raise ValueError("0 cannot be")
            return all_of_them

        return lambda: meet(Need((EVALUATE, "dataset"), own, serve))

    done = []
    with pytest.raises(ValueError, match="0 cannot be"):
        Turns().run([cell(0), lambda: done.append(cell(1)())])
    assert done == [1]


def test_alone_nothing_is_waited_for():
    assert meet(Need((TRAIN, 0, 0), 3, lambda own: [2 * o for o in own])) == 6


def test_where_someone_listens_checkpoints_are_written_and_the_work_goes_on(
    tmp_path, make, signalled_at
):
    """As under submitit: SIGTERM announces SIGKILL, SIGUSR2 is for submitit."""
    steps = []
    shared = [make(tmp_path / "shared", f"model={m}") for m in ("relu", "topk")]
    alone = [make(tmp_path / "alone", f"model={m}") for m in ("relu", "topk")]
    for training in alone:
        training()

    def note(*_):
        steps.append([checkpoint_step(s.stage.scratch) for s in shared])

    before = signal.signal(signal.SIGUSR2, note)
    try:
        signalled_at("relu", 3, signal.SIGTERM)
        at_the_fifth = Need((TRAIN, 1, 1, "then"), None, lambda own: [note()])
        Turns().run([*shared, lambda: meet(at_the_fifth)])
        assert steps == [[3, 2]]
        assert [s.weights for s in shared] == [a.weights for a in alone]
        signalled_at("sparsemax", 3, signal.SIGUSR2)
        shared.append(make(tmp_path / "shared", "model=sparsemax"))
        Turns().run(shared)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert steps == [[3, 2], [None, None, 3]]
