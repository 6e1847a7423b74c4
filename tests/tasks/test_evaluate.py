"""SAEs in and out by `run.py`: the benchmark on one that was not trained here, and exports."""

import json

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

import clipsae
from clipsae.errors import ConfigError
from clipsae.interop import read, saelens
from clipsae.sae import SAE
from clipsae.store import Store
from clipsae.tasks import evaluate, export
from run import ROOT
from tests.warm import run_py


@pytest.fixture
def foreign(tmp_path):
    """A SAELens folder with an SAE for the built-in CLIP, and the SAE."""
    torch.manual_seed(0)
    sae = SAE(d=128, latents=64, activation="topk", k=6).eval()
    saelens.write(sae, tmp_path / "theirs", {"model_name": "somebody's"})
    return tmp_path / "theirs", sae


@pytest.fixture
def composed(tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: compose(
            "config", [f"paths.output_dir={tmp_path / 'out'}", *overrides]
        )
    HydraConfig.instance().cfg = None


@pytest.mark.slow
def test_the_benchmark_on_a_foreign_sae_gives_the_numbers_of_the_same_sae_of_ours(
    tmp_path, foreign
):
    folder, sae = foreign
    sae.save(tmp_path / "ours")
    common = [
        "task=evaluate",
        f"paths.output_dir={tmp_path / 'out'}",
        "logger=csv",
        "dataset=scenes_colour",
        "dataset.size=40",
        "evaluation.settings=[no_sae,on]",
        "measurement.metrics=[sparsity]",
    ]
    for source in (folder, tmp_path / "ours", folder):
        done = run_py(*common, f"task.sae={source}")
        assert done.returncode == 0, done.stderr
        assert "somebody's" in done.stdout or source != folder
    out = tmp_path / "out"
    assert len(list(out.glob("sae/*"))) == 2  # once each, though one was asked for twice
    tables = [pd.read_csv(file) for file in sorted(out.glob("evaluation/*/results.csv"))]
    assert [set(table.model) for table in tables] == [{"ours"}, {"theirs"}]
    assert tables[0].accuracy.tolist() == tables[1].accuracy.tolist()
    assert set(tables[0].latents) == {64}
    numbers = [pd.read_csv(f).set_index("metric") for f in out.glob("evaluation/*/metrics.csv")]
    assert numbers[0].value["l0"] == numbers[1].value["l0"] == pytest.approx(6)
    # The imported SAE lies in the store as a trained one does, and may be imported again.
    for stored in out.glob("sae/*"):
        again = clipsae.load(stored)
        x = torch.randn(8, 128)
        assert torch.allclose(again.encode(x), sae.encode(x), atol=1e-5)
        assert str(tmp_path) not in (stored / "config.yaml").read_text().replace(str(out), "")


def test_the_key_is_the_weights_and_the_config(make_sae):
    one, same, other = make_sae(0), make_sae(0), make_sae(1)
    assert evaluate.digest(one) == evaluate.digest(same) != evaluate.digest(other)
    assert evaluate.digest(make_sae(0, k=5)) != evaluate.digest(one)


@pytest.fixture
def make_sae():
    def make(seed, k=4):
        torch.manual_seed(seed)
        return SAE(d=16, latents=32, activation="topk", k=k)

    return make


def write_hostile(path):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    torch.save({"cfg": Harm(), "state_dict": {}}, path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "task.sae is empty"),
        (["task.sae=./nowhere"], "is neither a file or folder nor"),
        (["task.sae=TMP/theirs", "clip=vit_b_16", "clip.pretrained=null"], "tokens of width 128"),
        (["task.sae=TMP/hostile.pt"], "asks for print"),
        (["task.sae=TMP/theirs", "evaluation.protocol=papre"], "expected one of paper, heldout"),
    ],
)
def test_evaluate_refuses_in_a_sentence(tmp_path, foreign, composed, overrides, words):
    write_hostile(tmp_path / "hostile.pt")
    given = [text.replace("TMP", str(tmp_path)) for text in overrides]
    with pytest.raises(ConfigError) as refused:
        evaluate.run(composed("task=evaluate", *given))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "sae").exists()


def test_a_transcoder_that_would_write_where_it_reads(tmp_path, composed):
    sae = SAE(d=128, latents=8, activation="topk", k=2, target_layer=-1, subtract_bias=False)
    sae.save(tmp_path / "one")
    cfg = composed("task=evaluate", f"task.sae={tmp_path / 'one'}", "clip.layer=3")
    with pytest.raises(ConfigError, match="target_layer=-1 is the layer that is read"):
        evaluate.prepare(cfg)


