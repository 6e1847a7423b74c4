"""What is marked in an image and kept bright, and the figure of it."""

from pathlib import Path

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.sae import SAE
from clipsae.visualization.drawing import save, share
from clipsae.visualization.figure import Panel, draw
from clipsae.visualization.references import BINS, References, Shown
from clipsae.visualization.view import View, darkened, look, passes_filter


def references(latents: int = 6, grid: tuple[int, int] = (2, 3), top: int = 10) -> References:
    generator = torch.Generator().manual_seed(0)
    patches = grid[0] * grid[1]
    values = torch.rand(latents, top, generator=generator).sort(descending=True).values
    return References(
        values=values,
        index=torch.arange(top).repeat(latents, 1),
        label=torch.arange(top).repeat(latents, 1) % 2,
        maps=(torch.rand(1, top, patches, generator=generator) * 255)
        .to(torch.uint8)
        .expand(latents, -1, -1),
        scale=values,
        class_token=values,
        frequency=torch.tensor([0.01, 0.5, 0.9, 0.0, 0.2, 0.3]).repeat(-(-latents // 6))[:latents],
        token_frequency=torch.full((latents,), 0.1),
        strength=torch.tensor([0.5, 0.05, 0.2, 0.0, 0.1, 0.09]).repeat(-(-latents // 6))[:latents],
        entropy=torch.zeros(latents),
        top_label=torch.zeros(latents, dtype=torch.long),
        histogram=torch.zeros(latents, BINS, dtype=torch.long),
        shown=Shown("made up", "test", 10, grid, ["a cat", "a dog of a breed"], [], None),
    )


def test_filters_by_frequency_and_by_strength():
    found = references()
    limits = {"max_frequency": 0.3, "max_strength": 0.1}
    by_frequency = passes_filter(found, "frequency", **limits)
    assert by_frequency.tolist() == [True, False, False, True, True, True]
    # The released code's drops a strong rare latent.
    by_strength = passes_filter(found, "strength", **limits)
    assert by_strength.tolist() == [False, True, False, True, True, True]
    assert passes_filter(found, "none", **limits).all()
    with pytest.raises(ValueError, match="filter='rare'"):
        passes_filter(found, "rare", **limits)


def test_only_active_patches_stay_bright():
    image = torch.full((3, 12, 12), 200, dtype=torch.uint8)
    codes = torch.tensor([0.0, 1e-9, -1.0, 0.0, 0.0, 3.0])
    shown = darkened(image, codes, (2, 3))
    for row in range(12):
        for column in range(12):
            patch = row // 6 * 3 + column // 4
            expected = 200 if codes[patch] > 0 else round(200 * 30 / 255)
            assert (shown[:, row, column] == expected).all()


@torch.no_grad()
def test_the_strongest_of_the_allowed_latents_are_marked():
    torch.manual_seed(0)
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    sae = SAE(clip.width, 40, activation="relu").eval()
    image = ScenesDataset("all", "test", 3)[1][0]
    codes = sae.encode(clip.prefix(clip.normalize(image[None])))[0]
    order = sorted(range(40), key=lambda m: -float(codes[:, m].mean()))
    shown = torch.ones(40, dtype=torch.bool)
    shown[order[0]] = False
    found = look(clip, sae, image, shown, top=4)
    assert found.marked == order[1:5]
    assert torch.allclose(found.means, codes.mean(dim=0))
    assert torch.equal(found.patches, codes[1:, found.marked].T)
    assert look(clip, sae, image, ~shown & False, top=4).marked == []


def figure(latents: int = 6, grid: tuple[int, int] = (2, 3), **options):
    patches = grid[0] * grid[1]
    means = torch.zeros(latents)
    means[[2, 3, 4]] = torch.tensor([0.3, -0.1, 0.9])
    view = View(means, torch.ones(latents, dtype=torch.bool), [4, 2], torch.rand(2, patches))
    pictures = torch.randint(256, (10, 3, 12, 12), dtype=torch.uint8)
    panel = Panel(view, references(latents, grid), lambda index: pictures[index])
    empty = View(means * 0, ~view.shown, [], torch.zeros(0, patches))
    panels = {"one": panel, "other": Panel(empty, panel.references, panel.image_of)}
    return draw(pictures[0], "an image", panels, **options), panel.references


def test_a_figure_shows_values_and_labels_of_other_images():
    drawn, of = figure(references=4, own_index=1)
    texts = [text.get_text() for text in drawn.texts]
    assert "latent 4" in texts
    assert f"{of.values[4, 0]:.3g}" in texts
    assert f"{of.values[4, 1]:.3g}" not in texts  # the image itself
    assert f"{of.values[4, 4]:.3g}" in texts
    assert "a dog of a breed" in " ".join(texts)
    assert sum(text.startswith("latent ") for text in texts) == 2
    assert len([axes for axes in drawn.axes if axes.images]) == 2 + 2 * (1 + 4)


@pytest.mark.parametrize("size", [(6, (2, 3)), (131_072, (16, 16))])
def test_the_same_figure_is_the_same_file(tmp_path, size):
    for folder in ("a", "b"):
        torch.manual_seed(0)
        (tmp_path / folder).mkdir()
        written = save(figure(*size, mask_references=True)[0], tmp_path / folder / "figure.v1")
        assert [path.name for path in written] == ["figure.v1.png", "figure.v1.pdf"]
    for path in Path(tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_share_is_never_a_misleading_zero():
    assert [share(x) for x in (0, 0.0004, 0.034, 1)] == ["0 %", "< 0.1 %", "3.4 %", "100.0 %"]
