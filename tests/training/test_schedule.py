"""Learning-rate factors against values worked out by hand; options that cannot be."""

import pytest
import torch

from clipsae.sae import SAE
from clipsae.training.module import SAEModule
from clipsae.training.schedule import warmup_then


def test_warm_up_is_linear_and_then_constant():
    factor = warmup_then("constant", 4, 100)
    assert [factor(s) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factor(10**6) == 1.0


def test_a_training_shorter_than_its_warm_up():
    factor = warmup_then("linear", 10, 5)
    assert [factor(s) for s in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_no_warm_up():
    assert warmup_then("constant", 0, 10)(0) == 1.0


def test_decays_end_at_zero():
    linear = warmup_then("linear", 10, 110)
    cosine = warmup_then("cosine", 10, 110)
    assert linear(10) == cosine(10) == 1.0
    assert linear(60) == pytest.approx(0.5)
    assert cosine(60) == pytest.approx(0.5)
    assert cosine(35) == pytest.approx(0.8535533905932737)
    assert linear(110) == cosine(110) == 0.0
    assert linear(200) == pytest.approx(0.0)


def test_a_decay_over_a_share_of_the_steps_is_at_their_end():
    linear = warmup_then("linear", 10, 100, 0.2)
    cosine = warmup_then("cosine", 10, 100, 0.2)
    assert [linear(step) for step in (4, 9, 79, 80)] == [0.5, 1.0, 1.0, 1.0]
    assert [linear(s) for s in (85, 90, 95, 100)] == pytest.approx([0.75, 0.5, 0.25, 0])
    assert cosine(80) == 1.0
    assert [cosine(s) for s in (85, 90, 100)] == pytest.approx([0.8535533905932737, 0.5, 0])
    # Never before the warm-up has ended.
    late = warmup_then("linear", 90, 100, 0.2)
    assert [late(step) for step in (84, 89, 90, 95)] == pytest.approx([85 / 90, 1, 1, 0.5])
    for step in (0, 10, 55, 100):
        whole = warmup_then("linear", 10, 100)
        assert warmup_then("linear", 10, 100, 1.0)(step) == whole(step)
        assert warmup_then("constant", 10, 100, 0.2)(step) == warmup_then("constant", 10, 100)(step)


@pytest.mark.parametrize(
    ("decay", "warmup", "steps", "words"),
    [
        ("sine", 1, 10, "expected one of constant, cosine, linear"),
        ("constant", -1, 10, "at least 0"),
        ("constant", "x", 10, "warmup_steps='x'"),
        ("cosine", 10, -1, "needs a trainer.max_steps"),
    ],
)
def test_what_cannot_be_is_refused(decay, warmup, steps, words):
    with pytest.raises(ValueError, match=words):
        warmup_then(decay, warmup, steps)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0}, "learning_rate=0: expected a number above 0"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"betas": [0.9]}, r"betas=\[0\.9\]: expected two numbers"),
        ({"betas": 0.9}, r"betas=0\.9: expected two numbers"),
        ({"betas": [0.9, 1.0]}, r"betas=1\.0: expected two numbers with 0 <= beta < 1"),
        ({"betas": ["a", 0.9]}, "betas='a'"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": 0.5}, r"warmup_steps=0\.5"),
        ({"decay": "sine"}, "decay='sine': expected one of constant, cosine, linear"),
        ({"decay_fraction": 0}, "decay_fraction=0: expected a number above 0, up to 1"),
        ({"decay_fraction": 1.5}, r"decay_fraction=1\.5"),
        ({"sparsity_warmup_steps": -1}, "sparsity_warmup_steps=-1: expected an integer"),
        ({"reference_latents": 0}, "reference_latents=0: expected an integer of at least 1"),
        ({"initial_images": 0}, "initial_images=0: expected an integer of at least 1"),
        ({"compile": "no"}, "compile='no': expected true or false"),
    ],
)
def test_options_of_the_training_are_refused_by_name(options, words):
    with torch.device("meta"):
        sae = SAE(d=4, latents=8)
    with pytest.raises(ValueError, match=words) as refused:
        SAEModule(sae, **{"learning_rate": 1e-3, **options})
    assert "\n" not in str(refused.value)
