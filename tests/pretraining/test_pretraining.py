"""Pretraining of the built-in CLIP: the losses, and stopping and continuing."""

import math
import shutil
from argparse import Namespace

import open_clip
import pytest
import torch
import torch.nn.functional as F

from clipsae.clip import tiny
from clipsae.data.scenes import KINDS
from clipsae.pretraining import losses as contrastive
from clipsae.pretraining import train as pretrain


def small(*options: object) -> Namespace:
    sizes = "--batch-size 8 --steps 4 --curriculum-steps 3 --patch-steps 3 --warmup-steps 2"
    every = "--checkpoint-every 2 --evaluate-every 1000 --log-every 2"
    return pretrain.parse([*sizes.split(), *every.split(), *map(str, options)])


@pytest.fixture(scope="module")
def model():
    return pretrain.build_model(0)


@pytest.fixture(autouse=True)
def unevaluated(monkeypatch):
    """tests/clip/test_tiny.py evaluates."""
    monkeypatch.setattr(pretrain, "zero_shot_accuracy", lambda *options: 0.5)


# --- the fast forward is open_clip's own ---


def test_image_embedding_is_open_clips(model):
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = contrastive.embed_image_tokens(model, images)
    assert tokens.shape == (3, 65, 128)
    expected = model.encode_image(images, normalize=True)
    torch.testing.assert_close(tokens[:, 0], expected, atol=1e-5, rtol=1e-4)


def test_text_embedding_is_open_clips(model):
    tokenizer = open_clip.get_tokenizer(tiny.register())
    texts = ["a star", "a photo of a red ring and an outlined orange circle against stone", ""]
    tokens = tokenizer(texts)
    expected = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(
        contrastive.embed_texts(model, tokens), expected, atol=1e-5, rtol=1e-4
    )


# --- losses ---


def test_multi_positive_loss_is_clips_where_pairs_are_unique():
    logits = torch.randn(6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(6, dtype=torch.bool)
    target = torch.arange(6)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    actual = contrastive._multi_positive_loss(logits, eye, torch.zeros_like(eye))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def test_multi_positive_loss_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 5, generator=generator)
    true = torch.eye(5, dtype=torch.bool)
    true[0, 1] = true[3, 2] = true[3, 4] = True
    unclear = torch.zeros_like(true)
    unclear[2, 0] = unclear[4, 1] = True

    def one_way(logits, true, unclear):
        total = 0.0
        for i in range(5):
            z = sum(math.exp(logits[i, j]) for j in range(5) if not unclear[i, j])
            right = [j for j in range(5) if true[i, j]]
            total -= sum(float(logits[i, j]) - math.log(z) for j in right) / len(right)
        return total / 5

    expected = (one_way(logits, true, unclear) + one_way(logits.T, true.T, unclear.T)) / 2
    actual = contrastive._multi_positive_loss(logits, true, unclear)
    assert float(actual) == pytest.approx(expected, abs=1e-5)


def test_labelled_loss_leaves_out_what_has_no_label():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([2, -1, 0, -1])
    expected = F.cross_entropy(logits[[0, 2]], label[[0, 2]])
    torch.testing.assert_close(contrastive._labelled_loss(logits, label), expected)
    assert contrastive._labelled_loss(logits, torch.full((4,), -1)) == 0


def test_prompts_name_every_class_in_order():
    prompts = contrastive.class_prompts(seed=0, step=3)
    names = [name for kind in KINDS.values() for name in kind.classnames]
    assert len(prompts) == len(names)
    assert all(name in prompt for name, prompt in zip(names, prompts, strict=True))
    assert prompts == contrastive.class_prompts(seed=0, step=3)
    assert prompts != contrastive.class_prompts(seed=0, step=4)


