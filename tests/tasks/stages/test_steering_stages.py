"""Which latents `task=steer` and `task=spurious` take, what they refuse, and what they write."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.errors import ConfigError
from clipsae.evaluation.steering import Steering
from clipsae.naming.activity import Activity
from clipsae.sae import SparseCodes
from clipsae.tasks import options, spurious, steer
from clipsae.tasks.stages import spurious as groups
from clipsae.tasks.stages import steering
from run import ROOT


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*overrides])


def test_which_latents_are_steered():
    frequency = torch.tensor([0.1, 0.0, 0.3, 0.2])
    references = SimpleNamespace(token_frequency=frequency, alive=frequency > 0, latents=4)
    assert steering.chosen_sets("alive", references) == [[2], [3], [0]]
    assert steering.chosen_sets(2, references) == [[2], [3]]
    assert steering.chosen_sets([3, [0, 2]], references) == [[3], [0, 2]]
    for wrong, said in (([1], "has 1: "), ([7], "as 3 are"), ([[2, 2]], "of a set")):
        with pytest.raises(ConfigError, match=said):
            steering.chosen_sets(wrong, references)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=steer", "task.latents=dead"], "task.latents=dead: expected alive, or an integer"),
        (["task=steer", "task.latents=[[]]"], "task.latents=[[]]"),
        (["task=steer", "task.strengths=[-1]"], "task.strengths=[-1]: expected a list"),
        (["task=spurious", "task.split=test"], "task.split=test: expected train"),
        (["task=spurious", "task.counts=[0]"], "task.counts=[0]: expected a list"),
    ],
)
def test_options_that_cannot_be(overrides, said):
    with pytest.raises(ConfigError) as caught:
        options.check(composed(*overrides))
    assert said in str(caught.value)


def test_a_dataset_without_groups_and_a_name_that_no_latent_can_have():
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    plain, tied = ScenesDataset("shape", "train", 4), ScenesDataset("spurious", "train", 4)
    cfg = composed("task=spurious", "dataset=scenes_spurious")
    groups.check(cfg, clip, tied)
    assert groups.wanted_words(cfg, tied) == ["grass", "water"]
    with pytest.raises(ConfigError, match="has no groups of class"):
        groups.check(cfg, clip, plain)
    cfg = composed("task=spurious", "dataset=scenes_spurious", "task.names=[grass,lava]")
    options.check(cfg)
    with pytest.raises(ConfigError, match="'lava': no latent can have"):
        groups.check(cfg, clip, tied)


def test_rows_of_steering():
    found = Steering(
        images=torch.tensor([6, 1]),
        target=torch.tensor([1, -1]),
        steerability=torch.tensor([1.5, torch.nan]),
        low=torch.tensor([1.0, torch.nan]),
        high=torch.tensor([2.0, torch.nan]),
        specificity=torch.tensor([0.6, torch.nan]),
        flipped=torch.tensor([0.5, 0.0]),
        effect=torch.tensor([[-0.5, 1.5, -1.0], [torch.nan] * 3]),
    )
    rows = steering.csv_rows(found, found.chosen(slice(0, 1)), [[4], [1, 2]], 0.0, ["a", "b", "c"])
    assert [row["latents"] for row in rows] == ["4", "1+2"]
    assert (rows[0]["target"], rows[1]["target"]) == ("b", "")
    assert rows[0]["others"] == "c -1.00, a -0.50"
    assert rows[0]["random"] == 1.5
    assert [row["steers"] for row in rows] == [False, False]
    numbers = steering.summary(found, found.chosen(slice(0, 1)))
    assert numbers["steerability"] == numbers["steerability_random"] == 1.5
    assert numbers["steers"] == 0
    frame = pd.DataFrame(rows)
    assert steer.table(frame, 0.0, 5).row_count == 2
    said = steer.described(frame, {f"{k}_at_0": v for k, v in numbers.items()}, 0.0)
    assert "0% of 2 steer further than 95 % of random directions (1.50 logits)" in said


def test_latents_by_name_by_score_and_at_random():
    names = SimpleNamespace(
        named=torch.tensor([True, True, False, True, True]),
        text=["water", "red", "grass", "grass", "water"],
    )
    size = torch.tensor([0.7, 0.9, 0.95, 0.8, 0.8])
    found = groups.named_latents(names, ["grass", "water"], size)
    assert found == [3, 4, 0]  # 2 is not to be trusted
    codes = torch.zeros(8, 3)
    codes[::2, 2] = 1  # latent 2 is active on value 0, and 1 on all of one class
    codes[4:, 1] = 1
    activity = Activity(
        torch.zeros(8, 2), SparseCodes.from_dense(codes), torch.arange(8), torch.arange(8) // 4
    )
    of = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    assert groups.scored_latents(activity, of, 2) == [2]
    found = groups.removals([3, 4, 0], [2], torch.arange(5), [1, 2, 9], 2)
    assert [(one.method, len(one.latents)) for one in found] == [
        ("none", 0),
        *[("name", 1), ("score", 1), ("random", 1), ("random", 1)],
        *[("name", 2), ("random", 2), ("random", 2)],
        *[("name", 3), ("random", 3), ("random", 3)],
    ]
    assert found[5].latents == [3, 4]
    assert [one.draw for one in found[3:5]] == [0, 1]


def test_the_worst_group_wins_when_the_confounder_is_taken_out(caplog):
    """Embeddings whose first axis is the confounder, which the removal takes out."""
    torch.manual_seed(0)

    def split(n: int, tied: float):
        label = torch.arange(n) % 2
        value = torch.where(torch.rand(n) < tied, label, 1 - label)
        x = torch.randn(n, 8) * 0.5
        x[:, 0] = 4 * value + 0.1 * torch.randn(n)
        x[:, 1] += 1.5 * label
        without = x.clone()
        without[:, 0] = 2
        return torch.stack((x, without)), label, 2 * label + value

    train, test = split(1500, 0.97), split(600, 0.5)
    removed = [groups.Removal("none", []), groups.Removal("name", [5])]
    rows = pd.DataFrame(groups.accuracies(removed, train, test, torch.eye(8)[:2], 2))
    worst = rows.set_index(["method", "classifier"]).worst
    assert worst["none", "probe"] < 65
    for better in ("name", "projection"):
        assert worst[better, "refit"] > 80
    assert worst["balanced", "refit"] > worst["none", "probe"] + 10
    assert (rows.low <= rows.worst).all()
    rows["group"] = "a on b"
    shown = spurious.table(rows, "toy")
    assert shown.row_count == 4
    assert [column.header for column in shown.columns][2:] == [*spurious.CLASSIFIERS.values()]
