"""The published suites, and comparisons with published scores."""

import math

import pytest

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.evaluation.published_scores import PUBLISHED_SCORES
from mlx_openelm.evaluation.results import (
    Metric,
    ModelCard,
    TaskResult,
    describe_model,
    pair,
    report_suite,
)
from mlx_openelm.evaluation.suites import SUITES, find_suite_file
from mlx_openelm.storage.model_folder import ModelFolder


def make_result(task, right, *, metric="acc", total=None, digest="same"):
    n = len(right)
    mean = sum(right) / n
    stderr = math.sqrt(sum((x - mean) ** 2 for x in right) / (n - 1) / n)
    metrics = {metric: Metric(mean, stderr, tuple(map(float, right)))}
    return TaskResult(task, 0, n, total or n, digest, metrics)


# Settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "expected"),
    [
        (
            "zero-shot",
            "arc_challenge 0 acc_norm, arc_easy 0 acc_norm, boolq 0 acc, "
            "hellaswag 0 acc_norm, piqa 0 acc_norm, sciq 0 acc, winogrande 0 acc",
        ),
        (
            "openllm",
            "arc_challenge 25 acc_norm, hellaswag 10 acc_norm, mmlu 5 acc, "
            "truthfulqa_mc2 0 acc, winogrande 5 acc",
        ),
        (
            "llm360",
            "arc_challenge 25 acc_norm, crows_pairs_english 25 pct_stereotype, "
            "hellaswag 10 acc_norm, mmlu 5 acc, piqa 0 acc_norm, race 0 acc, "
            "truthfulqa_mc2 0 acc, winogrande 5 acc",
        ),
    ],
)
def test_a_suite_has_the_published_shots_and_metrics(suite, expected):
    tasks = SUITES[suite].tasks
    assert ", ".join(f"{t.task} {t.num_fewshot} {t.metric}" for t in tasks) == expected


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_a_suite_has_the_columns_of_the_published_table(suite):
    assert tuple(t.name for t in suite.tasks) == PUBLISHED_SCORES[suite.name].columns
    assert any("unverified" in note for note in suite.notes)


def test_the_notes_mention_the_swapped_headings_of_the_card():
    notes = {name: " ".join(SUITES[name].notes) for name in ("openllm", "llm360")}
    assert '"LLM360": its two headings are swapped' in notes["openllm"]
    assert '"OpenLLM Leaderboard": its two headings are swapped' in notes["llm360"]


@pytest.mark.interop
def test_the_harness_has_every_task_and_metric():
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    from pathlib import Path

    import lm_eval.tasks
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    root, tasks = Path(lm_eval.tasks.__file__).parent, {}
    for place in (
        *("arc", "super_glue", "hellaswag", "piqa", "sciq", "winogrande"),
        *("mmlu/default", "truthfulqa", "crows_pairs", "race"),
    ):
        for path in (root / place).rglob("*.yaml"):
            read = yaml.load(path.read_text(), Loader)
            name = read.get("task") if "group" not in read else read["group"]
            tasks[name if isinstance(name, str) else path.stem] = read
    for suite in SUITES.values():
        for task in [] if suite.local else suite.tasks:
            read = tasks[task.task]
            while "metric_list" not in read and "include" in read:
                read = tasks[read["include"].removesuffix(".yaml")]
            listed = read.get("metric_list") or read["aggregate_metric_list"]
            assert task.metric in {metric["metric"] for metric in listed}, task


def test_a_task_file_is_found_by_either_of_its_names(tmp_path):
    easy, boolq, *_ = SUITES["peft"].tasks[1:]
    (tmp_path / "ARC-Easy.json").write_text("[]")
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text("[]")
    assert find_suite_file(tmp_path, easy) == tmp_path / "ARC-Easy.json"
    assert find_suite_file(tmp_path, boolq) == tmp_path / "boolq" / "test.json"
    assert find_suite_file(tmp_path, SUITES["peft"].tasks[0]) is None


