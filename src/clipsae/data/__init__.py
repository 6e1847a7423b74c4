"""Images and labels, and the DataModule that streams token features of them."""

from clipsae.data.datamodule import FeatureDataModule
from clipsae.data.dataset import ImageDataset, ImageList
from clipsae.data.image_folder import ImageFolder
from clipsae.data.images import read_image

__all__ = ["FeatureDataModule", "ImageDataset", "ImageFolder", "ImageList", "read_image"]
