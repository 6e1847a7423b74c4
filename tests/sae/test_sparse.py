"""Sparse codes: training with them against training in dense products; their operations against the
dense reference; encoding with them against `encode` and `decode`."""

import contextlib
import copy

import pytest
import torch

from clipsae.sae import SAE, SAEOutput, SparseCodes
from clipsae.sae import dense as dense_module
from clipsae.sae.engine import cpu
from clipsae.sae.engine.cpu import CPU
from clipsae.sae.engine.reference import Reference, largest
from clipsae.sae.engine.switch import DENSE_FROM
from clipsae.sae.sparse_ops import positions_above
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
    "attention_relu": [{"l1_coefficient": 0.03}],
    "relu": [
        {"l1_coefficient": 0.03, "auxk": 0.3, "auxk_k": 3},
        {"l1_coefficient": 0.03, "unit_decoder": False, "normalize": "unit"},
    ],
    "gated": [{"l1_coefficient": 0.03, "auxk": 0.3}],
    "jumprelu": [
        {"l0_coefficient": 0.02, "bandwidth": 0.7, "target_l0": None},
        {"l0_coefficient": 0.1, "target_l0": 3.0, "auxk": 0.3, "pre_activation": 0.2},
    ],
    "topk": [{"auxk": 0.3, "auxk_k": 3}, {"k": M}, {"k": 1, "encoder_init": "independent"}],
    "batch_topk": [{"auxk": 0.3, "auxk_k": 3}, {"k": 20}],
    "matryoshka": [{"auxk": 0.3, "auxk_k": 3}],
    "abs_topk": [{"auxk": 0.3, "auxk_k": 3}, {"k": M}],
    "matching_pursuit": [{}],
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
    before = DENSE_FROM["cpu"]
    DENSE_FROM["cpu"] = {1: share, 2: share}
    try:
        yield
    finally:
        DENSE_FROM["cpu"] = before


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
    for options in OPTIONS[recipe.partition("+")[0]]:
        sparse = build(recipe, **options).to(dtype)
        dense, x = copy.deepcopy(sparse), HARD[case]().to(dtype)
        if "k" in sparse.config and (dtype == torch.bfloat16 or case == "zero tokens"):
            continue  # equal scores, of which each way may keep others
        out, gradients = two_steps(sparse, x, 2)
        expected, expected_gradients = two_steps(dense, x, -1)
        assert isinstance(out.encoded, SparseCodes) == (recipe != "matching_pursuit")
        assert isinstance(expected.encoded, torch.Tensor)
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
    for options in OPTIONS[recipe.partition("+")[0]]:
        whole = build(recipe, **options).to(dtype)
        parts, x = copy.deepcopy(whole), tokens(3, 5, D, dtype=dtype)
        expected, expected_gradients = two_steps(whole, x, -1)
        with monkeypatch.context() as patch:
            patch.setattr(dense_module, "_BLOCK", 4 * M)  # four tokens, the last ones three
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
    assert isinstance(sae(x).encoded, torch.Tensor)  # half of the scores are positive
    with torch.no_grad():
        sae.architecture.b_enc -= 5.0
    sparse = sae(x)
    assert isinstance(sparse.encoded, SparseCodes)
    assert torch.equal(sparse.codes, sae.eval()(x).codes)


@pytest.mark.parametrize("share", [2, -1])
def test_mixed_precision_and_no_gradient(recipe, share):
    sae, x = build(recipe), tokens(6, 5, D)
    twin = copy.deepcopy(sae)
    with dense_from(share):
        expected = copy.deepcopy(sae)(x).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = twin(x)
        out.loss.backward()
        torch.testing.assert_close(out.loss.float(), expected, rtol=0.1, atol=1e-3)
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in twin.parameters())
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
    for options in OPTIONS[recipe.partition("+")[0]]:
        for share in (2, -1):
            sae = build(recipe, **options)
            sae.tokens_since_fired.fill_(10**9)  # all dead: AuxK has candidates
            before = copy.deepcopy(dict(sae.named_buffers()))
            with dense_from(share):
                out = sae(torch.zeros(shape))
                out.loss.backward()
            # (An l0 that should be 3 is missed by all of it.)
            assert out.loss == (options["l0_coefficient"] if options.get("target_l0") else 0)
            assert out.reconstruction.shape == shape
            assert out.codes.shape == (*shape[:-1], M)
            for name, parameter in sae.named_parameters():
                assert parameter.grad is None or not parameter.grad.any(), name
            for name, buffer in sae.named_buffers():
                assert torch.equal(buffer, before[name]) or name == "activation.step", name
            assert sae.eval()(torch.zeros(shape)).loss == 0
            assert sae.encode_sparse(torch.zeros(shape)).shape == (*shape[:-1], M)


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


