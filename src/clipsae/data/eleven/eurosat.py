"""EuroSAT: 27,000 satellite images of 64 x 64 pixels, ten kinds of land (Helber et al., 2019).

Source: https://github.com/phelber/EuroSAT (MIT). Layout: the RGB archive's
`2750/<class>/<class>_<n>.jpg`; newer archives call the folder `EuroSAT_RGB`. It has no split of
its own.
"""

from pathlib import Path

from clipsae.data.eleven.base import DatasetInfo, PublishedDataset
from clipsae.data.eleven.files import names_in
from clipsae.data.eleven.splits import Split, split_by_rule
from clipsae.data.listing import folders_in

NAMES = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


class EuroSAT(PublishedDataset):
    """See the module. Without CoOp's file the split is `split_by_rule`'s."""

    about = DatasetInfo(
        name="eurosat",
        title="EuroSAT",
        layout="2750/<class>/<image>.jpg, better with split_zhou_EuroSAT.json",
        source="https://github.com/phelber/EuroSAT",
        licence="MIT",
        classes=10,
        official=(13_500, 8_100),
        coop=(13_500, 8_100),
        split_file="split_zhou_EuroSAT.json",
        prompt="a centered satellite photo of {}.",
        zero_shot=50.42,
        own_split="fixed rule",
    )
    other_folders = ("EuroSAT_RGB", "eurosat-dataset")
    image_folders = ("2750", "EuroSAT_RGB", ".")
    published = frozenset(NAMES)
    torchvision_class = "EuroSAT"

    @classmethod
    def holds_images(cls, folder: Path) -> bool:
        """The archive of all 13 bands has the same folders, of .tif files."""
        classes = cls.published.intersection(folders_in(folder))
        names = (name.lower() for inside in classes for name in names_in(folder / inside))
        return any(name.endswith((".jpg", ".jpeg", ".png")) for name in names)

    def official(self, split: str) -> Split:
        return split_by_rule(self.place.images, split)

    def clean(self, raw: str) -> str:
        return NAMES.get(raw, raw)
