"""The configs of a sweep's jobs are those that Hydra composes one by one."""

from types import SimpleNamespace

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from clipsae.errors import ConfigError
from clipsae.tasks.composing import Composer
from run import ROOT


@pytest.fixture(scope="module")
def launcher():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        given = ["sweeps=demo", "hydra.sweep.dir=/tmp/x", "seed=5", "precision=tf32"]
        config = loader.load_configuration("config", given, RunMode.MULTIRUN)
        calls = []

        def load(*args):
            calls.append(args[1])
            return loader.load_sweep_config(*args)

        counted = SimpleNamespace(load_sweep_config=load)
        context = SimpleNamespace(config_loader=counted)
        yield SimpleNamespace(config=config, hydra_context=context, calls=calls)


def tree(node, key=""):
    """Every node with what may be done to it."""
    flags = type(node), OmegaConf.is_struct(node), OmegaConf.is_readonly(node)
    found = {key: (*flags, OmegaConf.get_type(node))}
    if isinstance(node, DictConfig | ListConfig) and not node._is_none():
        keys = node if isinstance(node, DictConfig) else range(len(node))
        for k in keys:
            found |= tree(node._get_node(k), f"{key}.{k}")
    elif not isinstance(node, DictConfig | ListConfig):
        found[key] = (*found[key], node._value())
    return found


JOBS = [
    ["model=topk", "dataset=scenes_shape", "seed=0"],
    ["model=topk", "dataset=scenes_shape", "seed=1", "model.k=7", "measurement.metrics=[support]"],
    ["model=topk", "dataset=scenes_shape", "model={k: 3}", "model.k=4"],  # the last one holds
    ["seed=2", "dataset=scenes_shape", "model=topk", "model.k='auto'", "sweep_name='a b,c'"],
    ["model=gated", "clip=vit_b_16", "dataset=dtd", "trainer.max_steps=3"],  # with a recipe
    ["model=gated", "clip=vit_b_16", "dataset=dtd", "++measurement.own=[1]", "+dataset.more=null"],
    ["model=gated", "clip=vit_b_16", "dataset=dtd", "+dataset.more={a: 1}", "dataset.more.a=2"],
    ["model=gated", "clip=vit_b_16", "dataset=dtd", "~model.compile", "evaluation=none"],
    ["model=pca", "evaluation=none", "+trainer@other=default", "features.batch_size=2"],
    ["model.k=${seed}", "model=topk", "seed=3"],
    [],
]


def test_every_config_is_the_one_that_hydra_composes(launcher, monkeypatch):
    monkeypatch.setattr("clipsae.tasks.composing.options.check", lambda *args: None)
    composer = Composer(launcher)
    load = launcher.hydra_context.config_loader.load_sweep_config
    for overrides in JOBS:
        ours, theirs = composer.config(overrides), load(launcher.config, overrides)
        assert OmegaConf.to_yaml(ours) == OmegaConf.to_yaml(theirs)
        assert tree(ours) == tree(theirs)
        with pytest.raises(AttributeError):
            ours.nonsense = 1


def test_hydra_composes_once_for_each_choice_of_groups(launcher):
    composer = Composer(launcher)
    launcher.calls.clear()
    jobs = [[f"model={m}", f"seed={s}"] for s in range(4) for m in ("topk", "relu")]
    configs = [composer.config(overrides) for overrides in jobs]
    assert launcher.calls == [["model=topk"], ["model=relu"]]
    assert [f"model={c.model.name} seed={c.seed}".split() for c in configs] == jobs
    assert [list(c.hydra.overrides.task) for c in configs] == jobs
    configs[0].model.k = 3  # no other has the same nodes
    assert configs[2].model.k != 3


def test_image_embeddings_are_of_no_layer(launcher):
    """Which SAEs that train together would read them after."""
    jobs = [["clip.hook=embedding", f"clip.layer={i}", "together=true"] for i in (-2, -3)]
    composer = Composer(launcher)
    for _ in range(2):
        composer.config(jobs[0])
    with pytest.raises(ConfigError, match="the image embedding is the same for every layer"):
        composer.config(jobs[1])
    for job in jobs:
        composer.config([*job[:2], "together=false"])


def test_what_does_not_compose_or_is_invalid_is_said_as_by_hydra(launcher):
    composer = Composer(launcher)
    for wrong in (
        "model.nonsense=1",
        "nonsense=1",
        "model=nonsense",
        "+model.k=1",
        "hydra=1",
        "++model=topk",
        "sweeps/nonsense=1",
        "model=[topk,relu]",
        "~model.nonsense",
    ):
        with pytest.raises(Exception, match=r"\w") as theirs:
            launcher.hydra_context.config_loader.load_sweep_config(
                launcher.config, ["model=topk", wrong]
            )
        with pytest.raises(type(theirs.value)) as ours:
            composer.config(["model=topk", wrong])
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(ConfigCompositionException):
        composer.config(["model.nonsense=1"])
    with pytest.raises(ConfigError, match=r"trainer\.max_steps=-1"):
        composer.config(["trainer.max_steps=-1"])
