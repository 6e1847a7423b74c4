"""What a multirun says before it begins and when it has ended."""

import io
from unittest.mock import patch

import pandas as pd
import pytest
from rich.console import Console

from clipsae.store import Store
from clipsae.store.files import seal
from clipsae.tasks.sweep import Cell, duration, forecast, labels_of, summary


class Work:
    """A store with finished stages of known times."""

    def __init__(self, root):
        self.store = Store(root)

    def sae(self, model, steps, seconds=None, seed=0, batch=32):
        key = {
            "model": model,
            "seed": seed,
            "training": {"trainer": {"max_steps": steps}, "features": {"batch_size": batch}},
        }
        return self.made("sae", {"model": model}, key, seconds)

    def evaluation(self, trained, dataset, seconds=None, accuracy=None):
        about = {"model": trained.about["model"], "dataset": dataset}
        key = {"sae": trained.path.name, "dataset": dataset}
        return self.made("evaluation", about, key, seconds, accuracy)

    def made(self, kind, about, key, seconds, accuracy=None):
        about = {**about, "clip": "tiny", "latents": 64}
        stage = self.store.stage(kind, list(map(str, about.values())), key, about)
        if seconds is None:
            return stage

        def build(folder):
            if accuracy is not None:
                rows = [
                    ("no_sae", None, 99.0),
                    ("on", 1, 1.0),
                    ("on", 10, accuracy),
                    ("on", 64, 98),
                ]
                frame = pd.DataFrame(rows, columns=["setting", "n", "accuracy"])
                frame.to_csv(folder / "results.csv", index=False)

        def sealed(folder, meta):
            seal(folder, meta | {"seconds": seconds})

        with patch("clipsae.store.files.seal", sealed):
            stage.make(build)
        return stage


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def test_how_much_is_there_and_how_long_the_rest_takes(work):
    trained = work.sae("relu", 600, seconds=60.0)
    done = work.evaluation(trained, "a", seconds=7.0)
    cells = [Cell({"dataset": "a"}, (trained, done))]
    assert forecast(cells) == "1 cell, 1 of them finished; 1 SAE, 0 to train"
    # Nothing has been evaluated on b: no time is made up.
    cells.append(Cell({"dataset": "b"}, (trained, work.evaluation(trained, "b"))))
    said = forecast(cells)
    assert said.startswith(
        "2 cells, 1 of them finished; 1 SAE, 0 to train; how long it takes is not"
    )
    # Half the images a step.
    smaller = work.sae("relu", 600, batch=16)
    assert "1 to train; about 30 s, one after the other" in forecast([Cell({}, (smaller,))])
    # 3,000 steps at a tenth of a second, then 7 s.
    longer = work.sae("relu", 3000, seed=1)
    said = forecast([Cell({}, (longer, work.evaluation(longer, "a")))])
    assert said.startswith(
        "1 cell, 0 of them finished; 1 SAE, 1 to train; about 5 min, one after the other"
    )


def test_an_sae_that_several_cells_need_is_counted_once(work):
    work.sae("relu", 600, seconds=60.0)
    shared = work.sae("relu", 600, seed=1)
    said = forecast([Cell({"dataset": d}, (shared,)) for d in "abc"])
    assert said.startswith(
        "3 cells, 0 of them finished; 1 SAE, 1 to train; about 60 s, one after the other"
    )


def test_a_models_own_times_count_before_others(work):
    work.sae("relu", 100, seconds=10.0)
    work.sae("topk", 100, seconds=80.0)
    assert "about 10 s" in forecast([Cell({}, (work.sae("relu", 100, seed=1),))])
    assert "about 45 s" in forecast([Cell({}, (work.sae("gated", 100, seed=1),))])


def test_the_summary_is_by_model_and_dataset(work):
    trained = work.sae("topk", 600, seconds=60.0)
    cells = [
        Cell(
            {"model": "topk", "dataset": dataset, "k": "8"},
            (trained, work.evaluation(trained, dataset, seconds=30.0, accuracy=accuracy)),
        )
        for dataset, accuracy in (("a", 12.5), ("b", 50.0))
    ]
    cells.append(Cell({"model": "topk", "dataset": "a", "k": "0"}, (), "k=0: expected more"))
    title, table = summary(cells, [False, False, True])
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    said = console.file.getvalue()
    assert title == "2 of 3 cells are finished: macro accuracy, %, on_10"
    (row,) = [line.split() for line in said.splitlines() if "k=8" in line]
    # The SAE's minute counts once.
    assert [word for word in row if word not in "│┃"] == [
        "topk",
        "k=8",
        "12.50",
        "50.00",
        "2",
        "min",
    ]
    (row,) = [line for line in said.splitlines() if "k=0" in line]
    assert "failed" in row


def test_a_cell_is_known_by_what_sets_it_apart():
    jobs = [
        ["logger=none", f"model={m}", f"model.k={k}", "dataset=a"] for m in "xy" for k in (1, 2)
    ]
    assert labels_of(jobs)[1] == {"model": "x", "k": "2", "dataset": "a"}
    jobs = [["model=x", f"seed={s}", f"measurement.seed={s}"] for s in (0, 1)]
    assert labels_of(jobs)[1] == {"model": "x", "seed": "1", "measurement.seed": "1"}


def test_durations_have_one_unit():
    assert [duration(s) for s in (0.4, 89, 100, 5000, 7200)] == [
        "0 s",
        "89 s",
        "2 min",
        "83 min",
        "2.0 h",
    ]
