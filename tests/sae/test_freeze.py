"""`SAE(freeze=...)`: what stays, bit for bit, and how far a softly frozen decoder may go."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipsae.sae import SAE
from clipsae.sae.sae import LEAST_COSINE, within_cone
from tests.sae.conftest import D, M, tokens

VARIANTS = {
    "relu": {"activation": "relu"},
    "gated": {"activation": "gated"},
    "jumprelu": {"activation": "jumprelu", "initial_threshold": 0.5, "bandwidth": 1.0},
    "topk": {"activation": "topk", "k": 4, "auxk": 0.1, "dead_after": 60},
    "batch_topk": {"activation": "batch_topk", "k": 4},
    "sparsemax": {"activation": "sparsemax", "architecture": "attention"},
    "attention_relu": {"activation": "relu", "architecture": "attention", "query": "learned"},
}


def train(sae: SAE, steps: int = 12, rate: float = 0.1, batch=None) -> SAE:
    """Steps large enough that whatever can move does."""
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        loss = sae(tokens(6, 5, D, seed=step) if batch is None else batch).loss
        optimizer.zero_grad()
        loss.backward()
        sae.after_backward()
        optimizer.step()
        sae.after_step()
    return sae


def make(name: str, freeze: str | None, **options) -> SAE:
    torch.manual_seed(0)
    return SAE(D, M, freeze=freeze, **VARIANTS[name], **options)


@pytest.mark.parametrize("freeze", ["decoder", "encoder"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_frozen_matrices_keep_their_bits_and_the_others_move(name, freeze):
    sae = make(name, freeze)
    before = copy.deepcopy(sae)
    train(sae)
    own = {"decoder": ["W_dec", "C", "W_V"], "encoder": ["W_enc", "C", "W_K", "W_Q"]}[freeze]
    moved = []
    for parameter, after in sae.named_parameters():
        same = torch.equal(before.get_parameter(parameter), after)
        if parameter.rpartition(".")[2] in own:
            assert same, parameter
            assert after.grad is None
        elif not same:
            moved.append(parameter)
    assert moved
    rows = sae.decoder_rows()
    assert torch.equal(rows, before.decoder_rows()) == (freeze == "decoder")
    if freeze == "encoder" and name != "gated":  # the direction of each score's gradient
        # Whatever the biases, differences of tokens have the scores that they had.
        x = tokens(3, D, seed=9)
        change = [s.architecture.scores(x) - s.architecture.scores(0 * x) for s in (before, sae)]
        torch.testing.assert_close(*change)


def test_soft_rows_stay_in_the_cone_while_they_are_pulled_away():
    for unit in (True, False):
        sae = make("topk", "soft_decoder", unit_decoder=unit)
        start = sae.decoder_rows().detach().clone()
        # To reconstruct what no row points to.
        train(sae, steps=25, batch=-10 * start.mean(0) + tokens(6, 5, D))
        cosines = np.array(
            [
                float(w @ s / np.linalg.norm(w) / np.linalg.norm(s))
                for w, s in zip(
                    sae.decoder_rows().detach().double().numpy(),
                    start.double().numpy(),
                    strict=True,
                )
            ]
        )
        assert cosines.min() >= LEAST_COSINE - 1e-6
        assert (cosines < LEAST_COSINE + 1e-5).any()  # some were stopped
        assert torch.equal(sae.start_rows, start)
        assert sae.start_rows.grad is None


def test_without_a_violation_a_soft_training_is_a_free_one():
    free, soft = (train(make("relu", f), rate=1e-3) for f in (None, "soft_decoder"))
    cosine = torch.cosine_similarity(soft.decoder_rows(), soft.start_rows)
    assert cosine.min() > LEAST_COSINE
    for name, parameter in free.named_parameters():
        assert torch.equal(parameter, soft.get_parameter(name)), name


def test_the_projection_is_the_nearest_point_of_the_cone_with_the_row_s_norm():
    generator = np.random.default_rng(0)
    rows, start = generator.normal(size=(2, 300, 3)) * generator.uniform(0.1, 9, (2, 300, 1))
    found = within_cone(torch.tensor(rows), torch.tensor(start)).numpy()
    norms = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), norms)
    unit = start / np.linalg.norm(start, axis=1, keepdims=True)
    inside = (rows * unit).sum(1) >= 0.8 * norms
    assert 20 < inside.sum() < 280
    assert (found[inside] == rows[inside]).all()
    np.testing.assert_allclose((found * unit).sum(1)[~inside], 0.8 * norms[~inside])
    # No point of the cone's edge is nearer.
    angles = np.linspace(0, 2 * np.pi, 400)
    for i in np.flatnonzero(~inside)[:50]:
        a = np.linalg.svd(unit[i : i + 1])[2][1:]
        circle = np.cos(angles)[:, None] * a[0] + np.sin(angles)[:, None] * a[1]
        edge = norms[i] * (0.8 * unit[i] + 0.6 * circle)
        nearest = np.linalg.norm(edge - rows[i], axis=1).min()
        assert np.linalg.norm(found[i] - rows[i]) <= nearest + 1e-9


def test_the_projection_of_rows_without_a_direction_to_go_to():
    start = torch.eye(4)[:3]
    rows = torch.stack([-2 * start[0], torch.zeros(4), start[2]])
    found = within_cone(rows, start)
    torch.testing.assert_close(torch.cosine_similarity(found[:1], start[:1]), torch.tensor([0.8]))
    assert found[0].norm() == pytest.approx(2)
    assert torch.equal(found[1:], rows[1:])
    assert torch.equal(within_cone(torch.tensor([[-3.0]]), torch.ones(1, 1)), torch.tensor([[3.0]]))


def test_the_files_of_a_finished_sae_do_without_the_rows_where_it_began(tmp_path):
    sae = train(make("topk", "soft_decoder"))
    sae.save(tmp_path)
    file = tmp_path / "sae.safetensors"
    weights = load_file(file)
    assert weights.keys() == sae.state_dict().keys() - {"start_rows"}
    save_file({**weights, "start_rows": sae.start_rows.detach()}, tmp_path / "with.safetensors")
    x = tokens(6, 5, D, seed=50)
    codes = sae.eval().encode(x)
    for earlier in (False, True):
        if earlier:
            (tmp_path / "with.safetensors").rename(file)
        loaded = SAE.load(tmp_path)
        assert torch.equal(loaded.encode(x), codes)
        assert torch.equal(loaded.decoder_rows(), sae.decoder_rows())
        assert loaded.state_dict().keys() == weights.keys()
        loaded.save(tmp_path / "again")
        assert load_file(tmp_path / "again" / "sae.safetensors").keys() == weights.keys()
        with pytest.raises(RuntimeError, match="cannot be trained further"):
            loaded.after_step()
    # A checkpoint has them.
    continued = make("topk", "soft_decoder")
    torch.nn.init.zeros_(continued.start_rows)
    continued.load_state_dict(sae.state_dict())
    assert torch.equal(continued.start_rows, sae.start_rows)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match=r"freeze='soft_decoder': architecture=attention has no"):
        make("sparsemax", "soft_decoder")
    with pytest.raises(ValueError, match=r"freeze='all': expected one of decoder, encoder, soft_"):
        make("relu", "all")
