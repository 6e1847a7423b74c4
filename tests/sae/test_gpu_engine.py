"""The operations of `engine.gpu` in Triton's interpreter, on the CPU: against formulas in float64,
entmax, and the CPU's engine; whole training steps of every recipe; what makes a GPU wait."""

import copy

import pytest
import torch
from torch import Tensor

from clipsae.sae import SAE, engine
from clipsae.sae.codes import SparseCodes
from clipsae.sae.engine import gpu
from clipsae.sae.engine.gpu import GPU, PaddedCodes, Rows
from clipsae.sae.engine.reference import Reference
from clipsae.sae.engine.switch import DENSE_FROM
from tests.sae.conftest import D, build, tokens
from tests.sae.test_sparse import OPTIONS, random_codes
from tests.waits import Waits, hide_the_interpreter

if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("interpreted")


def scores_of(case: str, n: int, m: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(n + m)
    scores = torch.randn(n, m, generator=g, dtype=torch.float64)
    if case == "ties":
        scores = (2 * scores).round() / 2
    elif case == "equal":
        scores = torch.full_like(scores, 0.25)
    elif case == "large":
        scores = 1000 + scores / 10
    elif case == "half active":
        scores = scores / (4 * m)  # all within 1 of the largest
    elif case == "few":
        scores = 5 * scores
    return scores.to(dtype)


CASES = ["random", "ties", "equal", "large", "half active", "few"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def support(chosen: Rows | Tensor) -> Tensor:
    if isinstance(chosen, Rows):
        chosen = chosen.pack().exact()
    return chosen.positions if not isinstance(chosen, Tensor) else chosen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_sparsemax_is_the_formula(case, dtype):
    m = {"random": 1, "ties": 511}.get(case, 37)
    scores = scores_of(case, 2, m, dtype)
    wide = scores.double()
    ordered = wide.sort(dim=1, descending=True).values
    sizes = torch.arange(1, m + 1)
    k = (1 + sizes * ordered > ordered.cumsum(1)).sum(1, keepdim=True)
    tau = (ordered.cumsum(1).gather(1, k - 1) - 1) / k
    torch.testing.assert_close(GPU.sparsemax_threshold(scores), tau, rtol=1e-13, atol=1e-13)
    codes = GPU.sparsemax(scores.clone()).pack(m * 2).exact()
    expected = Reference.sparsemax(scores.clone())
    assert torch.equal(codes.positions, expected)
    assert torch.equal(codes.values, scores.flatten()[expected])


def test_sparsemax_is_entmax_at_full_width(monkeypatch):
    entmax = pytest.importorskip("entmax")
    monkeypatch.setattr(gpu, "BLOCK", 2048)
    monkeypatch.setattr(gpu, "ROOM", 2048)
    for m in (49_152, 131_072):
        for scale in (1.0, 1e-5):  # a few active; so many that no list has room
            scores = scale * torch.randn(2, m, generator=torch.Generator().manual_seed(0))
            tau = GPU.sparsemax_threshold(scores)
            expected = entmax.sparsemax(scores.double(), dim=1)
            torch.testing.assert_close((scores - tau).clamp(min=0), expected, rtol=0, atol=1e-12)
            assert ((expected > 0).sum(1) > 2048).all() == (scale < 1)


@pytest.mark.slow
def test_many_tokens():
    """As many as 32 images have."""
    codes = random_codes(0.1, (6304, 8))
    rows = torch.randn(8, 4)
    torch.testing.assert_close(GPU.mix(codes, rows), codes.dense() @ rows)


@pytest.mark.parametrize("zeroed", [[], [0, 3, 36], list(range(37))])
def test_capped_latents_count_as_zero(zeroed):
    scores = scores_of("random", 4, 37, torch.float32) + 2
    mask = torch.zeros(37, dtype=torch.bool)
    mask[zeroed] = True
    codes = GPU.sparsemax(scores.clone(), mask).pack().exact()
    changed = scores.masked_fill(mask, 0)
    expected = Reference.sparsemax(changed.clone())
    assert torch.equal(codes.positions, expected)
    assert torch.equal(codes.values, changed.flatten()[expected])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "m", "k"),
    [
        *(("random", 1, 1), ("random", 37, 5), ("ties", 37, 5), ("equal", 70, 9)),
        *(("few", 70, 20), ("large", 70, 70), ("half active", 37, 1)),
    ],
)
def test_the_largest_of_each_token(m, k, case, dtype):
    scores = scores_of(case, 2, m, dtype)
    codes = GPU.largest(scores, k).pack()
    assert len(codes.values) == 2 * k
    for row, values in enumerate(codes.values.view(2, k)):
        latents = codes.latent.view(2, k)[row]
        assert torch.equal(values, scores[row, latents])
        assert torch.equal(values.sort().values, scores[row].topk(k).values.sort().values)
        assert (latents.diff() > 0).all()
    others = torch.randn(2, m)
    by = GPU.largest(others, k, by=scores)
    assert torch.equal(by.positions, codes.positions)
    assert torch.equal(by.values, others.flatten()[codes.positions])


