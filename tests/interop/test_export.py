"""What is exported computes the same: in the other library itself where it is installed, and read
back by the importer (which test_import.py compares with the formulas) everywhere."""

import pytest
import torch

from clipsae.interop import read, saelens, visaebench
from clipsae.interop.plain import Plain
from clipsae.sae import ACTIVATIONS, Activation
from clipsae.sae.batch_topk import BatchTopK
from tests.interop.conftest import KINDS, random_sae


def close(codes, reconstruction, sae, x):
    """Codes and reconstructions within rounding; the same latents act."""
    found = sae(x)
    assert 0.02 < (found.codes != 0).float().mean() < 0.98
    assert torch.equal(codes != 0, found.codes != 0)
    torch.testing.assert_close(codes, found.codes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reconstruction, found.reconstruction, atol=1e-4, rtol=1e-4)


def in_visaebenchs_files(sae) -> bool:
    other = sae.config["activation"] in ("gated", "abs_topk")
    other |= sae.normalize in ("unit", "layer_norm")
    return not other and sae.config["architecture"] != "matching_pursuit"


def test_files_and_back(tmp_path, sae, x):
    lost = saelens.write(sae, tmp_path / "a", {"model_name": "ViT", "hook_name": "resblocks.10"})
    assert all(sentence.endswith(".") for sentence in lost)
    found = read(tmp_path / "a")
    close(found.sae(x).codes, found.sae(x).reconstruction, sae, x)
    assert found.format == "SAELens"
    assert found.reads["hook_name"] == "resblocks.10"
    if not in_visaebenchs_files(sae):
        with pytest.raises(ValueError, match="VisaebenchSAE"):
            visaebench.write(sae, tmp_path / "b")
        return
    visaebench.write(sae, tmp_path / "b")
    found = read(tmp_path / "b")
    close(found.sae(x).codes, found.sae(x).reconstruction, sae, x)
    assert found.format == "visaebench"


def test_the_real_saelens_encodes_and_decodes_alike(tmp_path, sae, x):
    sae_lens = pytest.importorskip("sae_lens", reason="extra peers: not installed")
    saelens.write(sae, tmp_path, {"model_name": "ViT-B-16"})
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        codes = theirs.encode(x)
        close(codes, theirs(x), sae, x)
        # Image tokens as they come, [B, T, d].
        tokens = x.view(4, 16, -1)
        torch.testing.assert_close(theirs.encode(tokens), sae.encode(tokens), atol=1e-4, rtol=1e-4)
    assert theirs.cfg.metadata.model_name == "ViT-B-16"
    back = saelens.from_object(theirs)
    close(back.sae(x).codes, back.sae(x).reconstruction, sae, x)


@pytest.mark.parametrize(
    "name", ["standard", "topk", "abstopk", "jumprelu", "gated", "matching_pursuit"]
)
def test_the_real_saelens_is_read_without_it(tmp_path, x, name):
    sae_lens = pytest.importorskip("sae_lens", reason="extra peers: not installed")
    torch.manual_seed(2)
    cls, config = sae_lens.saes.sae.get_sae_class(name)
    more = {"k": 4, "rescale_acts_by_decoder_norm": True} if name.endswith("topk") else {}
    if name == "matching_pursuit":
        more = {"residual_threshold": 2.0}  # up to d steps, none with a latent again
    if name in ("gated", "topk"):
        more["normalize_activations"] = "layer_norm"
    theirs = cls(config(d_in=12, d_sae=40, apply_b_dec_to_input=name != "jumprelu", **more))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
        theirs.save_model(tmp_path)
        ours = read(tmp_path).sae
        close(theirs.encode(x), theirs(x), ours, x)


@pytest.mark.parametrize("kind", ["standardised", "whitened", "whitened_attention"])
def test_statistics_of_tokens_are_folded_into_the_weights(kind, x):
    sae = random_sae(**KINDS[kind])
    folded = Plain.of(sae, "anything").to_sae()
    assert folded.config["normalize"] == "none"
    assert not folded.normalization.learned
    found, expected = folded(x), sae(x)
    for a, b in (
        (found.codes, expected.codes),
        (found.reconstruction, expected.reconstruction),
        (folded.decoder_rows(), sae.decoder_rows()),
        (folded.decoder_bias, sae.decoder_bias),
    ):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_means_of_positions_are_refused(tmp_path, make):
    sae = make(activation="topk", k=5, position_mean=True)
    for call in (lambda: saelens.write(sae, tmp_path), lambda: visaebench.write(sae, tmp_path)):
        with pytest.raises(ValueError, match="position_mean=true cannot be written for"):
            call()
    with pytest.raises(ValueError, match="position_mean=true cannot be measured by visaebench"):
        visaebench.VisaebenchSAE(sae)
    assert list(tmp_path.iterdir()) == []


