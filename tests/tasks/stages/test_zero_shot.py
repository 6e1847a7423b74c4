"""CLIP's own accuracy against the published one: a warning where they are 2 points apart."""

import logging
from types import SimpleNamespace

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from clipsae.data.published import DTD
from clipsae.tasks.stages.evaluation import check_zero_shot
from run import ROOT

DATASET = SimpleNamespace(about=DTD.about, split_source="coop", image_size=224)  # 45.04 %


def warned(caplog, accuracy: float, *overrides: str, dataset=DATASET) -> str:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["clip=vit_b_16", "dataset=dtd", *overrides])
    rows = pd.DataFrame({"setting": ["no_sae", "on"], "micro_accuracy": [accuracy, 1.0]})
    with caplog.at_level(logging.WARNING, logger="clipsae"):
        check_zero_shot(cfg, dataset, rows)
    return caplog.text


@pytest.mark.parametrize("accuracy", [42.9, 47.1, 3.0])
def test_more_than_two_points_are_a_warning_that_names_the_causes(caplog, accuracy):
    text = warned(caplog, accuracy)
    assert f"{accuracy:.2f}" in text
    assert "45.04" in text
    for cause in ("split_source=coop", "classnames=clean", "templates=imagenet", "QuickGELU"):
        assert cause in text


@pytest.mark.parametrize("accuracy", [43.1, 45.04, 47.0])
def test_within_two_points_is_not(caplog, accuracy):
    assert not warned(caplog, accuracy)


@pytest.mark.parametrize(
    "overrides",
    [
        ["clip=tiny"],
        ["clip.pretrained=null"],
        ["clip.pretrained=laion2b_s34b_b88k"],
        ["evaluation.split=train"],
        ["evaluation.limit_images=100"],
    ],
)
def test_only_where_the_figure_is_known(caplog, overrides):
    assert not warned(caplog, 3.0, *overrides)
    assert not warned(caplog, 3.0, dataset=SimpleNamespace(image_size=224))
