"""Training on the support against training in dense products, and the support's own products."""

import contextlib
import copy

import pytest
import torch

from clipsae.sae import SAE, SAEOutput
from clipsae.sae import blockwise as blockwise_module
from clipsae.sae import support as support_module
from clipsae.sae.base import SparseCodes
from clipsae.sae.support import Support, largest, positions_above
from tests.sae.conftest import D, M, build, tokens

HARD = {
    "random": lambda: tokens(3, 5, D),
    "one token": lambda: tokens(1, D),
    "zero tokens": lambda: tokens(4, 5, D) * (torch.arange(4) % 2)[:, None, None],
    "only zero tokens": lambda: torch.zeros(2, 3, D),
    "equal tokens": lambda: tokens(1, D).expand(7, D).contiguous(),
    "many blocks": lambda: tokens(600, D),
}
OPTIONS = {
    "attention_relu": [{"l1": 0.03}],
    "relu": [{"l1": 0.03}, {"l1": 0.03, "unit_decoder": False, "normalize_input": True}],
    "gated": [{"l1": 0.03}],
    "jumprelu": [{"l0": 0.02, "bandwidth": 0.7}, {"l0": 0.1, "target_l0": 3.0, "auxk": 0.3}],
    "topk": [{"auxk": 0.3, "auxk_k": 3}, {"k": M}, {"k": 1, "encoder_init": "independent"}],
    "batch_topk": [{"auxk": 0.3, "auxk_k": 3}, {"k": 20}],
    "sparsemax": [
        {"max_activation_frequency": 0.2},
        {"weights": "probabilities", "query": "learned", "max_activation_frequency": 0.2},
        {"clamp": True, "scale": 30.0, "auxk": 0.3},
    ],
    "linear_sparsemax": [{"auxk": 0.3}],
}


@contextlib.contextmanager
def dense_from(share: float):
    """Dense products where more than this share of pairs is active: -1 is always, 2 never."""
    before = support_module.DENSE_FROM["cpu"]
    support_module.DENSE_FROM["cpu"] = share
    try:
        yield
    finally:
        support_module.DENSE_FROM["cpu"] = before


