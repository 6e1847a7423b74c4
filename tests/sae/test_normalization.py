"""What is done to tokens before they are encoded: statistics and formulas, against float64."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from clipsae.evaluation.floors import untrained
from clipsae.sae import SAE
from clipsae.sae.normalization import LEAST_VARIANCE, Moments, Normalization
from tests.sae.conftest import D, M, tokens

T = 5
WAYS = [
    {"normalize": "none", "position_mean": True},
    {"normalize": "mean_std"},
    {"normalize": "mean_std", "position_mean": True},
    {"normalize": "whiten", "whitening": 0.5},
    {"normalize": "whiten", "position_mean": True},
]


def images(n: int = 30, seed: int = 0) -> Tensor:
    """[n, T, D], float64: correlated dimensions of different variances, far from 0, and positions
    with means of their own."""
    mixing = torch.eye(D, dtype=torch.float64) * torch.arange(1, D + 1) + 0.5
    at = torch.arange(T, dtype=torch.float64)[:, None] * torch.linspace(-1, 2, D).double()
    return tokens(n, T, D, seed=seed, dtype=torch.float64) @ mixing + at + 7


def statistics(x: Tensor, way: dict) -> tuple[np.ndarray, float, np.ndarray]:
    """mean [T, d] or [d], deviation, W [d, d], written plainly."""
    mean = x.numpy().mean(axis=0 if way.get("position_mean") else (0, 1))
    centred = (x.numpy() - mean).reshape(-1, D)
    if way["normalize"] == "none":
        return mean, 1.0, np.eye(D)
    deviation = np.sqrt((centred**2).mean())
    strength = {"mean_std": 0.0, "whiten": way.get("whitening", 1.0)}[way["normalize"]]
    values, vectors = np.linalg.eigh(np.cov(centred.T, bias=True))
    whitening = vectors @ np.diag(values ** (-strength / 2)) @ vectors.T
    # Of tokens whose mean variance is what it was.
    return mean, deviation, whitening * deviation / np.sqrt(((centred @ whitening) ** 2).mean())


def fitted(way: dict, **options) -> SAE:
    torch.manual_seed(0)
    sae = SAE(D, M, "linear", **{"activation": "relu", "unit_decoder": False, **way, **options})
    sae = sae.double()
    x = images()
    sae.normalization.fit(Moments.of(x.split([1, 20, 9])))
    sae.initialize(x)
    return sae


@pytest.mark.parametrize("way", WAYS)
def test_codes_loss_and_gradients_are_those_of_the_formula(way):
    sae, x = fitted(way, l1_coefficient=0.03), images(6, seed=1)
    mean, s, w = statistics(images(), way)
    p = {n: q.detach().clone().requires_grad_() for n, q in sae.architecture.named_parameters()}
    y = (x - torch.tensor(mean)) @ torch.tensor(w)
    z = torch.relu((y / s - p["b_dec"]) @ p["W_enc"].T + p["b_enc"])
    y_hat = s * (z @ p["W_dec"] + p["b_dec"])
    x_hat = y_hat @ torch.tensor(np.linalg.inv(w)) + torch.tensor(mean)
    norm = x.norm(dim=-1)
    loss = ((y_hat - y).square().mean(-1) / norm).mean()
    l1 = 0.03 * (z * p["W_dec"].norm(dim=1)).sum(-1).mean()
    (loss + l1).backward()
    if way["normalize"] != "whiten":  # the loss is that of the tokens as they are
        torch.testing.assert_close(loss, ((x_hat - x).square().mean(-1) / norm).mean())

    out = sae.train()(x)
    out.loss.backward()
    assert 0.1 < (out.codes != 0).double().mean() < 0.9
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out.codes, z, **close)
    torch.testing.assert_close(out.reconstruction, x_hat, **close)
    torch.testing.assert_close(out.losses["reconstruction"], loss, **close)
    torch.testing.assert_close(out.losses["l1"], l1, **close)
    for name, q in sae.architecture.named_parameters():
        torch.testing.assert_close(q.grad, p[name].grad, **close)
    evaluated = sae.eval()(x)
    torch.testing.assert_close(evaluated.loss, loss, **close)
    # The dictionary is in units of the tokens.
    codes = sae.encode(x)
    assert torch.equal(sae.input_scale(x), torch.ones(6, T, 1).double())
    torch.testing.assert_close(sae.decode(codes), x_hat, **close)
    torch.testing.assert_close(codes @ sae.decoder_rows() + sae.decoder_bias, x_hat, **close)
    torch.testing.assert_close(sae.encode_sparse(x).dense(), codes, **close)
    few = torch.tensor([7, 3])
    torch.testing.assert_close(sae.decoder_rows(few), sae.decoder_rows()[few])
    kept = sae.decode(codes[..., few].contiguous(), latents=few)
    torch.testing.assert_close(
        kept, codes[..., few] @ sae.decoder_rows(few) + sae.decoder_bias, **close
    )


@pytest.mark.parametrize("options", [{}, {"activation": "topk", "k": 3, "auxk": 1.0}])
def test_layer_norm_is_of_each_token_by_itself(options):
    """And is SAELens's: its deviation has d - 1 in it, and 1e-5 beside it."""
    sae, x = fitted({"normalize": "layer_norm"}, dead_after=1, **options), images(6, seed=1)
    x = x * torch.arange(1, 7)[:, None, None]
    with torch.no_grad():
        sae.architecture.b_dec += 0.3
    p = {n: q.detach().clone().requires_grad_() for n, q in sae.architecture.named_parameters()}
    mean = x.sum(dim=-1, keepdim=True) / D
    s = ((x - mean).square().sum(dim=-1, keepdim=True) / (D - 1)).sqrt() + 1e-5
    scores = torch.relu(((x - mean) / s - p["b_dec"]) @ p["W_enc"].T + p["b_enc"])
    z = scores * (scores >= scores.topk(3, dim=-1).values[..., -1:]) if options else scores
    x_hat = s * (z @ p["W_dec"] + p["b_dec"]) + mean
    loss = ((x_hat - x).square().mean(-1) / x.norm(dim=-1)).mean()
    out = sae.train()(x)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out.codes, z, **close)
    torch.testing.assert_close(out.reconstruction, x_hat, **close)
    torch.testing.assert_close(out.losses["reconstruction"], loss, **close)
    loss.backward()
    out.losses["reconstruction"].backward()
    for name, q in sae.architecture.named_parameters():
        torch.testing.assert_close(q.grad, p[name].grad, **close)
    evaluated = sae.eval()(x)
    torch.testing.assert_close(evaluated.reconstruction, x_hat, **close)
    torch.testing.assert_close(evaluated.losses["reconstruction"], loss, **close)
    codes, scale, few = sae.encode(x), sae.input_scale(x), torch.tensor([7, 3])
    torch.testing.assert_close(sae.decode(codes, scale), x_hat, **close)
    torch.testing.assert_close(sae.encode_sparse(x).dense(), codes, **close)
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x), scale), x_hat, **close)
    kept = sae.decode(codes[..., few].contiguous(), scale, few)
    expected = s * (codes[..., few] @ sae.decoder_rows(few) + sae.decoder_bias) + mean
    torch.testing.assert_close(kept, expected, **close)
    half = sae.bfloat16()(x.bfloat16()).reconstruction.double()
    assert (half - x_hat).norm() < 0.02 * x_hat.norm()


