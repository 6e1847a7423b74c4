"""SAEs of both towers against plain loops in float64: shares, the bridge score, retrieval, and the
whole measurement on scenes and their captions."""

import math

import pytest
import torch
from torch import nn

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.evaluation import evaluate
from clipsae.evaluation.metrics import towers
from clipsae.evaluation.metrics.towers import bridge, cosines, image_shares, recall
from clipsae.sae import SAE
from clipsae.sae.normalization import Moments

IMAGES = 40


def codes(n: int = 9, m: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of images and captions, some with signs; the last latent is never active."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, n, m, generator=generator) * (torch.rand(2, n, m, generator=generator) < 0.5)
    z[..., -1] = 0
    return z[0], z[1]


def plain_bridge(images, captions, rows) -> dict[str, float]:
    n, m = images.shape
    scores = [
        [
            sum(float(images[p, i]) * float(captions[p, j]) for p in range(n))
            / n
            * sum(float(a) * float(b) for a, b in zip(rows[i], rows[j], strict=True))
            for j in range(m)
        ]
        for i in range(m)
    ]
    flat = [value for row in scores for value in row]
    total = sum(map(abs, flat))
    return {
        "same": sum(abs(scores[i][i]) for i in range(m)) / total,
        "pairs": total**2 / sum(value**2 for value in flat),
        "sum": sum(flat),
    }


def test_shares_of_images():
    images, captions = codes()
    images[:, 0] = 0
    found = image_shares(images, captions)
    for i in range(7):
        a, b = (sum(abs(float(v)) for v in z[:, i]) for z in (images, captions))
        assert found[i].item() == pytest.approx(a / (a + b) if a + b else math.nan, nan_ok=True)
    assert found[0] == 0


@pytest.mark.parametrize("block", [3, 1024])
def test_the_bridge_score(monkeypatch, block):
    monkeypatch.setattr(towers, "_BLOCK", block)
    (images, captions), rows = codes(), torch.randn(7, 5)
    expected = plain_bridge(images, captions, rows)
    found = bridge(images, captions, rows)
    for name in ("same", "pairs"):
        assert found[name].item() == pytest.approx(expected[name], rel=1e-6)
    # What its sum is; and a code twice as large with a row half as long is the same latent.
    inner = ((images @ rows) * (captions @ rows)).sum(dim=1).mean()
    assert inner.item() == pytest.approx(expected["sum"], rel=1e-4)
    scaled = bridge(images * 2, captions * 2, rows / 2)
    torch.testing.assert_close(scaled, found)
    one = torch.zeros(9, 7)
    one[:, 2] = 1  # a single latent that serves both
    assert {k: v.item() for k, v in bridge(one, one, rows).items()} == {"same": 1, "pairs": 1}


def test_recall_with_ties(monkeypatch):
    images, captions = codes(12, 5)
    images[3] = 0  # as similar to each caption
    captions[7] = captions[6]
    monkeypatch.setattr(towers, "_BLOCK", 2)
    similarity = cosines(images, captions)
    plain = nn.functional.cosine_similarity(
        images.double()[:, None], captions.double()[None], dim=-1
    )
    torch.testing.assert_close(similarity, plain)
    for k in (1, 5):
        hits = []
        for i in range(12):
            above = sum(float(s) > float(similarity[i, i]) for s in similarity[i])
            level = sum(float(s) == float(similarity[i, i]) for s in similarity[i])
            # Of the places above..above + level - 1 that the own one may take, those below k.
            hits.append(sum(place < k for place in range(above, above + level)) / level)
        assert recall(similarity, k).item() == pytest.approx(sum(hits) / 12)
    assert recall(torch.zeros(8, 8), 5) == 5 / 8  # nothing is told apart: chance


@pytest.fixture(scope="module")
def clip():
    return FrozenCLIP.load("clipsae-tiny", "builtin", hook="towers")


@torch.no_grad()
def test_the_measurement_on_scenes(clip):
    scenes = ScenesDataset("all", "test", IMAGES)
    scenes.captions = lambda indices, said=scenes.captions: [
        "two objects" if i in (3, 30) else text  # two images with the same caption
        for i, text in zip(torch.as_tensor(indices).tolist(), said(indices), strict=True)
    ]
    texts = clip.tokenizer(scenes.captions(range(IMAGES)))
    x = clip.pairs(clip.normalize(scenes.images(range(IMAGES))[0]), texts)
    torch.manual_seed(0)
    sae = SAE(
        clip.width, 30, "linear", "topk", k=4, normalize="mean_std", position_mean=True
    ).eval()
    sae.normalization.fit(Moments.of([x]))
    result = evaluate(clip, {"a": sae}, scenes, metrics=["towers", "sparsity"], batch_size=16)
    found = {row["metric"]: row["value"] for row in result.metrics}
    kept = [i for i in range(IMAGES) if i != 30]
    assert found["pairs_compared"] == len(kept)
    z, x_hat = sae.encode(x)[kept], sae(x).reconstruction[kept]
    x = x[kept]
    shares = image_shares(z[:, 0], z[:, 1])
    torch.testing.assert_close(result.per_latent["a"]["image_share"], shares, equal_nan=True)
    live = shares[~shares.isnan()]
    for name, chosen in (
        ("image_latents", live > 0.9),
        ("text_latents", live < 0.1),
        ("shared_latents", (live >= 0.1) & (live <= 0.9)),
    ):
        assert found[name] == pytest.approx(chosen.double().mean().item(), abs=1e-9), name
    rows = sae.decoder_rows()
    assert found["bridge_same"] == pytest.approx(
        plain_bridge(z[:, 0], z[:, 1], rows)["same"], rel=1e-4
    )
    assert found["bridge_same_shuffled"] != found["bridge_same"]
    for suffix, of in (("", x_hat), ("_codes", z), ("_embedding", x)):
        similarity = cosines(of[:, 0], of[:, 1])
        assert found[f"image_to_text_5{suffix}"] == pytest.approx(recall(similarity, 5).item())
        assert found[f"text_to_image_1{suffix}"] == pytest.approx(recall(similarity.T, 1).item())
    assert found["image_to_text_5_random"] == pytest.approx(5 / len(kept))
    text = x[:, 1].double()
    lost = (text - x_hat[:, 1]).square().sum() / (text - text.mean(dim=0)).square().sum()
    assert found["text_fvu"] == pytest.approx(lost.item(), rel=1e-4)
    # All else is of images alone, whose mean is the first position's.
    assert found["text_l0"] == pytest.approx((z[:, 1] != 0).double().sum(dim=1).mean().item())
    assert found["l0"] == pytest.approx(4, abs=0.5)


def test_images_alone_have_nothing_to_compare(clip):
    cut = FrozenCLIP(clip.model, name=clip.name, hook="embedding")
    sae = SAE(clip.width, 8, "linear", "topk", k=2)
    with pytest.raises(ValueError, match=r"'towers' needs clip\.hook=towers, and a dataset whose"):
        evaluate(cut, {"a": sae}, ScenesDataset("all", "test", 4), metrics=["towers"])
