"""Every choice of every group composes; what does not exist is refused by name."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from run import ROOT  # (and the resolvers that the configs use)

GROUPS = [
    "clip",
    "model",
    "optimizer",
    "dataset",
    "train_dataset",
    "features",
    "trainer",
    "evaluation",
    "measurement",
    "logger",
    "task",
]
CHOICES = [
    f"{group}={file.stem}"
    for group in GROUPS
    for file in sorted((ROOT / "conf" / group).glob("[!_]*.yaml"))
]
SWEEPS = [file.stem for file in sorted((ROOT / "sweeps").glob("*.yaml"))]


@pytest.fixture
def composed():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: compose("config", list(overrides), return_hydra_config=False)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(composed, choice):
    cfg = composed(choice)
    group, name = choice.split("=")
    file = OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml") or {}
    for key in file:
        assert key == "defaults" or key in [*cfg[group], *cfg]


@pytest.mark.parametrize("clip", ["tiny", "vit_b_16", "vit_l_14"])
@pytest.mark.parametrize("model", [c[6:] for c in CHOICES if c.startswith("model=")])
def test_every_model_with_every_clip(composed, clip, model):
    cfg = composed(f"clip={clip}", f"model={model}")
    assert cfg.model.name == model
    assert cfg.model.latents == (2048 if clip == "tiny" else 49152)


def test_a_value_on_the_command_line_beats_the_recipe(composed):
    assert composed("model=topk", "model.latents=77").model.latents == 77
    assert composed("trainer.max_steps=3").trainer.max_steps == 3


def test_a_model_names_its_optimizer_and_the_command_line_another(composed):
    chosen = "clip=vit_l_14", "model=topk"  # a pair without a recipe
    assert composed(*chosen).optimizer.learning_rate == 1.15e-4
    assert composed(*chosen, "optimizer=default").optimizer.learning_rate == 4e-4
    assert composed("clip=vit_l_14", "model=relu").optimizer.warmup_steps == 500


@pytest.mark.parametrize(
    ("clip", "model", "expected"),
    [
        ("vit_b_16", "topk", 0.02),
        ("vit_b_16", "batch_topk", 0.02),
        ("tiny", "topk", 0.3),
        ("tiny", "batch_topk", 0.3),
        ("vit_b_16", "relu", None),
        ("vit_b_16", "sparsemax", None),
        ("tiny", "jumprelu", None),
    ],
)
def test_gradients_are_clipped_where_the_source_clips_them(composed, clip, model, expected):
    chosen = f"clip={clip}", f"model={model}"
    assert composed(*chosen).trainer.gradient_clip_val == expected
    assert composed(*chosen, "trainer.gradient_clip_val=0.5").trainer.gradient_clip_val == 0.5


def test_an_unknown_key_and_an_unknown_choice_are_refused(composed):
    with pytest.raises(ConfigCompositionException, match="modle"):
        composed("modle.k=3")
    with pytest.raises(ConfigCompositionException, match="laten"):
        composed("model.laten=3")
    with pytest.raises(Exception, match="batch_topk"):  # the message lists what exists
        composed("model=topkk")


def test_which_images_train_the_sae(composed):
    assert composed("dataset=scenes_colour").train_dataset.name == "scenes"
    cfg = composed("dataset=image_folder", "dataset.root=x")
    assert cfg.train_dataset == cfg.dataset


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_is_chosen_by_name_and_its_axes_exist(sweep):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"sweeps={sweep}"], return_hydra_config=True)
        assert cfg.sweep_name == sweep
        assert str(cfg.hydra.mode) == "RunMode.MULTIRUN"
        for key, values in cfg.hydra.sweeper.params.items():
            for value in str(values).split(","):
                more = ["model=topk"] if key == "model.k" else []
                assert compose("config", [*more, f"{key}={value}"])


def test_the_benchmark_is_six_models_on_eleven_datasets():
    from clipsae.data.published import DATASETS

    params = OmegaConf.load(ROOT / "sweeps" / "benchmark.yaml").hydra.sweeper.params
    assert params.dataset.split(",") == list(DATASETS)
    assert len(params.model.split(",")) == 6


def test_the_entry_point_does_not_import_torch():
    code = "import sys, run; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_ctrl_c_is_answered_where_a_shell_has_it_ignored():
    """As it does for a command in the background."""
    code = (
        "import signal, sys, run; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.argv[1:] = ['--info', 'searchpath']; run.main()\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "True", done.stderr


@pytest.mark.parametrize("look", [["task=status"], ["task=gc", "sweeps=demo"]])
def test_a_look_at_the_store_does_not_import_torch(tmp_path, look):
    arguments = [*look, f"paths.output_dir={tmp_path}"]
    code = f"import sys, run; sys.argv[1:] = {arguments}; run.main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_help_works_from_any_folder(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "batch_topk" in done.stdout
    assert list(tmp_path.iterdir()) == []