def test_dead_latents_reconstruct_what_is_left_of_the_normalised_token():
    way = {"normalize": "whiten", "whitening": 0.5}
    options = {"activation": "topk", "k": 3, "auxk": 1.0, "dead_after": 1000, "auxk_k": 2}
    sae, x = fitted(way, **options), images(6, seed=1)
    dead = slice(0, 10)
    sae.tokens_since_fired[dead] = 1000
    with torch.no_grad():
        sae.architecture.W_enc[dead] *= 1e-3  # never among the three largest
    out = sae.train()(x)
    assert sae.dead.nonzero()[:, 0].tolist() == list(range(10))
    mean, s, w = (torch.tensor(part) for part in statistics(images(), way))
    y, y_hat = (x - mean) @ w, (out.reconstruction - mean) @ w
    p = sae.architecture
    scores = torch.relu((y / s - p.b_dec) @ p.W_enc[dead].T + p.b_enc[dead])
    kept = scores * (scores >= scores.topk(2, dim=-1).values[..., -1:])
    error = y - y_hat
    left = (error - s * kept @ p.W_dec[dead]).square().sum()
    expected = left / (error - error.flatten(0, 1).mean(dim=0)).square().sum()
    torch.testing.assert_close(out.losses["auxk"], expected)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_a_known_covariance(strength):
    """Tokens +-a_i along dimension i: variances a_i^2 / d, which become their power."""
    a = torch.tensor([1.0, 3.0, 10.0, 0.2], dtype=torch.float64)
    x = torch.cat((torch.diag(a), -torch.diag(a)))[:, None] + 5
    way = Normalization(4, "whiten", strength).double()
    way.fit(Moments.of([x]))
    gain = (a**2) ** (-strength / 2)
    gain = gain * ((a**2).mean() / (a**2 * gain**2).mean()).sqrt()
    torch.testing.assert_close(way.whitening.detach(), torch.diag(gain))
    torch.testing.assert_close(way.deviation, (a**2).mean().sqrt()[None] / 2, check_stride=False)
    variances = way(x)[:, 0].square().mean(0)
    torch.testing.assert_close(variances.mean(), (a**2).mean() / 4)
    torch.testing.assert_close(way.inverse(way(x)), x)
    if strength == 1:
        torch.testing.assert_close(variances, variances.mean().expand(4))
    if strength == 0:
        torch.testing.assert_close(way(x), x - 5)


