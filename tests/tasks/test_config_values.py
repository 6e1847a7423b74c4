"""What each key of `conf/` may be: a wrong value of any of them is one sentence that names it."""

import copy
import inspect
import subprocess
import sys
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from clipsae.errors import ConfigError
from clipsae.overrides import with_bases
from clipsae.tasks import options
from clipsae.tasks.stages import sae
from run import ROOT  # (and the resolvers that the configs use)
from tests.warm import run_py

GROUPS = [
    *("paths", "clip", "model", "dataset", "train_dataset", "features", "task", "trainer"),
    "optimizer",
    *("callbacks", "evaluation", "measurement", "logger"),
]
CHOICES = {
    f"{group}={file.stem}": OmegaConf.to_container(with_bases(file))
    for group in GROUPS
    for file in sorted((ROOT / "conf" / group).glob("[!_]*.yaml"))
}
# Chosen by `defaults:` alone, or not a value that a user gives.
NOT_VALUES = ("defaults", "_target_")


def leaves(node: dict, prefix: str = "") -> list[tuple[str, object]]:
    found = []
    for key, value in node.items():
        if isinstance(value, dict) and value and not {"train", "test"} <= set(value):
            found += leaves(value, f"{prefix}{key}.")
        elif key not in NOT_VALUES and value != "${dataset}":
            found.append((f"{prefix}{key}", value))
    return found


def every_key() -> list[tuple[str, str, object]]:
    keys = {}
    for choice, content in CHOICES.items():
        group = choice.partition("=")[0]
        content = content.get("task", content) if group == "task" else content
        for key, value in leaves(content):
            keys.setdefault((group, key), (choice, f"{group}.{key}", value))
    top = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "config.yaml"))
    for key, value in leaves({k: v for k, v in top.items() if k not in ("hydra", "defaults")}):
        keys["", key] = ("", key, value)
    return sorted(keys.values(), key=str)


def wrong(value: object) -> object:
    """Of a kind that the key cannot have."""
    if value is None or (isinstance(value, str) and not value.startswith("${oc.select:model")):
        return ["not", {"a": "text"}]
    return "nonsense!"


@pytest.fixture(scope="module")
def composed():
    @cache
    def once(*overrides: str):
        # Every task's and dataset's other needs are met.
        needed = ["dataset.root=x"] if "dataset=image_folder" in overrides else []
        cfg = compose("config", [o for o in overrides if o] + needed)
        options.check(cfg)  # as it is, it is right
        return cfg

    def run(*overrides: str):
        return copy.deepcopy(once(*overrides))

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield run


def check(cfg, *overrides: str) -> None:
    """What a run asks of its config before it loads the CLIP."""
    options.check(cfg, overrides)
    sae.check_options(cfg)


def refusal(cfg, *overrides: str) -> str:
    """The one sentence that answers a config."""
    with pytest.raises(ConfigError) as caught:
        check(cfg, *overrides)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("choice", "key", "value"), every_key(), ids=str)
def test_a_wrong_value_is_refused_by_name(composed, choice, key, value):
    cfg = composed(choice)
    with open_dict(cfg):
        OmegaConf.update(cfg, key, wrong(value), merge=False)
    said = refusal(cfg)
    assert key.rpartition(".")[2] in said, said


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=-1", "seed=-1: expected a whole number from 0 to 4294967295"),
        ("seed=4294967296", "seed=4294967296: expected"),
        ("seed=1.5", "seed=1.5: expected a whole number"),
        ("seed=true", "seed=true: expected a whole number"),
        ("together=1", "together=1: expected true or false"),
        ("trainer.max_steps=0", "trainer.max_steps=0: expected a whole number, 1 or more"),
        ("trainer.max_steps=-1", "trainer.max_steps=-1"),
        ("trainer.max_steps=1e3", "trainer.max_steps=1000.0: expected a whole number"),
        ("trainer.precision=8", "trainer.precision=8"),
        ("trainer.devices=0", "trainer.devices=0"),
        ("trainer.devices=[]", "trainer.devices=[]"),
        ("trainer.gradient_clip_val=0", "trainer.gradient_clip_val=0: expected a number above 0"),
        ("trainer.limit_val_batches=1.5", "trainer.limit_val_batches=1.5"),
        ("model.latents=0", "model.latents=0"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate=0: expected a number above 0"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas=[0.9,1]"),
        ("optimizer.decay=cosin", "optimizer.decay=cosin: expected constant, cosine or linear"),
        ("evaluation.count_threshold=-0.1", "evaluation.count_threshold=-0.1"),
        ("features.batch_size=0", "features.batch_size=0"),
        ("callbacks.checkpoint_every_n_steps=0", "callbacks.checkpoint_every_n_steps=0"),
        ("evaluation.protocol=papers", "evaluation.protocol=papers: expected paper or heldout"),
        ("evaluation.ns=[]", "evaluation.ns=[]"),
        ("evaluation.ns=[5,0]", "evaluation.ns=[5,0]"),
        ("evaluation.ns=5", "evaluation.ns=5: expected a list"),
        ("evaluation.split=val", "evaluation.split=val: expected train or test"),
        ("evaluation.limit_images=0", "evaluation.limit_images=0"),
        ("measurement.threshold=1.1", "measurement.threshold=1.1"),
        ("measurement.pooling=sum", "measurement.pooling=sum: expected mean, max or cls"),
        ("logger.mode=on", "logger.mode=on: expected online, offline or disabled, or null"),
        ("resources.cpus=0", "resources.cpus=0"),
        ("dataset.size=0", "dataset.size=0"),
        ("dataset.size.train=-1", "dataset.size={'train': -1"),
        ("+model.decay=linear", "model.decay=linear: model.decay is now optimizer.decay"),
        ("+foo=1", "foo=1: there is no such option"),
        ("+task.foo=1", "task.foo=1: there is no such option"),
        ("+evaluation.n=[1]", "did you mean evaluation.ns"),
        ("+callbacks.checkpoint_every=1", "callbacks.checkpoint_every=1: there is no such option"),
        ("+trainer.max_step=3", "did you mean trainer.max_steps"),
        ("+trainer.limit_train_batchs=1", "did you mean trainer.limit_train_batches"),
        ("+trainer.fast_dev_run=true", "trainer.fast_dev_run=true: not to be set"),
        ("+trainer.max_epochs=2", "how long a training is, is trainer.max_steps"),
        ("+trainer.max_time=soon", "trainer.max_time=soon"),
        ("+trainer.limit_train_batches=0", "trainer.limit_train_batches=0: expected"),
        ("trainer.accelerator=gpux", "trainer.accelerator=gpux"),
    ],
)
def test_what_is_out_of_range_or_read_by_nobody(composed, override, expected):
    assert expected in refusal(compose("config", [override]), override)


