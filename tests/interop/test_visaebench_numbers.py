"""Our measures equal visaebench's on the same arrays.

`THEIRS` was computed by visaebench 0.1.0 with `theirs` below; where it is installed, it is computed
again. (Its own dependencies, transformers among them, are too heavy to install for this.)
"""

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split

from clipsae.evaluation.metrics.coherence import LEAST_IMAGES, morans_i
from clipsae.evaluation.metrics.probing import linear_probe, sparse_probing
from clipsae.evaluation.metrics.sparsity import sparsity_sums, sparsity_values
from clipsae.interop.visaebench import VisaebenchSAE
from clipsae.sae import SAE, SparseCodes

GRID = (4, 5)
THEIRS = {
    "accuracy_original": 0.6666666666666666,
    "accuracy_reconstructed": 0.25,
    "downstream_preservation": 0.375,
    "feature_localization": 0.02491979323316139,
    "fvu": 0.8864558314446955,
    "k_accuracies": {1: 0.3333333333333333, 5: 0.4583333333333333, 10: 0.375},
    "per_feature_scores": [
        -0.0007063664888080798,
        0.028581891245054968,
        0.020673137051718575,
        0.03590978828130984,
        0.012917341009990589,
        0.03406082487654412,
        -0.0048596708253882395,
        0.03138599524626861,
        0.010991807330888932,
        0.019984917796176414,
        0.05673113465309143,
        0.05336671862108954,
    ],
    "sparse_probing_auc": 0.40740740740740733,
}


@pytest.fixture(scope="module")
def given():
    """An SAE of codes that lie together, and tokens [N, P, d] of labelled images."""
    generator = np.random.default_rng(0)
    n, (h, w), d, classes = 120, GRID, 6, 4
    labels = np.arange(n) % classes
    means = generator.normal(size=(classes, d))
    x = generator.normal(size=(n, h, w, d)).round(3)
    x[:, 1:] += 0.8 * x[:, :-1]  # neighbours are alike
    x = (x + 0.2 * means[labels][:, None, None]).reshape(n, h * w, d)
    sae = SAE(d, 12, "linear", "topk", k=4)
    weights = torch.from_numpy(generator.normal(size=(d, 12))).float()
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.ndim == 2:
                parameter.copy_(weights if parameter.shape == weights.shape else 0.1 * weights.T)
            else:
                parameter.zero_()
    return sae.eval(), torch.from_numpy(x).float(), torch.from_numpy(labels)


def theirs(sae, x, labels):
    from visaebench.metrics import METRIC_REGISTRY as metrics

    wrapped, found = VisaebenchSAE(sae), {}
    for name, options in (
        ("localization", {"grid_size": GRID}),
        ("sparse_probing", {"k_values": [1, 5, 10]}),
        ("downstream_preservation", {}),
        ("fvu", {}),
    ):
        tokens = x.flatten(0, 1) if name == "fvu" else x
        more = {} if name in ("fvu", "localization") else {"labels": labels.numpy()}
        result = metrics[name](**options).compute(wrapped, tokens, device="cpu", **more)
        found[result.metric_name] = result.value
        keys = ("per_feature_scores", "k_accuracies", "accuracy_original", "accuracy_reconstructed")
        found |= {key: result.metadata[key] for key in keys if key in result.metadata}
    return found


@pytest.fixture(params=["as it was computed", "installed"])
def expected(request, given):
    if request.param == "installed":
        pytest.importorskip("visaebench.metrics", exc_type=ImportError)
        return theirs(*given)
    return THEIRS


def split(labels):
    """visaebench's: a fifth is scored."""
    train, _ = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels.numpy(), random_state=42
    )
    training = torch.zeros(len(labels), dtype=torch.bool)
    training[torch.from_numpy(train)] = True
    return training


@torch.no_grad()
def test_spatial_coherence(given, expected):
    sae, x, _ = given
    scores, counts = morans_i(sae.encode_sparse(x), GRID)
    images = counts.sum(dim=0)
    assert images.max() <= 200  # where visaebench stops
    mean = torch.where(counts, scores, 0).sum(dim=0) / images
    for mine, other, n in zip(
        mean.tolist(), expected["per_feature_scores"], images.tolist(), strict=True
    ):
        assert (n < LEAST_IMAGES) == (other is None)
        assert other is None or mine == pytest.approx(other, rel=1e-4)
    scored = mean[images >= LEAST_IMAGES]
    assert len(scored) > 5
    assert scored.mean().item() == pytest.approx(expected["feature_localization"], rel=1e-4)


@torch.no_grad()
def test_sparse_probing(given, expected):
    sae, x, labels = given
    codes = SparseCodes.from_dense(
        VisaebenchSAE(sae).encode(x.flatten(0, 1)).view(*x.shape[:2], -1).amax(1)
    )
    everything = torch.ones(len(labels), dtype=torch.bool)
    found = sparse_probing(
        codes, labels, split(labels), ranking=everything, ks=[1, 5, 10, 20], standardize=False
    )
    assert found["k_accuracies"] == pytest.approx(expected["k_accuracies"])
    assert found["auc"] == pytest.approx(expected["sparse_probing_auc"])


@torch.no_grad()
def test_linear_probe(given, expected):
    sae, x, labels = given
    wrapped = VisaebenchSAE(sae)
    x_hat = wrapped.decode(wrapped.encode(x.flatten(0, 1))).view_as(x)
    accuracies = linear_probe(x.mean(1), x_hat.mean(1), labels, split(labels))
    assert accuracies[0] == pytest.approx(expected["accuracy_original"])
    assert accuracies[1] == pytest.approx(expected["accuracy_reconstructed"])
    ratio = accuracies[1] / accuracies[0]
    assert ratio == pytest.approx(expected["downstream_preservation"])


@torch.no_grad()
def test_fvu_is_equal_where_tokens_are_centred_alone(given, expected):
    sae, x, _ = given
    x = x.flatten(0, 1)

    def of_both(y):
        res = y - sae.decode(sae.encode(y), sae.input_scale(y))
        # visaebench takes the square of the mean of a token's sum from the mean of squares.
        left, all_ = (((v**2).sum() - v.sum() ** 2 / len(v)).item() for v in (res, y))
        mine = sparsity_values(sparsity_sums(y, y - res, sae.encode(y)))["fvu"].item()
        plain = (res**2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert mine == pytest.approx(plain.item(), rel=1e-5)
        return mine, left / all_

    assert of_both(x)[1] == pytest.approx(expected["fvu"], rel=1e-5)
    for shift, equal in ((0.0, True), (3.0, False)):
        mine, other = of_both(x - x.mean(0) + shift)
        assert (other == pytest.approx(mine, rel=0.02)) == equal