def test_statistics_do_not_depend_on_how_the_images_are_split():
    x = images()
    whole, split = Moments.of([x]), Moments.of(x.float().split(7))
    for positions in (False, True):
        torch.testing.assert_close(whole.mean(positions), split.mean(positions))
        a, b = whole.covariance(positions), split.covariance(positions)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert a.dtype == b.dtype == torch.float64
    with pytest.raises(ValueError, match="statistics of no tokens"):
        Normalization(D, "mean_std").fit(Moments())


@pytest.mark.parametrize("kind", ["mean_std", "whiten"])
def test_tokens_that_do_not_vary_or_span_few_directions(kind):
    way = Normalization(D, kind)
    way.fit(Moments.of([torch.full((3, T, D), 4.0)]))
    assert torch.equal(way(torch.full((2, D), 4.0)), torch.zeros(2, D))
    assert way.deviation == 1
    way = Normalization(D, kind)
    x = torch.randn(40, T, 2) @ torch.randn(2, D)
    way.fit(Moments.of([x]))
    assert all(p.isfinite().all() for p in way.parameters())
    torch.testing.assert_close(way.inverse(way(x)), x, rtol=1e-3, atol=1e-3)
    if kind == "whiten":  # the other ten are at the least variance
        gains = torch.linalg.eigvalsh(way.whitening.detach())
        assert (gains > 0).all()
        assert gains[-1] / gains[0] < 2 * (D / LEAST_VARIANCE) ** 0.5


