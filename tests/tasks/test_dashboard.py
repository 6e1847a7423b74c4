"""The W&B workspace: what is on it, and that it shows what is logged."""

import json

import pytest

from clipsae.tasks.dashboard import CURVES, as_json, workspace
from tests.warm import run_py

pytest.importorskip("wandb_workspaces")


def panels(content: dict) -> dict[str, list[dict]]:
    """The panels of each section."""
    sections = content["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


@pytest.fixture(scope="module")
def content() -> dict:
    made = workspace("me", "clipsae", "demo", ["scenes_shape", "dtd"], [1, 5, 10, 50])
    return json.loads(as_json(made))


def test_it_is_the_same_each_time():
    again = [as_json(workspace("me", "clipsae", "demo", ["dtd"], [1, 5])) for _ in range(2)]
    assert again[0] == again[1]


def test_sections_and_panels(content):
    found = panels(content)
    assert list(found) == [
        "Accuracy over n: only the class's n latents",
        "Accuracy over n: all but the class's n latents",
        "Accuracy over n: the image's own n latents (label-free)",
        "k",
        "Sparsity against fidelity",
        "Training",
    ]
    on = found["Accuracy over n: only the class's n latents"]
    assert [(p["config"]["xAxis"], p["config"]["metrics"]) for p in on] == [
        ("topn/n", ["topn/scenes_shape/on"]),
        ("topn/n", ["topn/dtd/on"]),
    ]
    plane = found["Sparsity against fidelity"][0]["config"]
    assert (plane["xAxis"], plane["yAxis"]) == ("summary:val/l0", "summary:val/fvu")
    assert found["k"][0]["config"]["xAxis"] == "config:model.value.k"
    assert found["k"][0]["config"]["yAxis"] == "summary:topn/on_10"
    assert [p["config"]["metrics"] for p in found["Training"]] == [[name] for name in CURVES]


def test_only_the_sweeps_runs_with_their_failures(content):
    (runset,) = content["spec"]["section"]["runSets"]
    text = json.dumps(runset)
    assert '"demo"' in text
    assert '"group"' in text
    assert "summary:failure" in text


@pytest.mark.slow
def test_the_task_writes_it_for_the_sweeps_datasets(tmp_path):
    done = run_py("task=dashboard", "sweeps=demo", f"paths.output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "not saved in W&B" in line]
    assert "name the user or team by logger.entity=, and give the same command again" in line
    found = panels(json.loads((tmp_path / "dashboard-demo.json").read_text()))
    assert len(found["Accuracy over n: the image's own n latents (label-free)"]) == 5
