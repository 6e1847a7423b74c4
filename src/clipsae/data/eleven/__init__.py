"""The eleven published datasets of the benchmark, read as people have them on disk.

Each file states its dataset's source, layout and licence. `ELEVEN` is their table: the name of
`conf/dataset/<name>.yaml` and of the folder under `paths.data_dir` -> the class, whose `about`
holds the published sizes.
"""

from clipsae.data.eleven.base import PublishedDataset
from clipsae.data.eleven.caltech101 import Caltech101
from clipsae.data.eleven.dtd import DTD
from clipsae.data.eleven.eurosat import EuroSAT
from clipsae.data.eleven.fgvc_aircraft import FGVCAircraft
from clipsae.data.eleven.food101 import Food101
from clipsae.data.eleven.imagenet import ImageNet, ImageNetSketch
from clipsae.data.eleven.oxford_pets import OxfordPets
from clipsae.data.eleven.stanford_cars import StanfordCars
from clipsae.data.eleven.sun397 import SUN397
from clipsae.data.eleven.ucf101 import UCF101

ELEVEN: dict[str, type[PublishedDataset]] = {
    cls.about.name: cls
    for cls in (
        Caltech101,
        DTD,
        EuroSAT,
        FGVCAircraft,
        Food101,
        ImageNet,
        ImageNetSketch,
        OxfordPets,
        StanfordCars,
        SUN397,
        UCF101,
    )
}

__all__ = [
    "DTD",
    "ELEVEN",
    "SUN397",
    "UCF101",
    "Caltech101",
    "EuroSAT",
    "FGVCAircraft",
    "Food101",
    "ImageNet",
    "ImageNetSketch",
    "OxfordPets",
    "PublishedDataset",
    "StanfordCars",
]
