"""What is marked in an image and kept bright, the figure of it, and sheets of reference images."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from clipsae.training.module import SAEModule
from clipsae.visualization.figures import (
    ImageCodes,
    Panel,
    darkened,
    draw_image,
    draw_sheet,
    image_codes,
    leading_latents,
    passes_filter,
    percent,
    save,
)
from clipsae.visualization.references import BINS, References, Source
from clipsae.visualization.watch import ReferenceSheets


def references(latents: int = 6, grid: tuple[int, int] = (2, 3), top: int = 10) -> References:
    generator = torch.Generator().manual_seed(0)
    patches = grid[0] * grid[1]
    values = torch.rand(latents, top, generator=generator).sort(descending=True).values
    maps = (torch.rand(1, top, patches, generator=generator) * 255).to(torch.uint8)
    frequency = torch.tensor([0.01, 0.5, 0.9, 0.0, 0.2, 0.3])
    strength = torch.tensor([0.5, 0.05, 0.2, 0.0, 0.1, 0.09])
    return References(
        values=values,
        index=torch.arange(top).repeat(latents, 1),
        label=torch.arange(top).repeat(latents, 1) % 2,
        maps=maps.expand(latents, -1, -1),
        scale=values,
        class_token=values,
        sample_values=values[:, :0],
        sample_index=torch.zeros(latents, 0, dtype=torch.long),
        sample_label=torch.zeros(latents, 0, dtype=torch.long),
        sample_maps=torch.zeros(latents, 0, patches, dtype=torch.uint8),
        sample_scale=values[:, :0],
        sample_class_token=values[:, :0],
        frequency=frequency.repeat(-(-latents // 6))[:latents],
        token_frequency=torch.full((latents,), 0.1),
        strength=strength.repeat(-(-latents // 6))[:latents],
        entropy=torch.zeros(latents),
        top_label=torch.zeros(latents, dtype=torch.long),
        histogram=torch.zeros(latents, BINS, dtype=torch.long),
        source=Source("made up", "test", 10, grid, ["a cat", "a dog of a breed"], [], None),
    )


def test_filters_by_frequency_and_by_strength():
    limits = {"max_frequency": 0.3, "max_strength": 0.1}
    by_frequency = passes_filter(references(), "frequency", **limits)
    assert by_frequency.tolist() == [True, False, False, True, True, True]
    # The released code's drops a strong rare latent.
    by_strength = passes_filter(references(), "strength", **limits)
    assert by_strength.tolist() == [False, True, False, True, True, True]
    assert passes_filter(references(), "none", **limits).all()
    with pytest.raises(ValueError, match="filter='rare'"):
        passes_filter(references(), "rare", **limits)


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
def test_the_strongest_of_the_allowed_latents_are_marked(world):
    clip, sae, image = world.clip, world.sae, world.dataset[1][0]
    codes = sae.encode(clip.prefix(clip.normalize(image[None])))[0]
    order = sorted(range(40), key=lambda m: -float(codes[:, m].mean()))
    shown = torch.ones(40, dtype=torch.bool)
    shown[order[0]] = False
    found = image_codes(clip, sae, image, shown, top=4)
    assert found.marked == order[1:5]
    assert torch.allclose(found.means, codes.mean(dim=0))
    assert torch.equal(found.patches, codes[1:, found.marked].T)
    assert image_codes(clip, sae, image, ~shown & False, top=4).marked == []


def figure(latents: int = 6, grid: tuple[int, int] = (2, 3), **options):
    patches = grid[0] * grid[1]
    means = torch.zeros(latents)
    means[[2, 3, 4]] = torch.tensor([0.3, -0.1, 0.9])
    codes = ImageCodes(means, torch.ones(latents, dtype=torch.bool), [4, 2], torch.rand(2, patches))
    pictures = torch.randint(256, (10, 3, 12, 12), dtype=torch.uint8)
    panel = Panel(codes, references(latents, grid), lambda index: pictures[index])
    empty = ImageCodes(means * 0, ~codes.shown, [], torch.zeros(0, patches))
    panels = {"one": panel, "other": Panel(empty, panel.references, panel.image_of)}
    return draw_image(pictures[0], r"an image of $\frac{$5$", panels, **options), panel.references


def test_a_figure_shows_values_and_labels_of_other_images():
    drawn, refs = figure(references=4, own_index=1)
    texts = [text.get_text() for text in drawn.texts]
    assert "latent 4" in texts
    assert f"{refs.values[4, 0]:.3g}" in texts
    assert f"{refs.values[4, 1]:.3g}" not in texts  # the image itself
    assert f"{refs.values[4, 4]:.3g}" in texts
    assert "a dog of a breed" in " ".join(texts)
    assert sum(text.startswith("latent ") for text in texts) == 2
    assert len([axes for axes in drawn.axes if axes.images]) == 2 + 2 * (1 + 4)


def test_the_same_figure_is_the_same_file(tmp_path):
    for folder in ("a", "b"):
        torch.manual_seed(0)
        (tmp_path / folder).mkdir()
        drawn = figure(131_072, (16, 16), mask_references=True, references=2)[0]
        written = save(drawn, tmp_path / folder / "figure.v1")
        assert [path.name for path in written] == ["figure.v1.png", "figure.v1.pdf"]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_share_is_never_a_misleading_zero():
    assert [percent(x) for x in (0, 0.0004, 0.034, 1)] == ["0 %", "< 0.1 %", "3.4 %", "100.0 %"]


def test_leading_latents_are_strong_and_not_everywhere(world):
    found, dataset = world.references, world.dataset
    chosen = leading_latents(found, 5, max_frequency=0.8)
    allowed = [m for m in range(40) if 0 < found.frequency[m] <= 0.8]
    assert 5 < len(allowed) < 40
    assert chosen == sorted(allowed, key=lambda m: (-found.values[m, 0].item(), m))[:5]
    assert len(leading_latents(found, 100, max_frequency=0.8)) == len(allowed)
    drawn = draw_sheet(found, chosen, lambda i: dataset[i][0], "step 5", images=3)
    said = " ".join(text.get_text() for text in drawn.texts)
    assert all(f"latent {m}" in said for m in chosen)
    assert len(drawn.axes) == sum(min(3, int((found.index[m] >= 0).sum())) for m in chosen)
    draw_sheet(found, [], lambda i: dataset[i][0], "nothing is active")


def test_a_sheet_lies_beside_the_csv_file_and_the_sae_is_unchanged(world, tmp_path):
    sae = world.sae
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    logger = CSVLogger(save_dir=tmp_path, name="", version="")
    member = SAEModule(sae.train(), learning_rate=1.0, run=logger)
    module = SimpleNamespace(device=torch.device("cpu"), each=lambda work: work(member))
    watch = ReferenceSheets(
        world.clip, world.dataset, name="colour", split="test", images=8, every_n_steps=20, rows=2
    )
    for step in (10, 20, 30):
        member.step = step
        state = torch.random.get_rng_state()
        watch.on_validation_end(SimpleNamespace(is_global_zero=True), module)
        assert torch.equal(state, torch.random.get_rng_state())
    files = sorted(tmp_path.glob("val/*.png"))
    names = ["reference_images-000010.png", "reference_images-000030.png"]
    assert [file.name for file in files] == names
    assert Image.open(files[0]).width > 900
    assert sae.training
    sae.eval()
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())
