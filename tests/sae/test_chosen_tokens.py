"""Tokens that are left out for their norm, and targets other than the tokens: a loop over what is
left, in float64."""

import copy

import pytest
import torch

from clipsae.sae import SAE
from tests.sae.conftest import D, M, build, tokens

RECIPES = ("relu", "topk", "batch_topk", "sparsemax", "attention_relu", "gated")


@pytest.fixture
def batch() -> torch.Tensor:
    """Three of 30 tokens have 50 times the norm of the others."""
    x = tokens(6, 5, D)
    x = x / x.norm(dim=-1, keepdim=True)
    x[0, 1] *= 50
    x[3, 0] *= 50
    x[5, 4] *= 50
    return x


def limited(recipe: str, batch: torch.Tensor, **options) -> tuple[SAE, SAE]:
    """An SAE that leaves some out, and the same that does not."""
    plain = build(recipe, **options)
    sae = build(recipe, max_norm_ratio=3.0, **options)
    sae.initialize(batch)
    norms = batch.norm(dim=-1).flatten().sort().values
    assert sae.norm_limit == 3.0 * norms[(len(norms) - 1) // 2]
    plain.load_state_dict({k: v for k, v in sae.state_dict().items() if k != "norm_limit"})
    return sae, plain


@pytest.mark.parametrize("variant", RECIPES)
@pytest.mark.parametrize("dense", [True, False])
def test_a_training_is_that_of_the_others_alone(variant, dense, batch, monkeypatch):
    if dense:
        monkeypatch.setattr("clipsae.sae.sae.prefers_dense", lambda like: True)
    auxk = {} if variant in ("relu", "attention_relu", "gated") else {"auxk": 0.1}
    sae, plain = limited(variant, batch, **auxk)
    for one in (sae, plain):
        one.tokens_since_fired[:5] = 10**8
    kept = batch.norm(dim=-1) < 2
    out, alone = sae(batch), plain(batch[kept])
    assert torch.equal(out.kept, kept)
    assert out.losses.keys() == alone.losses.keys()
    for name, value in out.losses.items():
        torch.testing.assert_close(value, alone.losses[name])
    torch.testing.assert_close(out.codes[kept], alone.codes)
    assert not out.codes[~kept].any()
    torch.testing.assert_close(out.reconstruction[kept], alone.reconstruction)
    assert torch.equal(out.reconstruction[~kept], batch[~kept])
    assert torch.equal(out.fired(), alone.fired())
    out.loss.backward()
    alone.loss.backward()
    pairs = sae.architecture.named_parameters(), plain.architecture.parameters()
    for (name, p), q in zip(*pairs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert torch.equal(sae.tokens_since_fired, plain.tokens_since_fired)


@pytest.mark.parametrize("variant", RECIPES)
@torch.no_grad()
def test_in_evaluation_they_have_no_codes_and_pass(variant, batch, tmp_path):
    sae, plain = limited(variant, batch)
    sae(batch)  # BatchTopK's threshold
    plain.load_state_dict({k: v for k, v in sae.state_dict().items() if k != "norm_limit"})
    sae.save(tmp_path)
    sae, kept = SAE.load(tmp_path), batch.norm(dim=-1) < 2
    expected = plain.eval().encode(batch) * kept[..., None]
    assert expected[kept].any()
    assert torch.equal(sae.encode(batch), expected)
    torch.testing.assert_close(sae.encode_sparse(batch).dense(), expected)
    out = sae(batch)
    assert torch.equal(out.codes, expected)
    assert torch.equal(out.reconstruction[~kept], batch[~kept])
    torch.testing.assert_close(out.losses, plain(batch[kept]).losses)


def test_without_a_limit_nothing_is_left_out(batch):
    sae = build("topk", max_norm_ratio=3.0)  # not initialised
    assert sae(batch).kept.all()
    assert sae.kept(batch).all()
    assert build("topk").kept(batch) is None


@pytest.mark.parametrize("bias_init", ["images", "tokens"])
def test_the_bias_starts_as_the_median_of_those_that_are_left(batch, bias_init):
    sae, _ = limited("topk", batch, bias_init=bias_init)
    plain = build("topk", bias_init="tokens")
    plain.initialize(batch[batch.norm(dim=-1) < 2][:, None])
    assert torch.equal(sae.decoder_bias, plain.decoder_bias)


# --- transcoders ---


@pytest.mark.parametrize("variant", RECIPES)
def test_a_transcoder_reconstructs_its_target(variant):
    linear = {} if variant in ("attention_relu", "sparsemax") else {"subtract_bias": False}
    if variant == "gated":
        linear["unit_decoder"] = False
    sae = build(variant, target_layer=-1, **linear).double()
    x, y = tokens(4, 5, D, dtype=torch.float64), tokens(4, 5, D, seed=9, dtype=torch.float64)
    sae.initialize(x, target=y)
    out = sae(x, target=y)
    norm = y.norm(dim=-1)
    wanted = sum(
        (out.reconstruction[i, j] - y[i, j]).square().sum() / (D * norm[i, j])
        for i in range(4)
        for j in range(5)
    )
    weight = sae.reconstruction_weight
    torch.testing.assert_close(out.losses["reconstruction"], weight * wanted / 20)
    out.loss.backward()
    for name, p in sae.named_parameters():
        assert p.grad is not None, name
    with torch.no_grad():
        scale = sae.input_scale(x)
        if linear:
            W, b = sae.architecture.W_enc, sae.architecture.b_enc
            scores = (x / scale) @ W.T + (0 if b is None else b)
            torch.testing.assert_close(sae.scores(x), scores)
    sae.eval()
    torch.testing.assert_close(sae(x, target=y).codes, sae.encode(x))
    assert sae.needs == {"target"}
    with pytest.raises(ValueError, match="target=None: this SAE reconstructs other tokens"):
        sae(x)


def test_the_bias_starts_as_the_median_of_the_target():
    x, y = tokens(6, 5, D), 3 + tokens(6, 5, D, seed=9)
    sae = build("topk", target_layer=-1, subtract_bias=False)
    plain = build("topk")
    sae.initialize(x, target=y)
    plain.initialize(y)
    assert torch.equal(sae.decoder_bias, plain.decoder_bias)


def test_auxk_is_of_the_target_s_residual():
    sae = build("topk", target_layer=-1, subtract_bias=False, auxk=1.0).double()
    sae.tokens_since_fired[:] = 10**8
    x, y = tokens(4, 5, D, dtype=torch.float64), tokens(4, 5, D, seed=9, dtype=torch.float64)
    twin = copy.deepcopy(sae)
    out = sae(x, target=y)
    dead = sae.dead  # after the batch's own firing
    scores = torch.relu(twin.scores(x).flatten(0, 1)) * dead
    best = scores.topk(min(sae.auxk_k, M), dim=1)
    codes = torch.zeros_like(scores).scatter(1, best.indices, best.values)
    left = (y - out.reconstruction).flatten(0, 1).detach()
    error = (left - codes @ twin.architecture.W_dec).square().sum()
    expected = error / (left - left.mean(dim=0)).square().sum()
    torch.testing.assert_close(out.losses["auxk"], expected)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"target_layer": -1}, "set subtract_bias=false"),
        (
            {"target_layer": -1, "subtract_bias": False, "normalize": "mean_std"},
            "the statistics of normalize=mean_std and position_mean",
        ),
        (
            {"target_layer": -1, "subtract_bias": False, "normalize": "layer_norm"},
            "the statistics of normalize=layer_norm and position_mean",
        ),
        ({"max_norm_ratio": 3.0, "monosemanticity": 0.1}, "compares images by the codes of all"),
        ({"target_layer": 1.5}, "target_layer=1.5: "),
        ({"tokens": "some"}, "tokens='some': expected all, patches or cls"),
        ({"max_norm_ratio": 0.5}, "max_norm_ratio=0.5: expected a number of at least 1"),
    ],
)
def test_what_cannot_be(options, why):
    with pytest.raises(ValueError, match=why):
        build("topk", **options)


def test_a_transcoder_does_not_pursue():
    with pytest.raises(ValueError, match=r"architecture=matching_pursuit: .*: use linear"):
        SAE(D, M, "matching_pursuit", "relu", l1_coefficient=0.0, k=3, target_layer=-1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"normalize": "whiten"}, {"position_mean": True}, {"prefixes": [4, 8], "k": 3}],
    ids=["whiten", "position_mean", "prefixes"],
)
def test_normalised_and_nested_tokens_that_are_left_out(batch, options, training):
    recipe = "topk" if "k" in options else "relu"
    sae, plain = build(recipe, max_norm_ratio=3.0, **options), build(recipe, **options)
    sae.initialize(batch)
    plain.load_state_dict({n: v for n, v in sae.state_dict().items() if n != "norm_limit"})
    plain.normalization.fitted = True
    sae.train(training), plain.train(training)
    out, whole = sae(batch), plain(batch)
    kept = out.kept
    assert (~kept).sum() == 3
    torch.testing.assert_close(out.reconstruction[kept], whole.reconstruction[kept])
    assert torch.equal(out.reconstruction[~kept], batch[~kept])
    assert not out.codes[~kept].any()
