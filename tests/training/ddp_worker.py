"""One rank of several: trains each model in turn as the main job does.

ddp_worker.py FOLDER MODELS PORTS OVERRIDE...   (rank and world size come from the environment)
"""

import os
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

MORE = {
    "relu": ["optimizer.sparsity_warmup_steps=8"],
    # Shares of 520 tokens are never 0.0987: no rounding decides which latents are above the limit.
    "sparsemax": ["model.max_activation_frequency=0.0987"],
}


def train(cfg: DictConfig, folder: Path) -> None:
    from clipsae.store import Store
    from clipsae.tasks import build
    from clipsae.tasks.stages import sae

    clip = build.build_clip(cfg)
    images, held_out = (
        build.build_dataset(cfg.train_dataset, split, clip.image_size)
        for split in ("train", "test")
    )
    folder.mkdir(parents=True, exist_ok=True)
    stage = Store(folder / "store").stage("sae", [cfg.model.name], {})
    sae.make([sae.Training(cfg, stage, folder)], clip, images, held_out)


def configs(models: list[str], overrides: list[str]) -> list[DictConfig]:
    import run

    with initialize_config_dir(str(run.ROOT / "conf"), version_base="1.3"):
        return [
            compose(
                "config",
                ["precision=float32", f"model={model}", *overrides, *MORE.get(model, [])],
            )
            for model in models
        ]


if __name__ == "__main__":
    folder, models, ports, *overrides = sys.argv[1:]
    models = models.split(",")
    for cfg, model, port in zip(configs(models, overrides), models, ports.split(","), strict=True):
        os.environ["MASTER_PORT"] = port
        train(cfg, Path(folder, model))