# Identity of a model -------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "name", "metadata", "method", "expected"),
    [
        ("270M", "models/mine", {}, None, ("OpenELM-270M", False, None)),
        ("270M", "apple/OpenELM-270M-Instruct", {}, None, ("OpenELM-270M", True, None)),
        (
            *("1.1B", "mine", {"source": {"repo": "apple/OpenELM-1_1B-Instruct"}}),
            *(None, ("OpenELM-1_1B", True, None)),
        ),
        ("3B", "adapters/a", {}, "dora", ("OpenELM-3B", False, "dora")),
        ("450M", "my/instructions", {}, "lora", ("OpenELM-450M", False, "lora")),
        ("270M", "instruct/OpenELM-270M", {}, None, ("OpenELM-270M", False, None)),
        (
            *("450M", "fused", {"fusion": {"method": "lora"}}),
            *(None, ("OpenELM-450M", False, "lora")),
        ),
        (
            *("450M", "m", {"source": {"kind": "CoreNet DoRA checkpoint, merged"}}),
            *(None, ("OpenELM-450M", False, "dora")),
        ),
    ],
)
def test_a_model_is_identified_by_its_sizes_and_source(
    tmp_path, size, name, metadata, method, expected
):
    raw = {"mlx_openelm": metadata}
    folder = ModelFolder(tmp_path, raw, OpenELMConfig.preset(size), {}, {})
    card = describe_model(name, folder, method)
    assert (card.size_name, card.instruct, card.method) == expected
    assert card.name == name


def test_other_sizes_have_no_published_row():
    card = ModelCard("mine", "OpenELM")
    report = report_suite(SUITES["zero-shot"], card, [])
    assert report.published is None
    assert all(score.difference is None for score in report.scores)


# Differences ---------------------------------------------------------------------


def test_a_score_is_compared_with_the_published_one():
    card = ModelCard("apple/OpenELM-1_1B", "OpenELM-1_1B")
    right = [1, 0, 1, 1] * 100
    results = [make_result("sciq", right, total=1000), make_result("boolq", right)]
    report = report_suite(SUITES["zero-shot"], card, results)
    sciq = next(score for score in report.scores if score.column == "SciQ")
    assert (sciq.value, sciq.published, sciq.n) == (75.0, 90.6, 400)
    assert sciq.difference == pytest.approx(75.0 - 90.6)
    ours = 100 * math.sqrt(0.75 * 0.25 / 399)
    assert sciq.stderr == pytest.approx(ours)
    published = 100 * math.sqrt(0.906 * 0.094 / 1000)  # of all questions of the task
    assert sciq.difference_stderr == pytest.approx(math.hypot(ours, published))
    assert report.scores[0].value is None  # ARC-c was not run


def test_averages_are_over_what_was_run_on_both_sides():
    card = ModelCard("apple/OpenELM-1_1B", "OpenELM-1_1B")
    suite = SUITES["zero-shot"]
    results = [
        make_result(task.task, [1, 0] * 50, metric=task.metric) for task in suite.tasks
    ]
    whole = report_suite(suite, card, results)
    average, without = whole.averages
    assert (average.column, without.column) == ("average", "average without SciQ")
    assert (average.value, without.value) == (50.0, 50.0)
    assert average.published == pytest.approx(63.44, abs=0.01)
    assert without.published == pytest.approx(58.91, abs=0.01)
    each = 100 * math.sqrt(0.25 / 99)
    assert average.stderr == pytest.approx(each / math.sqrt(7))
    part, _ = report_suite(suite, card, results[:2]).averages
    assert part.column == "average of 2 of 7"
    assert part.published == pytest.approx((32.34 + 55.43) / 2)


def test_differences_of_models_are_paired():
    first = make_result("sciq", [1, 0, 1, 0, 1, 0, 1, 0])
    second = make_result("sciq", [1, 1, 1, 0, 1, 0, 0, 1])
    (paired,) = pair([first], [second])
    assert (paired.task, paired.metric) == ("sciq", "acc")
    difference = paired.difference
    assert (difference.gained, difference.lost, difference.n) == (2, 1, 8)
    assert difference.value == pytest.approx(1 / 8)
    changes = [0, 1, 0, 0, 0, 0, -1, 1]
    variance = sum((c - 1 / 8) ** 2 for c in changes) / 7
    assert difference.stderr == pytest.approx(math.sqrt(variance / 8))


def test_other_questions_are_not_paired():
    first = make_result("sciq", [1, 0, 1])
    assert pair([first], [make_result("sciq", [1, 0, 1], digest="other")]) == ()
    assert pair([first], [make_result("boolq", [1, 0, 1])]) == ()
