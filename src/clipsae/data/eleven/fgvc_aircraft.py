"""FGVC-Aircraft: 10,000 photos of 100 variants of aircraft (Maji et al., 2013).

Source: https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft (non-commercial research). Layout: the
archive's folder `data/` with `images/<number>.jpg`, `variants.txt` and
`images_variant_{train,val,test}.txt`, whose lines are a number and a variant. CoOp uses this
split, and the variants as they are named.
"""

from clipsae.data.eleven.base import DatasetInfo, PublishedDataset
from clipsae.data.eleven.files import read_fields, read_lines
from clipsae.data.eleven.splits import Split


class FGVCAircraft(PublishedDataset):
    """See the module."""

    about = DatasetInfo(
        name="fgvc_aircraft",
        title="FGVC-Aircraft",
        layout="images/<number>.jpg, variants.txt and images_variant_{train,test}.txt, "
        "there or in data/",
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        licence="non-commercial research",
        classes=100,
        official=(3_334, 3_333),
        prompt="a photo of a {}, a type of aircraft.",
        zero_shot=23.22,
    )
    other_folders = ("fgvc-aircraft-2013b",)
    torchvision_class = "FGVCAircraft"

    def official(self, split: str) -> Split:
        variants = self.annotation("variants.txt")
        classes = read_lines(variants)
        index = {name: label for label, name in enumerate(classes)}
        path = self.annotation(f"images_variant_{split}.txt")
        rows = read_fields(path, "number variant")
        unknown = [name for _, name in rows if name not in index]
        if unknown:
            raise ValueError(f"{path} has the variant {unknown[0]!r}, which {variants} has not")
        files = [f"{number}.jpg" for number, _ in rows]
        return Split(files, [index[name] for _, name in rows], classes, source=path)

    def clean(self, raw: str) -> str:
        return raw