@pytest.mark.parametrize("m", [20, 70])
def test_the_largest_of_impossible_scores_and_of_both_zeros(m):
    scores = torch.full((2, m), -torch.inf)
    scores[0, [3, 7]] = torch.tensor([2.0, 1.0])
    scores[1, :6] = torch.tensor([1.0, 0.0, 0.0, -0.0, -0.0, -0.0])
    codes = GPU.largest(scores, 4).pack().exact()
    assert codes.positions.tolist() == [3, 7, m, m + 1, m + 2, m + 3]
    assert torch.equal(codes.values, scores.flatten()[codes.positions])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "count"), [("random", 6), ("ties", 40), ("few", 1), ("few", 300), ("negative", 6)]
)
def test_the_largest_of_all(case, count, dtype):
    scores = scores_of(case, 4, 83, dtype)
    if case == "negative":
        scores = -scores.abs()
    codes = GPU.largest_of_all(scores, count, lambda values: min(count, len(values)))
    found = codes.exact()
    assert torch.equal(found.values, scores.flatten()[found.positions])
    assert (found.positions.diff() > 0).all()
    expected = scores.flatten().topk(count).values
    assert torch.equal(found.values.sort(descending=True).values, expected[expected > 0])
    assert not codes.overflows()()
    few = GPU.largest_of_all(scores, count, lambda values: torch.tensor(min(2, count)))
    assert len(few.exact().values) == min(2, int((expected > 0).sum()))


@pytest.mark.parametrize("floor", ["scalar", "per token", "per latent", "per token, float64"])
@pytest.mark.parametrize("shift", [-9.0, 0.5, 9.0])
def test_above(floor, shift):
    scores = scores_of("random", 5, 37, torch.float32)
    border = {
        "scalar": torch.tensor(shift),
        "per token": shift + torch.linspace(-1, 1, 5)[:, None],
        "per latent": shift + torch.linspace(-1, 1, 37),
        "per token, float64": scores.double()[:, 3:4] - 1e-9,  # no float32 is as near
    }[floor]
    expected = (scores.double() > border.double()).flatten().nonzero()[:, 0]
    rows = GPU.above(scores, border)
    assert torch.equal(support(rows), expected)
    for room in (len(expected), 200):
        codes = rows.pack(room)
        assert not codes.overflows()()
        assert torch.equal(codes.dense(), torch.where(scores > border.double(), scores, 0))
    if len(expected):
        short = rows.pack(len(expected) - 1)
        assert short.overflows()()
        assert torch.equal(short.positions, expected[:-1])


def test_scores_and_floors_in_any_layout():
    scores, every = torch.randn(37, 10).T[::2], torch.tensor(0.5)
    for floor in (every, every[None], torch.randn(1, 37), torch.randn(5, 37), torch.randn(74)[::2]):
        expected = (scores > floor).flatten().nonzero()[:, 0]
        assert torch.equal(support(GPU.above(scores, floor)), expected)
    plain = scores.contiguous()
    assert torch.equal(support(GPU.sparsemax(scores)), Reference.sparsemax(plain))
    found = GPU.largest(scores, 3).pack().positions
    assert torch.equal(found, Reference.largest(plain, 3).sort().values)