def two_steps(sae: SAE, x: torch.Tensor, share: float) -> tuple[SAEOutput, dict]:
    """The second of two steps' output and gradients; both accumulate."""
    with dense_from(share):
        sae(x).loss.backward()
        out = sae(x.flip(0))
        out.loss.backward()
    return out, {name: p.grad for name, p in sae.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", HARD)
def test_both_ways_give_the_same(recipe, case, dtype):
    for options in OPTIONS[recipe]:
        sparse = build(recipe, **options).to(dtype)
        dense, x = copy.deepcopy(sparse), HARD[case]().to(dtype)
        if "k" in sparse.config and (dtype == torch.bfloat16 or case == "zero tokens"):
            continue  # equal scores, of which each way may keep others
        out, gradients = two_steps(sparse, x, 2)
        expected, expected_gradients = two_steps(dense, x, -1)
        assert isinstance(out.held, SparseCodes)
        assert isinstance(expected.held, torch.Tensor)
        tolerance = {
            torch.float64: {"rtol": 1e-9, "atol": 1e-11},
            torch.float32: {"rtol": 1e-4, "atol": 1e-5},
            torch.bfloat16: {"rtol": 0.1, "atol": 0.05},
        }[dtype]
        torch.testing.assert_close(out.codes, expected.codes, **tolerance)
        torch.testing.assert_close(out.reconstruction, expected.reconstruction, **tolerance)
        assert torch.equal(out.fired(), expected.fired())
        assert list(out.losses) == list(expected.losses)
        for name, loss in expected.losses.items():
            torch.testing.assert_close(out.losses[name], loss, **tolerance, msg=name)
        for name, gradient in expected_gradients.items():
            if gradient is None:
                assert gradients[name] is None or not gradients[name].any(), name
                continue
            assert gradients[name].dtype == dtype or name.startswith("activation"), name
            torch.testing.assert_close(
                gradients[name], gradient, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        for name, value in dense.named_buffers():
            torch.testing.assert_close(dict(sparse.named_buffers())[name], value, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dense_codes_in_blocks_are_those_in_one_piece(recipe, dtype, monkeypatch):
    for options in OPTIONS[recipe]:
        whole = build(recipe, **options).to(dtype)
        parts, x = copy.deepcopy(whole), tokens(3, 5, D, dtype=dtype)
        expected, expected_gradients = two_steps(whole, x, -1)
        with monkeypatch.context() as patch:
            patch.setattr(blockwise_module, "_BLOCK", 4 * M)  # four tokens, the last ones three
            out, gradients = two_steps(parts, x, -1)
        assert torch.equal(out.codes, expected.codes)
        tolerance = (
            {"rtol": 1e-9, "atol": 1e-11}
            if dtype == torch.float64
            else {"rtol": 0.02, "atol": 0.02}
        )
        torch.testing.assert_close(out.loss, expected.loss, **tolerance)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, **tolerance)


def test_each_way_is_taken_by_density():
    sae, x = build("relu", latents=2048), tokens(40, D)
    assert isinstance(sae(x).held, torch.Tensor)  # half of the scores are positive
    with torch.no_grad():
        sae.architecture.b_enc -= 5.0
    sparse = sae(x)
    assert not isinstance(sparse.held, torch.Tensor)
    assert sparse.codes.shape == (40, 2048)
    assert torch.equal(sparse.codes, sae.eval()(x).codes)


def test_mixed_precision_and_no_gradient_work_on_the_support(recipe):
    sae, x = build(recipe), tokens(6, 5, D)
    with dense_from(2):
        expected = copy.deepcopy(sae)(x).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = copy.deepcopy(sae)(x)
        out.loss.backward()
        torch.testing.assert_close(out.loss.float(), expected, rtol=0.1, atol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(sae(x).loss, expected)


def test_the_gradient_reaches_the_tokens(recipe):
    found = []
    for share in (2, -1):
        sae = build(recipe).double()
        x = tokens(6, D, dtype=torch.float64).requires_grad_()
        with dense_from(share):
            sae(x).loss.backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(0, D), (0, 5, D)])
def test_an_empty_batch_has_no_loss_and_moves_nothing(recipe, shape):
    for options in OPTIONS[recipe]:
        for share in (2, -1):
            sae = build(recipe, **options)
            sae.tokens_since_fired.fill_(10**9)  # all dead: AuxK has candidates
            before = copy.deepcopy(dict(sae.named_buffers()))
            with dense_from(share):
                out = sae(torch.zeros(shape))
                out.loss.backward()
            # (An l0 that should be 3 is missed by all of it.)
            assert out.loss == (options["l0"] if "target_l0" in options else 0)
            assert out.reconstruction.shape == shape
            assert out.codes.shape == (*shape[:-1], M)
            for name, parameter in sae.named_parameters():
                assert parameter.grad is None or not parameter.grad.any(), name
            for name, buffer in sae.named_buffers():
                assert torch.equal(buffer, before[name]) or name == "activation.step", name
            assert sae.eval()(torch.zeros(shape)).loss == 0
            assert sae.encode_held(torch.zeros(shape)).shape == (*shape[:-1], M)


def test_codes_made_dense_carry_their_gradient():
    sae, x = build("topk").double(), tokens(6, D, dtype=torch.float64)
    weight = torch.randn(6, M, dtype=torch.float64)
    with dense_from(2):
        (sae(x).codes * weight).sum().backward()
    found = sae.architecture.W_enc.grad.clone()
    sae.zero_grad()
    with dense_from(-1):
        (sae(x).codes * weight).sum().backward()
    torch.testing.assert_close(found, sae.architecture.W_enc.grad)


@pytest.mark.parametrize("chunk", [1024, 4, 1])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.03, 1.0])
def test_products_on_a_support(share, ordered, chunk, monkeypatch):
    monkeypatch.setattr(support_module, "_TILE", 7)  # some tiles, the last one shorter
    monkeypatch.setattr(support_module, "_CHUNK", chunk)
    monkeypatch.setattr(support_module, "_PAIRS_A_ROW", 0)
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(9, 40, generator=g) < share
    positions = mask.flatten().nonzero()[:, 0]
    if not ordered:
        positions = positions[torch.randperm(len(positions), generator=g)]
    support = Support(positions, 9, 40)
    values = torch.randn(len(positions), generator=g)
    z = torch.zeros(9 * 40).index_put((positions,), values).view(9, 40)
    rows, x = torch.randn(40, D, generator=g), torch.randn(9, D, generator=g)
    assert len(support._chunks) == (0 if chunk > 9 else -(-9 // chunk))
    torch.testing.assert_close(support.dense(values), z)
    torch.testing.assert_close(support.times_rows(values, rows), z @ rows)
    torch.testing.assert_close(support.transposed_times((values, x)), z.T @ x)
    both = support.transposed_times((values, x), (2 * values, 3 * x))
    torch.testing.assert_close(both, 7 * z.T @ x)
    torch.testing.assert_close(support.sampled(x, rows), (x @ rows.T).flatten()[positions])
    torch.testing.assert_close(support.per_latent(values), z.sum(0))
    assert torch.equal(support.count(values > 0), (z > 0).sum(0))


@pytest.mark.parametrize("m", [40, 39, 2048])
@pytest.mark.parametrize("floor", ["scalar", "per token", "per latent"])
def test_positions_above(m, floor):
    scores = torch.randn(33, m, generator=torch.Generator().manual_seed(0))
    border = {
        "scalar": torch.tensor(2.0),
        "per token": torch.linspace(1, 3, 33)[:, None],
        "per latent": torch.linspace(1, 3, m),
    }[floor]
    with dense_from(2):
        found = positions_above(scores, border)
    assert torch.equal(found, (scores > border).flatten().nonzero()[:, 0])
    with dense_from(0.2):
        assert positions_above(scores, border - 3) is None


@pytest.mark.parametrize(("m", "k"), [(40, 3), (1000, 3), (1003, 31), (1003, 1003), (512, 16)])
def test_largest_is_topk(m, k):
    scores = torch.randn(5, m, generator=torch.Generator().manual_seed(0))
    scores[0] = 1.0
    values, indices = largest(scores, k)
    assert torch.equal(values.sort().values, scores.topk(k).values.sort().values)
    assert torch.equal(values, scores.gather(1, indices))
    assert all(len(row.unique()) == k for row in indices)
