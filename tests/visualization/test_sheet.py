"""The sheet of the leading latents' reference images, and its place in a training."""

import io
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.sae import SAE
from clipsae.training.module import SAEModule
from clipsae.visualization import collect_references
from clipsae.visualization.sheet import draw_sheet, leading_latents
from clipsae.visualization.watch import ReferenceSheets


def world():
    torch.manual_seed(0)
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    sae = SAE(clip.width, 64, "linear", "topk", k=4)
    return clip, sae, ScenesDataset("colour", "test", 24)


def test_leading_latents_are_strong_and_not_everywhere():
    clip, sae, dataset = world()
    found = collect_references(clip, {"it": sae}, dataset, name="colour", split="test")["it"]
    chosen = leading_latents(found, 5, max_frequency=0.4)
    allowed = [m for m in range(64) if 0 < found.frequency[m] <= 0.4]
    assert chosen == sorted(allowed, key=lambda m: (-found.values[m, 0].item(), m))[:5]
    assert leading_latents(found, 100, max_frequency=0.4).__len__() == len(allowed)
    drawn = draw_sheet(found, chosen, lambda i: dataset[i][0], "step 5", images=3)
    said = " ".join(text.get_text() for text in drawn.texts)
    assert all(f"latent {m}" in said for m in chosen)
    assert len(drawn.axes) == sum(min(3, int((found.index[m] >= 0).sum())) for m in chosen)
    same = [io.BytesIO(), io.BytesIO()]
    for file in same:
        drawn.savefig(file, format="png", metadata={"Software": None})
    assert same[0].getvalue() == same[1].getvalue()
    draw_sheet(found, [], lambda i: dataset[i][0], "nothing is active")


def test_a_sheet_lies_beside_the_csv_file_and_the_sae_is_as_before(tmp_path):
    clip, sae, dataset = world()
    sae.train()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    member = SAEModule(
        sae, learning_rate=1.0, run=CSVLogger(save_dir=tmp_path, name="", version="")
    )
    module = SimpleNamespace(device=torch.device("cpu"), each=lambda work: work(member))
    watch = ReferenceSheets(
        clip, dataset, name="colour", split="test", images=8, every_n_steps=20, rows=3
    )
    for step in (10, 20, 30):
        member.step = step
        state = torch.random.get_rng_state()
        watch.on_validation_end(SimpleNamespace(is_global_zero=True), module)
        assert torch.equal(state, torch.random.get_rng_state())
    files = sorted(Path(tmp_path).glob("val/*.png"))
    assert [file.name for file in files] == [
        "reference_images-000010.png",
        "reference_images-000030.png",
    ]
    assert Image.open(files[0]).width > 900
    assert sae.training
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())
