"""One pass over images against the metrics computed on all tokens at once."""

import random

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.evaluation import evaluate
from clipsae.evaluation.encoders import image_encoder, judge
from clipsae.evaluation.metrics import METRICS, NUMBERS, Measurement
from clipsae.evaluation.metrics.cknna import cknna
from clipsae.evaluation.metrics.concepts import concept_recovery
from clipsae.evaluation.metrics.monosemanticity import monosemanticity
from clipsae.evaluation.metrics.orthogonality import decoder_orthogonality
from clipsae.evaluation.metrics.sparsity import sparsity_sums, sparsity_values
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import pool_codes
from clipsae.evaluation.truth import (
    IMAGE_ATTRIBUTES,
    OBJECT_ATTRIBUTES,
    PATCH_ATTRIBUTES,
    concept_names,
    image_concepts,
    patch_concepts,
    patch_objects,
)
from clipsae.sae import SAE

IMAGES = 30


@pytest.fixture(scope="module")
def clip():
    return FrozenCLIP.load("clipsae-tiny", "builtin")


@pytest.fixture(scope="module")
def scenes():
    return ScenesDataset(kind="all", split="test", size=IMAGES)


@pytest.fixture(scope="module")
def saes(clip):
    torch.manual_seed(0)
    return {
        "topk": SAE(clip.width, 40, "linear", "topk", k=4).eval(),
        "relu": SAE(clip.width, 25, "linear", "relu").eval(),
    }


def everything(clip, scenes, sae):
    images = scenes.images(range(IMAGES))[0]
    x = clip.prefix(clip.normalize(images))
    scores = sae.scores(x)
    return images, x, sae.apply_threshold(scores, sae.threshold(scores)), scores.relu()


def by_metric(result, sae):
    return {row["metric"]: row["value"] for row in result.metrics if row["sae"] == sae}


@torch.no_grad()
def test_every_number_is_that_of_all_images_at_once(clip, scenes, saes):
    result = evaluate(
        clip,
        saes,
        scenes,
        image_encoder="attributes",
        pooling="max",
        batch_size=7,
        sample_tokens=200,
        sample_images=11,
        seed=5,
        threshold=0.8,
    )
    tokens = sorted(random.Random(5).sample(range(IMAGES * clip.tokens), 200))
    chosen = sorted(random.Random(5).sample(range(IMAGES), 11))
    assert result.images == IMAGES
    assert result.rows == []
    assert (result.pooling, result.image_encoder) == ("max", "attributes")
    for name, sae in saes.items():
        images, x, codes, dense = everything(clip, scenes, sae)
        found = by_metric(result, name)
        for suffix, z in (("", codes), ("_dense", dense)):
            values = sparsity_values(sparsity_sums(x, sae.decode(z, sae.input_scale(x)), z))
            for key, value in values.items():
                assert found[key + suffix] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), key
        aligned = cknna(x.flatten(0, 1)[tokens], codes.flatten(0, 1)[tokens])
        assert found["cknna"] == pytest.approx(aligned.item(), rel=1e-3)
        assert found["decoder_orthogonality"] == decoder_orthogonality(sae.decoder_rows()).item()

        embeddings = image_encoder("attributes", scenes)(images, torch.arange(IMAGES))
        pooled = pool_codes(codes, "max")
        scores = monosemanticity(pooled, embeddings)
        assert torch.allclose(
            result.per_latent[name]["monosemanticity"], scores, rtol=1e-3, equal_nan=True
        )
        assert found["monosemanticity_mean"] == pytest.approx(scores.nanmean().item(), rel=1e-3)

        at = torch.tensor(chosen)
        order = torch.randperm(11, generator=torch.Generator().manual_seed(5))
        choosing = order % 2 == 0
        truth, slot = patch_concepts(scenes, at, 8), patch_objects(scenes, at, 8)
        objects = [(i, s) for i in range(11) for s in range(3) if (slot[i] == s).any()]
        for level, attributes, z, shown, first in (
            (
                "patch",
                PATCH_ATTRIBUTES,
                codes[chosen, 1:].flatten(0, 1),
                truth.flatten(0, 1),
                choosing.repeat_interleave(64),
            ),
            (
                "object",
                OBJECT_ATTRIBUTES,
                torch.stack([codes[chosen][i, 1:][slot[i] == s].amax(0) for i, s in objects]),
                torch.stack([truth[i][slot[i] == s].any(0)[:25] for i, s in objects]),
                torch.stack([choosing[i] for i, _ in objects]),
            ),
            ("image", IMAGE_ATTRIBUTES, pooled[chosen], image_concepts(scenes, at), choosing),
        ):
            expected = concept_recovery(z, shown, concept_names(attributes), first, threshold=0.8)
            assert found[f"{level}_auroc"] == pytest.approx(expected["mean_auroc"].item(), rel=1e-3)
            rows = [row for row in result.concepts[name] if row["level"] == level]
            assert [row["auroc_latent"] for row in rows] == expected["auroc_latent"].tolist()


