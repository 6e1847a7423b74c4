"""Images and labels, and the DataModule that streams token features of them."""

from clipsae.data.datamodule import FeatureDataModule
from clipsae.data.dataset import ImageDataset, ImageList
from clipsae.data.image_folder import ImageFolder
from clipsae.data.images import read_image
from clipsae.data.masks import ADE20K, MaskFolder, MaskList, PascalVOC

__all__ = [
    "ADE20K",
    "FeatureDataModule",
    "ImageDataset",
    "ImageFolder",
    "ImageList",
    "MaskFolder",
    "MaskList",
    "PascalVOC",
    "read_image",
]
