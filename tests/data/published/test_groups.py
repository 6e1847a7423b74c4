"""Waterbirds and CelebA at toy size, in the layouts in which they are distributed."""

import csv

import pytest
import torch

from clipsae.data.published.groups import GROUPED, CelebA, Waterbirds
from tests.data.published.toys import save_image

# (file, class, part, place) of Waterbirds
BIRDS = [
    ("001.Black_footed_Albatross/Albatross_0001.jpg", 1, 0, 1),
    ("001.Black_footed_Albatross/Albatross_0002.jpg", 1, 2, 0),
    ("020.Yellow_breasted_Chat/Chat_0001.jpg", 0, 0, 0),
    ("020.Yellow_breasted_Chat/Chat_0002.jpg", 0, 1, 1),
    ("020.Yellow_breasted_Chat/Chat_0003.jpg", 0, 2, 1),
    ("020.Yellow_breasted_Chat/Chat_0004.jpg", 0, 2, 0),
]
# (blond, part, male) of CelebA
FACES = [(1, 0, 0), (0, 0, 1), (0, 1, 1), (1, 2, 1), (0, 2, 0), (0, 2, 1)]
ATTRIBUTES = ["5_o_Clock_Shadow", "Blond_Hair", "Male", "Young"]


def waterbirds(folder):
    home = folder / "waterbird_complete95_forest2water2"
    for file, label, *_ in BIRDS:
        save_image(home / file, label)
    with (home / "metadata.csv").open("w", newline="") as out:
        lines = csv.writer(out)
        lines.writerow(["img_id", "img_filename", "y", "split", "place", "place_filename"])
        for i, (file, label, part, place) in enumerate(BIRDS):
            lines.writerow([i + 1, file, label, part, place, f"/b/bamboo_forest/{i:08d}.jpg"])
    return home


def celeba(folder, kaggle):
    images = folder / "img_align_celeba" / ("img_align_celeba" if kaggle else "")
    names = [f"{i + 1:06d}.jpg" for i in range(len(FACES))]
    rows = [(-1, *(2 * v - 1 for v in (blond, male)), 1) for blond, _, male in FACES]
    for name, (blond, *_) in zip(names, FACES, strict=True):
        save_image(images / name, blond)
    if kaggle:
        for file, header, lines in (
            ("list_attr_celeba.csv", ["image_id", *ATTRIBUTES], rows),
            ("list_eval_partition.csv", ["image_id", "partition"], [(f[1],) for f in FACES]),
        ):
            with (folder / file).open("w", newline="") as out:
                csv.writer(out).writerows(
                    [header, *([n, *r] for n, r in zip(names, lines, strict=True))]
                )
        return
    lines = [str(len(rows)), " ".join(ATTRIBUTES)]
    lines += [f"{n} {' '.join(f'{v:2d}' for v in row)}" for n, row in zip(names, rows, strict=True)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    parts = [f"{n} {part}" for n, (_, part, _) in zip(names, FACES, strict=True)]
    (folder / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")


@pytest.mark.parametrize("place", ["waterbirds", "", "waterbird_complete95_forest2water2"])
def test_waterbirds(tmp_path, place):
    home = waterbirds(tmp_path / "waterbirds" if place == "waterbirds" else tmp_path)
    root = tmp_path / "waterbirds" if place != home.name else home
    for split, part in (("train", 0), ("test", 2)):
        data = Waterbirds(root, split, image_size=32)
        rows = [row for row in BIRDS if row[2] == part]
        assert data.files == [file for file, *_ in rows]
        assert data.labels.tolist() == [label for _, label, *_ in rows]
        assert data.groups.tolist() == [2 * label + at for _, label, _, at in rows]
        assert data[0][0].shape == (3, 32, 32)
    assert data.groupnames[1] == "landbird, water"
    assert data.templates is None
    fingerprint = data.fingerprint
    text = (home / "metadata.csv").read_text().replace(",2,0,/b/", ",2,1,/b/")
    (home / "metadata.csv").write_text(text)
    other = Waterbirds(root, "test")
    assert other.groups.tolist() == [3, 1, 1]
    assert other.fingerprint != fingerprint  # the groups are others


@pytest.mark.parametrize("kaggle", [False, True])
def test_celeba(tmp_path, kaggle):
    celeba(tmp_path, kaggle)
    for split, part in (("train", 0), ("test", 2)):
        data = CelebA(tmp_path, split, image_size=32)
        rows = [row for row in FACES if row[1] == part]
        assert data.labels.tolist() == [blond for blond, *_ in rows]
        assert data.groups.tolist() == [2 * blond + male for blond, _, male in rows]
        assert data[0][0].dtype == torch.uint8
    assert data.classnames == ["dark hair", "blond hair"]
    assert data.groupnames == [
        f"{h} hair, {p}" for h in ("dark", "blond") for p in ("woman", "man")
    ]


def test_what_is_missing_is_named(tmp_path):
    for name, cls in GROUPED.items():
        with pytest.raises(FileNotFoundError, match=f"{cls.about.title} is not in .*expected"):
            cls(tmp_path / name)
    home = waterbirds(tmp_path)
    (home / "metadata.csv").write_text("img_id,img_filename,y,split\n1,a.jpg,0,2\n")
    with pytest.raises(ValueError, match="has no column 'place'"):
        Waterbirds(home)
    celeba(tmp_path / "celeba", False)
    (tmp_path / "celeba" / "list_attr_celeba.txt").write_text("1\nYoung\n000001.jpg 1\n")
    with pytest.raises(ValueError, match="has no attribute Blond_Hair"):
        CelebA(tmp_path / "celeba")