def test_every_loss_reaches_both_towers(model):
    cfg = small("--batch-size", 16)
    scenes, images, patches = pretrain.draw_batch(cfg, 0)
    inputs, tokenize = pretrain.normalize(model, images), pretrain.tokenizer()
    losses = contrastive.scene_losses(model, tokenize, inputs, scenes, patches, 0, 0)
    assert set(losses) == {"caption", "patch", *KINDS}
    for name, loss in losses.items():
        towers = (model.visual.conv1.weight, model.token_embedding.weight)
        gradients = torch.autograd.grad(loss, towers, retain_graph=True)
        assert all(g.abs().sum() > 0 for g in gradients), name


# --- schedule, curriculum, options ---


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    cfg = small("--steps", 100, "--warmup-steps", 10)
    factor = [pretrain.learning_rate_factor(s, cfg) for s in range(100)]
    assert factor[0] == pytest.approx(0.1)
    assert factor[9:61] == [1.0] * 52
    assert factor[80] == pytest.approx(0.5)
    assert factor[99] == pytest.approx(1 / 40)


def test_the_curriculum_begins_with_one_large_object():
    cfg = small("--batch-size", 64, "--curriculum-steps", 10)
    first, _, _ = pretrain.draw_batch(cfg, 0)
    last, _, _ = pretrain.draw_batch(cfg, 10)
    assert first.count.eq(1).all()
    assert first.size[:, 0].eq(1).all()
    assert set(last.count.tolist()) == {1, 2, 3}
    assert 0 in last.size[:, 0]


def test_the_model_is_a_function_of_the_seed():
    state = torch.random.get_rng_state()
    one, two = pretrain.build_model(1).state_dict(), pretrain.build_model(1).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = pretrain.build_model(2).state_dict()
    assert not torch.equal(one["visual.conv1.weight"], other["visual.conv1.weight"])
    assert torch.equal(state, torch.random.get_rng_state())


def test_options_of_the_command(tmp_path):
    defaults = pretrain.parse([])
    assert (defaults.steps, defaults.precision, defaults.counts) == (
        2000,
        "bf16",
        (0.7, 0.15, 0.15),
    )
    assert set(defaults.weights) == {"caption", *KINDS}
    given = f"--steps 3 --weights shape=1 --counts 1 0 0 --seed 7 --output {tmp_path}"
    cfg = pretrain.parse(given.split())
    assert cfg.weights == {**defaults.weights, "shape": 1.0}
    assert (cfg.steps, cfg.counts, cfg.seed, cfg.output) == (3, [1, 0, 0], 7, tmp_path)


@pytest.mark.parametrize("wrong", ["--precision fp16", "--weights form=1", "--steps 0"])
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        pretrain.parse(wrong.split())
    assert wrong.split()[0][2:] in capsys.readouterr().err.splitlines()[-1]


# --- stopping and continuing ---


class Stopped(Exception):
    pass


def test_continued_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, caplog):
    whole = pretrain.train(small("--output", tmp_path / "whole")).state_dict()
    fresh = pretrain.build_model(0).state_dict()
    assert not torch.equal(whole["visual.conv1.weight"], fresh["visual.conv1.weight"])

    # The exported weights load in open_clip.
    exported = str(tmp_path / "whole" / "weights.safetensors")
    model = open_clip.create_model(tiny.register(), pretrained=exported)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, whole[name].half().float(), msg=name)

    cut = small("--output", tmp_path / "cut")
    losses, calls = pretrain.scene_losses, []

    def stopping(*args):
        if len(calls) == 3:  # past a checkpoint, before the next
            raise Stopped
        calls.append(1)
        return losses(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "scene_losses", stopping)
        with pytest.raises(Stopped):
            pretrain.train(cut)
    shutil.copytree(tmp_path / "cut", tmp_path / "damaged")
    path = tmp_path / "damaged" / "pretrain.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for cfg in (cut, small("--output", tmp_path / "damaged")):
        continued = pretrain.train(cfg).state_dict()
        assert all(torch.equal(whole[k], continued[k]) for k in whole)
    # One from the checkpoint, the other from the start.
    assert caplog.text.count("does not match its checksum") == 1
