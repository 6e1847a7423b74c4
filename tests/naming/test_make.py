"""Names of a dictionary as a whole: planted latents get their names, others' names tell nothing."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.evaluation.floors import least_squares
from clipsae.evaluation.truth import (
    IMAGE_ATTRIBUTES,
    concept_names,
    concept_words,
    patch_concept_names,
    patch_concepts,
)
from clipsae.naming import Vocabulary
from clipsae.naming.activity import collect_activity
from clipsae.naming.make import name_latents, score_names
from clipsae.naming.truth import named_right, truth_judge
from clipsae.naming.vocabulary import scenes_words
from clipsae.sae import SAE
from clipsae.visualization import collect_references

PLANTED = ("shape", "colour", "background")


@pytest.fixture(scope="module")
def planted():
    """An SAE whose encoder rows are linear probes of concepts of patches."""
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    train, test = ScenesDataset("all", "train", 300), ScenesDataset("all", "test", 200)
    tokens = clip.prefix(clip.normalize(train.images(range(300))[0]))[:, 1:].flatten(0, 1)
    truth = patch_concepts(train, torch.arange(300), 8).flatten(0, 1)
    names = patch_concept_names(train)
    kept = [i for i, name in enumerate(names) if name.split("=")[0] in PLANTED]
    weights = least_squares(tokens, truth[:, kept])[:-1].float()
    # As often active as the concept is there.
    shares = (truth[:, kept].float().mean(dim=0)).tolist()
    scores = tokens @ weights
    limits = [scores[:, i].quantile(1 - share) for i, share in enumerate(shares)]
    sae = SAE(clip.width, len(kept) + 1, "linear", "relu").eval()
    with torch.no_grad():
        of = sae.architecture
        of.W_enc[:-1], of.b_enc[:-1] = weights.T, -torch.stack(limits)
        of.W_enc[-1], of.b_enc[-1] = 0, -1  # dead
    found = collect_references(clip, {"": sae}, test, name="scenes", split="test")[""]
    vocabulary = Vocabulary.embed(clip, list(scenes_words().values()))
    return SimpleNamespace(
        clip=clip,
        sae=sae,
        dataset=test,
        references=found,
        vocabulary=vocabulary,
        planted=[names[i] for i in kept],
    )


@pytest.fixture(scope="module")
def names(planted):
    return name_latents(
        planted.clip,
        planted.sae,
        planted.dataset,
        planted.vocabulary,
        planted.references.index,
        planted.references.maps,
    )


@pytest.fixture(scope="module")
def activity(planted):
    return collect_activity(planted.clip, planted.sae, planted.dataset)


def test_planted_latents_get_their_names(planted, names):
    word = dict(zip(concept_names(IMAGE_ATTRIBUTES), concept_words(), strict=True))
    assert names.text[:-1] == [word[one] for one in planted.planted]
    assert names.text[-1] == ""
    assert names.best[-1].tolist() == [-1] * 5
    # A latent is found by its word, too.
    nearest = [names.find(text, n=1)[0][0] for text in names.text[:-1]]
    right = [found == latent for latent, found in enumerate(nearest)]
    assert sum(right) >= 20, right


def test_names_tell_held_out_images_and_those_of_others_do_not(planted, names, activity):
    score, control = names.score[:-1], names.control[:-1]
    assert float(score.mean()) > 0.65
    # A bit below chance: where red is there is less room for blue.
    assert 0.4 < float(control.mean()) < 0.5
    assert (names.low[:-1] <= score).all()
    assert int(names.named.sum()) > 5  # of few images little is sure
    assert not names.named[-1]
    # The images that a name was found on do not count: with all of them left out nothing is left.
    everything = torch.arange(200).expand(27, 200)
    texts = lambda said: truth_judge(planted.dataset, activity.indices, said)  # noqa: E731
    assert score_names(names.text, activity, everything, texts)["score"].isnan().all()
    by_truth = score_names(names.text, activity, planted.references.index, texts)
    assert float(by_truth["score"].nanmean()) > 0.6


def test_without_any_name_there_is_no_score(planted, activity, tmp_path):
    index, latents = planted.references.index, planted.sae.latents
    found = score_names([""] * latents, activity, index, lambda texts: pytest.fail("asked"))
    assert found.pop("threshold") == 1.0
    save_file(found, tmp_path / "scores.safetensors")  # none is another's memory
    assert all(value.isnan().all() for value in found.values())


def test_the_share_that_is_right(planted, names):
    concepts = ["colour=red", "count=one", "shape=star"]
    leading = torch.tensor([[2, 0], [1, 0], [-1, -1]])
    found = named_right(["red", "small", "red"], concepts, leading, torch.tensor([-1, 1, 2]))
    assert (found["right"], found["concepts"], found["right_oracle"]) == (0.5, 2, 0.5)
    assert found["right_shuffled"] == pytest.approx(1 / 3, abs=0.2)  # of red on latent 2: 2 / 3
    references = planted.references
    numbers = named_right(
        names.text, references.source.concepts, references.leading, references.concept
    )
    assert numbers["right"] > 0.5
    assert numbers["right_shuffled"] < 0.1


def test_activity_is_that_of_the_references(planted, activity):
    assert activity.indices.tolist() == list(range(200))
    codes = activity.codes.dense()
    index, values = planted.references.index, planted.references.values
    place = activity.places(index)
    latent, k = (place >= 0).nonzero(as_tuple=True)
    assert len(latent) > 200
    assert (activity.indices[place[latent, k]] == index[latent, k]).all()
    torch.testing.assert_close(codes[place[latent, k], latent], values[latent, k])
    image = planted.dataset[int(activity.indices[7])][0][None]
    embedding = planted.clip.encode_image(planted.clip.normalize(image))
    expected = torch.nn.functional.normalize(embedding, dim=-1)[0]
    torch.testing.assert_close(activity.embeddings[7], expected, atol=1e-5, rtol=0)
