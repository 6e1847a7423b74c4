"""Top-n classification against the plain protocol: a hook on the stock open_clip model, one full
forward per image and setting, dense codes, Python loops."""

import json
import warnings

import open_clip
import pytest
import torch
from torch import nn

from clipsae.clip import FrozenCLIP
from clipsae.evaluation import evaluate, passes
from clipsae.evaluation.passes import evenly_spaced
from clipsae.evaluation.ranking import ClassCounts, contrast, ranked
from clipsae.sae import SAE, SparseCodes
from clipsae.sae.normalization import Moments

CLASSES, LATENTS, WIDTH = 7, 40, 32
NS = (1, 5, 10, 50)  # 50 > M


def evaluate_topn(*args, metrics=(), **options):
    return evaluate(*args, metrics=metrics, **options)


class Changed(SAE):
    """An SAE whose codes are changed to what a real one's seldom are."""

    change = None

    def encode(self, x):
        return self.change(super().encode(x))

    def encode_sparse(self, x):
        return SparseCodes.from_dense(self.encode(x))


def dead(codes):
    return torch.zeros_like(codes)


def negative(codes):
    return codes * torch.tensor([1, -1]).repeat(codes.shape[-1] // 2)


def ties(codes):
    """Two latents of each, equal to the bit."""
    return codes[..., : codes.shape[-1] // 2].repeat(1, 1, 2)


def real(architecture: str, activation: str, latents=LATENTS, seed=0, change=None, **more) -> SAE:
    kind = SAE if change is None else type("", (Changed,), {"change": staticmethod(change)})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = kind(WIDTH, latents, architecture, activation, **more)
        for parameter in sae.parameters():
            if parameter.ndim == 1:  # biases start at 0, where a bias counted twice does not show
                nn.init.uniform_(parameter, -0.2, 0.2)
    return sae.eval()


def topk(**more) -> SAE:
    return real("linear", "topk", k=6, **more)


def whitened() -> SAE:
    """With statistics of the 17 positions, whose means are a bias that differs between them."""
    sae = topk(normalize="whiten", whitening=0.5, position_mean=True)
    generator = torch.Generator().manual_seed(5)
    x, at = (torch.randn(n, 17, WIDTH, generator=generator) for n in (20, 1))
    sae.normalization.fit(Moments.of([x + at]))
    return sae


class Photos:
    """Random images of a class-dependent colour, in the order of `labels`."""

    def __init__(self, labels, seed: int = 0) -> None:
        self.labels = torch.tensor(labels, dtype=torch.long)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(0, 256, (len(labels), 3, 32, 32), generator=generator)
        tint = torch.randint(0, 256, (CLASSES, 3, 1, 1), generator=generator)
        self.images = ((noise + 2 * tint[self.labels]) // 3).to(torch.uint8)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], int(self.labels[i])


# Class 3 has no image, class 5 has one; not sorted.
LABELS = [0, 4, 1, 2, 0, 6, 4, 5, 1, 0, 2, 6, 6, 4, 0, 1]
TRAIN_LABELS = [6, 2, 0, 4, 3, 1, 0, 3, 2, 4, 1]  # class 5 is missing here


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> FrozenCLIP:
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 3,
            "width": WIDTH,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
    }
    path = tmp_path_factory.mktemp("clip") / "clipsae-test-topn.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FrozenCLIP.load("clipsae-test-topn", pretrained=None, layer=-2)


def telling_classifier(clip, sae=None) -> torch.Tensor:
    """Rows along which the images of a random model differ, with and without the SAE: its
    embeddings share a large mean, which would make every prediction the same."""
    tokens = clip.prefix(clip.normalize(Photos(list(range(CLASSES)), seed=9).images))
    streams = [tokens]
    if sae is not None:
        streams.append(sae.decode(sae.encode(tokens), sae.input_scale(tokens)))
    embeddings = [clip.tail(stream) for stream in streams]
    rows = sum(e - e.mean(dim=0) for e in embeddings)
    means = torch.linalg.qr(torch.stack([e.mean(dim=0) for e in embeddings]).T).Q
    return nn.functional.normalize(rows - rows @ means @ means.T, dim=-1)


@pytest.fixture(scope="module")
def classifier(clip) -> torch.Tensor:
    return telling_classifier(clip)


class PlainProtocol:
    """The oracle, sharing no code with the package but open_clip's and the SAE's own."""

    module = ""  # of block 1 of 3, whose outputs the SAE reads

    def __init__(self, clip, sae, classifier, threshold, ranking="frequency"):
        self.model, self.sae, self.classifier = clip.model, sae, classifier
        self.ranking = ranking
        self.threshold = threshold
        self.mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
        self.std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)

    def forward(self, image, replacement=None):
        """Predicted class and the tokens of block 1 of 3, which may be replaced."""
        seen = {}

        def hook(_module, _inputs, output):
            seen["tokens"] = output
            return replacement

        block = self.model.visual.transformer.resblocks[1]
        handle = block.get_submodule(self.module).register_forward_hook(hook)
        embedding = self.model.encode_image(((image / 255 - self.mean) / self.std)[None])
        handle.remove()
        cosines = torch.cosine_similarity(embedding, self.classifier, dim=-1)
        return int(cosines.argmax()), seen["tokens"]

    def rankings(self, dataset):
        counts = [[0] * self.latents for _ in range(CLASSES)]
        sums = [[0.0] * self.latents for _ in range(CLASSES)]
        for image, label in (dataset[i] for i in range(len(dataset))):
            for token in self.sae.encode(self.forward(image)[1])[0].tolist():
                for m, z in enumerate(token):
                    counts[label][m] += z > self.threshold
                    sums[label][m] += z
        scores = counts if self.ranking == "frequency" else self.excess(counts, dataset)
        return [
            sorted(range(self.latents), key=lambda m, c=c: (-scores[c][m], -sums[c][m], m))
            for c in range(CLASSES)
        ]

    def excess(self, counts, dataset):
        """(count - mean) / sqrt(mean + 1) of classes brought to the same size."""
        images = [dataset.labels.tolist().count(c) for c in range(CLASSES)]
        there = [c for c in range(CLASSES) if images[c]]
        size = len(dataset) / len(there)
        found = [[0.0] * self.latents for _ in range(CLASSES)]
        for m in range(self.latents):
            same_size = {c: counts[c][m] * (size / images[c]) for c in there}
            mean = sum(same_size.values()) / len(there)
            for c in there:
                found[c][m] = (same_size[c] - mean) / (mean + 1) ** 0.5
        return found

    @property
    def latents(self):
        return self.sae.config["latents"]

    def run(self, dataset, count_dataset):
        """{(setting, n): predictions}."""
        rankings = self.rankings(count_dataset)
        everything = set(range(self.latents))
        found: dict[tuple, list[int]] = {}

        for image, label in (dataset[i] for i in range(len(dataset))):
            predicted, tokens = self.forward(image)
            codes, scale = self.sae.encode(tokens), self.sae.input_scale(tokens)
            totals = codes[0].double().sum(0).tolist()
            own = sorted(everything, key=lambda m, totals=totals: (-totals[m], m))
            kept = {}
            for n in [*[n for n in NS if n < self.latents], self.latents]:
                kept["on", n] = set(rankings[label][:n])
                kept["off", n] = everything - kept["on", n]
                if n < self.latents:
                    kept["self", n] = set(own[:n])
            found.setdefault(("no_sae", None), []).append(predicted)
            for key, latents in kept.items():
                mask = torch.zeros(self.latents)
                mask[list(latents)] = 1
                rebuilt = self.sae.decode(codes * mask, scale)
                found.setdefault(key, []).append(self.forward(image, rebuilt)[0])
        return found, rankings


def check(result, name, oracle, dataset, count_dataset):
    expected, rankings = oracle.run(dataset, count_dataset)
    rows = {(r["setting"], r["n"]): r for r in result.rows if r["sae"] == name}
    assert set(rows) == set(expected)
    labels = dataset.labels.tolist()
    for (setting, n), predictions in expected.items():
        key = (None if setting == "no_sae" else name, setting, n)
        assert result.predictions[key].tolist() == predictions, key
        right = [p == y for p, y in zip(predictions, labels, strict=True)]
        of_class = [
            sum(r for r, y in zip(right, labels, strict=True) if y == c) / labels.count(c)
            for c in sorted(set(labels))
        ]
        row = rows[setting, n]
        assert row["accuracy"] == pytest.approx(100 * sum(of_class) / len(of_class))
        assert row["micro_accuracy"] == pytest.approx(100 * sum(right) / len(right))
        assert (row["images"], row["classes"]) == (len(labels), len(of_class))
    for c in set(count_dataset.labels.tolist()):
        n = result.latents[name].shape[1]
        assert result.latents[name][c].tolist() == rankings[c][:n]


VARIANTS = {
    "dead": (lambda: real("linear", "relu", change=dead), 0.2),
    "negative": (lambda: real("linear", "relu", change=negative), 0.02),
    "ties": (lambda: real("linear", "relu", change=ties), 0.2),
    "relu": (lambda: real("linear", "relu"), 0.2),
    "jumprelu": (lambda: real("linear", "jumprelu"), 0.2),
    "gated": (lambda: real("linear", "gated"), 0.2),
    "topk": (topk, 0.2),
    "topk of unit tokens": (lambda: topk(normalize="unit"), 0.02),
    "topk of layer-normed tokens": (lambda: topk(normalize="layer_norm"), 0.0),
    "topk of whitened tokens": (whitened, 0.2),
    "batch_topk": (lambda: real("linear", "batch_topk", k=6), 0.2),
    "sparsemax": (lambda: real("attention", "sparsemax", normalize="unit"), 0.0),
    "attention relu": (lambda: real("attention", "relu"), 0.05),
    "linear sparsemax": (lambda: real("linear", "sparsemax", weights="probabilities"), 0.05),
}


@pytest.mark.parametrize(
    ("kind", "protocol", "ranking"),
    [
        *((kind, "paper", "frequency") for kind in VARIANTS),
        *(("ties", "heldout", "frequency"), ("sparsemax", "heldout", "frequency")),
        *((kind, "paper", "contrast") for kind in ("dead", "negative", "ties", "topk")),
        ("sparsemax", "heldout", "contrast"),
    ],
)
@torch.no_grad()
def test_every_prediction_is_that_of_the_plain_protocol(kind, protocol, ranking, clip, monkeypatch):
    monkeypatch.setattr(passes, "_DENSE_BYTES", 2 * clip.tokens * LATENTS * 4)  # groups of two
    make, threshold = VARIANTS[kind]
    sae = make()
    silent = kind == "dead"
    classifier = telling_classifier(clip, None if silent else sae)
    dataset = Photos(LABELS)
    train = Photos(TRAIN_LABELS, seed=1) if protocol == "heldout" else None
    result = evaluate_topn(
        clip,
        {kind: sae},
        dataset,
        classifier,
        ns=NS,
        protocol=protocol,
        ranking=ranking,
        count_dataset=train,
        count_threshold=threshold,
        batch_size=3,
    )
    oracle = PlainProtocol(clip, sae, classifier, threshold, ranking)
    check(result, kind, oracle, dataset, train or dataset)
    if not silent:  # the cases say something: settings differ, and so do images
        distinct = {tuple(p.tolist()) for p in result.predictions.values()}
        assert len(distinct) > 4
        assert len(set(result.predictions[kind, "on", LATENTS].tolist())) > 2


@torch.no_grad()
@pytest.mark.parametrize(("hook", "module"), [("attn_out", "ls_1"), ("mlp_out", "ls_2")])
def test_what_a_block_adds_is_replaced_alone(hook, module, clip, classifier):
    cut = FrozenCLIP(clip.model, name=clip.name, layer=-2, hook=hook)
    sae, dataset = topk(), Photos(LABELS)
    options = {"ns": NS, "count_threshold": 0.01, "batch_size": 3}
    result = evaluate_topn(cut, {"a": sae}, dataset, classifier, **options)
    oracle = PlainProtocol(clip, sae, classifier, 0.01)
    oracle.module = module
    check(result, "a", oracle, dataset, dataset)


@torch.no_grad()
def test_the_embedding_is_replaced_itself(clip, classifier):
    cut = FrozenCLIP(clip.model, name=clip.name, hook="embedding")
    sae = SAE(cut.width, LATENTS, "linear", "topk", k=6).eval()
    dataset = Photos(LABELS)
    result = evaluate_topn(cut, {"a": sae}, dataset, classifier, ns=(5,))
    embeddings = cut.encode_image(cut.normalize(dataset.images))
    for name, kept in (("no_sae", embeddings), ("on", sae(embeddings).reconstruction)):
        key = (None, name, None) if name == "no_sae" else ("a", name, LATENTS)
        expected = (nn.functional.normalize(kept, dim=-1) @ classifier.T).argmax(dim=-1)
        assert torch.equal(result.predictions[key], expected)


@torch.no_grad()
def test_several_saes_of_different_sizes_on_one_stream(clip, classifier):
    saes = {"a": real("linear", "relu"), "b": topk(latents=8, seed=3)}
    saes["c"] = real("linear", "relu", change=dead)
    thresholds = {"a": 0.4, "b": 0.1, "c": 0.2}
    dataset = Photos(LABELS)
    visits = []
    result = evaluate_topn(
        clip,
        saes,
        dataset,
        classifier,
        ns=NS,
        count_threshold=thresholds,
        batch_size=5,
        progress=lambda done, total, what: visits.append((done, total)),
    )
    for name in ("a", "b"):
        oracle = PlainProtocol(clip, saes[name], classifier, thresholds[name])
        check(result, name, oracle, dataset, dataset)
    assert visits[-1] == (len(LABELS), len(LABELS))
    assert result.count_threshold == thresholds


@torch.no_grad()
def test_a_class_beyond_the_memory_gives_the_same(clip, classifier):
    saes = {"a": topk(), "b": real("linear", "jumprelu")}
    saes["dead"] = real("linear", "relu", change=dead)
    dataset = Photos(LABELS)
    visits = []

    def run(memory_gb, batch_size):
        visits.clear()
        result = evaluate_topn(
            clip,
            saes,
            dataset,
            classifier,
            ns=NS,
            batch_size=batch_size,
            memory_gb=memory_gb,
            progress=lambda done, total, what: visits.append((done, total)),
        )
        assert visits[-1][0] == visits[-1][1]
        return result, visits[-1][0] - len(LABELS)

    whole, repeated = run(1.0, 3)
    assert repeated == 0
    image = 4 * clip.tokens * (WIDTH + 1) + 8 * 8 * clip.tokens  # at least, of a TopK's
    seen = set()
    for batch_size, images_that_fit in [*((2, n) for n in range(5)), (3, 1)]:
        small, repeated = run(images_that_fit * image * 3 / 2**30, batch_size)
        seen.add(repeated)
        assert small.rows == whole.rows
        assert small.share_above_threshold == whole.share_above_threshold
        for name in saes:
            assert torch.equal(small.latents[name], whole.latents[name])
    assert len(seen) > 2


@torch.no_grad()
def test_diagnostics(clip, classifier):
    sae, dataset = topk(), Photos(LABELS)
    result = evaluate_topn(clip, {"topk": sae}, dataset, classifier, count_threshold=0.9)
    codes = sae.encode(clip.prefix(clip.normalize(dataset.images)))
    share = (codes > 0.9).sum() / (codes != 0).sum()
    assert result.share_above_threshold["topk"] == pytest.approx(share.item())
    assert 0 < share < 1
    assert result.counted_images.tolist() == [LABELS.count(c) for c in range(CLASSES)]


@pytest.mark.parametrize("change", [None, negative, dead])
def test_a_share_of_the_active_codes_sets_each_sae_s_threshold(change, clip, classifier):
    """All active codes count with 1.0; otherwise so many exceed it, whatever the codes' size."""
    dataset = Photos([0, 1, 2, 3] * 3)
    saes = {"a": topk(change=change), "b": real("attention", "sparsemax", change=change)}
    pixels, _ = zip(*(dataset[i] for i in range(12)), strict=True)
    tokens = clip.prefix(clip.normalize(torch.stack(pixels)))
    for share in (1.0, 0.5, 0.1):
        options = {"settings": ["on"], "ns": (1,), "count_share": share}
        result = evaluate_topn(clip, saes, dataset, classifier, **options)
        for name, sae in saes.items():
            codes = sae.encode(tokens)
            active, threshold = codes[codes != 0], result.count_threshold[name]
            above = int((active > threshold).sum())
            if change is None and share < 1:
                assert above == int(share * len(active))
            assert above <= int(share * len(active))
            assert threshold == 0 or (share < 1 and threshold in active)
            if change is negative and share > 0.5:
                assert threshold == 0
        given = evaluate_topn(
            *(clip, saes, dataset, classifier),
            **{**options, "count_share": None, "count_threshold": result.count_threshold},
        )
        assert torch.equal(given.latents["b"], result.latents["b"])


def test_some_settings_only(clip, classifier):
    sae, dataset = real("linear", "relu"), Photos(LABELS)
    every = evaluate_topn(clip, {"s": sae}, dataset, classifier, ns=(1, 5))
    for settings in (["no_sae"], ["self"], ["on"], ["off", "no_sae"]):
        some = evaluate_topn(clip, {"s": sae}, dataset, classifier, ns=(1, 5), settings=settings)
        rows = [row for row in every.rows if row["setting"] in settings]
        assert [{**row, "sae": "s"} for row in some.rows] == rows
    alone = evaluate_topn(clip, {}, dataset, classifier)
    assert [row["setting"] for row in alone.rows] == ["no_sae"]


def test_limited_to_evenly_spaced_images(clip, classifier):
    dataset = Photos(LABELS)
    result = evaluate_topn(clip, {}, dataset, classifier, limit_images=4)
    seen = (result.predictions[None, "no_sae", None] >= 0).nonzero().flatten()
    by_class = sorted(range(len(LABELS)), key=lambda i: LABELS[i])
    assert seen.tolist() == sorted(by_class[i] for i in (0, 4, 8, 12))
    assert result.rows[0]["images"] == 4
    everything = evaluate_topn(clip, {}, dataset, classifier, limit_images=1000)
    assert everything.rows[0]["images"] == len(LABELS)


def test_a_limit_leaves_no_class_out_where_labels_repeat():
    labels = torch.arange(2000) % 10
    assert labels[evenly_spaced(labels, 200)].bincount().tolist() == [20] * 10
    assert evenly_spaced(labels, None) == evenly_spaced(labels.tolist(), 5000) == list(range(2000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "papre"}, "protocol='papre': expected one of paper, heldout"),
        ({"settings": ["of"]}, r"settings=\['of'\]: expected some of no_sae, on, off, self"),
        ({"ns": (0, 5)}, r"ns=\[0, 5\]: expected numbers of latents"),
        ({"protocol": "heldout"}, "heldout counts on another split"),
        ({"count_dataset": Photos([0])}, "paper counts on the evaluated one"),
        ({"count_threshold": {"b": 0.1}}, r"count_threshold for \['b'\]: .* \['a'\]"),
        ({"count_share": 0.0}, "count_share=0.0: expected a share of the active codes above 0"),
        ({"count_threshold": -0.1}, "count_threshold=-0.1 for a: expected at least 0"),
        ({"limit_images": 0}, "limit_images=0: must be at least 1"),
        ({"dataset": Photos([])}, "no images"),
        ({"classifier": torch.zeros(2, 24)}, "classifier of 2 classes: expected 0..1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_in_one_sentence(options, message, clip, classifier):
    arguments = {"dataset": Photos(LABELS), "classifier": classifier, **options}
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_topn(clip, {"a": topk()}, **arguments)
    assert "\n" not in str(caught.value)


def test_contrast_finds_the_class_s_own_latents_whatever_the_sizes_of_classes():
    """Latent 0 is active everywhere, 1 to 3 on one class each, 4 on one token, 5 never."""
    images, tokens = [4, 8, 2], 10
    counts = torch.zeros(3, 6, dtype=torch.long)
    for c, n in enumerate(images):
        counts[c, 0] = n * tokens
        counts[c, 1 + c] = n * tokens // 2
    counts[2, 4] = 1
    sums = counts.double()
    sums[:, 5] = 1e-3  # active below the threshold: among equals it comes first
    kept = [ClassCounts.of(c, images[c], counts[c], sums[c]) for c in range(3)]
    frequent = [ranked(counts[c], sums[c], 2).tolist() for c in range(3)]
    assert frequent == [[0, 1], [0, 2], [0, 3]]
    scores = {c: (s, of) for c, s, of in contrast(kept, 6, torch.device("cpu"))}
    for c, (found, of) in scores.items():
        rate = counts.double() * (sum(images) / 3 / torch.tensor(images))[:, None]
        mean = rate.mean(dim=0)
        assert torch.allclose(found, (rate[c] - mean) / (mean + 1).sqrt(), atol=1e-12)
        assert ranked(found, of, 1).tolist() == [1 + c]
        assert found[0] == pytest.approx(0.0, abs=1e-9)
        assert torch.equal(of, sums[c].float().double())
    assert set(ranked(*scores[0], 3).tolist()[1:]) == {0, 5}  # those that are nobody's own


@torch.no_grad()
def test_contrast_by_the_paper_s_protocol_takes_a_pass_more_and_only_then(clip, classifier):
    dataset, visits = Photos(LABELS), []
    for settings, passes_ in ((("on",), 2), (("no_sae",), 1)):
        evaluate_topn(
            clip,
            {"a": topk()},
            dataset,
            classifier,
            settings=settings,
            ranking="contrast",
            memory_gb=0,
            progress=lambda done, total, what: visits.append((done, total)),
        )
        assert visits[-1] == (passes_ * len(LABELS),) * 2
