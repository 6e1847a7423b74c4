"""Images with masks, in the layouts of the real datasets."""

import numpy as np
import pytest
import torch
from PIL import Image

from clipsae.data import ADE20K, MaskFolder, PascalVOC
from clipsae.data.images import BadImageError, read_image


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def indices(h, w, classes, seed=0):
    """A mask of blocks of 4 x 4."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, classes + 1, (h // 4 + 1, w // 4 + 1))
    return blocks.repeat(4, 0).repeat(4, 1)[:h, :w]


def picture(path, h=24, w=36, seed=0):
    save(path, np.random.default_rng(seed).integers(0, 255, (h, w, 3)))


def folder(root, **masks):
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text("sky\ngrass\nsheep\n")
    for name, mask in masks.items():
        picture(root / "images" / f"{name}.jpg", *np.shape(mask))
        save(root / "masks" / f"{name}.png", mask)
    return root


def test_a_mask_is_cropped_as_its_image(tmp_path):
    """An image that shows its own mask, in black and white and enlarged without interpolation."""
    for h, w in ((24, 36), (40, 16), (16, 16)):
        mask = np.zeros((h, w), int)
        mask[: h // 2, : w // 2] = 1
        root = folder(tmp_path / f"{h}", a=mask)
        save(root / "images" / "a.png", (mask * 255)[..., None].repeat(3, 2))
        (root / "images" / "a.jpg").unlink()
        data = MaskFolder(root, image_size=16)
        seen = read_image(root / "images/a.png", 16, as_seen=False)[0] > 127
        assert ((data.mask(0) == 0) == seen).float().mean() > 0.98  # edges are blurred
        assert data[0][0].shape == (3, 16, 16)


def plain_truth(mask, grid, names, least):
    """The commonest class of each patch by a loop over its pixels."""
    side, found = len(mask), []
    for p in range(grid * grid):
        inside = [
            int(mask[r, c])
            for r in range(side)
            for c in range(side)
            if (r * grid // side, c * grid // side) == (p // grid, p % grid)
        ]
        counts = [inside.count(v) for v in range(names)]
        most = max(counts)
        shown = most > 0 and most / len(inside) >= least
        found.append((counts.index(most) if shown else -1, most / len(inside)))
    return found


@pytest.mark.parametrize("grid", [4, 5])
def test_patch_truth_is_what_a_loop_over_pixels_finds(tmp_path, grid):
    mask = indices(24, 32, 3)
    mask[:8, :8] = 255
    data = MaskFolder(folder(tmp_path, a=mask, b=np.zeros((20, 20))), image_size=24)
    assert data.concepts == {"class": ("sky", "grass", "sheep")}
    for least in (0.25, 0.6):
        truth = data.patch_truth([0, 1], grid, least)
        expected = plain_truth(data.mask(0), grid, 3, least)
        assert truth["class"][0].tolist() == [label for label, _ in expected]
        assert truth["coverage"][0].tolist() == pytest.approx([share for _, share in expected])
        assert (truth["class"][1] == -1).all()  # an empty mask
    assert data.patch_truth([], grid)["class"].shape == (0, grid * grid)


def test_splits_fingerprint_and_labels(tmp_path):
    mask = indices(20, 20, 3)
    data = MaskFolder(folder(tmp_path / "a", x=mask))
    assert data.labels.tolist() == [0]
    assert data.classnames == ["image"]
    before = data.fingerprint
    assert MaskFolder(folder(tmp_path / "b", x=mask)).fingerprint == before
    assert MaskFolder(folder(tmp_path / "b", x=(mask + 1) % 4)).fingerprint != before
    assert MaskFolder(tmp_path / "a", ignored=[0]).fingerprint != before
    for split, seed in (("training", 1), ("validation", 2)):
        picture(tmp_path / "c/images" / split / "y.jpg", seed=seed)
        save(tmp_path / "c/masks" / split / "y.png", indices(24, 36, 3))
    (tmp_path / "c/classes.txt").write_text("a\nb\nc")
    assert MaskFolder(tmp_path / "c", "train").files == ["images/training/y.jpg"]
    assert MaskFolder(tmp_path / "c", "test").masks.files == ["masks/validation/y.png"]


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split, names in (("training", ("1", "2")), ("validation", ("1",))):
        for name in names:
            stem = f"ADE_{split[:5]}_0000000{name}"
            picture(root / "images" / split / f"{stem}.jpg")
            save(root / "annotations" / split / f"{stem}.png", indices(24, 36, 3))
    (root / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
        "1\t0.15\t11664\t1172\t1\twall\n2\t0.1\t6046\t612\t1\tscreen, silver screen\n"
        "3\t0.1\t8265\t796\t1\tscreen, CRT screen\n"
    )
    assert len(ADE20K(tmp_path, "train")) == 2
    data = ADE20K(root, "test", image_size=16)
    assert data.files == ["images/validation/ADE_valid_00000001.jpg"]
    assert data.concepts["class"] == ("wall", "screen, silver screen", "screen, CRT screen")
    shown = data.mask(0)
    assert shown.shape == (16, 16)
    assert set(shown.unique().tolist()) == {-1, 0, 1, 2}


def test_pascal_voc(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    mask = indices(24, 36, 20)
    mask[:6] = 255
    for stem in ("2007_000001", "2007_000002"):
        picture(root / "JPEGImages" / f"{stem}.jpg")
        (root / "SegmentationClass").mkdir(exist_ok=True)
        of_palette = Image.fromarray(mask.astype(np.uint8), mode="P")
        of_palette.putpalette(list(range(256)) * 3)
        of_palette.save(root / "SegmentationClass" / f"{stem}.png")
    picture(root / "JPEGImages/2007_000003.jpg")  # without a mask, as most are
    for name, stems in (("train", "2007_000001"), ("val", "2007_000002")):
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets/Segmentation" / f"{name}.txt").write_text(f"{stems}\n")
    for place in (tmp_path, tmp_path / "VOCdevkit", root):
        assert PascalVOC(place, "train").files == ["JPEGImages/2007_000001.jpg"]
    data = PascalVOC(root, image_size=24)
    expected = torch.from_numpy(mask[:, 6:30].copy())  # the centre of 24 x 36
    assert torch.equal(data.mask(0), torch.where(expected == 255, 0, expected) - 1)
    assert len(data.concepts["class"]) == 20
    assert data.concepts["class"][14] == "person"


def test_what_is_no_mask_is_refused(tmp_path):
    data = MaskFolder(
        folder(
            tmp_path, a=np.full((8, 8), 7), b=np.ones((8, 8)), c=np.ones((8, 8)), d=np.ones((8, 8))
        )
    )
    save(tmp_path / "masks/b.png", np.ones((8, 9)))
    save(tmp_path / "masks/c.png", np.ones((8, 8, 3)))
    (tmp_path / "masks/d.png").write_bytes(b"")
    for at, words in enumerate(
        ("has the index 7: expected 1 to 3", "9 x 8 pixels", "mode RGB", "cannot be read")
    ):
        with pytest.raises(BadImageError, match=words):
            data.patch_truth([at], 2)
    (tmp_path / "masks/a.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 images have no mask in masks, such as a\.jpg"):
        MaskFolder(tmp_path)
    with pytest.raises(ValueError, match="split='val'"):
        MaskFolder(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        ADE20K(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="lacks JPEGImages; expected in it are"):
        PascalVOC(tmp_path)