def test_what_others_define_is_theirs(composed):
    cfg = composed()
    with open_dict(cfg):
        cfg.dataset = {"_target_": "theirs.Noise", "name": "noise", "size": "large"}
        cfg.logger = {"_target_": "theirs.logger", "level": 3}
        cfg.task = {"_target_": "theirs.run", "depth": 2}
        cfg.model.temperature = 0.5  # a plugin's, which the SAE's class knows or refuses
        cfg.note = "of a config file of their own"
    options.check(cfg)


def test_the_trainer_s_options_are_those_of_lightning():
    from lightning import Trainer

    assert sorted(options._trainer_options()) == sorted(inspect.signature(Trainer).parameters)


def test_a_dataset_that_is_not_given_is_named_where_it_is_needed(composed):
    cfg = compose("config", ["dataset=image_folder"])
    with pytest.raises(ConfigError, match=r"dataset\.root is not given"):
        options.check(cfg)
    options.check(compose("config", ["dataset=image_folder", "task=status"]))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mdel=topk"], "mdel=topk: there is no such option; did you mean model?"),
        (["model.laten=3"], "model.laten=3: there is no such option; did you mean model.latents"),
        (["model=topk", "model.kk=3"], "did you mean model.k"),
        (
            ["model.learning_rate=1"],
            "model.learning_rate=1: model.learning_rate is now optimizer.learning_rate",
        ),
        (["model.betas=[0,0],[0.9,0.9]", "-m"], "model.betas is now optimizer.betas"),
        (["dataset=scene_shape"], "did you mean scenes_shape or"),
        (["clip=vitb16"], "clip=vitb16: there is no such choice; "),
        (["model=topk,relu"], "model=topk,relu: several values are a sweep: add -m"),
        (["topk"], "'topk' is not key=value"),
        (["seed=abc"], "seed=abc: expected a whole number"),
        (["+foo=1"], "foo=1: there is no such option"),
        (["+trainer.accelerator=gpu"], "+trainer.accelerator=gpu: it is there already: leave out"),
        (["dataset=image_folder"], "dataset.root is not given"),
        (
            ["+dataset.foo=1"],
            "dataset.foo=1: there is no such option; dataset has kind",
        ),
        (["dataset.kind=shap"], "unknown kind of scenes 'shap'"),
        (["model.k=16"], "there is no such option; it is an option of model=batch_topk and topk"),
        (["hydra.launcher.foo=1", "hydra/launcher=slurm"], "hydra.launcher has account"),
        (["+model.k=16"], "k"),
    ],
)
def test_the_command_answers_in_one_line(tmp_path, arguments, expected):
    done = run_py(f"paths.output_dir={tmp_path}", *arguments)
    said = (done.stdout + done.stderr).strip()
    assert done.returncode == 1
    assert expected in said
    assert len(said.splitlines()) == 1, said


def test_a_slip_is_answered_without_torch(tmp_path):
    arguments = [f"paths.output_dir={tmp_path}", "seed=abc"]
    code = (
        f"import sys, run; sys.argv[1:] = {arguments}\ntry: run.main()\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("name", "layer", "blocks"),
    [("clipsae-tiny", 4, 4), ("clipsae-tiny", -5, 4), ("ViT-B-16-quickgelu", 12, 12)],
)
def test_a_block_that_is_not_there(composed, name, layer, blocks):
    cfg = composed()
    cfg.clip.name, cfg.clip.layer = name, layer
    with pytest.raises(ConfigError, match=f"clip.layer={layer}: {name} has {blocks} blocks"):
        options.check(cfg)
    cfg.clip.layer = blocks - 1
    options.check(cfg)
    cfg.clip.name, cfg.clip.layer = "RN50", 99  # no plain ViT: what builds it says so
    options.check(cfg)
