"""Sparsity penalties in a training: how sparse they make JumpReLU on a synthetic task, targets that
are met, and their warm-up."""

import math
from itertools import pairwise

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor

from clipsae.sae import SAE
from clipsae.training.module import SAEGroup, SAEModule
from clipsae.training.schedule import penalty_warmup
from tests.sae.conftest import D, build, tokens

WIDTH, LATENTS, FEATURES, ACTIVE = 64, 512, 256, 5.3


def superposed(images: int, seed: int, width: int = WIDTH) -> Tensor:
    """[images, width]: sums of 5.3 of 256 unit vectors on average, times 0.5 to 1.5, and noise."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.nn.functional.normalize(torch.randn(FEATURES, width, generator=generator), dim=1)
    generator.manual_seed(1000 + seed)
    on = torch.rand(images, FEATURES, generator=generator) < ACTIVE / FEATURES
    strength = 0.5 + torch.rand(images, FEATURES, generator=generator)
    return (on * strength) @ rows + 0.02 * torch.randn(images, width, generator=generator)


class Batches:
    """As the feature streams are: a loader that knows its epoch."""

    epoch = 0

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict:
        return {}


class Stream(LightningDataModule):
    def __init__(self, batches: list[Tensor]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Batches:
        return Batches(self.batches)

    def first_batch(self, images: int) -> Tensor:
        return self.batches[0][:images]


def warming_up(sae, **options):
    """A training whose penalties warm up for four steps."""
    return SAEModule(sae, learning_rate=1e-3, sparsity_warmup_steps=4, initial_images=2, **options)


def train(member: SAEModule, batches: list[Tensor]) -> SAE:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=member.max_steps,
        log_every_n_steps=10**6,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(SAEGroup([member]), datamodule=Stream(batches))
    assert member.step == member.max_steps
    return member.sae


@pytest.fixture(scope="module")
def l0():
    """The mean L0 of held-out tokens of a JumpReLU SAE that was trained with some options."""
    steps = 300
    batches = [superposed(64, step)[:, None] for step in range(steps)]
    held_out = superposed(1000, 10**6)

    def of(**options) -> float:
        torch.manual_seed(0)
        sae = SAE(WIDTH, LATENTS, activation="jumprelu", encoder_init="tied", **options)
        member = SAEModule(
            sae,
            learning_rate=3e-3,
            warmup_steps=15,
            decay="linear",
            decay_fraction=0.2,
            sparsity_warmup_steps=15,
            gradient_clip_val=1 / WIDTH,  # 1.0 times r / d, as the recipes have it
            max_steps=steps,
        )
        codes = train(member, batches).eval().encode(held_out)
        return (codes != 0).sum(dim=1).double().mean().item()

    return of


def test_l0_falls_with_the_coefficient_over_three_decades(l0):
    found = [l0(l0_coefficient=c) for c in (1e-5, 1e-4, 1e-3, 1e-2)]
    assert all(a > b for a, b in pairwise(found)), found
    assert found[0] > 3 * found[-1] > 3, found


@pytest.mark.parametrize("target", [5, 20])
def test_a_target_is_met_within_a_tenth(l0, target):
    # Ten times dictionary_learning's 1.0, times r / d.
    assert l0(l0_coefficient=10 / WIDTH, target_l0=target) == pytest.approx(target, rel=0.1)


# --- the warm-up ---


def test_the_warm_up_is_linear_from_0_to_1():
    assert [penalty_warmup(4, step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert penalty_warmup(0, 0) == 1.0


@pytest.mark.parametrize("every", [1, 2])
def test_each_step_has_the_warm_up_of_its_number(every, monkeypatch):
    """Through the trainer, whose batches are fewer than a step's where gradients accumulate."""
    seen = []
    losses = SAE.forward

    def spied(sae, tokens):
        out = losses(sae, tokens)
        seen.append((out.losses["l1"] / (0.5 * out.codes.sum(-1).mean())).item())
        return out

    monkeypatch.setattr(SAE, "forward", spied)
    member = warming_up(
        build("relu", l1_coefficient=0.5), max_steps=6, accumulate_grad_batches=every
    )
    train(member, [tokens(4, 5, D, seed=i) for i in range(6 * every)])
    expected = [step / 4 if step < 4 else 1.0 for step in range(6) for _ in range(every)]
    assert seen == pytest.approx(expected, rel=1e-5)


def test_a_compiled_step_is_compiled_once_for_all_of_the_warm_up(monkeypatch):
    compiled = []
    torch._dynamo.reset()  # other tests' SAEs may have used up how often it compiles a function
    monkeypatch.setattr(
        torch,
        "compile",
        lambda sae, compile=torch.compile: compile(
            sae, backend=lambda graph, _: compiled.append(graph) or graph.forward
        ),
    )
    member = warming_up(build("jumprelu"), max_steps=6, compile=True)
    train(member, [tokens(4, 5, D, seed=i) for i in range(6)])
    assert len(compiled) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_training_the_penalty_is_whole(fails):
    member = warming_up(build("relu", l1_coefficient=0.5), max_steps=5)
    batches = [tokens(4, 5, D, seed=i) for i in range(5)]
    if fails:  # in the midst of the warm-up
        batches[2] = batches[2].double()
        with pytest.raises(ValueError, match=r"float64 and the SAE is torch\.float32"):
            train(member, batches)
        assert member.step == 2
    else:
        train(member, batches)
    assert isinstance(member.sae.activation.penalty_scale, float)
    out = member.sae(batches[0])
    assert out.losses["l1"].item() == pytest.approx(0.5 * out.codes.sum(-1).mean().item(), rel=1e-5)


def test_a_warm_up_of_no_penalty_is_refused():
    with pytest.raises(ValueError, match=r"sparsity_warmup_steps=5 does nothing with .*=topk"):
        SAEModule(build("topk"), learning_rate=1e-3, sparsity_warmup_steps=5)


@pytest.mark.parametrize(("warm_up", "steps"), [(5, 4), (5, 5), (1, 1)])
def test_a_warm_up_that_the_training_ends_in_is_refused(warm_up, steps):
    assert max(penalty_warmup(warm_up, step) for step in range(steps)) < 1
    expected = f"^sparsity_warmup_steps={warm_up}: in a training of max_steps={steps} .* never"
    with pytest.raises(ValueError, match=expected):
        SAEModule(build("relu"), learning_rate=1e-3, sparsity_warmup_steps=warm_up, max_steps=steps)


@pytest.mark.parametrize("steps", [6, 0, -1])  # 0: untrained; -1: not known
def test_a_warm_up_that_ends_in_the_training_or_has_none_is_not(steps):
    SAEModule(build("relu"), learning_rate=1e-3, sparsity_warmup_steps=5, max_steps=steps)


# --- the learning rate and the number of latents ---


def test_the_rate_goes_as_one_over_the_root_of_the_number_of_latents():
    for latents, factor in ((16384, 1), (49152, 1 / math.sqrt(3)), (1024, 4)):
        with torch.device("meta"):
            sae = SAE(d=4, latents=latents)
        module = SAEModule(sae, learning_rate=2e-4, reference_latents=16384)
        assert module.learning_rate == pytest.approx(2e-4 * factor)
        assert module.configure_optimizers()["optimizer"].defaults["lr"] == module.learning_rate
        assert SAEModule(sae, learning_rate=2e-4).learning_rate == 2e-4
