"""SAEs of patches, of the class token, that leave out tokens, and transcoders: what they have no
codes for passes unchanged. Against the plain protocol, and sums over the tokens with codes."""

import pytest
import torch

from clipsae.evaluation import evaluate
from clipsae.evaluation.metrics.cknna import cknna
from clipsae.evaluation.metrics.sparsity import sparsity_sums, sparsity_values
from clipsae.evaluation.run import check_metrics
from tests.evaluation.test_topn import (
    LABELS,
    Photos,
    PlainProtocol,
    check,
    clip,
    real,
    telling_classifier,
)

__all__ = ["clip"]  # a fixture

CHOSEN = {"patches": slice(1, None), "cls": slice(1), "all": slice(None)}


class Masked:
    """An SAE as it is on whole streams: the tokens of one image that it is not of keep their
    values."""

    def __init__(self, sae, limit=None):
        self.sae, self.config, self.limit = sae, sae.config, limit
        self.input_scale = sae.input_scale

    def there(self, tokens):
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        mask[:, CHOSEN[self.config["tokens"]]] = True
        if self.limit is not None:
            mask &= tokens.norm(dim=-1) <= self.limit
        return mask

    def encode(self, tokens):
        self.tokens = tokens
        scores = self.sae.scores(tokens)
        codes = self.sae.apply_threshold(scores, self.sae.threshold(scores))
        return codes * self.there(tokens)[..., None]

    def decode(self, codes, scale):
        rebuilt = self.sae.decode(codes, scale)
        if self.config["target_layer"] is not None:
            return rebuilt
        return torch.where(self.there(self.tokens)[..., None], rebuilt, self.tokens)


class Transcoded(PlainProtocol):
    """Reads after block 1 of 3, and writes after block 2."""

    def forward(self, image, replacement=None):
        seen, blocks = {}, self.model.visual.transformer.resblocks
        reading = blocks[1].register_forward_hook(lambda *a: seen.update(tokens=a[2]))
        writing = blocks[2].register_forward_hook(lambda *a: replacement)
        embedding = self.model.encode_image(((image / 255 - self.mean) / self.std)[None])
        reading.remove()
        writing.remove()
        cosines = torch.cosine_similarity(embedding, self.classifier, dim=-1)
        return int(cosines.argmax()), seen["tokens"]


@pytest.fixture(scope="module")
def photos():
    return Photos(LABELS)


@pytest.fixture(scope="module")
def streams(clip, photos):
    return clip.prefix(clip.normalize(photos.images))


KINDS = {
    "patches": {"tokens": "patches"},
    "cls": {"tokens": "cls"},
    "norms": {"max_norm_ratio": 3.0},
    "patches and norms": {"tokens": "patches", "max_norm_ratio": 3.0},
    "transcoder": {"target_layer": -1, "subtract_bias": False},
}


def made(kind, streams):
    sae = real("linear", "topk", k=6, **KINDS[kind])
    limit = None
    if sae.norm_limit is not None:  # three of ten are left out
        limit = streams[:, CHOSEN[sae.config["tokens"]]].norm(dim=-1).quantile(0.7)
        sae.norm_limit.fill_(limit)
    return sae, limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranking", ["frequency", "contrast"])
@torch.no_grad()
def test_every_prediction_is_that_of_the_plain_protocol(kind, ranking, clip, photos, streams):
    sae, limit = made(kind, streams)
    plain = Masked(sae, limit)
    protocol = Transcoded if kind == "transcoder" else PlainProtocol
    classifier = telling_classifier(clip)
    oracle = protocol(clip, plain, classifier, 0.1, ranking)
    result = evaluate(
        clip,
        {"sae": sae},
        photos,
        classifier,
        metrics=(),
        count_threshold=0.1,
        ranking=ranking,
        batch_size=5,
    )
    check(result, "sae", oracle, photos, photos)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_numbers_are_over_the_tokens_with_codes(kind, clip, photos, streams):
    sae, limit = made(kind, streams)
    there = Masked(sae, limit).there(streams)
    result = evaluate(
        clip, {"sae": sae}, photos, metrics=("sparsity", "dense", "cknna"), batch_size=5, k=3
    )
    found = {row["metric"]: row["value"] for row in result.metrics}
    x, scores = streams[there], sae.scores(streams)[there]
    codes = sae.apply_threshold(scores, sae.threshold(scores))
    y = x
    if kind == "transcoder":
        y = clip.at(-1).prefix(clip.normalize(photos.images))[there]
    for suffix, z in (("", codes), ("_dense", scores.relu())):
        expected = sparsity_values(sparsity_sums(y, sae.decode(z), z))
        for key, value in expected.items():
            assert found[key + suffix] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), key
    share = there.double().mean().item()
    assert found.get("coded_tokens", 1.0) == pytest.approx(share)
    assert (share == 1) == (kind == "transcoder")
    assert found["cknna"] == pytest.approx(cknna(y, codes, 3).item(), rel=1e-3)


def test_what_cannot_be_measured(clip, photos):
    with pytest.raises(ValueError, match="'support' needs tokens that are patches"):
        check_metrics(clip, photos, metrics=["support"], tokens="cls")
    assert "support" not in check_metrics(clip, photos, tokens="cls")
    assert "support" in check_metrics(clip, photos, tokens="patches")
    with pytest.raises(ValueError, match="pooling='cls': an SAE of patches"):
        check_metrics(clip, photos, pooling="cls", tokens="patches")
    saes = {kind: real("linear", "topk", k=6, **KINDS[kind]) for kind in ("patches", "cls")}
    with pytest.raises(ValueError, match="SAEs of tokens=patches and of tokens=cls"):
        evaluate(clip, saes, photos, metrics=["sparsity"])
