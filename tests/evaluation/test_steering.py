"""Interventions on many images at once, against a loop that changes CLIP's stream by a hook."""

from types import SimpleNamespace

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.evaluation.steering import Steering, Sums, measure_steering, threshold
from clipsae.sae import SAE


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    sae = SAE(clip.width, 40, "linear", "topk", k=6, tokens="patches").eval()
    classifier = torch.nn.functional.normalize(torch.randn(5, clip.embed_dim), dim=-1)
    return SimpleNamespace(
        clip=clip, sae=sae, dataset=ScenesDataset("colour", "test", 6), classifier=classifier
    )


@torch.no_grad()
def logits_by_hook(world, image, codes_of_set) -> torch.Tensor:
    """Of the whole model, with a hook behind the SAE's block that writes codes {latent: code}."""
    clip, sae = world.clip, world.sae

    def hook(_, __, stream):
        patches = stream[:, 1:]  # the SAE's tokens
        codes = sae.encode(patches)
        changed = codes.clone()
        for latent, code in codes_of_set.items():
            changed[..., latent] = code
        patches = patches + (changed - codes) @ sae.decoder_rows()
        return torch.cat((stream[:, :1], patches), dim=1)

    block = clip.model.visual.transformer.resblocks[clip.blocks + clip.layer]
    handle = block.register_forward_hook(hook)
    embedding = clip.encode_image(clip.normalize(image[None])).double()
    handle.remove()
    unit = embedding / embedding.norm()
    return float(clip.logit_scale) * (unit @ world.classifier.double().T)[0]


def test_effects_are_those_of_a_loop_with_a_hook(world):
    stream = torch.stack([world.dataset[i][0] for i in range(6)])
    patches = world.clip.prefix(world.clip.normalize(stream))[:, 1:]
    often = (world.sae.encode(patches) > 0).any(dim=1).sum(dim=0).argsort(descending=True)
    a, b, c, d = often[:4].tolist()
    sets = [[a], [b, c], [a], [a, d]]
    levels = [[0.0], [0.0, 0.0], [2.0], [1.0, 4.0]]
    found, random = measure_steering(
        *(world.clip, world.sae, world.dataset, world.classifier, sets, levels), batch_size=4
    )
    assert not len(random.images)
    for v, (one, level) in enumerate(zip(sets, levels, strict=True)):
        effects, flips = [], []
        for image, _ in (world.dataset[i] for i in range(6)):
            before = logits_by_hook(world, image, {})
            after = logits_by_hook(world, image, dict(zip(one, level, strict=True)))
            if not torch.equal(before, after):
                change = (after - before) * (1 if any(level) else -1)
                effects.append(change - change.mean())
                flips.append(bool(after.argmax() != before.argmax()))
        assert found.images[v] == len(effects)
        target = torch.stack(effects[::2]).mean(dim=0).argmax()
        measured = torch.stack(effects[1::2])
        mean = measured.mean(dim=0)
        own = measured[:, target]
        reach = 1.96 * own.std() / len(own) ** 0.5
        assert found.target[v] == target
        assert found.effect[v].tolist() == pytest.approx(mean.tolist(), abs=1e-3)
        assert found.steerability[v].item() == pytest.approx(own.mean().item(), abs=1e-3)
        assert found.high[v].item() - found.low[v].item() == pytest.approx(
            2 * reach.item(), abs=2e-3, nan_ok=True
        )
        assert found.specificity[v].item() == pytest.approx(
            (mean[target] ** 2 / mean.square().sum()).item(), abs=1e-2
        )
        assert found.flipped[v].item() == pytest.approx(sum(flips) / len(flips))
    others = found.others(2, 4)
    assert [k for k, _ in others] == sorted(
        {*range(5)} - {int(found.target[2])}, key=lambda k: -abs(float(found.effect[2, k]))
    )


def test_random_directions_are_as_long_and_an_interrupted_pass_goes_on(world, tmp_path):
    given = (world.clip, world.sae, world.dataset, world.classifier, [[m] for m in range(8)])
    options = {"random": 3, "seed": 5, "batch_size": 2, "scratch": tmp_path}
    whole = measure_steering(*given, **{**options, "scratch": None})

    class Interrupted(Exception):
        pass

    def interrupt(done, total):
        if done == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        measure_steering(*given, **options, save_every_seconds=0, progress=interrupt)
    seen = []
    resumed = measure_steering(*given, **options, progress=lambda done, total: seen.append(done))
    assert seen == [3, 4, 5, 6]  # the second batch was not saved yet
    for one, other in zip(whole, resumed, strict=True):
        for name, value in vars(one).items():
            assert torch.equal(value.nan_to_num(), getattr(other, name).nan_to_num()), name
    assert whole[1].images.tolist() == [whole[0].images[m] for m in (0, 4, 7)]
    assert len(whole[0].images) == 8
    assert not torch.allclose(whole[1].effect[1], whole[0].effect[4], atol=1e-3)


def test_a_target_is_chosen_on_other_images_than_it_is_measured_on():
    """Effects that are noise steer nowhere on average, though each has a largest class."""
    torch.manual_seed(0)
    sums = Sums(torch.zeros(400, dtype=torch.bool), 10)
    for _ in range(8):
        sums.add(torch.arange(400), torch.zeros(10), torch.randn(400, 10))
    noise = sums.compute()
    assert noise.steerability.mean().item() == pytest.approx(0, abs=0.08)
    assert 0.9 < (noise.low < 0).float().mean().item() < 1
    assert threshold(noise) == pytest.approx(noise.steerability.quantile(0.95).item())
    alone = Sums(torch.zeros(1, dtype=torch.bool), 10)
    one = torch.zeros(10)
    one[3] = 2.0
    for _ in range(2):
        alone.add(torch.tensor([0]), torch.zeros(10), one[None])
    found: Steering = alone.compute()
    assert found.target.tolist() == [3]
    assert found.specificity.item() == pytest.approx(0.9)  # 1 - 1 / C
    assert found.low.isnan().all()  # of one image


def test_what_cannot_be_steered(world):
    given = (world.clip, world.sae, world.dataset)
    for classifier, sets, said in (
        (world.classifier, [], "at least one set"),
        (world.classifier[:1], [[1]], "between two or more"),
        (world.classifier, [[40]], "expected 0 to 39"),
        (world.classifier, [[1, 1]], "expected each of them once"),
    ):
        with pytest.raises(ValueError, match=said):
            measure_steering(*given, classifier, sets)