@pytest.mark.parametrize("share", [0.0, 0.03, 1.0])
def test_products_are_the_reference(share):
    codes = random_codes(share)
    codes = codes.with_values(codes.values.double())
    z, rows, x = codes.dense(), torch.randn(40, 300).double(), torch.randn(9, 300).double()
    room = len(codes.values) + 5
    padded = GPU.above(z, torch.tensor(-torch.inf)).pack(9 * 40)  # 0s are codes, too
    assert len(padded.exact().values) == 9 * 40
    for sparse in (codes, GPU.above(z.abs(), torch.tensor(0.0)).pack(room), padded):
        dense = sparse.dense()
        torch.testing.assert_close(GPU.mix(sparse, rows), dense @ rows)
        torch.testing.assert_close(GPU.accumulate(sparse, x), dense.T @ x)
        sampled = GPU.sample(sparse, x, rows)
        real = sparse.real if isinstance(sparse, PaddedCodes) else ...
        expected = (x @ rows.T).flatten()[sparse.positions]
        torch.testing.assert_close(sampled[real], expected[real])


def test_products_of_pairs_in_any_order():
    codes = random_codes(0.1)
    order = torch.randperm(len(codes.values), generator=torch.Generator().manual_seed(0))
    mixed = SparseCodes(codes.values[order], codes.positions[order], codes.shape)
    z, rows, x = codes.dense(), torch.randn(40, 30), torch.randn(9, 30)
    torch.testing.assert_close(GPU.mix(mixed, rows), z @ rows)
    torch.testing.assert_close(GPU.accumulate(mixed, x), z.T @ x)
    torch.testing.assert_close(GPU.sample(mixed, x, rows), (x @ rows.T).flatten()[mixed.positions])
    found = GPU.find(x, lambda *_: z, lambda _: mixed.positions, most=360, wait=False)
    assert torch.equal(found.positions, mixed.positions.sort().values)


def test_padded_codes_of_images_are_read_as_others():
    x = scores_of("random", 6, 40, torch.float32)
    codes = GPU.above(x, torch.tensor(1.0)).pack(200).view(2, 3, 40)
    z = codes.dense()
    assert torch.equal(codes.count(), (z != 0).sum(1))
    assert torch.equal(codes.lookup(torch.arange(5)), z[..., :5])
    assert torch.equal(codes[1].dense(), z[1])
    assert torch.equal(codes.compact()[0].dense(), z[0])
    assert torch.equal(codes.csr().to_dense().float(), z.view(6, 40))


def test_sums_over_latents_and_tokens_with_their_gradients():
    scores = scores_of("random", 6, 40, torch.float64)
    codes = GPU.above(scores, torch.tensor(1.0)).pack(100)
    plain = codes.exact()
    assert 10 < len(plain.values) < 90
    by_latent, by_token = torch.randn(40).double(), torch.randn(6).double()

    def total(c, values, by_latent, by_token):
        found = c.with_values(values)
        a = (found * by_latent).values * c.at_token(by_token)
        sums = c.sum_tokens(a).square().sum() + c.sum_latents(a).pow(3).sum()
        return sums + found.sum() + c.at_latent(by_latent).square().mul(values).sum()

    gradients = []
    for c in (codes, plain):
        inputs = [t.detach().clone().requires_grad_() for t in (c.values, by_latent, by_token)]
        loss = total(c, *inputs)
        gradients.append([loss, *torch.autograd.grad(loss, inputs)])
    gradients[0][1] = gradients[0][1][: len(plain.values)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(codes.count(), plain.count())
    assert torch.equal(codes.count(codes.values > 1.5), plain.count(plain.values > 1.5))
    assert torch.equal(codes.sizes(), plain.sizes())
    half = codes.sum_latents(codes.values.bfloat16())
    torch.testing.assert_close(half.float(), plain.dense().sum(1).float(), rtol=0.01, atol=0)


def steps(sae: SAE, xs: list[Tensor]) -> tuple[list, dict]:
    outs = []
    for x in xs:
        outs.append(sae(x))
        outs[-1].loss.backward()
    return outs, {name: p.grad for name, p in sae.named_parameters()}


def hard_tokens() -> Tensor:
    """Three images [3, 3, d]: one of ordinary tokens, one of zeros, one of equal tokens."""
    x = tokens(3, 3, D, dtype=torch.float64)
    x[1], x[2] = 0, x[2, 0]
    return x


def test_a_step_is_that_of_dense_products(recipe, monkeypatch):
    for options in OPTIONS[recipe.partition("+")[0]]:
        dense, x = build(recipe, **options).double(), hard_tokens()
        if "k" in dense.config:  # of equal scores each way may keep others
            x = x[:1]
        sparse = copy.deepcopy(dense)
        with monkeypatch.context() as patch:
            patch.setitem(engine.BACKENDS, "cpu", lambda: GPU)
            patch.setitem(DENSE_FROM, "cpu", {1: 1.0, 2: 1.0})
            outs, gradients = steps(sparse, [x, x.flip(0)])
        with monkeypatch.context() as patch:
            patch.delitem(DENSE_FROM, "cpu")
            expected, expected_gradients = steps(dense, [x, x.flip(0)])
        for out, other in zip(outs, expected, strict=True):
            assert isinstance(out.encoded, PaddedCodes) or sparse.architecture.dictionary() is None
            torch.testing.assert_close(out.codes, other.codes, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(out.reconstruction, other.reconstruction)
            assert torch.equal(out.fired(), other.fired())
            for name, loss in other.losses.items():
                torch.testing.assert_close(out.losses[name], loss, msg=name)
        for name, gradient in expected_gradients.items():
            if gradient is None:
                assert gradients[name] is None or not gradients[name].any(), name
            else:
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-11)
        for name, value in dense.named_buffers():
            torch.testing.assert_close(dict(sparse.named_buffers())[name], value)


def test_a_step_without_tokens(recipe, as_on_cuda):
    sae = build(recipe)
    sae(torch.zeros(0, 3, D)).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in sae.parameters())


