"""A store with results whose numbers are known, written as the experiment writes them."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from clipsae.report import Commands, Report, Selection, Wanted, collect, make_report, select

METRICS = {
    "l0": 4.0,
    "zero_fraction": 0.96875,
    "fvu": 0.25,
    "explained_variance": 0.75,
    "fvu_per_token": 0.2,
    "cosine": 0.9,
    "dead_fraction": 0.125,
}
TINY = Wanted("clipsae-tiny", "builtin", -2, "paper", 128)


class FakeStore:
    """Writes finished evaluations, and reports on them."""

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
        metrics: dict[str, float] = METRICS,
        image_encoder: str | None = "tiny",
        pooling: str = "mean",
        **more: Any,
    ) -> Path:
        """Accuracies by column ("no_sae", "on_5", "on_all", ...) and metrics by name."""
        self.made += 1
        folder = self.root / "evaluation" / f"{model}-{dataset}-s{seed}-{self.made:010x}"
        folder.mkdir(parents=True)
        cell = {"model": model, "dataset": dataset, "clip": more.get("clip", "clipsae-tiny")}
        cell |= {"latents": latents, "k": k, "seed": seed, "images": 1000}
        of_topn = {"protocol": more.get("protocol", "paper"), "classes": classes}
        of_topn |= {name: more[name] for name in ("competing", "ranking") if name in more}
        rows = []
        for column, value in accuracy.items():
            setting, n = ("no_sae", None) if column == "no_sae" else column.split("_")
            n = latents if n == "all" else n
            rows.append({**cell, **of_topn, "setting": setting, "n": n, "accuracy": value})
        if rows:
            pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
        cell |= {"image_encoder": image_encoder, "pooling": pooling}
        if metrics:
            rows = [{**cell, "metric": name, "value": value} for name, value in metrics.items()]
            pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
        clip = {"name": cell["clip"], "pretrained": more.get("weights", "builtin"), "layer": -2}
        config = {
            "clip": clip,
            "model": {"name": model, "latents": latents, "k": k, **more.get("options", {})},
            "dataset": {"name": dataset},
            "evaluation": {"limit_images": None},
            "trainer": {"max_steps": more.get("max_steps", 600)},
            "train_dataset": {"_target_": "clipsae.data.ScenesDataset", "name": "scenes"},
        }
        if "concepts" in more:
            pd.DataFrame(more["concepts"]).to_csv(folder / "concepts.csv", index=False)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        meta = {
            "finished": float(self.made if finished is None else finished),
            "key": {"sae": more.get("sae", "none"), **more.get("key", {})},
            "versions": {"torch": "2.9.0"},
            "git_commit": "0123456789abcdef",
            "host": "somewhere",
        }
        (folder / "meta.json").write_text(json.dumps(meta))
        return folder

    def measurement(self, model: str, dataset: str, values: dict[str, float], **more: Any) -> Path:
        """An evaluation without accuracies."""
        return self.evaluation(model, dataset, {}, metrics=values, **more)

    def sae(self, name: str, key: dict[str, Any]) -> str:
        """The record of a trained SAE."""
        folder = self.root / "sae" / name
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps({"key": key}))
        return name

    def selection(self, **wanted: Any) -> Selection:
        return select(collect(self.root), Wanted(**{**vars(TINY), **wanted}))

    def report(self, **wanted: Any) -> Report:
        found = collect(self.root)
        selection = select(found, Wanted(**{**vars(TINY), **wanted}))
        return make_report(self.root, found, selection, Commands(["clip=tiny"]))


@pytest.fixture
def store(tmp_path) -> FakeStore:
    return FakeStore(tmp_path / "out")
