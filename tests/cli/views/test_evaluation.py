"""The tables of `evaluate` with published averages that need a remark."""

import pytest

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.views.evaluation import scores_json, show_scores
from mlx_openelm.evaluation.results import Metric, ModelCard, ModelScores, TaskResult
from mlx_openelm.evaluation.suites import SUITES


def made_scores(suite, size, value=0.5):
    """Scores of a model that was right in the first half of each task."""
    n = 10
    values = tuple(float(i < value * n) for i in range(n))
    results = [
        TaskResult(
            column.task,
            column.num_fewshot,
            n,
            n,
            "digest",
            {column.metric: Metric(sum(values) / n, 0.1, values)},
        )
        for column in SUITES[suite].tasks
    ]
    return ModelScores(ModelCard(size, size), None, tuple(results))


def shown(capsys, suite, *sizes):
    scores = [made_scores(suite, size, 0.5 + i / 10) for i, size in enumerate(sizes)]
    show_scores(Console(), scores, SUITES[suite])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("suite", "size", "words"),
    [
        ("zero-shot", "OpenELM-270M", "59.12 - 55.80"),  # TinyLlama
        ("zero-shot", "OpenELM-270M", "60.00 - 57.83"),  # OpenLM
        ("openllm", "OpenELM-450M", "average 41.50, the mean of the row is 41.494)"),
        (
            "llm360",
            "OpenELM-270M",
            "MobiLlama 0.50B: published average 46.37, the mean",
        ),
    ],
)
def test_averages_without_sciq_and_notes_are_shown(capsys, suite, size, words):
    assert words in shown(capsys, suite, size)


def test_published_differences_stand_beside_paired_ones(capsys):
    text = shown(capsys, "openllm", "OLMo 1.18B", "OpenELM-1_1B")
    assert "OpenELM-1_1B minus OLMo 1.18B" in text
    assert "ARC-c 10 +10.00 ± 10.00 +2.22" in text
    assert "average +10.00 ± 4.47 +2.36" in text  # 10 / sqrt(5)
    assert "OLMo 1.18B of 3.0T training tokens, average 43.57" in text
    assert "OpenELM-1_1B of 1.5T training tokens, average 45.93" in text


def test_an_average_of_fewer_columns_has_their_published_mean():
    suite = SUITES["openllm"]
    first, other = (made_scores("openllm", n) for n in ("OLMo 1.18B", "OpenELM-1_1B"))
    fewer = ModelScores(other.card, None, other.tasks[:2])
    document = scores_json([first, fewer], suite)["suite"]["comparisons"][0]
    average = document["differences"][-1]
    assert average["column"] == "average of 2 of 5"
    expected = ((36.69 - 34.47) + (65.71 - 63.81)) / 2
    assert average["published"] == pytest.approx(expected)


def test_zero_shot_differences_have_an_average_without_sciq():
    """TinyLlama has no other: 55.80; OpenELM 1.1B 58.91 (facts, 7.2 and 7.5)."""
    scores = [made_scores("zero-shot", n) for n in ("TinyLlama 1.10B", "OpenELM-1_1B")]
    document = scores_json(scores, SUITES["zero-shot"])["suite"]["comparisons"][0]
    both, without = document["differences"][-2:]
    assert (both["column"], both["published"]) == ("average", None)
    assert without["column"] == "average without SciQ"
    assert without["published"] == pytest.approx(58.91 - 55.80, abs=0.01)
    assert without["value"] == pytest.approx(0, abs=1e-9)


def test_the_published_average_without_sciq_is_named(capsys):
    text = shown(capsys, "zero-shot", "TinyLlama 1.10B", "OpenELM-1_1B")
    assert "TinyLlama 1.10B of 3.0T training tokens, average without SciQ 55.80" in text
