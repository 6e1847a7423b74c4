"""SAEs of both towers (`clip.hook=towers`): which latents serve images and captions, which pairs of
latents hold the two together, and whether an image still finds its caption.

The bridge score is that of Papadimitriou et al., "Interpreting the Linear Structure of
Vision-language Model Embedding Spaces", 2025 (arXiv 2504.11695), and so is the share of a latent's
codes that images have, their modality score.

n pairs of an image and its caption, M latents, e embedding size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from clipsae.evaluation.metrics.base import METRICS, Measurement, Options
from clipsae.evaluation.metrics.sample import CodeSample, Draw
from clipsae.evaluation.numbers import Number
from clipsae.evaluation.passes import Batch
from clipsae.sae import SAE, SparseCodes
from clipsae.sae.dense import without_tf32

RECALLS = (1, 5)
LEAST_SHARE = 0.1
"""Of a latent's summed |codes|, that each modality must have for it to serve both."""

_ENTRIES = 2**25  # pairs of an image and a latent, at most
_BLOCK = 1024  # latents that are compared with others at a time


def image_shares(images: Tensor, captions: Tensor) -> Tensor:
    """The share of images in each latent's summed |codes|: the modality score, float64 [M], from 0
    (captions alone) to 1 (images alone); NaN where it is never active.

    Args:
        images: codes [n, M].
        captions: the same of their captions.
    """
    of_images, of_captions = (
        codes.abs().sum(dim=0, dtype=torch.float64) for codes in (images, captions)
    )
    return of_images / (of_images + of_captions)


def bridge(images: Tensor, captions: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """How the bridge score B is spread over pairs of latents:

        B_ij = mean over pairs of z_i(image) z_j(caption) times <d_i, d_j>

    With decoder rows d of unit length it is the paper's; of any other it does not depend on how a
    latent's size is shared between its code and its row. The sum of B is the mean inner product of
    what the latents add to an image's reconstruction and to its caption's.

    Args:
        images: codes [n, M].
        captions: those of their captions, row by row.
        rows: decoder rows [M, e].

    Returns:
        float64 scalars: `same`, the share of sum |B| on the diagonal, where one latent is active on
        both; `pairs`, (sum |B|)^2 / sum B^2: over how many pairs of latents it is spread, if all
        had the same. NaN where B is 0.
    """
    total, squares, same = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for i in _blocks(images.shape[1]):
        for j in _blocks(images.shape[1]):
            together = images[:, i].double().T @ captions[:, j].double() / len(images)
            scores = (together * (rows[i].double() @ rows[j].double().T)).cpu()
            total += scores.abs().sum()
            squares += scores.square().sum()
            if i == j:
                same += scores.diagonal().abs().sum()
    return {"same": same / total, "pairs": total.square() / squares}


def cosines(images: Tensor, captions: Tensor) -> Tensor:
    """Cosines of each image with each caption, float64 [n, n], by [n, M] codes or embeddings; 0
    where one is 0."""
    found = torch.zeros(len(images), len(captions), dtype=torch.float64, device=images.device)
    for columns in _blocks(images.shape[1]):
        found += images[:, columns].double() @ captions[:, columns].double().T
    lengths = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) for x in (images, captions)]
    product = lengths[0][:, None] * lengths[1]
    return torch.where(product > 0, found / product, 0.0)


def recall(similarity: Tensor, k: int) -> Tensor:
    """How often the own candidate is among the k most similar: a float64 scalar.

    Of candidates as similar as the own one, an order at random is assumed.

    Args:
        similarity: of each query with each candidate, [n, n]; query i belongs to candidate i.
    """
    own = similarity.diagonal()[:, None]
    above = (similarity > own).sum(dim=1)
    level = (similarity == own).sum(dim=1)  # itself, too
    return ((k - above) / level).clamp(0, 1).double().mean()


def _blocks(latents: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, latents, _BLOCK))


def _recalls() -> Iterator[Number]:
    """The numbers of retrieval: of reconstructions, with CLIP's own and chance beside them, and of
    codes."""
    for of, to in (("image", "text"), ("text", "image")):
        for k in RECALLS:
            key, label = f"{of}_to_{to}_{k}", f"{of} to {to}, recall@{k}"
            chance, own = f"{key}_random", f"{key}_embedding"
            yield Number(
                key,
                label,
                "share of reconstructions of one modality whose own partner's is among the k "
                "nearest, by their cosine" * (key == "image_to_text_1"),
                ".1%",
                table="towers",
                headline=k == 1,
                floor=chance,
                ceiling=own,
            )
            yield Number(
                f"{key}_codes",
                f"{label}, codes",
                format=".1%",
                table="towers",
                floor=chance,
                ceiling=own,
            )
            yield Number(own, f"{label}, CLIP's embeddings", format=".1%", table="")
            yield Number(chance, f"{label}, at random", format=".1%", table="")


