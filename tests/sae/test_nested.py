"""Nested reconstructions, by prefixes of the dictionary and by a token's largest codes: against
sums of losses written out one by one, in float64."""

import copy

import pytest
import torch

from clipsae.sae import SAE, SparseCodes
from clipsae.sae.engine import cpu
from clipsae.sae.engine.switch import DENSE_FROM
from clipsae.sae.nested import _RunningErrors
from clipsae.sae.objectives.prefixes import drawn_sizes
from tests.sae.conftest import D, M, build, tokens
from tests.sae.test_every_recipe import train

PREFIXES = {"prefixes": [3, 0.25, 20], "prefix_weights": [1.0, 0.0, 2.0, 3.0]}
CASES = [
    ("topk", PREFIXES),
    ("batch_topk", PREFIXES | {"auxk": 0.3}),
    ("batch_topk", {"prefixes": "fixed", "normalize": "unit"}),
    ("sparsemax", PREFIXES),
    ("sparsemax", {"prefixes": "drawn", "n_prefixes": 5, "weights": "probabilities"}),
    ("relu", PREFIXES),
    ("gated", {"prefixes": "fixed"}),
    ("jumprelu", {"prefixes": [1, 39]}),
    ("topk", {"nested_k": [1, 2], "nested_k_weights": "reverse"}),
    ("batch_topk", {"nested_k": [1, 3, 4], "nested_k_weights": [2.0, 1.0, 0.0]}),
    ("batch_topk", {"nested_k": [2], "normalize": "unit"}),
]


def masks(sae: SAE, codes: torch.Tensor) -> tuple[list[torch.Tensor], list[float]]:
    """Which codes [N, M] each reconstruction is by, and its weight."""
    c = sae.config
    if c["nested_k"] is not None:
        sizes = sorted({*c["nested_k"], c["k"]})
        found = []
        for size in sizes:
            mask = torch.zeros_like(codes, dtype=torch.bool)
            for row, token in zip(mask, codes, strict=True):
                row[sorted(range(M), key=lambda m: -token[m].abs())[:size]] = True
            found.append(mask | (size == c["k"]))
        weights = c["nested_k_weights"]
        if isinstance(weights, str):
            weights = [len(sizes) - i if weights == "reverse" else 1 for i in range(len(sizes))]
        return found, weights
    sizes = {
        "fixed": [1, 2, 5, 10, 40],
        "drawn": sae.nested.step_sizes(),
        str(PREFIXES["prefixes"]): [3, 10, 20, 40],
        "[1, 39]": [1, 39, 40],
    }[str(c["prefixes"])]
    return [(torch.arange(M) < n).expand_as(codes) for n in sizes], c["prefix_weights"] or [
        1
    ] * len(sizes)


@pytest.mark.parametrize(
    "share", [2, -1, None], ids=["sparse", "dense", "without sparse operations"]
)
@pytest.mark.parametrize(("model", "options"), CASES)
def test_the_loss_is_the_mean_of_the_losses_one_by_one(model, options, share, monkeypatch):
    if share is None:  # as on other devices
        monkeypatch.delitem(DENSE_FROM, "cpu")
    else:
        monkeypatch.setitem(DENSE_FROM, "cpu", {1: share, 2: share})
    monkeypatch.setattr(cpu, "_TILE", 7)
    sae = build(model, **options, reconstruction_weight=3.0).double()
    plain = build(
        model, **{k: v for k, v in options.items() if "prefix" not in k and "nested" not in k}
    ).double()
    plain.load_state_dict({k: v for k, v in sae.state_dict().items() if "objectives" not in k})
    for one in (sae, plain):
        one.tokens_since_fired[::3] = 10**9  # dead: AuxK has something to do
    x = tokens(3, 5, D, dtype=torch.float64)
    x[0, 0] = 0
    out, before = sae(x), plain(x)
    assert isinstance(out.encoded, SparseCodes) == (share == 2)

    flat, codes = x.flatten(0, 1), before.codes.flatten(0, 1)
    scale, norm = plain.input_scale(flat), flat.norm(dim=-1)
    total = 0.0
    parts, weights = masks(sae, codes.detach())
    for mask, weight in zip(parts, weights, strict=True):
        x_hat = (codes * mask) @ plain.decoder_rows() + (
            0 if plain.decoder_bias is None else plain.decoder_bias
        )
        errors = (x_hat * scale - flat).square().sum(-1) / D
        total = total + weight * (errors / norm.clamp(min=1e-9))[norm > 0].sum() / len(flat)
    total = total / sum(weights)
    others = sum(term for name, term in before.losses.items() if name != "reconstruction")
    torch.testing.assert_close(out.losses["reconstruction"], 3 * total)
    torch.testing.assert_close(out.loss, 3 * total + others)
    torch.testing.assert_close(out.reconstruction, before.reconstruction)
    out.loss.backward()
    (3 * total + others).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(sae.get_parameter(name).grad, parameter.grad, msg=name)


