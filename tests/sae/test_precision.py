"""Float64 SAEs compute in float64 throughout, and float32 ones lose no more than float32 must."""

import entmax
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipsae.sae import SAE, SparseCodes
from clipsae.sae.engine.switch import DENSE_FROM
from clipsae.sae.sparsemax import Sparsemax
from tests.sae.conftest import D, M, build, options_of, tokens

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class NoNarrowTensors(TorchDispatchMode):
    """Fails where an operation returns floating point numbers of fewer digits than float64's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype not in NARROW, f"{func} made a tensor of {tensor.dtype}"
        return result


@pytest.mark.parametrize("share", [2, -1], ids=["sparse", "dense"])
def test_no_step_of_a_float64_sae_is_of_a_lower_precision(recipe, share, monkeypatch):
    monkeypatch.setitem(DENSE_FROM, "cpu", {1: share, 2: share})
    options = options_of(recipe)
    variants = [options]
    if options["activation"] == "sparsemax":
        variants.append(options | {"weights": "probabilities"})
    if recipe != "matching_pursuit":
        variants.append(options | {"auxk": 0.3, "dead_after": 1})
    for each in variants:
        torch.manual_seed(0)
        sae = SAE(d=D, **each).double()
        x = tokens(4, 5, D, dtype=torch.float64)
        with NoNarrowTensors():
            sae.initialize(x)
            for _ in range(5):
                sae(x).loss.backward()
                sae.after_backward()
                sae.after_step()
            sae.eval()
            scores = sae.scores(x)
            tau = sae.threshold(scores)
            codes = sae.apply_threshold(scores, tau)
            sae.apply_threshold(sae.scores(x, torch.tensor([3, 0])), tau, torch.tensor([3, 0]))
            sae.decode(codes, sae.input_scale(x))
            sae.decode(sae.encode_sparse(x), sae.input_scale(x))
            sae.architecture.decoder_norms()
        for name, value in sae.state_dict().items():
            assert value.dtype in (torch.float64, torch.int64), name


@pytest.mark.parametrize("centre", [0.0, 20.0, 1000.0, -1000.0])
@pytest.mark.parametrize("spread", [1e-4, 1.0])
def test_probabilities_are_the_projection_wherever_the_scores_lie(centre, spread, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = centre + spread * torch.randn(3, 49152, generator=generator)
    p = entmax.sparsemax(scores.double(), dim=-1)
    weight = torch.randn(p.shape, generator=generator)
    mean = (weight.double() * (p > 0)).sum(-1, keepdim=True) / (p > 0).sum(-1, keepdim=True)
    activation = Sparsemax(49152, weights="probabilities", max_activation_frequency=None)
    monkeypatch.setitem(DENSE_FROM, "cpu", {1: 2, 2: 2})
    positions = activation.support(scores.clone())
    few = scores.flatten()[positions].requires_grad_()
    sparse = SparseCodes(few, positions, scores.shape)
    all_of_them = scores.clone().requires_grad_()
    trained = {"sparse": activation(sparse).dense(), "dense": activation(all_of_them)}
    codes = {
        "evaluated": activation.apply_threshold(scores, activation.threshold(scores)),
        "trained, dense": trained["dense"],
        "trained, sparse": trained["sparse"],
    }
    for name, found in codes.items():
        assert torch.equal(found > 0, p > 0), name
        torch.testing.assert_close(found.double(), p, rtol=2e-7, atol=1e-12, msg=name)
        torch.testing.assert_close(
            found.double().sum(-1), torch.ones(3).double(), rtol=0, atol=1e-6, msg=name
        )
    (trained["dense"] * weight).sum().backward()
    (trained["sparse"] * weight).sum().backward()
    expected = (weight.double() - mean) * (p > 0)
    for gradient in (all_of_them.grad, sparse.with_values(few.grad).dense()):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("active", "of"), [(1, 10), (3, 10), (1, 5), (7, 10)])
def test_a_latent_at_the_limit_of_its_frequency_is_not_capped(active, of, sparse):
    activation = Sparsemax(2, max_activation_frequency=active / of).double()
    first = torch.arange(of) < active
    scores = torch.stack([torch.where(first, 3.0, 0.0), torch.where(first, 0.0, 3.0)], 1).double()
    for _ in range(4):
        if sparse:
            positions = torch.arange(of) * 2 + ~first
            codes = activation(SparseCodes(scores.flatten()[positions], positions, (of, 2))).dense()
        else:
            codes = activation(scores)
        assert activation.frequency[0] == active / of
        assert torch.equal(codes[:, 0], scores[:, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_after_steps_are_those_of_plain_float64(recipe, dtype):
    """Counters and running means follow from the codes that were given out, by their formulas."""
    sae = build(recipe).to(dtype)
    activation = sae.activation
    silent = torch.zeros(M, dtype=torch.int64)
    frequency = torch.zeros(M, dtype=torch.float64)
    threshold = 0.0
    for step in range(6):
        x = tokens(1 if step == 2 else 9, D, seed=step, dtype=dtype)  # once a single token
        codes = sae(x).codes.detach().double()
        silent = torch.where((codes != 0).any(0), 0, silent + len(x))
        frequency += ((codes > 0).double().mean(0) - frequency) / (step + 1)
        if (codes > 0).any():
            new, decay = codes[codes > 0].min().item(), sae.config.get("threshold_decay", 0)
            late = step > sae.config.get("threshold_start_step", 0)
            threshold = decay * threshold + (1 - decay) * new if late else new
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    assert torch.equal(sae.tokens_since_fired, silent)
    assert torch.equal(sae.dead, silent >= 30)
    sae.eval()(x)
    assert torch.equal(sae.tokens_since_fired, silent)
    if hasattr(activation, "frequency"):
        found = activation.frequency.double()
        torch.testing.assert_close(found, frequency, rtol=rtol, atol=rtol / 10)
    if hasattr(activation, "inference_threshold"):
        assert activation.inference_threshold.item() == pytest.approx(threshold, rel=rtol)
