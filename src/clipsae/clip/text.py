"""The text side: a zero-shot classifier from class names and prompt templates."""

from collections.abc import Callable, Sequence

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from clipsae.clip.frozen import FrozenCLIP

__all__ = ["OPENAI_IMAGENET_TEMPLATES", "text_classifier"]

Template = Callable[[str], str] | str

# Bounds memory for any number of classes and templates.
_TEXTS_PER_BATCH = 256


@torch.no_grad()
def text_classifier(
    clip: FrozenCLIP,
    classnames: Sequence[str],
    templates: Sequence[Template] | None = OPENAI_IMAGENET_TEMPLATES,
    renormalize: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Text embeddings of classes, [C, e] float32: row c belongs to class index c.

    A row is the mean over the templates of the normalised prompt embeddings, normalised again
    (open_clip's `build_zero_shot_classifier`, CLIP's own practice).

    Args:
        classnames: C names; they may repeat, a class is its index.
        templates: callables name -> prompt, or strings with one "{}"; None means the 80 of
            OpenAI's ImageNet ensemble.
        renormalize: False leaves the plain mean, as PatchSAE's and the paper's released code do.
        progress: called with (classes done, classes): 1,000 in 80 templates take an hour on a CPU.

    Raises:
        ValueError: no class names or no templates.
    """
    templates = OPENAI_IMAGENET_TEMPLATES if templates is None else templates
    if not len(classnames) or not len(templates):
        raise ValueError(
            f"{len(classnames)} class names and {len(templates)} templates: at least one of each"
        )
    fill = [t.format if isinstance(t, str) else t for t in templates]
    classes_per_batch = max(1, _TEXTS_PER_BATCH // len(fill))
    rows = []
    for start in range(0, len(classnames), classes_per_batch):
        names = classnames[start : start + classes_per_batch]
        prompts = [template(name) for name in names for template in fill]
        units = clip.encode_text(clip.tokenizer(prompts), normalize=True)
        means = units.unflatten(0, (len(names), len(fill))).mean(dim=1)
        rows.append(means / means.norm(dim=1, keepdim=True) if renormalize else means)
        if progress is not None:
            progress(start + len(names), len(classnames))
    return torch.cat(rows)