def test_positions_are_those_of_whole_images(tmp_path):
    sae = fitted({"normalize": "mean_std", "position_mean": True}).eval()
    x = images(4, seed=2)
    torch.testing.assert_close(sae.encode(x)[1], sae.encode(x[1]))  # one image [T, d]
    assert sae.decoder_bias.shape == (T, D)
    said = r"tokens of shape \(4, 12\): with position_mean=True .* means of 5 positions"
    for call in (sae.encode, sae.encode_sparse, sae.scores, sae):
        with pytest.raises(ValueError, match=said):
            call(x[:, 0])
    with pytest.raises(ValueError, match="means of 5 positions"):
        sae.decode(sae.encode(x)[:, :3])
    first = sae.encode(x)[:, :1]  # alone, as of images without their captions
    torch.testing.assert_close(sae.encode(x[:, :1]), first)
    torch.testing.assert_close(sae.decode(first), sae(x).reconstruction[:, :1])
    sae.float().save(tmp_path)
    loaded = SAE.load(tmp_path)
    assert torch.equal(loaded.encode(x.float()), sae.encode(x.float()))
    fresh = SAE(**sae.config)  # as a training that is continued
    fresh.load_state_dict(sae.state_dict())
    for name, value in sae.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    assert not fresh.normalization.mean.requires_grad
    fresh.initialize(x.float() + 100)  # it has its statistics
    assert torch.equal(fresh.normalization.mean, sae.normalization.mean)


def test_an_untrained_twin_has_the_statistics_of_the_sae():
    sae, x = fitted({"normalize": "whiten", "position_mean": True}).float().eval(), images(8)
    twin = untrained(sae, x.float() + 3)
    torch.testing.assert_close(twin.normalization.mean, sae.normalization.mean.mean(dim=0))
    assert torch.equal(twin.normalization.whitening, sae.normalization.whitening)
    assert twin.encode_sparse(x[:, 0].float()).shape == (8, M)  # a patch without its image
    alone = untrained(sae, x[:, :1].float())  # of images without their captions
    torch.testing.assert_close(alone.normalization.mean, sae.normalization.mean[0])


def test_half_precision_keeps_the_statistics():
    sae = fitted({"normalize": "whiten", "whitening": 0.5}).float().eval()
    x = images(6).float()
    expected = sae(x)
    before = {name: p.clone() for name, p in sae.normalization.named_parameters()}
    half = sae.bfloat16()(x.bfloat16())
    assert half.reconstruction.dtype == half.codes.dtype == torch.bfloat16
    for name, p in sae.normalization.named_parameters():
        assert torch.equal(p, before[name]), name
    difference = (half.reconstruction.float() - expected.reconstruction).norm()
    assert difference < 0.02 * expected.reconstruction.norm()


def test_an_sae_with_the_old_option_loads(tmp_path):
    x = tokens(6, D)
    for old, new in ((True, "unit"), (False, "none")):
        torch.manual_seed(0)
        sae = SAE(D, M, normalize=new).eval()
        sae.save(tmp_path)
        about = json.loads((tmp_path / "sae.json").read_text())
        for name in ("normalize", "whitening", "position_mean"):
            del about["config"][name]
        about["config"]["normalize_input"] = old
        (tmp_path / "sae.json").write_text(json.dumps({**about, "version": 3}))
        loaded = SAE.load(tmp_path)
        assert loaded.config == sae.config
        assert torch.equal(loaded.encode(x), sae.encode(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "l2"}, "expected one of none, unit, layer_norm, mean_std, whiten"),
        ({"normalize": "whiten", "whitening": 1.5}, r"whitening=1\.5: expected a number from 0 to"),
        ({"normalize": "mean_std", "whitening": 0.5}, "whitening=0.5 does nothing with"),
        ({"normalize": "unit", "position_mean": True}, "normalize=unit divides each token"),
        ({"normalize": "layer_norm", "position_mean": True}, "normalize=layer_norm divides each"),
        ({"position_mean": "yes"}, "position_mean='yes': expected true or false"),
        ({"normalize_input": True}, "normalize_input=True: .* now normalize: normalize='unit'"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SAE(D, M, **options)
