"""The statistics that tokens are normalised by: of which images, and that a training keeps them."""

import torch
from lightning import Trainer

from clipsae.sae import SAE
from clipsae.sae.normalization import Moments
from clipsae.training.module import SAEGroup, SAEModule
from tests.sae.conftest import D, M, tokens
from tests.training.test_penalties import Stream

T, B = 5, 4


LAYERS = (-1, -2)


class Counting(Stream):
    """Of two layers; notes for how many images it is asked."""

    asked: list[int] = []  # noqa: RUF012

    def first_batches(self, images: int):
        self.asked.append(images)
        whole = {i: torch.cat([b[i] for b in self.batches])[:images] for i in LAYERS}
        for at in range(0, images, B):
            yield {i: x[at : at + B] for i, x in whole.items()}

    def first_batch(self, images: int):
        return {i: x[:images] for i, x in self.batches[0].items()}


def test_of_the_first_images_once_for_all_that_train_together(tmp_path):
    """At whatever layers."""
    batches = [tokens(B, T, D, seed=i) + torch.arange(T)[:, None] for i in range(6)]
    batches = [{-1: x, -2: 2 * x.flip(-1) + 1} for x in batches]
    ways = [
        {"normalize": "mean_std"},
        {"normalize": "whiten", "whitening": 0.5, "position_mean": True},
        {"normalize": "unit"},
    ]
    members = []
    for way in ways:
        torch.manual_seed(0)
        sae = SAE(D, M, activation="topk", k=3, **way)
        members.append(
            SAEModule(
                sae,
                learning_rate=0.01,
                statistics_images=10,
                initial_images=2,
                max_steps=6,
                layer=LAYERS[len(members) % 2],
            )
        )
    data = Counting(batches)
    trainer = Trainer(
        max_steps=18,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(SAEGroup(members), datamodule=data)
    assert data.asked == [10]
    for member, way in zip(members[:2], ways, strict=False):
        x = torch.cat([batch[member.layer] for batch in batches])[:10]
        moments = Moments.of([x])
        assert member.step == 6
        positions = way.get("position_mean", False)
        expected = x.double().mean(dim=0 if positions else (0, 1))
        found = member.sae.normalization
        torch.testing.assert_close(found.mean.detach(), expected.float())
        twin = SAE(**member.sae.config).normalization
        twin.fit(moments)  # six steps have changed none of them
        for (name, value), other in zip(found.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(value, other, msg=name)
        # The bias starts as the median of normalised tokens, near 0, and takes six small steps.
        assert member.sae.architecture.b_dec.abs().max() < 1
