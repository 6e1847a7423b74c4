"""The names of a dictionary: kept, written, searched."""

import csv

import pytest
import torch
from torch.nn.functional import normalize

from clipsae.naming import Names, Vocabulary
from clipsae.naming.vocabulary import digest, read_words, scenes_words


@pytest.fixture
def names() -> Names:
    """Three latents, the last one dead, of images that all share a direction, as CLIP's do."""
    words = normalize(torch.eye(4)[:3] + 0.5 * torch.eye(4)[3], dim=1)
    shown = normalize(torch.tensor([[0, 1, 0, 0], [1, 0.2, 0, 0], [0, 0, 0, 0.0]]), dim=1)
    shown[:2] = normalize(shown[:2] - 2 * torch.eye(4)[3], dim=1)
    return Names(
        vocabulary=Vocabulary(["red", "dotted", "a star"], words),
        best=torch.tensor([[1, 0], [0, 1], [-1, -1]]),
        best_scores=torch.tensor([[2.0, 0.5], [1.0, 0.25], [torch.nan, torch.nan]]),
        text=["dotted", "red", ""],
        score=torch.tensor([0.9, 0.7, torch.nan]),
        low=torch.tensor([0.8, 0.5, torch.nan]),
        high=torch.tensor([0.95, 0.8, torch.nan]),
        control=torch.tensor([0.5, 0.49, torch.nan]),
        threshold=0.6,
        judge="clip",
        source="clip-dissect",
        examples=shown,
        numbers={"named": 1 / 3},
    )


def test_a_name_clears_by_the_low_end_of_its_interval(names):
    assert names.named.tolist() == [True, False, False]


def test_names_are_kept_whole_and_written_as_a_table(names, tmp_path):
    names.save(tmp_path)
    kept = Names.load(tmp_path)
    for name in ("best", "best_scores", "score", "low", "high", "control", "examples"):
        assert torch.equal(getattr(kept, name).nan_to_num(-9), getattr(names, name).nan_to_num(-9))
    assert (kept.text, kept.threshold, kept.judge, kept.numbers) == (
        names.text,
        names.threshold,
        names.judge,
        names.numbers,
    )
    assert kept.vocabulary.words == names.vocabulary.words
    assert torch.equal(kept.vocabulary.embeddings, names.vocabulary.embeddings)
    with (tmp_path / "names.csv").open() as file:
        first, second, dead = csv.DictReader(file)
    assert (first["name"], first["score"], first["named"]) == ("dotted", "0.9", "True")
    assert (second["word_2"], second["named"]) == ("dotted 0.250", "False")
    assert (dead["name"], dead["score"], dead["word_1"]) == ("", "", "")


def test_latents_are_found_by_meaning(names):
    assert [latent for latent, _ in names.find("dotted")] == [0, 1]
    assert [latent for latent, _ in names.find(names.vocabulary.embeddings[0], n=1)] == [1]
    with pytest.raises(ValueError, match="'wood' is not among the 3 words"):
        names.find("wood")


def test_words_of_a_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("a dog\n\nred\na dog \n")
    assert read_words(file) == ["a dog", "red"]
    file.write_bytes(b"\xef\xbb\xbfred\r\na dog\r\n")  # as Windows' editors write it
    assert read_words(file) == ["red", "a dog"]
    file.write_text("red\nred\n")
    with pytest.raises(ValueError, match="at least two lines"):
        read_words(file)
    with pytest.raises(ValueError, match="No such file"):
        read_words(tmp_path / "none.txt")


def test_the_grammar_has_each_word_once():
    groups = scenes_words()
    words = [word for group in groups.values() for word in group.words]
    assert len(words) == len(set(words)) == 45
    assert digest(list(groups.values())) != digest(list(groups.values())[1:])
