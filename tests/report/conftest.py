"""A store with results whose numbers are known, written as the experiment writes them."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

METRICS = {
    "l0": 4.0,
    "zero_fraction": 0.96875,
    "fvu": 0.25,
    "explained_variance": 0.75,
    "fvu_per_token": 0.2,
    "cosine": 0.9,
    "dead_fraction": 0.125,
}


class FakeStore:
    """Writes finished evaluations: of accuracies and numbers, or of numbers alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made = 0

    def evaluation(
        self,
        model: str,
        dataset: str,
        accuracy: dict[str, float],
        *,
        k: int | None = None,
        seed: int = 0,
        finished: float | None = None,
        classes: int = 10,
        latents: int = 128,
        metrics: dict[str, float] | None = None,
        **more: Any,
    ) -> Path:
        """An evaluation with accuracies by column: "no_sae", "on_5", "on_all", ..."""
        about = self._about(model, dataset, latents, k, seed, more)
        rows = []
        for column, value in accuracy.items():
            setting, _, n = column.partition("_")
            setting, n = ("no_sae", None) if column == "no_sae" else (setting, n)
            rows.append(
                {
                    **about,
                    "protocol": more.get("protocol", "paper"),
                    "setting": setting,
                    "n": latents if n == "all" else n,
                    "accuracy": value,
                    "micro_accuracy": value,
                    "images": 1000,
                    "classes": classes,
                    **({"competing": more["competing"]} if "competing" in more else {}),
                }
            )
        folder = self._folder("evaluation", model, dataset, seed)
        pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
        numbers = METRICS if metrics is None else metrics
        self._metrics(folder, about, numbers, image_encoder="tiny", pooling="mean")
        return self._finish(folder, about, finished, more)

    def measurement(
        self,
        model: str,
        dataset: str,
        values: dict[str, float],
        *,
        k: int | None = None,
        seed: int = 0,
        finished: float | None = None,
        latents: int = 128,
        image_encoder: str | None = "tiny",
        pooling: str = "mean",
        **more: Any,
    ) -> Path:
        """An evaluation without accuracies: metrics by name."""
        about = self._about(model, dataset, latents, k, seed, more)
        folder = self._folder("evaluation", model, dataset, seed)
        self._metrics(folder, about, values, image_encoder=image_encoder, pooling=pooling)
        return self._finish(folder, about, finished, more)

    def _metrics(self, folder: Path, about: dict[str, Any], values: dict[str, float], **more: Any):
        about = {**about, "images": 1000, **more}
        rows = [{**about, "metric": name, "value": value} for name, value in values.items()]
        if rows:
            pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)

    def sae(self, name: str, key: dict[str, Any]) -> str:
        """The record of a trained SAE."""
        folder = self.root / "sae" / name
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps({"key": key}))
        return name

    def _about(self, model, dataset, latents, k, seed, more) -> dict[str, Any]:
        clip = more.get("clip", "clipsae-tiny")
        return {
            "model": model,
            "dataset": dataset,
            "clip": clip,
            "latents": latents,
            "k": k,
            "seed": seed,
        }

    def _folder(self, kind: str, model: str, dataset: str, seed: int) -> Path:
        self.made += 1
        folder = self.root / kind / f"{model}-{dataset}-s{seed}-{self.made:010x}"
        folder.mkdir(parents=True)
        return folder

    def _finish(self, folder, about, finished, more) -> Path:
        config = {
            "clip": {
                "name": about["clip"],
                "pretrained": more.get("weights", "builtin"),
                "layer": -2,
            },
            "model": {"name": about["model"], "latents": about["latents"], "k": about["k"]},
            "dataset": {"name": about["dataset"]},
            "evaluation": {"limit_images": more.get("limit_images")},
            "trainer": {"max_steps": more.get("max_steps", 600)},
            "train_dataset": {"_target_": "clipsae.data.ScenesDataset", "name": "scenes"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        meta = {
            "started": 1.0,
            "finished": float(self.made if finished is None else finished),
            "key": {"sae": more.get("sae", "none"), **more.get("key", {})},
            "versions": {"torch": "2.9.0"},
            "git_commit": "0123456789abcdef",
            "host": "somewhere",
        }
        (folder / "meta.json").write_text(json.dumps(meta))
        return folder


@pytest.fixture
def store(tmp_path) -> FakeStore:
    return FakeStore(tmp_path / "out")
