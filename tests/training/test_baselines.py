"""SAEs that are fitted: against scikit-learn, least squares and planted answers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from clipsae.clip import FrozenCLIP
from clipsae.sae import SAE
from clipsae.training.baselines import fit, learned, least_squares, text_directions

D = 6


def correlated(n: int = 400, d: int = D) -> torch.Tensor:
    """Tokens [n, d] around a mean, of variances that differ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.arange(1, d + 1)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    return (x @ rotation + torch.linspace(-5, 9, d)).float()


def reconstruct(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    return sae.decode(sae.encode(x))


@pytest.mark.parametrize("name", ["neurons", "pca", "ica", "random"])
@torch.no_grad()
def test_both_signs_reconstruct_any_token_exactly(name):
    x = correlated()
    sae = fit(name, x, latents=2 * D + 4)
    assert sae.latents == (2 * D + 4 if name == "random" else 2 * D)
    half = sae.latents // 2
    assert torch.equal(sae.architecture.W_enc[:half], -sae.architecture.W_enc[half:])
    assert torch.equal(sae.architecture.W_dec[:half], -sae.architecture.W_dec[half:])
    torch.testing.assert_close(sae.decoder_bias, x.mean(0))
    torch.testing.assert_close(sae.architecture.W_enc.norm(dim=1), torch.ones(sae.latents))
    for tokens in (x, 30 * torch.randn(9, D)):  # also those that it has not seen
        torch.testing.assert_close(reconstruct(sae, tokens), tokens, rtol=1e-4, atol=1e-3)
    assert (sae.encode(x) >= 0).all()


@torch.no_grad()
def test_neurons_are_the_coordinates_less_their_mean():
    x = correlated()
    codes = fit("neurons", x).encode(x)
    u = x - x.mean(0)
    torch.testing.assert_close(codes, torch.cat([u, -u], dim=1).clamp(min=0), atol=1e-5, rtol=0)


@torch.no_grad()
def test_pca_is_scikit_learn_s():
    x = correlated()
    sae = fit("pca", x)
    reference = PCA().fit(x.double().numpy())
    rows = sae.architecture.W_enc[:D].double().numpy()
    np.testing.assert_allclose(np.abs((rows * reference.components_).sum(1)), 1, atol=1e-6)
    found = (sae.encode(x)[:, :D] - sae.encode(x)[:, D:]).double().var(0).numpy()
    np.testing.assert_allclose(found, reference.explained_variance_, rtol=1e-5)
    assert all(a > b for a, b in pairwise(found))
    assert (np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1) > 0).all()


@torch.no_grad()
def test_ica_recovers_planted_sources():
    generator = np.random.default_rng(0)
    sources = generator.laplace(size=(5000, D))
    mixing = generator.normal(size=(D, D))
    sae = fit("ica", torch.tensor(sources @ mixing.T + 3), seed=1)
    codes = sae.encode(torch.tensor(sources @ mixing.T + 3).float())
    signed = (codes[:, :D] - codes[:, D:]).numpy()
    match = np.abs(np.corrcoef(signed.T, sources.T)[:D, D:])
    assert sorted(match.argmax(1)) == list(range(D))
    assert match.max(1).min() > 0.99
    # Its decoder's rows are the mixing matrix' columns.
    columns = mixing / np.linalg.norm(mixing, axis=0)
    rows = sae.decoder_rows()[:D].double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.abs(rows @ columns).max(0).min() > 0.99


@torch.no_grad()
def test_kmeans_finds_planted_centroids():
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.randn(8, D, generator=generator)
    noise = 0.1 * torch.randn(8, 100, D, generator=generator)
    x = (centres[:, None] + noise).flatten(0, 1)
    sae = fit("kmeans", x, latents=8)
    planted = centres + noise.mean(1) - x.mean(0)
    cosine = torch.cosine_similarity(sae.architecture.W_enc[:, None], planted, dim=-1)
    assert sorted(cosine.argmax(1).tolist()) == list(range(8))
    assert cosine.max(1).values.min() > 1 - 1e-5
    # Of a centroid's own tokens the code is their length along it.
    mine = cosine.argmax(0)
    lengths = planted.norm(dim=1)
    codes = sae.encode(planted + x.mean(0)).gather(1, mine[:, None])[:, 0]
    torch.testing.assert_close(codes, lengths, rtol=1e-3, atol=0)


