"""What is known about a published dataset without opening it."""

from dataclasses import dataclass

COOP = "DATASETS.md of github.com/KaiyangZhou/CoOp"


@dataclass(frozen=True)
class About:
    """Facts of one dataset.

    Attributes:
        name: of `conf/dataset/<name>.yaml`, and of its folder under `paths.data_dir`.
        title: as its authors call it.
        layout: what is expected in its folder, for the sentence that says it is not there.
        source: where to get it.
        licence: in a word.
        classes: published number of classes.
        official: published sizes (train, test) of its own split.
        coop: published sizes (train, test) of CoOp's split; None where that is the official one.
        split_file: CoOp's split; None where that is the official one.
        prompt: CoOp's one hand-written prompt for it.
        zero_shot: top-1 accuracy in percent of OpenAI's ViT-B/16 on CoOp's test split with the 80
            ImageNet templates, as quoted from TPT (Shu et al., 2022, arXiv 2209.07511).
        own_split: what "official" means, for the line that says it.
    """

    name: str
    title: str
    layout: str
    source: str
    licence: str
    classes: int
    official: tuple[int, int]
    prompt: str
    zero_shot: float
    coop: tuple[int, int] | None = None
    split_file: str | None = None
    own_split: str = "official split"

    def where(self) -> str:
        """What is expected and where to get it, as part of a sentence."""
        return f"expected {self.layout}; get it from {self.source} (licence: {self.licence})"

    def sizes(self, split_source: str) -> tuple[int, int]:
        """Published sizes (train, test) of "coop" or "official"."""
        return self.coop if split_source == "coop" and self.coop else self.official