@pytest.mark.parametrize(
    ("model", "options"),
    [("topk", PREFIXES), ("sparsemax", PREFIXES), ("batch_topk", {"k": 30, "nested_k": [5, 12]})],
)
@pytest.mark.usefixtures("interpreted", "as_on_cuda")
def test_a_gpu_s_codes_give_the_same(model, options):
    sae = build(model, **options).double()
    twin, x = copy.deepcopy(sae), tokens(3, D, dtype=torch.float64)
    out = sae(x)
    # Some with more memory than there are codes.
    assert (len(out.encoded.values) > out.encoded.begin[-1]) == (model != "topk")
    out.loss.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(DENSE_FROM, "cpu")
        expected = twin(x)
    expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.reconstruction, expected.reconstruction)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(sae.get_parameter(name).grad, parameter.grad, msg=name)


def test_errors_of_running_sums_and_their_gradients():
    """All four, and those of what another loss asks of the last reconstruction."""
    g = torch.Generator().manual_seed(0)
    shapes = (4, 3, 5), (5,), (4, 1), (4, 5)
    inputs = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    last, *errors = _RunningErrors.apply(*inputs)
    parts, bias, scale, x = inputs
    sums = (parts.cumsum(1) + bias) * scale[:, None]
    torch.testing.assert_close(last, sums[:, -1])
    torch.testing.assert_close(torch.stack(errors, 1), (sums - x[:, None]).square().mean(-1))
    assert torch.autograd.gradcheck(lambda *given: _RunningErrors.apply(*given), inputs)


def test_evaluation_is_that_of_the_plain_sae():
    sae, plain, x = build("batch_topk", prefixes="fixed"), build("batch_topk"), tokens(3, 5, D)
    sae.eval(), plain.eval()
    assert torch.equal(sae(x).reconstruction, plain(x).reconstruction)
    assert torch.equal(sae(x).loss, plain(x).loss)


def test_the_whole_alone_is_the_plain_loss():
    for options in ({"prefixes": [1.0]}, {"nested_k": [4]}):
        sae, plain, x = build("topk", **options), build("topk"), tokens(6, D)
        torch.testing.assert_close(sae(x).loss, plain(x).loss)


# --- prefixes that are drawn ---


def test_drawn_prefixes_have_the_distribution_of_their_source():
    """P(n <= size) is proportional to 1 - size^-1/2: of one that is drawn beside the whole."""
    latents, draws = 64, 4000
    first = torch.tensor([drawn_sizes(latents, 2, seed)[0] for seed in range(draws)])
    for size in (2, 5, 20, 63):
        expected = (1 - size**-0.5) / (1 - 63**-0.5)
        found = (first <= size).double().mean().item()
        error = (max(expected * (1 - expected), 1e-9) / draws) ** 0.5
        assert abs(found - expected) < 4 * error + 1e-9, size
    for count in (1, 2, 10, 64):
        sizes = drawn_sizes(latents, count, 3)
        assert len(set(sizes)) == count
        assert sizes == sorted(sizes)
        assert 1 <= sizes[0] <= sizes[-1] == 64
    assert drawn_sizes(1, 1, 0) == [1]


def test_each_step_draws_others_and_a_continued_training_the_same(tmp_path):
    sae = build("topk", prefixes="drawn", n_prefixes=4)
    x = tokens(6, 5, D)
    sizes = []
    for _ in range(4):
        sizes.append(sae.nested.step_sizes())
        assert torch.equal(sae(x).loss, sae(x).loss)  # until the optimizer's step
        sae.after_step()
    assert len({tuple(one) for one in sizes}) > 1
    sae.save(tmp_path)
    loaded = SAE.load(tmp_path)
    other = build("topk", seed=1, prefixes="drawn", n_prefixes=4)
    assert other.nested.step_sizes() != sae.nested.step_sizes()
    other.load_state_dict(sae.state_dict())
    for one in (loaded, other, copy.deepcopy(sae)):
        assert one.nested.step_sizes() == sae.nested.step_sizes()


