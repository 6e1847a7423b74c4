"""model.k=auto, model.target_l0=auto: the mean support of the Sparsemax SAE that fits."""

import json

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from clipsae.errors import ConfigError
from clipsae.store import Store
from clipsae.tasks import guidance
from run import ROOT


@pytest.fixture
def composed():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: compose("config", list(overrides))


def finished(store: Store, cfg, active: float | None, number: int) -> None:
    def build(folder):
        OmegaConf.save(cfg, folder / "config.yaml")
        metrics = {} if active is None else {"val/l0": active}
        (folder / "training.json").write_text(json.dumps({"steps": 5, **metrics}))

    store.stage("sae", [cfg.model.name], {"number": number}).make(build)


def test_k_is_the_support_of_the_newest_that_fits(composed, tmp_path):
    store = Store(tmp_path)
    finished(store, composed("model=sparsemax"), 20.0, 1)
    finished(store, composed("model=sparsemax"), 33.6, 2)
    finished(store, composed("model=sparsemax", "seed=1"), 90.0, 3)
    finished(store, composed("model=sparsemax", "model.latents=512"), 91.0, 4)
    finished(store, composed("model=sparsemax", "clip=vit_b_16", "model.latents=2048"), 92.0, 5)
    finished(store, composed("model=topk"), 93.0, 6)
    finished(store, composed("model=sparsemax"), None, 7)
    cfg = composed("model=topk", "model.k=auto")
    guidance.resolve(cfg, store)
    assert cfg.model.k == 34
    other = composed("model=batch_topk", "model.k=auto", "seed=1")
    guidance.resolve(other, store)
    assert other.model.k == 90
    jumprelu = composed("model=jumprelu", "model.target_l0=auto")
    guidance.resolve(jumprelu, store)
    assert (jumprelu.model.target_l0, jumprelu.model.get("k")) == (34, None)


def test_other_values_are_left_alone(composed, tmp_path):
    for overrides in (["model=topk", "model.k=7"], ["model=relu"], ["model=jumprelu"]):
        cfg = composed(*overrides)
        before = OmegaConf.to_yaml(cfg.model)
        guidance.resolve(cfg, Store(tmp_path))
        assert OmegaConf.to_yaml(cfg.model) == before


def test_without_one_it_says_what_to_run(composed, tmp_path):
    with pytest.raises(ConfigError, match=r"model.k=auto: .*model=sparsemax first, or give k a"):
        guidance.resolve(composed("model=topk", "model.k=auto"), Store(tmp_path))
    with pytest.raises(
        ConfigError, match=r"target_l0=auto: .* 49152 .* or give target_l0 a number"
    ):
        # As this recipe has it.
        guidance.resolve(composed("model=jumprelu", "clip=vit_b_16"), Store(tmp_path))
