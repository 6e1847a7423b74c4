"""The published figures as data: digits as printed, and nothing lost."""

import pytest

from clipsae.report import published
from clipsae.report.names import ELEVEN_NAMES, SIX


def test_every_accuracy_of_the_eleven_tables_is_there():
    known = published.zero_shot()
    columns = ("no_sae", "on_1", "on_5", "on_10", "on_50", "on_all")
    assert set(known) == {(d, m, c) for d in ELEVEN_NAMES for m in SIX for c in columns}
    assert published.table_numbers() == dict(zip(ELEVEN_NAMES, range(7, 18), strict=True))


@pytest.mark.parametrize(
    ("dataset", "model", "column", "printed"),
    [
        ("imagenet", "topk", "on_5", "8.2501"),  # four digits in the supplement
        ("eurosat", "batch_topk", "on_1", "10.0"),
        ("stanford_cars", "batch_topk", "on_50", "10.1140"),
        ("caltech101", "sparsemax", "on_all", "31.875"),
        ("ucf101", "gated", "on_10", "30.189"),
        ("fgvc_aircraft", "batch_topk", "no_sae", "23.136"),
    ],
)
def test_accuracies_are_kept_as_printed(dataset, model, column, printed):
    assert published.zero_shot()[dataset, model, column] == printed


def test_tables_5_and_6_under_our_metrics_names():
    known = published.metrics()
    assert known["topk", "zero_fraction"] == "0.966"
    assert known["relu", "fvu_per_token"] == "0.098"
    assert known["batch_topk", "cosine"] == "0.904"
    assert known["sparsemax", "decoder_orthogonality"] == "0.001"
    assert known["sparsemax", "monosemanticity_mean"] == "0.3484"
    assert known["topk", "monosemanticity_max"] == "0.8751"
    assert len(known) == 4 * 5 + 4 * 2


def test_the_corners_of_the_ablation_agree_with_table_12():
    known = published.ablation()
    assert known["attention_relu", "on_1"] == "3.86"
    assert known["linear_sparsemax", "on_50"] == "55.32"
    for model in ("relu", "sparsemax"):
        for column in ("on_1", "on_5", "on_10", "on_50"):
            assert known[model, column] == published.zero_shot()["imagenet", model, column]
    assert sorted(published.ablation_parts().values()) == [
        ("attention", "relu"),
        ("attention", "sparsemax"),
        ("linear", "relu"),
        ("linear", "sparsemax"),
    ]