def test_batches_and_groups_change_nothing(clip, scenes, saes, monkeypatch):
    options = {"sample_tokens": 150, "sample_images": 9, "image_encoder": "tiny"}
    whole = evaluate(clip, saes, scenes, batch_size=8, **options)
    monkeypatch.setattr("clipsae.evaluation.passes._DENSE_BYTES", 4 * 40 * 65 * 3)
    for size in (1, 30):
        seen = []
        options["progress"] = lambda *at, seen=seen: seen.append(at)
        again = evaluate(clip, saes, scenes, batch_size=size, **options)
        assert [at for at in seen if at[2] == "images"][-1] == (IMAGES, IMAGES, "images")
        ended = {what for done, total, what in seen if done == total}
        assert ended == {
            *("images", "CKNNA", "sparse probing"),
            *(f"recovery in {of}" for of in ("patches", "objects", "images")),
        }
        for row, other in zip(whole.metrics, again.metrics, strict=True):
            assert row["metric"] == other["metric"]
            assert row["value"] == pytest.approx(other["value"], rel=1e-3, abs=1e-5, nan_ok=True)


def test_several_image_encoders_are_each_alone(clip, scenes, saes):
    options = {"metrics": ["monosemanticity"], "limit_images": 12, "batch_size": 5}
    one = {
        name: by_metric(evaluate(clip, saes, scenes, image_encoder=name, **options), "relu")
        for name in ("attributes", "tiny")
    }
    both = evaluate(clip, saes, scenes, image_encoder=["attributes", "tiny"], **options)
    found = by_metric(both, "relu")
    assert both.image_encoder == "attributes"
    for key, value in one["attributes"].items():
        assert found.pop(key) == pytest.approx(value)
    assert set(found) == {"monosemanticity_mean_tiny", "monosemanticity_max_tiny"}
    for key, value in found.items():
        assert value == pytest.approx(one["tiny"][key.removesuffix("_tiny")])
    assert set(both.per_latent["relu"]) == {"monosemanticity", "monosemanticity_tiny"}


def test_the_suffix_of_an_image_encoder():
    assert judge("timm:vit_small_patch14_dinov2.lvd142m/random") == "dinov2"
    assert judge("open_clip:ViT-B-32/openai") == "clip"
    assert judge("timm:resnet50") == "other"


def test_some_images_and_modes_are_restored(clip, scenes, saes):
    saes["topk"].train()
    result = evaluate(clip, saes, scenes, metrics=["sparsity"], limit_images=10)
    assert result.images == 10
    assert result.image_encoder is None
    assert result.per_latent == {"topk": {}, "relu": {}}
    assert saes["topk"].training
    assert not saes["relu"].training
    saes["topk"].eval()


