"""`precision=`: what it means, which results it tells apart, and which it finds."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.metrics.stability import max_cosines
from clipsae.sae import SAE
from clipsae.store import Stage, Store
from clipsae.tasks import build, precision
from clipsae.tasks.stages import evaluation, features, sae
from clipsae.training.module import SAEModule
from run import ROOT
from tests.warm import run_py

SMALL = (
    *("model=batch_topk", "model.latents=64", "model.k=4", "trainer.max_steps=3"),
    *("+train_dataset.size=32", "dataset.size=24", "features.batch_size=8", "logger=none"),
    *("measurement=none", "callbacks.prediction_images=0", "callbacks.progress_bar=false"),
)


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*SMALL, "features=cached", *overrides])


@pytest.fixture
def gpu(monkeypatch):
    """A GPU since Ampere is there, or not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def pretend(there: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: there)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")

    yield pretend
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def sae_stage(cfg: DictConfig, store: Store) -> Stage:
    return sae.stage(cfg, store, build.build_dataset(cfg.train_dataset, "train", 64))


def test_which_results_it_tells_apart(tmp_path):
    names: dict[str, dict[str, str]] = {}
    for value in ("float32", "tf32", "bf16"):
        cfg = config(f"precision={value}")
        images = build.build_dataset(cfg.train_dataset, "train", 64)
        trained = sae_stage(cfg, Store(tmp_path))
        evaluated = evaluation.stage(cfg, Store(tmp_path), trained, images)
        stages = {"sae": trained, "evaluation": evaluated, "features": features.stage(cfg, images)}
        names[value] = {kind: stage.path.name for kind, stage in stages.items()}
        if value == "float32":  # as where the options were called clip. and trainer.precision
            assert trained.key["clip"]["precision"] == "fp32"
            assert trained.key["training"]["trainer"]["precision"] == "32-true"
    for kind in ("sae", "evaluation"):
        assert len({found[kind] for found in names.values()}) == 3
    # Tokens are the same under tf32 and bf16.
    assert names["float32"]["features"] != names["tf32"]["features"] == names["bf16"]["features"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("made", ["float32", "tf32", "bf16"])
def test_auto_finds_what_was_made_elsewhere(tmp_path, gpu, there, made):
    store, own = Store(tmp_path), "tf32" if there else "float32"
    gpu(there)

    def resolved() -> str:
        cfg = config("precision=auto")
        found = precision.resolve(cfg, lambda: sae_stage(cfg, store))
        assert found.path == sae_stage(cfg, store).path
        return cfg.precision

    assert resolved() == own
    place = sae_stage(config(f"precision={made}"), store)
    place.partial.mkdir(parents=True)
    assert resolved() == (own if there else made)  # a GPU does not go on with a CPU's work
    place.partial.rmdir()
    place.make(lambda folder: (folder / "weights").write_text("w"))
    assert resolved() == made
    sae_stage(config(f"precision={own}"), store).make(
        lambda folder: (folder / "weights").write_text("w")
    )
    assert resolved() == own


def test_a_training_on_the_cpu_of_a_machine_with_a_gpu(tmp_path, gpu):
    gpu(True)
    cfg = config("trainer.accelerator=cpu")
    precision.resolve(cfg, lambda: sae_stage(cfg, Store(tmp_path)))
    assert cfg.precision == "float32"


# (Without a GPU PyTorch's settings stay as they are.)
@pytest.mark.parametrize(
    ("value", "there", "flags", "of_clip", "said"),
    [
        ("float32", False, ("highest", True), "fp32", "everything in float32 (CPU)"),
        ("float32", True, ("highest", False), "fp32", "everything in float32 (NVIDIA H100)"),
        ("tf32", True, ("high", True), "bf16-mixed", "SAE products in TF32; CLIP in bf16 autocast"),
        ("tf32", False, ("highest", True), "bf16-mixed", "in float32, as there is no TF32 here;"),
        (
            "bf16",
            True,
            ("high", True),
            "bf16-mixed",
            "in bf16 autocast in training, otherwise TF32",
        ),
    ],
)
def test_what_is_set_and_said(gpu, value, there, flags, of_clip, said):
    gpu(there)
    cfg, clip = config(f"precision={value}"), FrozenCLIP.load("clipsae-tiny", "builtin")
    for other in ("tf32", "float32", value):  # the job before in this process may have another
        precision.apply(config(f"precision={other}"), clip)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == flags
    assert clip.precision == of_clip
    assert said in precision.described(cfg)


def test_figures_that_are_products_are_never_tf32(gpu, monkeypatch):
    torch.set_float32_matmul_precision("high")
    seen = []
    normalize = torch.nn.functional.normalize

    def spy(*args, **options):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return normalize(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "normalize", spy)
    max_cosines(torch.eye(2), torch.eye(2))
    assert set(seen) == {"ieee"}
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision() == "high"


def test_trained_under_autocast_with_weights_in_float32(tmp_path, monkeypatch):
    cfg = config("precision=bf16", "features=online", f"paths.output_dir={tmp_path}")
    seen: dict[str, set[torch.dtype]] = {"products": set(), "moments": set()}
    step, after = SAEModule.training_step, SAEModule.on_after_optimizer_step

    def training_step(module, tokens, batch_idx):
        scores = module.sae.scores(tokens)
        seen["products"].add(scores.dtype)
        return step(module, tokens, batch_idx)

    def on_after_optimizer_step(module):
        for moments in module.optimizer.state.values():
            seen["moments"] |= {moments["exp_avg"].dtype, moments["exp_avg_sq"].dtype}
        after(module)

    monkeypatch.setattr(SAEModule, "training_step", training_step)
    monkeypatch.setattr(SAEModule, "on_after_optimizer_step", on_after_optimizer_step)
    clip = build.build_clip(cfg)
    images, held_out = (
        build.build_dataset(cfg.train_dataset, split, clip.image_size)
        for split in ("train", "test")
    )
    stage = sae_stage(cfg, Store(tmp_path))
    folder = tmp_path / "folder"
    folder.mkdir()
    sae.make([sae.Training(cfg, stage, folder)], clip, images, held_out)
    assert seen == {"products": {torch.bfloat16}, "moments": {torch.float32}}
    assert clip.precision == "bf16-mixed"
    found = SAE.load(folder).state_dict()
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.float32}
    assert found["activation.inference_threshold"] > 0


def test_the_command(tmp_path):
    """Trained with a value, and then found without naming it."""
    small = [*SMALL, f"paths.output_dir={tmp_path}"]
    done = run_py(*small, "precision=tf32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("precision tf32: SAE products in float32, as") == 2
    again = run_py(*small)
    assert "precision=auto is tf32, that of" in again.stdout + again.stderr
    assert len(list((tmp_path / "sae").iterdir())) == 1
    (config,) = tmp_path.glob("sae/*/config.yaml")
    assert "precision: tf32" in config.read_text()
