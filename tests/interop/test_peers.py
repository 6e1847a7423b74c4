"""Codes and reconstructions are those of the other libraries themselves, where they are installed:
what their own writers write is read. (test_import.py compares with formulas everywhere.)"""

import pytest
import torch

from clipsae.interop import read
from tests.interop.foreign import D, K, M


def randomised(module):
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module.eval()


def agree(sae, x, codes, reconstruction):
    found = sae(x)
    assert 0.02 < (codes != 0).float().mean() < 0.98
    assert torch.equal(found.codes != 0, codes != 0)
    torch.testing.assert_close(found.codes, codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.reconstruction, reconstruction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SAE", {}),
        ("SAE", {"dictionary_params": {"normalization": "max_l1", "use_multiplier": True}}),
        ("TopKSAE", {"top_k": K}),
        ("TopKSAE", {"top_k": K, "encoder_module": "mlp_bn_1"}),
        ("BatchTopKSAE", {"top_k": 64 * K}),
        ("JumpSAE", {"dictionary_params": {"normalization": "l1"}}),
        ("RATopKSAE", {"top_k": K, "points": torch.randn(50, D)}),
        ("RAJumpSAE", {"points": torch.randn(50, D), "delta": 0.5}),
    ],
)
def test_overcomplete(tmp_path, x, name, options, training):
    library = pytest.importorskip("overcomplete.sae", reason="overcomplete is not installed")
    theirs = randomised(getattr(library, name)(D, nb_concepts=M, **options)).train()
    theirs(x)  # its first step: batch statistics, the running threshold
    randomised(theirs.train())
    theirs.train(training)
    torch.save(theirs, tmp_path / "sae.pt")
    theirs.eval()
    _, codes, reconstruction = theirs(x)
    agree(read(tmp_path / "sae.pt").sae, x, codes.detach(), reconstruction.detach())


@pytest.mark.parametrize("training", [False, True])
def test_overcompletes_matching_pursuit(tmp_path, x, training):
    library = pytest.importorskip("overcomplete.sae", reason="overcomplete is not installed")
    theirs = randomised(library.MpSAE(D, nb_concepts=M, k=K, dropout=0.1).train())
    theirs.train(training)
    torch.save(theirs, tmp_path / "sae.pt")
    _, codes, reconstruction = theirs.eval()(x)
    agree(read(tmp_path / "sae.pt").sae, x, codes.detach(), reconstruction.detach())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_overcompletes_other_encoders(tmp_path, x, tied, bias):
    library = pytest.importorskip("overcomplete.sae", reason="overcomplete is not installed")
    theirs = randomised(library.TopKSAE(D, nb_concepts=M, top_k=K).train())
    theirs = theirs.train().tied(bias) if tied else theirs.train().untied(bias)
    randomised(theirs.train())
    torch.save(theirs, tmp_path / "sae.pt")
    _, codes, reconstruction = theirs(x)
    agree(read(tmp_path / "sae.pt").sae, x, codes.detach(), reconstruction.detach())


def test_saev(tmp_path, x):
    nn = pytest.importorskip("saev.nn", reason="saev is not installed")
    config = pytest.importorskip("saev.config")
    theirs = randomised(nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=D, exp_factor=4)))
    nn.dump(str(tmp_path / "sae.pt"), theirs)
    with torch.no_grad():
        reconstruction, codes, _ = theirs(x)
    found = read(tmp_path / "sae.pt")
    agree(found.sae, x, codes, reconstruction)
    assert found.format == "saev"


@pytest.mark.parametrize("name", ["sae", "transcode", "skip_connection", "groupmax"])
def test_sparsify(tmp_path, x, name):
    library = pytest.importorskip("sparsify", reason="sparsify is not installed")
    options = {"activation": "groupmax"} if name == "groupmax" else {name: True}
    config = library.SparseCoderConfig(num_latents=M, k=K, **({} if name == "sae" else options))
    theirs = randomised(library.SparseCoder(D, config))
    theirs.save_to_disk(tmp_path)
    if name != "sae":
        with pytest.raises(ValueError, match=rf"{next(iter(options))}=\S+ has no counterpart here"):
            read(tmp_path)
        return
    with torch.no_grad():
        values, latents, _ = theirs.encode(x)
        codes = torch.zeros(len(x), M).scatter(1, latents, values)
        agree(read(tmp_path).sae, x, codes, codes @ theirs.W_dec + theirs.b_dec)


@pytest.mark.parametrize("name", ["AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_dictionary_learning(tmp_path, x, name):
    pytest.importorskip("dictionary_learning.dictionary", reason="dictionary_learning is missing")
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    module = {"A": top_k, "B": batch_top_k, "M": matryoshka_batch_top_k}[name[0]]
    groups = {"group_sizes": [8, M - 8]} if name[0] == "M" else {}
    theirs = randomised(getattr(module, name)(D, M, K, **groups))
    theirs.threshold.fill_(0.8)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    config = {"dict_class": name, "k": K, "activation_dim": D, "dict_size": M, **groups}
    (tmp_path / "config.json").write_text(f'{{"trainer": {config}}}'.replace("'", '"'))
    with torch.no_grad():
        reconstruction, codes = theirs(x, output_features=True)
    agree(read(tmp_path).sae, x, codes, reconstruction)


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_saelenss_trainings(tmp_path, x, name):
    """Its checkpoints encode with their threshold, as do the JumpReLU that it ends as."""
    sae_lens = pytest.importorskip("sae_lens", reason="extra peers: not installed")
    cls, config = sae_lens.registry.get_sae_training_class(name)
    widths = {"matryoshka_widths": [8, M]} if "matryoshka" in name else {}
    theirs = randomised(cls(config(d_in=D, d_sae=M, k=K, **widths)))
    theirs.topk_threshold.fill_(0.8)
    theirs.save_model(tmp_path / "checkpoint")
    theirs.save_inference_model(tmp_path / "end")
    last = sae_lens.SAE.load_from_disk(tmp_path / "end")
    with torch.no_grad():
        codes, reconstruction = last.encode(x), last(x)
    for folder in ("checkpoint", "end"):
        found = read(tmp_path / folder)
        agree(found.sae, x, codes, reconstruction)
    assert any("nested" in said for said in read(tmp_path / "checkpoint").lost) == bool(widths)
