"""Oxford-IIIT Pet: 37 breeds of cats and dogs, about 200 photos each (Parkhi et al., 2012).

Source: https://www.robots.ox.ac.uk/~vgg/data/pets (CC BY-SA 4.0). Layout: `images/<Breed>_<n>.jpg`
and `annotations/{trainval,test}.txt`, whose lines are image, class from 1, species, breed.
Cats are written with a capital, dogs without; CoOp's names are all in small letters.
"""

from clipsae.data.eleven.base import DatasetInfo, PublishedDataset
from clipsae.data.eleven.files import read_fields
from clipsae.data.eleven.splits import Split

FILES = {"train": "trainval.txt", "test": "test.txt"}


class OxfordPets(PublishedDataset):
    """See the module. Official train is `trainval`; CoOp's is four fifths of that."""

    about = DatasetInfo(
        name="oxford_pets",
        title="Oxford-IIIT Pet",
        layout="images/<Breed>_<n>.jpg and annotations/{trainval,test}.txt",
        source="https://www.robots.ox.ac.uk/~vgg/data/pets",
        licence="CC BY-SA 4.0",
        classes=37,
        official=(3_680, 3_669),
        coop=(2_944, 3_669),
        split_file="split_zhou_OxfordPets.json",
        prompt="a photo of a {}, a type of pet.",
        zero_shot=86.92,
    )
    other_folders = ("oxford-iiit-pet", "oxford-iiit-pets", "pets")
    torchvision_class = "OxfordIIITPet"

    def official(self, split: str) -> Split:
        path = self.annotation(f"annotations/{FILES[split]}")
        rows = read_fields(path, "image class species breed")
        names: dict[int, str] = {}
        for image, number, *_ in rows:
            if not number.isdigit() or int(number) < 1:
                raise ValueError(f"{path}: {image} has class {number!r}: expected 1, 2, ...")
            names[int(number)] = breed(image)
        absent = set(range(1, max(names) + 1)) - set(names)
        if absent:
            raise ValueError(f"{path}: no image has class {min(absent)}: get it anew")
        return Split(
            files=[f"{image}.jpg" for image, *_ in rows],
            labels=[int(number) - 1 for _, number, *_ in rows],
            raw=[names[number] for number in sorted(names)],
            source=path,
        )

    def clean(self, raw: str) -> str:
        return super().clean(raw).lower()

    def raw_name(self, file: str, name: str) -> str:
        return breed(file)


def breed(image: str) -> str:
    """The breed from an image's name: "great_pyrenees_12" -> "great_pyrenees"."""
    return image.rpartition("_")[0]