def test_auxk_with_more_latents_than_there_are(monkeypatch):
    found = []
    for choices in ({"cpu": lambda: GPU}, engine.BACKENDS):
        monkeypatch.setattr(engine, "BACKENDS", choices)
        monkeypatch.setitem(DENSE_FROM, "cpu", {1: 1.0, 2: 1.0})
        sae = build("topk", auxk=0.1, auxk_k=50, dead_after=30).double()
        sae.tokens_since_fired[::2] = 1000
        found.append(sae(tokens(4, 3, D, dtype=torch.float64)).losses["auxk"])
    assert found[0] > 0
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("known", [False, True])
def test_a_step_with_more_codes_than_memory_is_in_dense_products(recipe, known, as_on_cuda):
    x = tokens(2, 3, D)
    expected = build(recipe)
    out = expected(x)
    out.loss.backward()
    DENSE_FROM["cpu"] = {1: 1e-9, 2: 1e-9}
    sae = build(recipe)
    sae._many = known  # from the step before
    found = sae(x)
    assert sae._many or "k" in sae.config  # where the number is known, nothing is looked at
    found.loss.backward()
    assert isinstance(found.encoded, Tensor)
    torch.testing.assert_close(found.codes, out.codes)
    for name, parameter in expected.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(dict(sae.named_parameters())[name].grad, parameter.grad)
    for name, value in expected.named_buffers():
        torch.testing.assert_close(dict(sae.named_buffers())[name], value)


@torch.no_grad()
def test_sparse_encoding_is_encoding(recipe, as_on_cuda, monkeypatch):
    sae, x = build(recipe).eval(), tokens(2, 3, D)
    codes = sae.encode_sparse(x)
    assert not isinstance(codes, PaddedCodes)
    expected = sae.encode(x)
    assert torch.equal(codes.dense(), expected)
    torch.testing.assert_close(sae.decode(codes, sae.input_scale(x)), sae(x).reconstruction)
    monkeypatch.setattr(gpu, "TOKENS", 4)
    torch.testing.assert_close(sae.encode_sparse(x).dense(), expected)


def test_a_step_waits_for_nothing(recipe, as_on_cuda, monkeypatch):
    hide_the_interpreter(monkeypatch)
    for options in OPTIONS[recipe.partition("+")[0]][:1]:
        sae = build(recipe, **options | ({"dead_after": 10**9} if "auxk" in options else {}))
        optimizer = torch.optim.Adam(sae.parameters(), fused=True)
        x = tokens(2, 3, D)
        sae(x).loss.backward()  # the first one reads what the SAE was loaded with
        with Waits() as waits:
            for _ in range(2):
                optimizer.zero_grad()
                out = sae(x)
                out.loss.backward()
                sae.after_backward()
                optimizer.step()
                sae.after_step()
        assert isinstance(out.encoded, PaddedCodes) or sae.architecture.dictionary() is None
        assert waits.seen == []
    with Waits() as waits:
        tokens(3, D).nonzero()
        bool(torch.ones(()) > 0)
        tokens(3, D)[torch.ones(3, dtype=torch.bool)]
        torch.ones(3).tolist()
    assert waits.seen == ["nonzero", "_local_scalar_dense", "index", "tolist"]