@pytest.mark.parametrize(
    "options", [{"prefixes": "drawn", "n_prefixes": 3}, {"nested_k": [1, 2]}, {"prefixes": [0.5]}]
)
def test_an_interrupted_training_ends_with_the_same_bits(options):
    whole = build("topk", **options)
    half = copy.deepcopy(whole)
    for sae in (whole, half):
        train(sae, range(3))
    train(whole, range(3, 6))
    continued = build("topk", seed=1, **options)
    continued.load_state_dict(half.state_dict())
    train(continued, range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name


def test_the_first_latents_learn_to_reconstruct_alone():
    """From tokens of a few common directions and many rare ones."""
    directions = torch.nn.functional.normalize(tokens(30, D), dim=-1)
    chance = torch.where(torch.arange(30) < 3, 0.5, 0.02)

    def batch(step: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(step)
        return (torch.rand(64, 30, generator=g) < chance).float() @ directions + 1e-3

    def error_of_first(sae: SAE, n: int) -> float:
        x = batch(10**6)
        codes = sae.eval().encode(x) * (torch.arange(M) < n)
        return (sae.decode(codes) - x).square().sum().item()

    errors = []
    for options in ({}, {"prefixes": [5]}):
        sae = build("topk", dead_after=10**6, **options)
        train(sae, range(150), batch)
        errors.append(error_of_first(sae, 5))
    assert errors[1] < 0.8 * errors[0]


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefixes": "all"}, "prefixes='all': expected fixed, drawn, or a list of sizes from 1"),
        ({"prefixes": []}, r"prefixes=\[\]: expected fixed"),
        ({"prefixes": [0]}, r"prefixes=\[0\]"),
        ({"prefixes": [41]}, r"prefixes=\[41\]: .* latents=40 and shares up to 1\.0"),
        ({"prefixes": [1.5]}, r"prefixes=\[1\.5\]"),
        ({"prefixes": [True]}, r"prefixes=\[True\]"),
        ({"prefixes": [10, 5]}, r"prefixes=\[10, 5\]: expected them to ascend"),
        ({"prefixes": [10, 0.25]}, r"to ascend, here \[10, 10, 40\]"),
        ({"prefix_weights": [1.0]}, "prefix_weights=.* does nothing while prefixes is None"),
        ({"prefixes": "fixed", "prefix_weights": [1]}, "a number for each of the 5 prefixes"),
        ({"prefixes": [5], "prefix_weights": [0, 0]}, "not all of them 0"),
        (
            {"prefixes": [5], "prefix_weights": [1, -1]},
            r"prefix_weights=\[1, -1\]: expected a list",
        ),
        ({"prefixes": "fixed", "n_prefixes": 4}, "n_prefixes=4 does nothing with prefixes='fixed'"),
        ({"prefixes": "drawn", "n_prefixes": 0}, "n_prefixes=0: expected an integer from 1 to"),
        ({"prefixes": "drawn", "n_prefixes": 41}, "n_prefixes=41"),
        ({"nested_k": 3}, "nested_k=3: expected a list of integers"),
        ({"nested_k": [0]}, r"nested_k=\[0\]"),
        ({"nested_k": [2, 2]}, r"nested_k=\[2, 2\]: expected them to ascend"),
        ({"nested_k": [5]}, r"nested_k=\[5\]: expected numbers up to k=4"),
        ({"nested_k": [2], "nested_k_weights": "revers"}, r"did you mean reverse\?"),
        ({"nested_k": [2], "nested_k_weights": [1]}, "each of the 2 numbers of codes"),
        ({"nested_k_weights": "reverse"}, "does nothing while nested_k is None"),
        (
            {"nested_k": [2], "prefixes": "fixed"},
            r"nested_k=\[2\] and prefixes='fixed': one of them",
        ),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SAE(D, M, activation="topk", k=4, **options)


def test_nested_k_is_of_activations_that_keep_the_largest():
    with pytest.raises(ValueError, match=r"nested_k=.* needs an activation that keeps the largest"):
        SAE(D, M, activation="relu", nested_k=[2])
