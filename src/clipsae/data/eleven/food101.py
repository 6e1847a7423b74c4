"""Food-101: 101 dishes, 1,000 photos each (Bossard et al., 2014).

Source: https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101 (the images are their owners';
scientific fair use). Layout: the archive's `images/<class>/<number>.jpg` and
`meta/{train,test}.json`, which map a class to its images. CoOp's split is another one, with more
test images.
"""

from clipsae.data.eleven.base import DatasetInfo, PublishedDataset
from clipsae.data.eleven.files import read_json
from clipsae.data.eleven.splits import Split


class Food101(PublishedDataset):
    """See the module. Classes are in sorted order."""

    about = DatasetInfo(
        name="food101",
        title="Food-101",
        layout="images/<class>/<number>.jpg and meta/{train,test}.json, or "
        "split_zhou_Food101.json beside images/",
        source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        licence="fair use in research",
        classes=101,
        official=(75_750, 25_250),
        coop=(50_500, 30_300),
        split_file="split_zhou_Food101.json",
        prompt="a photo of {}, a type of food.",
        zero_shot=82.86,
    )
    torchvision_class = "Food101"

    def official(self, split: str) -> Split:
        path = self.annotation(f"meta/{split}.json")
        content = read_json(path)
        if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
            raise ValueError(f"{path} is not a list of images for each class: get it anew")
        classes = sorted(content)
        pairs = [(f"{f}.jpg", label) for label, c in enumerate(classes) for f in content[c]]
        return Split([f for f, _ in pairs], [n for _, n in pairs], classes, source=path)
