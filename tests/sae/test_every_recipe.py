"""What every SAE owes its users, over all recipes in conf/model."""

import copy

import pytest
import torch

from clipsae.sae import OBJECTIVES, SAE
from tests.sae.conftest import D, M, build, options_of, tokens

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def with_auxk(recipe: str) -> dict:
    """Terms that revive dead latents, where they can be."""
    if recipe == "matching_pursuit":
        return {}
    own = options_of(recipe)["activation"] in ("relu", "gated", "jumprelu")
    return {"auxk": 0.1} | ({"pre_activation": 0.1} if own else {})


def train(sae: SAE, steps: range, batch=lambda step: tokens(6, 5, D, seed=step)) -> list[float]:
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=1e-2)
    sae.train()
    losses = []
    for step in steps:
        sae.before_step(step, 8)
        loss = sae(batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        sae.after_backward()
        optimizer.step()
        sae.after_step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", [(3, 5, D), (7, D), (1, 1, D)])
def test_forward_has_the_input_s_shape_and_a_loss_that_is_the_sum_of_its_terms(recipe, shape):
    sae = build(recipe)
    out = sae(tokens(*shape))
    assert out.reconstruction.shape == shape
    assert out.codes.shape == (*shape[:-1], M)
    assert all(term.shape == () for term in out.losses.values())
    torch.testing.assert_close(out.loss, sum(out.losses.values()))
    assert list(sae.eval()(tokens(*shape)).losses) == ["reconstruction"]


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_evaluation_is_a_threshold_on_the_scores(recipe, dtype):
    sae = build(recipe).to(dtype)
    x = tokens(4, 5, D, dtype=dtype)
    sae(x)
    sae.eval()
    out, scores = sae(x), sae.scores(x)
    tau = sae.threshold(scores)
    assert torch.broadcast_shapes(tau.shape, scores.shape) == scores.shape
    gated = sae.apply_threshold(scores, tau)
    assert torch.equal(sae.encode(x), gated)
    assert torch.equal(out.codes, gated)
    assert torch.equal(sae.decode(gated, sae.input_scale(x)), out.reconstruction)
    assert out.reconstruction.dtype == out.codes.dtype == dtype
    strength = scores.abs() if recipe == "abs_topk" else scores
    assert not gated[(strength <= tau).expand_as(gated)].any()
    assert (gated != 0).any()


@pytest.mark.parametrize("latents", [torch.tensor([3, 0, 39]), torch.tensor([[1, 2], [5, 0]])])
@torch.no_grad()
def test_few_latents_give_what_all_give_for_them(recipe, latents):
    sae = build(recipe).double().eval()
    x = tokens(2, 5, D, dtype=torch.float64)
    all_scores, scale = sae.scores(x), sae.input_scale(x)
    tau = sae.threshold(all_scores)
    codes = sae.apply_threshold(all_scores, tau)
    index = latents.expand(2, -1)[:, None].expand(-1, 5, -1)

    scores = sae.scores(x, latents)
    torch.testing.assert_close(scores, all_scores.gather(-1, index))
    few = sae.apply_threshold(scores, tau, latents)
    torch.testing.assert_close(few, codes.gather(-1, index))
    others_zero = torch.zeros_like(codes).scatter(-1, index, few)
    kept = sae.decode(few, scale, latents)
    torch.testing.assert_close(kept, sae.decode(others_zero, scale))
    # Affine: the whole is the sum of the parts less the bias once.
    offset = 0 if sae.decoder_bias is None else sae.decoder_bias * scale
    rest = sae.decode(codes - others_zero, scale)
    torch.testing.assert_close(kept + rest - offset, sae.decode(codes, scale))
    torch.testing.assert_close((others_zero @ sae.decoder_rows()) * scale, kept - offset)
    torch.testing.assert_close(sae.decoder_rows(latents), sae.decoder_rows()[latents])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_tokens_give_finite_losses_and_gradients(recipe, dtype):
    sae = build(recipe, **with_auxk(recipe)).to(dtype)
    x = tokens(3, 5, D, dtype=dtype)
    x[0] = 0
    x[1, 2] = 0
    for batch in (x, torch.zeros_like(x)):
        sae.tokens_since_fired[:] = 1000
        out = sae(batch)
        out.loss.backward()
        assert out.loss.isfinite()
        assert out.reconstruction.isfinite().all()
        for name, parameter in sae.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all(value.isfinite().all() for value in sae.buffers())
    assert sae.eval().encode(torch.zeros_like(x)).isfinite().all()


def frozen(sae: SAE) -> list[str]:
    """The parameters that `freeze` leaves as they are, written out by name."""
    linear = hasattr(sae.architecture, "W_dec")
    statistics = [name for name, _ in sae.named_parameters() if name.startswith("normalization.")]
    return (
        statistics
        + {
            None: [],
            "decoder": ["W_dec"] if linear else ["C", "W_V"],
            "encoder": ["W_enc"] if linear else ["C", "W_K"],
            "soft_decoder": ["start_rows"],
        }[sae.config["freeze"]]
    )


def test_every_parameter_receives_a_gradient(recipe):
    sae = build(recipe)
    sae(tokens(8, 5, D)).loss.backward()
    for name, parameter in sae.named_parameters():
        if name.removeprefix("architecture.") in frozen(sae):
            assert parameter.grad is None
            assert not parameter.requires_grad
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.any() or "theta" in name, name


def test_a_saved_sae_gives_the_same_codes(recipe, tmp_path):
    sae = build(recipe)
    train(sae, range(5))
    sae.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    assert not loaded.training
    assert loaded.config == sae.config
    state = sae.state_dict()
    state.pop("start_rows", None)  # the training's
    assert list(loaded.state_dict()) == list(state)
    for name, value in state.items():
        assert torch.equal(loaded.state_dict()[name], value), name
        assert loaded.state_dict()[name].dtype == value.dtype
    x = tokens(4, 5, D, seed=99)
    assert torch.equal(loaded.encode(x), sae.eval().encode(x))
    trained = [n.removeprefix("architecture.") for n, p in loaded.named_parameters()]
    kept = [n for n, p in zip(trained, loaded.parameters(), strict=True) if not p.requires_grad]
    assert kept == [name for name in frozen(loaded) if name != "start_rows"]


def test_an_interrupted_training_ends_with_the_same_bits(recipe):
    whole = build(recipe, **with_auxk(recipe))
    half = copy.deepcopy(whole)
    for sae in (whole, half):
        train(sae, range(4))
    train(whole, range(4, 8))
    continued = build(recipe, seed=1, **with_auxk(recipe))
    continued.load_state_dict(half.state_dict())
    train(continued, range(4, 8))
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name


def test_thresholds_keep_their_precision_in_a_half_precision_sae(recipe):
    sae = build(recipe)
    train(sae, range(3))
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    sae.bfloat16()
    for name in sae.activation.full_precision:
        assert torch.equal(getattr(sae.activation, name), before[f"activation.{name}"])
    assert next(sae.architecture.parameters()).dtype == torch.bfloat16
    out = sae(tokens(2, 5, D, dtype=torch.bfloat16))
    out.loss.backward()
    assert out.loss.dtype == torch.float32


def test_decoder_rows_stay_of_unit_norm_where_they_are_to(recipe):
    sae = build(recipe)
    if not sae.architecture.unit_rows:
        pytest.skip("no such option")
    torch.testing.assert_close(sae.architecture.decoder_rows().norm(dim=1), torch.ones(M))
    sae(tokens(6, 5, D)).loss.backward()
    sae.after_backward()
    gradient, rows = sae.architecture.W_dec.grad, sae.architecture.W_dec
    if gradient is None:
        assert frozen(sae) == ["W_dec"]
        return
    assert gradient.any()
    along = (gradient * rows).sum(1) / gradient.norm(dim=1).clamp(min=1e-12)
    torch.testing.assert_close(along, torch.zeros(M), atol=1e-4, rtol=0)
    train(sae, range(3))
    torch.testing.assert_close(sae.architecture.decoder_rows().norm(dim=1), torch.ones(M))


def test_one_latent_and_one_token_work(recipe):
    changes = {name: 1 for name in ("k", "target_l0") if name in options_of(recipe)}
    sae = build(recipe, latents=1, **with_auxk(recipe), **changes)
    sae(tokens(1, D)).loss.backward()
    sae.eval()
    x = tokens(2, 3, D)
    scores = sae.scores(x)
    assert torch.equal(sae.encode(x), sae.apply_threshold(scores, sae.threshold(scores)))
    few = sae.apply_threshold(scores, sae.threshold(scores), torch.tensor([0]))
    assert torch.equal(few, sae.encode(x))


def test_it_can_be_compiled(recipe):
    if recipe in ("attention_relu", "linear_sparsemax", "sparsemax+encoder"):
        pytest.skip("slow, and its parts are in other recipes")
    sae = build(recipe)
    twin = copy.deepcopy(sae)
    # With the partition into forward and backward that the default backend makes, too.
    compiled = torch.compile(twin, backend="aot_eager_decomp_partition")
    for step in range(2):
        x = tokens(3, 5, D, seed=step)
        out, other = sae(x), compiled(x)
        out.loss.backward()
        other.loss.backward()
        torch.testing.assert_close(other.loss, out.loss)
    for (name, a), b in zip(sae.named_parameters(), twin.parameters(), strict=True):
        if a.grad is not None or b.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, msg=name)
    for (name, a), b in zip(sae.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


# For every option a value that must make a difference. `None`: nothing to compare.
OTHER = {
    "l1_coefficient": 0.5,
    "l0_coefficient": 0.5,
    "target_l0": 3.0,
    "initial_threshold": 0.5,
    "bandwidth": 3.0,
    "gate_weight": 0.0,
    "p_end": 0.3,
    "p_start_step": 4,
    "k": 5,
    "threshold_decay": 0.1,
    "threshold_start_step": 0,
    "weights": "probabilities",
    "clamp": True,
    "max_activation_frequency": None,
    "encoder_init": {"tied": "independent", "independent": "tied"},
    "unit_decoder": False,
    "residual_threshold": 0.1,
    "stop_on_repeat": True,
    "bias_init": "tokens",
    "subtract_bias": False,
    "query": "learned",
    "scale": "sqrt_d",
    "normalize": {"unit": "none", "none": "unit", "whiten": "mean_std"},
    "whitening": 0.25,
    "position_mean": True,
    "reconstruction_weight": 3.0,
    "auxk": 0.5,
    "auxk_k": 1,
    "dead_after": 3,
    "freeze": {None: "decoder", "decoder": None, "encoder": None, "soft_decoder": "decoder"},
}


def outcome(options: dict) -> torch.Tensor:
    torch.manual_seed(0)
    sae = SAE(d=D, **options)
    # So few that some latents stay dead, so small that a sparsemax's support has negative scores.
    x = 0.3 * tokens(2, 2, D) / tokens(2, 2, D).norm(dim=-1, keepdim=True) + 0.05
    sae.initialize(x)
    sae.architecture.after_step()
    losses = train(sae, range(8), lambda step: x + 0.01 * tokens(2, 2, D, seed=step))
    return torch.cat([torch.tensor(losses), sae.eval()(x).reconstruction.flatten().detach()])


def test_every_option_changes_something(recipe):
    given = options_of(recipe)
    if "weights" in given:
        given["normalize"] = "none"  # or no score of the support would be negative
        given["max_activation_frequency"] = 0.3
    if "initial_threshold" in given:
        given["initial_threshold"] = 0.1  # of the size of these tokens' scores
    if given["architecture"] == "attention":
        given["scale"] = 3.0
    if "p_end" in given:
        given["p_end"] = 0.6
    if "stop_on_repeat" in given:
        given["k"] = 12  # steps, among which one chooses a latent again
    names = set(SAE(d=D, **given).config) - {"d", "latents", "architecture", "activation"}
    # They have tests of their own; these three are in test_chosen_tokens.py.
    names -= {name for objective in OBJECTIVES for name in OBJECTIVES.options(objective)}
    names -= {"tokens", "max_norm_ratio", "target_layer"}
    if "auxk" in with_auxk(recipe):
        given.update(auxk=0.1, dead_after=6, auxk_k=2)
    else:  # nothing is computed from it, but it decides what is called dead
        names -= {"auxk", "auxk_k", "dead_after"}
    if recipe == "attention_relu":  # one latent dies here; seen with relu
        names -= {"auxk_k"}
    if given["freeze"] == "decoder":
        names -= {"unit_decoder"}  # rows begin so, and stay
    if given["normalize"] != "whiten":
        names -= {"whitening"}
    if given["normalize"] == "unit":
        names -= {"position_mean"}  # refused
    if given.get("l1_coefficient") == 0:
        names -= {"p_end", "p_start_step"}  # of a penalty that is not there
    if recipe == "matryoshka":  # batch_topk's own, seen there; here the same codes pass either
        names -= {"threshold_decay", "threshold_start_step"}
    assert names <= set(OTHER), "an option without a value that shows its effect"
    before = outcome(given)
    assert torch.equal(before, outcome(given))
    for name in sorted(names):
        value = OTHER[name]
        value = value[given[name]] if isinstance(value, dict) else value
        assert given.get(name) != value, name
        assert not torch.equal(before, outcome({**given, name: value})), name