@METRICS.register("towers")
class Towers(Measurement):
    """Images and captions of a sample, of no two with the same caption: shares of latents that
    serve one modality or both, `bridge` and the same of captions that are shuffled among the
    images, retrieval by reconstructions and codes, and what of the captions is lost.

    Memory is bounded by `sample_images`: the codes of active latents are held dense, 8 bytes for
    a pair and such a latent, and the cosines of each image with each caption.
    """

    needs = ("captions",)
    numbers = (
        Number(
            "shared_latents",
            "shared latents",
            "share of the latents that are active on a compared image or caption, of whose summed "
            "|codes| each of the two has a tenth or more",
            ".1%",
            "",
            "towers",
            headline=True,
        ),
        Number(
            "image_latents",
            "image latents",
            "the share of those of whose codes images have over nine tenths",
            ".1%",
            "",
            "towers",
        ),
        Number(
            "text_latents",
            "text latents",
            "the same of captions",
            ".1%",
            "",
            "towers",
        ),
        Number(
            "bridge_same",
            "bridge in one latent",
            "share of the bridge score's sum |B| that is of one latent on both sides, B_ij being "
            "the mean of z_i(image) z_j(caption) times the inner product of decoder rows i and j",
            ".1%",
            "max",
            "towers",
            headline=True,
            floor="bridge_same_shuffled",
        ),
        Number(
            "bridge_pairs",
            "bridge pairs",
            "over how many pairs of latents |B| is spread, (sum |B|)^2 / sum B^2",
            ".1f",
            "min",
            "towers",
            floor="bridge_pairs_shuffled",
        ),
        Number("bridge_same_shuffled", "bridge in one latent, shuffled", format=".1%", table=""),
        Number(
            "bridge_pairs_shuffled", "bridge pairs, shuffled", format=".1f", better="", table=""
        ),
        *_recalls(),
        Number("text_fvu", "FVU of captions", better="min", table="towers"),
        Number("text_l0", "L0 of captions", "", ".1f", "", "towers"),
        Number(
            "pairs_compared",
            "pairs",
            "images compared, each with a caption of its own",
            ".0f",
            "",
            "towers",
        ),
    )

    def __init__(self, sae: SAE, options: Options) -> None:
        super().__init__(sae, options)
        self._sae = [sae]  # no submodule
        self.draw = Draw(options.images, 1, options.sample_images, options.seed)
        # Of a pair both embeddings and both reconstructions, and the codes of both in a row.
        nothing = torch.empty(0, 4 * self.d)
        self.sample = CodeSample(
            "towers", "pairs", 2 * self.latents, nothing, lambda rows, pairs: pairs > _ENTRIES
        )

    def update(self, batch: Batch) -> None:
        rows, numbers = self.draw.among(batch.positions)
        own = batch.images.stream.distinct[batch.positions[rows]]
        rows, numbers = rows[own], numbers[own]
        if not len(rows):
            return
        x = torch.cat((batch.tokens[rows], batch.captions[rows][:, None]), dim=1)
        codes = batch.sae.encode_sparse(x)
        both = torch.stack((x, batch.sae.decode(codes, batch.sae.input_scale(x))), dim=1)
        pairs = SparseCodes(codes.values, codes.positions.long(), (len(rows), 2 * self.latents))
        self.sample.update(numbers, both.flatten(1), pairs)

    @without_tf32()
    def compute(self) -> dict[str, Tensor]:
        """The numbers; NaN with no pair, or where nothing is active."""
        beside, codes = self.sample.compute()
        n = len(beside)
        x, x_hat = beside.view(n, 2, 2, self.d).unbind(dim=1)
        # The latents that are active, in columns, of images and of captions.
        live, column = (codes.latent % self.latents).unique(return_inverse=True)
        z = codes.values.new_zeros(2, n, len(live))
        z[codes.latent // self.latents, codes.token.long(), column] = codes.values
        shares = image_shares(*z)
        self.per_latent = {"image_share": shares.new_full((self.latents,), torch.nan)}
        self.per_latent["image_share"][live] = shares
        known = max(len(live), 1) if n else torch.nan
        found = {
            "image_latents": (shares > 1 - LEAST_SHARE).sum() / known,
            "text_latents": (shares < LEAST_SHARE).sum() / known,
        }
        found["shared_latents"] = 1 - found["image_latents"] - found["text_latents"]
        generator = torch.Generator().manual_seed(self.options.seed)
        shuffled = torch.randperm(n, generator=generator).to(z.device)
        rows = self._sae[0].decoder_rows(live).detach()
        for suffix, captions in (("", z[1]), ("_shuffled", z[1][shuffled])):
            scores = bridge(z[0], captions, rows)
            found |= {f"bridge_{name}{suffix}": value for name, value in scores.items()}
        for suffix, (images, captions) in (
            ("", x_hat.unbind(dim=1)),
            ("_codes", z),
            ("_embedding", x.unbind(dim=1)),
        ):
            similarity = cosines(images, captions)
            for k in RECALLS:
                found[f"image_to_text_{k}{suffix}"] = recall(similarity, k)
                found[f"text_to_image_{k}{suffix}"] = recall(similarity.T, k)
        chance = torch.tensor([min(1.0, k / n) if n else torch.nan for k in RECALLS])
        for k, value in zip(RECALLS, chance, strict=True):
            found[f"image_to_text_{k}_random"] = found[f"text_to_image_{k}_random"] = value
        text, text_hat = x[:, 1].double(), x_hat[:, 1].double()
        found["text_fvu"] = (text - text_hat).square().sum() / (
            text - text.mean(dim=0)
        ).square().sum()
        found["text_l0"] = (z[1] != 0).sum().double() / n
        found["pairs_compared"] = torch.tensor(float(n))
        return found