class Ours(BatchTopK):
    """Codes above fixed thresholds, in a plugin."""

    def magnitude(self, scores, tau, latents):
        return super().magnitude(scores, tau, latents)


class Shrinking(Activation):
    def threshold(self, scores):
        return scores.new_full((), 0.5)

    def magnitude(self, scores, tau, latents):
        return scores - tau


def test_a_plugin_with_fixed_thresholds_is_jumprelu(tmp_path, make, monkeypatch, x):
    monkeypatch.setitem(ACTIVATIONS, "ours", Ours)
    monkeypatch.setitem(ACTIVATIONS, "shrinking", Shrinking)
    sae = make(activation="ours", k=5)
    for module in (saelens, visaebench):
        module.write(sae, tmp_path / module.NAME)
        found = read(tmp_path / module.NAME).sae
        assert found.config["activation"] == "jumprelu"
        close(found(x).codes, found(x).reconstruction, sae, x)
    with pytest.raises(ValueError, match="its codes are not the scores that pass a threshold"):
        saelens.write(make(activation="shrinking"), tmp_path)


def test_matching_pursuit_of_scaled_tokens_is_refused(tmp_path, make):
    sae = make(**{**KINDS["matching_pursuit"], "normalize": "mean_std"})
    with pytest.raises(ValueError, match="normalize=mean_std of matching pursuit cannot be writ"):
        saelens.write(sae, tmp_path)


@pytest.mark.parametrize("architecture", ["attention", "linear"])
def test_sparsemax_is_refused_in_one_sentence(tmp_path, make, architecture):
    sae = make(architecture=architecture, activation="sparsemax", normalize="unit")
    for write in (saelens.write, visaebench.write):
        with pytest.raises(
            ValueError, match=r"activation=sparsemax .* all of a token's scores"
        ) as said:
            write(sae, tmp_path)
        assert "\n" not in str(said.value)
    assert list(tmp_path.iterdir()) == []


def test_the_real_visaebench_loads_its_files(tmp_path, sae, x):
    hub = pytest.importorskip("visaebench.hub", reason="visaebench is not installed")
    if not in_visaebenchs_files(sae):
        pytest.skip("not for its files")
    visaebench.write(sae, tmp_path)
    theirs = hub.load_sae(str(tmp_path), device="cpu")
    close(theirs.encode(x), theirs.decode(theirs.encode(x)), sae, x)


@pytest.mark.parametrize("name", ["fvu", "adapter"])
def test_the_interface_of_visaebench(make, x, name):
    """The norms of normalised input are in its codes, so that codes alone can be decoded."""
    sae = make(architecture="attention", activation="sparsemax", normalize="unit")
    wrapped = visaebench.VisaebenchSAE(sae)
    reconstruction = wrapped.decode(wrapped.encode(x))
    torch.testing.assert_close(reconstruction, sae(x).reconstruction, atol=1e-4, rtol=1e-4)
    assert torch.equal(wrapped.encode(x) != 0, sae.encode(x) != 0)
    with pytest.raises(ValueError, match="decoder bias"):
        visaebench.VisaebenchSAE(make(activation="relu", normalize="unit"))
    with pytest.raises(ValueError, match="normalize=layer_norm with a decoder bias or means of"):
        visaebench.VisaebenchSAE(make(activation="relu", normalize="layer_norm"))
    if name == "fvu":
        metrics = pytest.importorskip("visaebench.metrics", reason="visaebench is not installed")
        found = metrics.METRIC_REGISTRY["fvu"]().compute(wrapped, x, device="cpu")
        residual = x - sae(x).reconstruction
        assert found.value == pytest.approx((residual.var() / x.var()).item(), rel=0.01)


@torch.no_grad()
def test_an_encoder_that_does_not_subtract_the_bias_has_equal_codes(make, x):
    for activation in ("topk", "gated"):
        sae = make(activation=activation, subtract_bias=False)
        sae.architecture.b_dec.normal_()
        plain = Plain.of(sae, "theirs").to_sae()
        assert plain.config["subtract_bias"]
        torch.testing.assert_close(plain.encode(x), sae.eval().encode(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"max_norm_ratio": 3.0}, {"target_layer": -1, "subtract_bias": False}]
)
def test_what_other_libraries_have_no_word_for(make, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* cannot be written for theirs"):
        Plain.of(make(activation="topk", **options), "theirs")
