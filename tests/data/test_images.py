"""Files of every kind are read as open_clip reads them; what is wrong is said in a sentence."""

import struct
import zlib

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clipsae.data.images import BadImageError, read_image


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def as_open_clip(path, size):
    """uint8 pixels by open_clip's own evaluation transform."""
    transform = open_clip.image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    return (transform(Image.open(path)) * 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("RGBA", "png"), ("P", "png")],
)
@pytest.mark.parametrize("size", [16, 64])
def test_pixels_of_published_datasets_are_open_clips(tmp_path, noise, mode, suffix, size):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(noise).convert(mode).save(path)
    found = read_image(path, size, as_seen=False)
    assert found.shape == (3, size, size)
    assert found.dtype == torch.uint8
    assert torch.equal(found, as_open_clip(path, size))
    if mode in ("RGB", "L"):
        assert torch.equal(found, read_image(path, size))


# A grid of nine values of each channel, from black to white, as one of Pillow's modes.
GREY = np.linspace(0, 255, 9).round().astype(np.uint8).reshape(3, 3)
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], axis=-1)
ALPHA = np.array([[0, 255, 128]] * 3, dtype=np.uint8)


def on_white(colour, alpha=ALPHA):
    """[3, 3, 3] of colours, as they look on white."""
    share = alpha[..., None] / 255
    return (colour * share + 255 * (1 - share)).round().astype(np.uint8)


def grey(values):
    return np.stack([values] * 3, axis=-1)


def of_mode(mode, array):
    """An image of raw values, without Pillow's conversions."""
    array = np.ascontiguousarray(array)
    return Image.frombytes(mode, (3, 3), array.tobytes())


DEEP = (GREY.astype(np.uint16) << 8) + 77
PALETTE = np.arange(9, dtype=np.uint8).reshape(3, 3)


def palette(transparent=None):
    image = of_mode("P", PALETTE)
    image.putpalette(COLOUR.reshape(-1).tolist())
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def modes():
    """Name -> (image, the colours that a viewer shows)."""
    black_and_white = np.array([[0, 255, 0]] * 3, dtype=np.uint8)
    ink = np.concatenate([255 - COLOUR, np.zeros((3, 3, 1), np.uint8)], axis=-1)
    faint = np.stack([GREY, ALPHA], axis=-1)
    see_through = np.concatenate([COLOUR, ALPHA[..., None]], axis=-1)
    times_alpha = np.concatenate(
        [(COLOUR * (ALPHA[..., None] / 255)).round().astype(np.uint8), ALPHA[..., None]], axis=-1
    )
    first_clear = np.where(PALETTE == 4, 0, 255).astype(np.uint8)
    lab = np.stack([GREY, np.zeros_like(GREY), np.zeros_like(GREY)], axis=-1)
    hsv = np.stack([np.zeros_like(GREY), np.full_like(GREY, 255), GREY], axis=-1)
    ycbcr = np.stack([GREY, np.full_like(GREY, 128), np.full_like(GREY, 128)], axis=-1)
    red = np.stack([GREY, np.zeros_like(GREY), np.zeros_like(GREY)], axis=-1)
    clear_rgb = of_mode("RGB", COLOUR)
    clear_rgb.info["transparency"] = tuple(COLOUR[1, 1].tolist())
    return {
        "1": (Image.fromarray(black_and_white).convert("1"), grey(black_and_white)),
        "L": (of_mode("L", GREY), grey(GREY)),
        "P": (palette(), COLOUR),
        "P, one clear": (palette(4), on_white(COLOUR, first_clear)),
        "PA": (palette().convert("RGBA").convert("PA"), None),
        "RGB": (of_mode("RGB", COLOUR), COLOUR),
        "RGB, one clear": (clear_rgb, on_white(COLOUR, first_clear)),
        "RGBX": (of_mode("RGB", COLOUR).convert("RGBX"), COLOUR),
        "RGBA": (of_mode("RGBA", see_through), on_white(COLOUR)),
        "RGBa": (of_mode("RGBa", times_alpha), on_white(COLOUR)),
        "LA": (of_mode("LA", faint), on_white(grey(GREY))),
        "La": (of_mode("LA", faint).convert("La"), on_white(grey(GREY))),
        "CMYK": (of_mode("CMYK", ink), COLOUR),
        "YCbCr": (of_mode("YCbCr", ycbcr), grey(GREY)),
        "LAB": (of_mode("LAB", lab), None),
        "HSV": (of_mode("HSV", hsv), red),
        "I;16": (of_mode("I;16", DEEP.astype("<u2")), grey(GREY)),
        "I;16L": (of_mode("I;16L", DEEP.astype("<u2")), grey(GREY)),
        "I;16B": (of_mode("I;16B", DEEP.astype(">u2")), grey(GREY)),
        "I;16N": (of_mode("I;16N", DEEP.astype("=u2")), grey(GREY)),
        "I": (of_mode("I", DEEP.astype(np.int32)), "32-bit integers"),
        "F": (of_mode("F", DEEP.astype(np.float32)), "floats"),
    }