def test_other_tokens_than_those_of_its_training_are_named(tmp_path, foreign, composed, caplog):
    foreign[1].save(tmp_path / "one")
    (tmp_path / "one" / "config.yaml").write_text(
        "clip: {name: clipsae-tiny, pretrained: builtin, layer: -2, hook: mlp_out}"
    )

    def warnings(*overrides: str) -> list[str]:
        caplog.clear()
        cfg = composed("task=evaluate", f"task.sae={tmp_path / 'one'}", *overrides)
        evaluate.bring_in(cfg, Store(tmp_path / "out"))
        return [record.getMessage() for record in caplog.records if record.levelno > 20]

    caplog.set_level("INFO", "clipsae")
    said = "was trained on the tokens of clip.layer=-2 clip.hook=mlp_out"
    assert said in warnings()[0]
    assert said in warnings("clip.hook=mlp_out", "clip.layer=0")[0]
    assert warnings("clip.hook=mlp_out", "clip.layer=2") == []


@pytest.mark.parametrize("target", export.TARGETS)
def test_export_of_any_sae_to_any_target(tmp_path, foreign, composed, target):
    folder, sae = foreign
    export.run(composed("task=export", f"task.sae={folder}", f"task.to={target}"))
    written = tmp_path / "out" / "export" / target / "theirs"
    x = torch.randn(32, 128)
    assert torch.allclose(clipsae.load(written)(x).codes, sae(x).codes, atol=1e-5)
    assert read(written).format.lower() == target
    assert (written / "README.md").exists() == (target == "clipsae")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.to=keras"], "expected one of clipsae, saelens, visaebench"),
        (["model=topk"], "run the same command without task=export first"),
        (["task.sae=TMP/sparsemax", "task.to=saelens"], "activation=sparsemax cannot be written"),
        (["task.sae=TMP/sparsemax", "task.push=nobody"], "task.push='nobody': expected owner/name"),
    ],
)
def test_export_refuses_in_a_sentence(tmp_path, composed, overrides, words):
    SAE(d=16, latents=32, activation="sparsemax").save(tmp_path / "sparsemax")
    given = [text.replace("TMP", str(tmp_path)) for text in overrides]
    with pytest.raises(ConfigError) as refused:
        export.run(composed("task=export", *given))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


PLUGIN = '''
import torch
from torch import Tensor, nn

from clipsae.sae import ACTIVATIONS, Activation


@ACTIVATIONS.register("softplus")
class Softplus(Activation):
    """z = softplus(s) where s is above a threshold."""

    def __init__(self, latents: int, *, above: float = 0.0) -> None:
        super().__init__(latents)
        self.above = above

    def threshold(self, scores: Tensor) -> Tensor:
        return scores.new_full((), self.above)

    def magnitude(self, scores: Tensor, tau: Tensor, latents: Tensor | None) -> Tensor:
        return nn.functional.softplus(scores)
'''

YAML = """
# @package _global_
plugins: [softplus.py]
model:
  name: softplus
  architecture: linear
  activation: softplus
  latents: 64
  above: 0.5
  initial_images: 4
optimizer:
  learning_rate: 1e-3
  warmup_steps: 2
"""


@pytest.mark.slow
def test_an_sae_of_ones_own_is_one_file_and_one_yaml(tmp_path):
    mine = tmp_path / "mine"
    (mine / "model").mkdir(parents=True)
    (mine / "softplus.py").write_text(PLUGIN)
    (mine / "model" / "softplus.yaml").write_text(YAML)
    command = [
        "--config-dir",
        str(mine),
        "model=softplus",
        f"paths.output_dir={tmp_path / 'out'}",
        "logger=none",
        "trainer.max_steps=6",
        "trainer.val_check_interval=6",
        "trainer.limit_val_batches=1",
        "features.batch_size=4",
        "features.num_workers=0",
        "dataset=scenes_colour",
        "dataset.size=40",
        "measurement=none",
    ]
    done = run_py(*command)
    assert done.returncode == 0, done.stderr
    assert "softplus seed=0 on scenes_colour" in done.stdout
    (sae,) = (tmp_path / "out" / "sae").glob("*")
    assert json.loads((sae / "sae.json").read_text())["config"]["above"] == 0.5
    # Found again as long as its file is the same, and trained anew once that has changed.
    (mine / "softplus.py").write_text(f"{PLUGIN}\n# changed\n")
    done = run_py(*command)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "sae").glob("*"))) == 2

    done = run_py(*command, "plugins=[nowhere.py]")
    assert done.returncode == 1
    assert "nowhere.py is in none of" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
