"""UCF101, middle frames: 13,320 videos of 101 actions, one frame of each (Soomro et al., 2012).

Source: CoOp's `UCF-101-midframes.zip`, from the videos of https://www.crcv.ucf.edu/data/UCF101.php
(no licence stated; research). Layout: `UCF-101-midframes/<Action_Name>/v_<..>.jpg`, and the
official lists `ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt`, which name videos
"ActionName/v_....avi". Folders of frames may be spelled either way.
"""

import re
from pathlib import Path

from clipsae.data.eleven.base import COOP, DatasetInfo, PublishedDataset
from clipsae.data.eleven.files import read_fields, read_lines
from clipsae.data.eleven.splits import Split
from clipsae.data.listing import folders_in


class UCF101(PublishedDataset):
    """See the module. The official split is the first of three."""

    about = DatasetInfo(
        name="ucf101",
        title="UCF101 (middle frames)",
        layout="UCF-101-midframes/<Action_Name>/<video>.jpg, and split_zhou_UCF101.json or "
        "ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt",
        source=f"UCF-101-midframes.zip in {COOP}",
        licence="none stated; research",
        classes=101,
        official=(9_537, 3_783),
        coop=(7_639, 3_783),
        split_file="split_zhou_UCF101.json",
        prompt="a photo of a person doing {}.",
        zero_shot=65.16,
    )
    image_folders = ("UCF-101-midframes",)

    def official(self, split: str) -> Split:
        lists = self.annotation("ucfTrainTestlist/classInd.txt").parent
        if not lists.is_dir():
            raise FileNotFoundError(
                f"{lists} is missing: it comes with the train/test splits of "
                f"https://www.crcv.ucf.edu/data/UCF101.php; extract them there"
            )
        classes = [name for _, name in read_fields(lists / "classInd.txt", "index action")]
        index = {name: label for label, name in enumerate(classes)}
        folder = {name.replace("_", ""): name for name in folders_in(self.place.images)}
        path = lists / f"{split}list01.txt"
        files, labels = [], []
        for line in read_lines(path):
            action, _, video = line.split()[0].partition("/")
            if action not in index:
                raise ValueError(f"{path} has the action {action!r}, which classInd.txt has not")
            files.append(f"{folder.get(action, action)}/{Path(video).stem}.jpg")
            labels.append(index[action])
        return Split(files, labels, classes, source=path)

    def clean(self, raw: str) -> str:
        """The words of a CamelCase name: "ApplyEyeMakeup" -> "Apply Eye Makeup"."""
        return " ".join(re.findall("[A-Z][^A-Z]*", raw)) or raw

    def raw_name(self, file: str, name: str) -> str:
        return file.split("/")[0].replace("_", "")