def test_what_is_measured_depends_on_what_is_there(clip, scenes, saes):
    found = by_metric(evaluate(clip, saes, scenes, limit_images=4), "relu")
    assert set(found) <= {number.key for number in NUMBERS}
    assert "patch_concepts_found" in found
    assert not any("monosemanticity" in metric for metric in found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": ["l0"]}, "metric='l0' does not exist: choose one of .*sparsity"),
        ({"metrics": []}, "nothing to evaluate"),
        ({"metrics": ["monosemanticity"]}, "needs an image_encoder"),
        ({"pooling": "sum"}, "mean, max, cls"),
        ({"sample_tokens": 0}, "at least 1"),
        ({"limit_images": 0}, "at least 1"),
        ({"image_encoder": "what"}, "open_clip:MODEL"),
        ({"image_encoder": ["attributes", "what"]}, "open_clip:MODEL"),
        ({"image_encoder": [], "metrics": ["monosemanticity"]}, "needs an image_encoder"),
        ({"image_encoder": ["attributes", "tiny", "tiny"]}, "several encoders .* named 'tiny'"),
    ],
)
def test_invalid_options_are_refused(clip, scenes, saes, options, words):
    with pytest.raises(ValueError, match=words):
        evaluate(clip, saes, scenes, **options)


@torch.no_grad()
def test_without_patches_what_needs_them_is_left_out(clip, scenes, saes):
    cut = FrozenCLIP(clip.model, name=clip.name, hook="embedding")
    few = {"sample_tokens": 20, "sample_images": 9}
    result = evaluate(cut, saes, scenes, image_encoder="attributes", **few)
    embeddings = clip.encode_image(clip.normalize(scenes.images(range(IMAGES))[0]))
    for name, sae in saes.items():
        found, codes = by_metric(result, name), sae.encode(embeddings)
        assert found["l0"] == pytest.approx((codes != 0).double().sum(dim=1).mean().item())
        assert not any(key.startswith(("patch_", "support_", "feature_loc")) for key in found)
        assert "monosemanticity_mean" in found
    for metric in ("recovery", "localization", "spatial_coherence", "support"):
        with pytest.raises(ValueError, match=f"'{metric}' needs tokens that are patches"):
            evaluate(cut, saes, scenes, metrics=[metric])


def test_recovery_needs_ground_truth(clip, saes):
    class Photos:
        labels = torch.zeros(3, dtype=torch.long)

    with pytest.raises(ValueError, match="needs a dataset with ground truth"):
        evaluate(clip, saes, Photos(), metrics=["recovery"])


def test_a_metric_is_one_class(clip, scenes, saes, monkeypatch):
    monkeypatch.setitem(METRICS, "agreement", None)  # so that it is removed again

    @METRICS.register("agreement")
    class Agreement(Measurement):
        """How often the reconstruction gets the prediction of the image."""

        needs = ("predictions",)
        numbers = (Number("agreement", "agreement"),)

        def __init__(self, sae, options):
            super().__init__(sae, options)
            self.add_state("same", torch.tensor(0.0), dist_reduce_fx="sum")
            self.add_state("largest", torch.zeros(self.latents), dist_reduce_fx="max")
            self.images = options.images

        def update(self, batch):
            own = batch.images.predictions[batch.rows]
            self.same += (batch.predictions == own).sum()
            self.largest = torch.maximum(self.largest, batch.codes.amax(dim=(0, 1)))

        def compute(self):
            self.per_latent = {"largest": self.largest}
            return {"agreement": self.same / self.images}

    names = torch.eye(clip.embed_dim)[: len(scenes.classnames)]
    options = {"settings": ["no_sae", "on"], "ns": (1,), "batch_size": 7}
    found = evaluate(clip, saes, scenes, names, metrics=["agreement"], **options)
    for name, sae in saes.items():
        same = found.predictions[None, "no_sae", None] == found.predictions[name, "on", sae.latents]
        assert by_metric(found, name) == {"agreement": pytest.approx(same.double().mean().item())}
        codes = everything(clip, scenes, sae)[2]
        largest = found.per_latent[name]["largest"]
        assert torch.allclose(largest, codes.amax(dim=(0, 1)), rtol=1e-4)
    assert "agreement" not in by_metric(evaluate(clip, saes, scenes, limit_images=4), "relu")
    with pytest.raises(ValueError, match="'agreement' needs a classifier"):
        evaluate(clip, saes, scenes, metrics=["agreement"])
    Agreement.numbers = ()
    with pytest.raises(ValueError, match="'agreement' computes 'agreement', which its class lacks"):
        evaluate(clip, saes, scenes, names, metrics=["agreement"], **options, limit_images=4)
