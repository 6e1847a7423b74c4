"""Names by an explainer within a budget, and its detection, against a loop."""

import pytest
import torch

from clipsae.naming.activity import Activity
from clipsae.naming.explain import DETECTED, Shown, describe, detect, leading
from clipsae.naming.explainers import Explainer
from clipsae.naming.make import Explaining, distinct
from clipsae.sae import SparseCodes

N, M, GRID = 120, 5, (2, 2)


class Images(list):
    """Image i is i everywhere."""

    def __getitem__(self, i):
        return torch.full((3, 4, 4), i, dtype=torch.uint8), 0


class Knows(Explainer):
    """Says which latent it is, and finds a name true of the images whose number it divides."""

    source = "knows"
    requests = (1, 1)

    def __init__(self):
        self.seen = []

    def describe(self, evidence):
        self.seen.append(evidence)
        return f"every {evidence.latent + 2}" if evidence.latent < 4 else ""

    def detect(self, name, examples):
        self.asked = [example.index for example in examples]
        n = int(name.split()[-1])
        return [int(example.image[0, 0, 0]) % n == 0 for example in examples]


@pytest.fixture
def activity() -> Activity:
    """Latent m is active on every (m + 2)nd image, the last on all; its code grows with m."""
    codes = torch.zeros(N, M)
    for m in range(4):
        codes[:: m + 2, m] = 1.0 + 10 * m
    codes[:, 4] = 0.1
    places = torch.arange(N)
    return Activity(torch.zeros(N, 2), SparseCodes.from_dense(codes), places, places % 3)


def shown(index: list[list[int]]) -> Shown:
    images = torch.tensor(index)
    maps = torch.zeros(*images.shape, 4, dtype=torch.uint8)
    maps[..., 1] = 255
    return Shown(images, (images >= 0).float() * 2, maps)


def test_the_latents_that_matter_most_are_named_within_the_budget(activity):
    mass = activity.codes.dense().double().sum(dim=0)
    order = mass.argsort(descending=True).tolist()
    assert leading(activity.codes, None) == order
    assert leading(activity.codes, 2) == order[:2]
    explaining = Explaining(Knows(), shown([[0]] * M), shown([[0]] * M), requests=7)
    assert explaining.latents(activity, "clip") == order
    assert explaining.latents(activity, "explainer") == order[:2]  # three requests a latent


def test_an_explainer_sees_the_strongest_and_others():
    explainer = Knows()
    top, sample = shown([[3, 9, -1]] * M), shown([[9, 12, 0]] * M)
    said = describe(explainer, [1, 4], Images(), GRID, top, sample, lambda done, total: None)
    assert said == {1: "every 3", 4: ""}
    first = explainer.seen[0]
    assert [example.index for example in first.top] == [3, 9]
    assert [example.index for example in first.sample] == [12, 0]  # 9 is among the strongest
    assert first.top[0].heat.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert first.top[0].strength == 2.0
    assert int(first.top[1].image[0, 0, 0]) == 9


def test_detection_by_the_explainer(activity):
    explainer = Knows()
    text = ["every 2", "every 3", "every 7", "", "every 2"]
    left_out = torch.tensor([[0, 1]] * M)
    found = detect(
        explainer, text, [0, 1, 2, 3, 4], Images(), GRID, activity, left_out, lambda *_: None
    )
    score, low, high, control = (found[name] for name in ("score", "low", "high", "control"))
    assert score[:2].tolist() == [1.0, 1.0]
    assert score[2] < 0.8  # active on every fourth image, named after every seventh
    assert score[3:].isnan().all()  # no name; active on all images
    assert (low[:2] < 1).all()  # forty images are no proof
    assert (low[:2] > 0.7).all()
    assert (high[:2] == 1).all()
    assert (control[:3] < 1).all()
    assert len(explainer.asked) == 2 * DETECTED
    assert not {0, 1} & set(explainer.asked)
    # One latent alone comes out as among others.
    alone = detect(explainer, text, [1], Images(), GRID, activity, left_out, lambda *_: None)
    assert alone["score"][1] == score[1]
    assert alone["control"][1] == control[1]
    assert alone["score"][0].isnan()
    assert alone["threshold"] == pytest.approx(float(control[1]))


def test_images_count_once():
    index = torch.tensor([[4, 2, 4, -1, 2], [1, 2, 3, 4, 5]])
    assert distinct(index).tolist() == [[4, 2, -1, -1, -1], [1, 2, 3, 4, 5]]
