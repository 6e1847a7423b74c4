"""SAEs without a gradient step: what a trained one must beat.

Raw neurons, principal and independent components, k-means centroids, directions of texts, random
directions: each an ordinary SAE with u = x - mean(x), z = relu(W_enc u), x_hat = W_dec^T z + mean.
Rows of W_enc have norm 1, so that a code is the length of u along its row. Where a direction is
there with both signs (+-), relu(s) - relu(-s) = s, and the reconstruction is linear in u.

The reference for random and frozen baselines is "Sanity Checks for Sparse Autoencoders" (arXiv
2602.14111). Work is done in float64, and is a function of the tokens and the seed alone.

N tokens, d width, M latents, C texts, e embedding size.
"""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipsae.sae import SAE

log = logging.getLogger(__name__)

MOST_TOKENS = 20_000
"""So many are drawn at random where the work would be long: for ICA, and for `least_squares`."""
ICA_STEPS = 400
LEARNED = ("trained", "partly frozen", "not learned")


def learned(config: Mapping[str, Any]) -> str:
    """How much of an SAE was learned, by its resolved config: one of `LEARNED`.

    "not learned": fitted (`model.fit`), or as initialised (`trainer.max_steps=0`); "partly frozen":
    with `model.freeze`; "trained": every other, also one that was imported.
    """
    model, trainer = config.get("model") or {}, config.get("trainer") or {}
    if model.get("fit") is not None:
        return "not learned"
    if "imported" not in model and trainer.get("max_steps") == 0:
        return "not learned"
    return "trained" if model.get("freeze") is None else "partly frozen"


def fit(
    name: str,
    tokens: Tensor,
    *,
    latents: int | None = None,
    seed: int = 0,
    directions: Tensor | None = None,
    of: str = "all",
) -> SAE:
    """An SAE by name, in eval mode on the CPU, float32.

    Args:
        name: "neurons", "pca", "ica", "kmeans", "random" or "text": see the functions below.
        tokens: [N, d], of any floating dtype.
        latents: M of "kmeans" and "random", whose M the tokens do not decide.
        seed: of what is drawn at random.
        directions: [M, d], of "text": `text_directions`.
        of: which of an image's tokens they are; see `SAE`.

    Raises:
        ValueError: too few tokens (k-means), tokens that span less than d dimensions (ICA), an odd
            M (random), or another name.
    """
    x = tokens.detach().double().cpu().numpy()
    mean = x.mean(axis=0)
    u, generator = x - mean, np.random.default_rng(seed)
    decoder: np.ndarray | None = None
    if name == "neurons":
        encoder, decoder = neurons(u)
    elif name == "pca":
        encoder, decoder = pca(u)
    elif name == "ica":
        encoder, decoder = ica(u, generator)
    elif name == "random" and latents is not None:
        encoder, decoder = random(u, latents, generator)
    elif name == "kmeans" and latents is not None:
        encoder = kmeans(u, latents, generator)
    elif name == "text" and directions is not None:
        encoder = directions.detach().double().cpu().numpy()
    else:
        raise ValueError(f"fit={name!r}: unknown, or without its latents or directions")
    norms = np.linalg.norm(encoder, axis=1, keepdims=True)
    norms[norms == 0] = 1
    encoder = encoder / norms
    fitted = least_squares(_sample(u, generator), encoder) if decoder is None else decoder * norms
    sae = SAE(
        u.shape[1],
        len(encoder),
        activation="relu",
        unit_decoder=False,
        bias_init="zero",
        l1_coefficient=0.0,
        tokens=of,
    )
    with torch.no_grad():
        for parameter, values in (("W_enc", encoder), ("W_dec", fitted), ("b_dec", mean)):
            sae.architecture.get_parameter(parameter).copy_(torch.from_numpy(values))
        sae.architecture.get_parameter("b_enc").zero_()
    return sae.eval()


Rows = tuple[np.ndarray, np.ndarray]
"""W_enc [M, d], of any scale, and the W_dec [M, d] that goes with it."""


def neurons(u: np.ndarray) -> Rows:
    """The d coordinates of the tokens, +-: M = 2 d, and an exact reconstruction."""
    rows = _signed(np.eye(u.shape[1]))
    return rows, rows


