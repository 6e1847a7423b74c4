"""What CLIP makes of reconstructions during training, against CLIP's own code and a loop."""

from types import SimpleNamespace

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.sae import SAE
from clipsae.training.predictions import Predictions, compare


def test_changes_of_predictions_by_hand():
    own = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [0.0, 1.0, 2.0], [4.0, 0.0, 0.0]])
    through = torch.tensor([[3.0, 1.0, 2.0], [6.0, 5.0, 1.0], [0.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
    found = compare(own, through, torch.tensor([0, 0, 1, 0]))
    # Before: classes 0, 1, 2, 0; after: 0, 0, 2, 1.
    expected = {"accuracy_no_sae": 50, "accuracy": 50, "agreement": 50}
    # The logit of the class before: 0, then 0 - (-6 / 3), then 0, then 4 - (4 - 3) / 3.
    expected["logit_loss"] = (0 + 2 + 0 + 4 - 1 / 3) / 4
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


@pytest.fixture
def world():
    torch.manual_seed(0)
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    dataset = ScenesDataset("colour", "test", 20)
    images = torch.stack([dataset[i][0] for i in range(20)])
    classifier = torch.nn.functional.normalize(torch.randn(10, clip.embed_dim), dim=-1)
    return clip, images, dataset.labels[:20], classifier


class Recorder:
    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def log_metrics(self, values, step):
        assert step == 7
        self.logged = values


def log(callback: Predictions, sae, first: bool = True) -> dict[str, float]:
    run = Recorder()
    member = SimpleNamespace(sae=sae, run=run if first else None, step=7, layer=None)
    group = SimpleNamespace(
        device=torch.device("cpu"), current=[member], each=lambda work: work(member)
    )
    callback.on_validation_epoch_end(SimpleNamespace(), group)
    return run.logged


@pytest.mark.parametrize(
    "options", [{}, {"tokens": "patches"}, {"target_layer": -1, "subtract_bias": False}]
)
@torch.no_grad()
@pytest.mark.parametrize("hook", ["resid", "mlp_out"])
def test_it_is_the_whole_model_on_the_reconstruction(world, hook, options):
    clip, images, labels, classifier = world
    clip = FrozenCLIP(clip.model, name=clip.name, hook=hook)
    sae = SAE(clip.width, 64, "linear", "topk", k=4, **options).eval()
    found = log(Predictions(clip, images, labels, classifier), sae)
    right = same = right_before = 0
    for image, label in zip(images, labels.tolist(), strict=True):
        pixels = clip.normalize(image[None])
        before = (clip.encode_image(pixels) @ classifier.T).argmax()
        stream = clip.prefix(pixels)
        rebuilt = sae.decode(sae.encode(stream))
        if "tokens" in options:
            rebuilt[:, 0] = stream[:, 0]
        target = clip.at(-1) if "target_layer" in options else clip
        _, context = target.prefix(pixels, with_context=True)
        after = (target.tail(rebuilt, context) @ classifier.T).argmax()
        right_before += int(before == label)
        right += int(after == label)
        same += int(before == after)
    assert found["val/accuracy_no_sae"] == pytest.approx(5 * right_before)
    assert found["val/accuracy"] == pytest.approx(5 * right)
    assert found["val/agreement"] == pytest.approx(5 * same)
    assert found["val/agreement"] < 100 or hook != "resid"
    assert log(Predictions(clip, images, labels, classifier), sae, first=False) == {}


def test_a_perfect_reconstruction_changes_nothing(world):
    clip, images, labels, classifier = world

    class Perfect:
        config = SAE(clip.width, 64).config

        def __call__(self, tokens):
            return SimpleNamespace(reconstruction=tokens)

    found = log(Predictions(clip, images, labels, classifier), Perfect())
    assert found["val/agreement"] == 100
    assert found["val/logit_loss"] == pytest.approx(0, abs=1e-5)
    assert found["val/accuracy"] == found["val/accuracy_no_sae"]