def random_codes(share: float, shape=(9, 40), ordered: bool = True) -> SparseCodes:
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < share)
    codes = SparseCodes.from_dense(codes)
    if ordered:
        return codes
    order = torch.randperm(len(codes.values), generator=g)
    return SparseCodes(codes.values[order], codes.positions[order], shape)


@pytest.mark.parametrize("chunk", [1024, 4, 1])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.03, 1.0])
def test_the_fast_operations_are_the_reference(share, ordered, chunk, monkeypatch):
    monkeypatch.setattr(cpu, "_TILE", 7)  # some tiles, the last one shorter
    monkeypatch.setattr(cpu, "_CHUNK", chunk)
    monkeypatch.setattr(cpu, "_PAIRS_A_ROW", 0)
    codes = random_codes(share, ordered=ordered)
    z, rows, x = codes.dense(), torch.randn(40, D), torch.randn(9, D)
    assert len(cpu._chunks(codes)) == (0 if chunk > 9 else -(-9 // chunk))
    expected = {"mix": z @ rows, "accumulate": z.T @ x, "sample": (x @ rows.T).flatten()}
    expected["sample"] = expected["sample"][codes.positions]
    for ops in (Reference, CPU):
        torch.testing.assert_close(ops.mix(codes, rows), expected["mix"])
        torch.testing.assert_close(ops.accumulate(codes, x), expected["accumulate"])
        torch.testing.assert_close(ops.sample(codes, x, rows), expected["sample"])
    torch.testing.assert_close(codes.sum_tokens(codes.values), z.sum(0))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("dense_from_token", [None, 0, 15])
def test_finding_block_by_block_is_finding_at_once(at_once, dense_from_token, monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", 7)
    x, rows = tokens(20, D), tokens(40, D, seed=1)
    seen = [0]

    def choose(scores):
        seen[0] += len(scores)
        if dense_from_token is not None and seen[0] > dense_from_token:
            return None
        return (scores > 1).flatten().nonzero()[:, 0]

    found = {}
    for ops in (Reference, CPU):
        seen[0] = 0
        scorer = lambda part, buffer: part @ rows.T  # noqa: E731
        codes = ops.find(x, scorer, choose, at_once=at_once, most=20 * 40)
        assert isinstance(codes, torch.Tensor) == (dense_from_token is not None)
        found[ops] = codes if isinstance(codes, torch.Tensor) else codes.dense()
    torch.testing.assert_close(found[CPU], found[Reference])


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_counts_and_lookups_of_images(share):
    codes = random_codes(share, (4, 6, 30))
    z = codes.dense()
    assert torch.equal(codes.count(codes.values > 0.5), (z > 0.5).sum(1))
    for latents in (torch.tensor([29, 0, 7]), torch.randint(0, 30, (4, 5))):
        index = latents if latents.ndim == 1 else latents[:, None]
        expected = z.gather(-1, index.expand(4, 6, -1))
        assert torch.equal(codes.lookup(latents), expected)
    assert torch.equal(codes.count(), (z != 0).sum(1))
    torch.testing.assert_close(codes.totals(), z.double().sum(1))


def test_a_part_of_the_codes_is_that_part_of_the_dense_ones():
    codes = random_codes(0.2, (5, 6, 30))
    z, mask = codes.dense(), torch.tensor([True, False, False, True, True])
    assert torch.equal(codes[3].dense(), z[3])
    assert torch.equal(codes[1:4].dense(), z[1:4])
    assert torch.equal(codes[mask].dense(), z[mask])
    assert len(codes[5:]) == 0
    small = codes[3].compact()
    assert small.positions.dtype == torch.int32
    assert small.nbytes == 8 * len(small.values)
    assert torch.equal(small.dense(), z[3])
    assert torch.equal(small.lookup(torch.tensor([2, 5])), z[3][:, [2, 5]])
    assert torch.equal(codes.view(30, 30).dense(), z.view(30, 30))
    chosen = torch.tensor([2, 5, 29])
    assert torch.equal(codes.view(30, 30).take(chosen).dense(), z.view(30, 30)[:, chosen])
    chosen = torch.tensor([29, 2, 2])
    assert torch.equal(codes.view(30, 30).columns(chosen), z.view(30, 30)[:, chosen])
    mask = torch.arange(30) % 3 == 0
    assert torch.equal(codes.view(30, 30)[mask].dense(), z.view(30, 30)[mask])
    assert torch.equal(codes.view(30, 30).csr().to_dense(), z.view(30, 30).double())
    assert torch.equal((codes * torch.arange(30)).dense(), z * torch.arange(30))
    assert torch.equal(
        (codes * (torch.arange(30) < 9)).nonzero().dense(), z * (torch.arange(30) < 9)
    )
    by_latent = codes.view(30, 30).by_latent()
    assert torch.equal(by_latent.dense(), z.view(30, 30))
    assert (by_latent.latent.diff() >= 0).all()
    assert torch.equal(by_latent.latent_edges().diff(), (z != 0).flatten(0, 1).sum(0))


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


def evaluated(recipe: str) -> tuple[SAE, torch.Tensor]:
    sae = build(recipe).double()
    for parameter in sae.parameters():
        if parameter.ndim == 1:  # biases start at 0, where one that is left out does not show
            torch.nn.init.uniform_(parameter.data, -0.1, 0.1)
    x = tokens(4, 5, D, dtype=torch.float64)
    sae(x)
    if recipe in (
        "batch_topk",
        "matryoshka",
    ):  # its threshold is one of these scores, which rounding may move
        sae.activation.inference_threshold.mul_(1 - 1e-6)
    return sae.eval(), x


@pytest.mark.parametrize("sparse", [True, False])
@torch.no_grad()
def test_codes_and_reconstruction_are_those_of_encode_and_decode(recipe, sparse, monkeypatch):
    share = 1.0 if sparse else 0.0
    monkeypatch.setitem(DENSE_FROM, "cpu", {1: share, 2: share})
    monkeypatch.setattr(cpu, "BLOCK", 7)  # 20 tokens in three blocks
    sae, x = evaluated(recipe)
    found, codes, scale = sae.encode_sparse(x), sae.encode(x), sae.input_scale(x)
    assert (found.positions.diff() > 0).all()
    assert found.values.all()
    assert (codes != 0).any()
    assert found.shape == (4, 5, M)
    torch.testing.assert_close(found.dense(), codes)
    torch.testing.assert_close(sae.decode(found, scale), sae.decode(codes, scale))


@torch.no_grad()
def test_a_late_block_with_many_active_latents_makes_all_dense(monkeypatch):
    monkeypatch.setitem(DENSE_FROM, "cpu", {1: 0.5, 2: 0.5})
    monkeypatch.setattr(cpu, "BLOCK", 8)
    sae = SAE(D, M, "linear", "relu", bias_init="zero").eval()
    few, many = -sae.decoder_rows()[:1], sae.decoder_rows()[:1]
    sae.architecture.W_enc.copy_(many.expand(M, -1) + 0.01 * torch.randn(M, D))
    x = torch.cat([few.expand(16, -1), many.expand(4, -1)])[None]
    found = sae.encode_sparse(x).dense()
    torch.testing.assert_close(found, sae.encode(x))
    assert (found[0, :16] != 0).float().mean() < 0.5 < (found[0, 16:] != 0).float().mean()
