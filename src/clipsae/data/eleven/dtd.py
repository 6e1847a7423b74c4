"""DTD, the Describable Textures Dataset: 47 textures, 120 images each (Cimpoi et al., 2014).

Source: https://www.robots.ox.ac.uk/~vgg/data/dtd (research only). Layout: the archive's
`images/<class>/<image>.jpg` and `labels/{train,val,test}1.txt`, of whose ten partitions the
first is the usual one.
"""

from clipsae.data.eleven.base import DatasetInfo, PublishedDataset
from clipsae.data.eleven.files import read_lines
from clipsae.data.eleven.splits import Split


class DTD(PublishedDataset):
    """See the module. The official split is partition 1: 40 images a class each."""

    about = DatasetInfo(
        name="dtd",
        title="DTD",
        layout="images/<class>/<image>.jpg and labels/train1.txt, or "
        "split_zhou_DescribableTextures.json beside images/",
        source="https://www.robots.ox.ac.uk/~vgg/data/dtd",
        licence="research only",
        classes=47,
        official=(1_880, 1_880),
        coop=(2_820, 1_692),
        split_file="split_zhou_DescribableTextures.json",
        prompt="{} texture.",
        zero_shot=45.04,
    )
    other_folders = ("dtd-r1.0.1", "describable textures dataset dtd")
    torchvision_class = "DTD"

    def official(self, split: str) -> Split:
        path = self.annotation(f"labels/{split}1.txt")
        files = read_lines(path)
        folders = [file.split("/")[0] for file in files]
        classes = sorted(set(folders))
        index = {name: label for label, name in enumerate(classes)}
        return Split(files, [index[name] for name in folders], classes, source=path)