def pca(u: np.ndarray) -> Rows:
    """The d principal components of centred tokens [N, d], +-: M = 2 d, and an exact
    reconstruction. The largest variance first, and of two signs that with which the entry of
    largest size is positive; the opposite signs follow in the same order."""
    _, vectors = np.linalg.eigh(u.T @ u)
    rows = vectors.T[::-1]
    largest = np.abs(rows).argmax(axis=1)
    rows = _signed(rows * np.sign(rows[np.arange(len(rows)), largest])[:, None])
    return rows, rows


def ica(u: np.ndarray, generator: np.random.Generator) -> Rows:
    """The d independent components of centred tokens [N, d], +-, by FastICA (Hyvarinen & Oja 2000)
    on `MOST_TOKENS` of them: M = 2 d. The decoder is the mixing matrix, the reconstruction exact.

    Raises:
        ValueError: the tokens span less than d dimensions.
    """
    from sklearn.decomposition import FastICA  # takes a second, which other runs need not wait

    (n, d), rank = u.shape, np.linalg.matrix_rank(u.T @ u, hermitian=True)
    if rank < d:
        raise ValueError(
            f"fit='ica': {n:,} tokens span {rank} of {d} dimensions, and all are needed: set "
            "model.initial_images to more"
        )
    found = FastICA(whiten="unit-variance", max_iter=ICA_STEPS, random_state=_seed(generator))
    with warnings.catch_warnings(action="ignore"):
        found.fit(_sample(u, generator))
    if found.n_iter_ == ICA_STEPS:
        log.warning("FastICA has not converged in %d iterations", ICA_STEPS)
    return _signed(found.components_), _signed(found.mixing_.T)


def kmeans(u: np.ndarray, latents: int, generator: np.random.Generator) -> np.ndarray:
    """M centroids of centred tokens [N, d], by MiniBatchKMeans: W_enc [M, d]. A score is the
    product of token and centroid, not their distance. The decoder is `least_squares`.

    Raises:
        ValueError: there are fewer tokens than centroids.
    """
    from sklearn.cluster import MiniBatchKMeans

    if len(u) < latents:
        raise ValueError(
            f"fit='kmeans': {len(u):,} tokens are fewer than {latents:,} centroids: set "
            "model.latents to fewer or model.initial_images to more"
        )
    found = MiniBatchKMeans(latents, batch_size=4096, n_init=1, random_state=_seed(generator))
    return found.fit(u).cluster_centers_


def random(u: np.ndarray, latents: int, generator: np.random.Generator) -> Rows:
    """M / 2 Gaussian directions, +-. The decoder is the pseudo-inverse: exact from M = 2 d on.

    Raises:
        ValueError: M is odd.
    """
    if latents % 2:
        raise ValueError(
            f"latents={latents}: expected an even number, as each random direction is there with "
            "both signs"
        )
    rows = generator.normal(size=(latents // 2, u.shape[1]))
    return _signed(rows), _signed(np.linalg.pinv(rows).T)


def text_directions(direct: Tensor, embeddings: Tensor) -> Tensor:
    """Directions of the residual stream that texts point to: [C, d].

    A token x of the last block has the embedding P^T (w * (x - mean x) / std x + b) with ln_post's
    weight w and the projection P. With the scale 1 / std x taken as fixed this is linear, and the
    gradient of its product with a text's embedding is the direction: the transpose of `direct`
    applied to the embedding. What is approximated: the scale, all blocks between the SAE's layer
    and the last (the direct path, a logit lens), and that patches are read as CLS is. The
    mean over the texts is subtracted, as what is common to all of them tells none apart.

    Args:
        direct: [d, e], `FrozenCLIP.direct` of the d unit vectors.
        embeddings: [C, e].
    """
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    return centred @ direct.double().T


def _signed(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, -rows])


def _seed(generator: np.random.Generator) -> int:
    return int(generator.integers(2**31))


def _sample(u: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """At most `MOST_TOKENS` of the tokens."""
    if len(u) <= MOST_TOKENS:
        return u
    return u[generator.choice(len(u), MOST_TOKENS, replace=False)]


def least_squares(u: np.ndarray, encoder: np.ndarray) -> np.ndarray:
    """W_dec [M, d] with the least sum of ||u - relu(u W_enc^T) W_dec||^2 over centred tokens
    [N, d], of several such the smallest: the best linear decoder of codes of one sign."""
    codes = np.maximum(u @ encoder.T, 0)
    gram = torch.from_numpy(codes.T @ codes)  # its pseudo-inverse in numpy is by SVD, slower
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10).numpy()
    return inverse @ (codes.T @ u)