@pytest.mark.parametrize("name", modes())
def test_every_mode_is_what_a_viewer_shows_or_refused(monkeypatch, name):
    image, expected = modes()[name]
    monkeypatch.setattr(Image, "open", lambda path: image)
    if isinstance(expected, str):
        with pytest.raises(BadImageError, match=f"of.tif: {expected} have no defined value range"):
            read_image("of.tif", 3)
        return
    found = read_image("of.tif", 3).permute(1, 2, 0).numpy().astype(int)
    if expected is None:  # by Pillow's own formula alone: black and white are what they are
        assert found.min() < 5 < 250 < found.max()
    else:
        assert abs(found - expected).max() <= 1


def test_the_modes_are_all_of_pillows():
    known = {image.mode for image, _ in modes().values()}
    possible = set()
    for mode in [*Image.MODES, "La", "RGBa", "RGBX", "I;16", "I;16L", "I;16B", "I;16N"]:
        Image.new(mode, (1, 1))
        possible.add(mode)
    assert possible <= known


@pytest.mark.parametrize("suffix", ["png", "pgm", "tif", "jp2"])
def test_sixteen_bits_of_any_format_are_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"deep.{suffix}")
    for as_seen in (True, False):
        found = read_image(tmp_path / f"deep.{suffix}", 64, as_seen=as_seen)
        wanted = torch.from_numpy((ramp >> 8).astype(np.uint8)).int()
        assert (found[0].int() - wanted).abs().max() <= (suffix == "jp2")


def test_sixteen_bits_of_a_colour_are_its_upper_byte(tmp_path):
    """A PNG as its specification has it: Pillow writes none."""
    deep = (COLOUR.astype(">u2") << 8) + 99
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 3, 3, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    found = read_image(tmp_path / "deep.png", 3)
    assert torch.equal(found, torch.from_numpy(COLOUR).permute(2, 0, 1))


def test_twelve_bits_of_a_tiff_reach_white(tmp_path):
    """A microscope's: 4095 is white. Two values of 12 bits lie in three bytes."""
    values = np.array([0, 4095, 2048, 1024], dtype=int)
    packed = bytes(
        byte
        for a, b in values.reshape(2, 2)
        for byte in (a >> 4, ((a & 15) << 4) | (b >> 8), b & 255)
    )
    tags = {256: 2, 257: 2, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    ifd = 8 + len(packed) + len(packed) % 2
    body = packed + b"\0" * (len(packed) % 2) + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "deep.tif").write_bytes(b"II*\0" + struct.pack("<I", ifd) + body)
    found = read_image(tmp_path / "deep.tif", 2)
    assert found[0].flatten().tolist() == [0, 255, 128, 64]