@torch.no_grad()
def test_the_decoder_of_one_sided_codes_is_least_squares():
    x = correlated()
    sae = fit("kmeans", x, latents=10)
    u = (x - x.mean(0)).double().numpy()
    codes = sae.encode(x).double().numpy()
    best = np.linalg.lstsq(codes, u, rcond=None)[0]
    np.testing.assert_allclose(sae.decoder_rows().numpy(), best, rtol=1e-3, atol=1e-4)
    # Also where a latent never fires, or two are one: the smallest solution, without NaN.
    rows = np.vstack([np.eye(D), np.zeros(D), np.eye(D)[:1]])
    found = least_squares(np.abs(u), rows)
    codes = np.maximum(np.abs(u) @ rows.T, 0)
    np.testing.assert_allclose(found, np.linalg.pinv(codes) @ np.abs(u), atol=1e-8)
    assert not found[D].any()


@torch.no_grad()
def test_a_text_s_direction_moves_clip_s_embedding_towards_it():
    clip = FrozenCLIP.load("clipsae-tiny", "builtin", layer=-1)  # behind it ln_post and projection
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(
        torch.randn(5, clip.embed_dim, generator=generator), dim=1
    )
    rows = text_directions(clip.tower.direct(torch.eye(clip.width)), embeddings)
    tokens = torch.randn(1, clip.tokens, clip.width, generator=generator).double()
    clip.double()
    centred = embeddings.double() - embeddings.double().mean(0)

    def products(cls: torch.Tensor) -> torch.Tensor:
        x = tokens.clone()
        x[0, 0] = cls
        return (clip.tower.tail(x, clip.blocks - 1) @ centred.T)[0]

    # The slope in any direction that keeps the layer norm's scale, by finite differences.
    cls, step = tokens[0, 0], 1e-5
    away = torch.randn(4, clip.width, generator=generator).double()
    away -= away.mean(1, keepdim=True)
    level = cls - cls.mean()
    away -= (away @ level)[:, None] * level / (level @ level)
    scale = level.square().mean().add(1e-5).sqrt()
    for direction in away:
        slope = (products(cls + step * direction) - products(cls - step * direction)) / (2 * step)
        torch.testing.assert_close(slope, rows @ direction / scale, rtol=1e-3, atol=1e-5)

    # The latent of a planted class is the largest of its tokens'.
    background = 0.1 * torch.randn(200, clip.width, generator=generator)
    unit = torch.nn.functional.normalize(rows, dim=1).float()
    sae = fit("text", torch.cat([background, unit]), directions=rows)
    codes = sae.encode(unit)
    assert codes.argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_the_same_seed_gives_the_same_bits():
    x = correlated()
    for name in ("ica", "kmeans", "random"):
        one, same, other = (fit(name, x, latents=8, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(one.architecture.W_enc, same.architecture.W_enc)
        assert torch.equal(one.architecture.W_dec, same.architecture.W_dec)
        assert not torch.equal(one.architecture.W_enc, other.architecture.W_enc)


@torch.no_grad()
def test_constant_tokens_and_few_of_them():
    x = torch.full((5, D), 2.0)
    for name in ("neurons", "pca", "random", "kmeans"):
        sae = fit(name, x, latents=4)
        assert all(p.isfinite().all() for p in sae.parameters())
        torch.testing.assert_close(reconstruct(sae, x), x)
    with pytest.raises(ValueError, match="fit='ica': 5 tokens span 0 of 6 dimensions"):
        fit("ica", x)
    with pytest.raises(ValueError, match="fit='kmeans': 5 tokens are fewer than 8 centroids"):
        fit("kmeans", x, latents=8)
    with pytest.raises(ValueError, match="latents=7: expected an even number"):
        fit("random", x, latents=7)
    with pytest.raises(ValueError, match="fit='lda': unknown"):
        fit("lda", x)


def test_how_much_of_an_sae_was_learned():
    def of(steps: int = 600, **model) -> str:
        return learned(
            {"model": {"freeze": None, "fit": None, **model}, "trainer": {"max_steps": steps}}
        )

    assert of() == "trained"
    assert of(freeze="soft_decoder") == "partly frozen"
    assert of(fit="pca") == "not learned"
    assert of(steps=0) == of(steps=0, freeze="decoder") == "not learned"
    assert of(steps=0, imported={"from": "SAELens"}) == "trained"
    assert learned({"model": {"name": "relu"}, "trainer": {"max_steps": 3}}) == "trained"  # older
