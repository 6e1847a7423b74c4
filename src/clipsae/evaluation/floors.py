"""What measures are compared with: random directions, an untrained SAE, a supervised probe.

N rows (patches, objects or images), V concepts, d width, M latents.
"""

import torch
from torch import Tensor

from clipsae.sae import SAE, SparseCodes

DIRECTIONS = 512
INITIAL_IMAGES = 32  # that an untrained SAE is initialised from, as training does
RIDGE = 0.1
REFERENCES = {
    "random": f"{DIRECTIONS} random directions and their negatives",
    "untrained": "an SAE of the same config before its first step",
}


class RandomDirections:
    """Codes relu(+-(x - mean) w) of 512 random directions w: 1,024 latents that know nothing.

    Args:
        tokens: [..., d], whose mean is taken away.
        seed: of the directions, which are uniform on the sphere.
    """

    def __init__(self, tokens: Tensor, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(DIRECTIONS, tokens.shape[-1], generator=generator)
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.rows = torch.cat((rows, -rows)).to(tokens.device)
        self.mean = tokens.flatten(0, -2).mean(dim=0)

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """Tokens [..., d] -> codes [..., 1,024]."""
        return SparseCodes.from_dense(torch.relu((x - self.mean) @ self.rows.T))


def untrained(sae: SAE, images: Tensor, seed: int = 0) -> SAE:
    """An SAE of the same config before its first step of training, in eval mode.

    Args:
        images: tokens [N, T, d]; it is initialised from the first 32, as training does.
        seed: of its weights; the global generators of random numbers are left as they are.
    """
    with torch.random.fork_rng():  # of all GPUs, too, which `manual_seed` seeds
        torch.manual_seed(seed)
        twin = SAE(**sae.config)
        # It has its statistics before the first step. (Metrics show it single patches, too.)
        twin.normalization.load_state_dict(sae.normalization.state_dict())
        twin.normalization.forget_positions(images.shape[1])
        twin.to(images.device).initialize(images[:INITIAL_IMAGES])
        twin.estimate_statistics(images[:INITIAL_IMAGES])  # as with trainer.max_steps=0
    return twin.eval()


def mean_rows(x: Tensor, group: Tensor) -> Tensor:
    """Means over groups of rows: [N, d], LongTensor [N] (-1: of no group) -> [G, d]."""
    here = group >= 0
    sizes = torch.bincount(group[here])
    sums = x.new_zeros(len(sizes), x.shape[1]).index_add_(0, group[here], x[here])
    return sums / sizes[:, None]


def least_squares(x: Tensor, truth: Tensor, ridge: float = RIDGE) -> Tensor:
    """Linear probes: the least squares of each concept (1 or 0) on features, with an intercept.

    Args:
        x: [n, d].
        truth: BoolTensor [n, V].
        ridge: that many times the mean of the features' variances is added to each.

    Returns:
        float64 [d + 1, V], the intercepts last.
    """
    x, y = x.double(), truth.double()
    mean, base = x.mean(dim=0), y.mean(dim=0)
    x = x - mean
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    weights = torch.linalg.solve(gram, x.T @ (y - base))
    return torch.cat((weights, (base - mean @ weights)[None]))