def save_film(path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("name", "save", "colour", "tolerance"),
    [
        *((f"first_frame.{s}", save_film, [200, 0, 0], 8) for s in ("gif", "tif", "png", "webp")),
        # Inks that Adobe writes inverted.
        ("red.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save, [255, 0, 0], 5),
        ("single_pixel.png", Image.new("RGB", (1, 1), (10, 20, 30)).save, [10, 20, 30], 0),
    ],
)
def test_colours_of_files(tmp_path, name, save, colour, tolerance):
    save(tmp_path / name)
    found = read_image(tmp_path / name, 4).flatten(1).float().mean(dim=1)
    assert found.tolist() == pytest.approx(colour, abs=tolerance)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_tag_says(tmp_path, suffix, orientation):
    """Against the table of the EXIF standard: where row 0 and column 0 are of what is seen."""
    seen = np.zeros((16, 16, 3), dtype=np.uint8)
    seen[:8], seen[:8, :8] = (0, 200, 0), (200, 0, 0)
    stored = {
        1: seen,
        2: seen[:, ::-1],  # row 0 is the top, column 0 the right
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen, 1),  # row 0 is the right, column 0 the top
        7: np.rot90(seen, 2).transpose(1, 0, 2),
        8: np.rot90(seen, 3),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    options = {"quality": 100} if suffix in ("jpg", "webp") else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    found = read_image(path, 16).permute(1, 2, 0).numpy()
    for row, column in ((3, 3), (3, 12), (12, 3), (12, 12)):
        assert abs(found[row, column].astype(int) - seen[row, column]).max() < 40
    if suffix != "tif":  # which Pillow itself turns
        assert torch.equal(read_image(path, 16, as_seen=False), as_open_clip(path, 16))


def test_a_broken_tag_turns_nothing(tmp_path, noise):
    whole = Image.fromarray(noise)
    whole.save(tmp_path / "plain.jpg")
    whole.save(tmp_path / "broken.jpg", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    plain, broken = (read_image(tmp_path / f"{n}.jpg", 16) for n in ("plain", "broken"))
    assert torch.equal(plain, broken)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tiff", "webp", "bmp"])
def test_broken_files_are_read_or_refused_by_name(tmp_path, noise, suffix):
    path = tmp_path / f"broken.{suffix}"
    Image.fromarray(noise).save(path)
    whole, random = path.read_bytes(), np.random.default_rng(1)
    for _ in range(150):
        broken = bytearray(whole[: random.integers(len(whole) // 2, len(whole) + 1)])
        for _ in range(random.integers(0, 8)):
            broken[random.integers(len(broken))] = random.integers(256)
        path.write_bytes(broken)
        try:
            assert read_image(path, 8).shape == (3, 8, 8)
        except BadImageError as error:
            assert path.name in str(error)  # noqa: PT017


def test_a_decoder_that_raises_anything_is_a_bad_image(tmp_path, noise, monkeypatch):
    """A broken TIFF made Pillow raise a TypeError."""
    Image.fromarray(noise).save(tmp_path / "image.png")

    def stumble(*_):
        raise TypeError("'str' object cannot be interpreted as an integer")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", stumble)
    with pytest.raises(BadImageError, match=r"image\.png: cannot be decoded \('str' object"):
        read_image(tmp_path / "image.png", 8)


def test_what_is_no_image_is_named(tmp_path, noise):
    Image.fromarray(noise).save(tmp_path / "cut.jpg", quality=95)
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("a cat")
    Image.new("RGB", (1, 3000)).save(tmp_path / "strip.png")
    for name, reason in {
        "cut.jpg": "truncated",
        "empty.jpg": "not an image",
        "text.jpg": "not an image",
        "strip.png": "too long",
        "none.jpg": "no such file",
    }.items():
        with pytest.raises(BadImageError, match=reason) as caught:
            read_image(tmp_path / name, 8)
        assert name in str(caught.value)
