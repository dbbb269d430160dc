"""`evaluate`: tasks, suites, and several models side by side."""

import csv
import io
import json
import re
import shutil
import weakref
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import call, expect_error
from models import TEXT, UNEVEN, make_factors, weights_of, write_mlx_lm_adapter

from mlx_openelm.cli import evaluate as evaluate_module
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.evaluation import harness_model
from mlx_openelm.evaluation.multiple_choice import score_task
from mlx_openelm.evaluation.paired import paired_difference
from mlx_openelm.evaluation.scorer import OpenELMScorer
from mlx_openelm.evaluation.task_files import read_task
from mlx_openelm.reporting.pictures import SCORE_AREA
from mlx_openelm.storage.loading import load

MODULES = tuple(
    name.removesuffix(".weight")
    for name, shape in UNEVEN.tensor_shapes().items()
    if len(shape) == 2 and "layers" in name
)
WORDS = [word for word in dict.fromkeys(TEXT.split()) if word.isalpha()]
RECORDS = [
    {
        "question": f"Who said {word}?",
        "choices": [WORDS[(i + step) % len(WORDS)] for step in (1, 5, 8)],
        "answer": i % 3,
    }
    for i, word in enumerate((WORDS * 3)[:30])
]


@pytest.fixture
def work(here):
    """The working folder with two tasks, a text and an adapter."""
    (here / "tales.json").write_text(json.dumps(RECORDS))
    lines = [json.dumps(record) + "\n" for record in RECORDS[::-1]]
    (here / "more.jsonl").write_text("".join(lines))
    (here / "text.txt").write_text(TEXT)
    write_mlx_lm_adapter(here / "adapter", make_factors(weights_of(UNEVEN), MODULES))
    return here


def run(*args):
    result = call("evaluate", "--model", "model", *args)
    assert result.exit_code == 0, result.stderr
    return result


def score_json(*args):
    return json.loads(run(*args, "--json").stdout)


def scored(*load_args, name="tales.json", limit=None):
    model, tokenizer = load(*load_args)
    return score_task(
        OpenELMScorer(model, tokenizer), read_task(Path(name), limit=limit)
    )


# One model -----------------------------------------------------------------------


def test_json_of_tasks_has_the_documented_fields(work):
    scores = score_json(
        "--tasks", "tales.json", "--tasks", "more.jsonl", "--limit", "20"
    )
    assert scores.keys() == {"tasks"}
    for name, file in (("tales", "tales.json"), ("more", "more.jsonl")):
        expected = scored("model", name=file, limit=20).score
        task = scores["tasks"][name]
        assert {n: task[n] for n in ("acc", "acc_norm", "stderr", "n")} == {
            "acc": expected.acc,
            "acc_norm": expected.acc_norm,
            "stderr": pytest.approx(expected.stderr),
            "n": 20,
        }


def test_a_text_and_tasks_are_scored_in_one_run(work):
    scores = score_json("--text", "text.txt", "--tasks", "tales.json")
    alone = score_json("--text", "text.txt")
    assert alone.items() <= scores.items()
    assert scores["tasks"]["tales"]["n"] == 30
    shown = run("--text", "text.txt", "--tasks", "tales.json").stdout
    assert f"{alone['bits_per_byte']:.4f} bits per byte" in shown
    acc = scores["tasks"]["tales"]["acc"]
    assert f"{100 * acc:.2f} ±" in shown


def test_a_stopped_run_resumes_from_its_folder(work, monkeypatch):
    args = ("--tasks", "tales.json", "--compare", "adapter", "--output", "kept")
    first = score_json(*args)
    assert sorted(str(p.relative_to(work)) for p in (work / "kept").rglob("*.*")) == [
        "kept/adapter/tales.jsonl",
        "kept/model/tales.jsonl",
    ]

    def answer(*args, **options):
        raise AssertionError("the answers were saved")

    monkeypatch.setattr("mlx_openelm.evaluation.scorer.score_requests", answer)
    assert score_json(*args) == first


# Several models ------------------------------------------------------------------


def test_differences_between_models_are_paired(work):
    scores = score_json("--tasks", "tales.json", "--compare", "adapter")
    base, adapted = scored("model"), scored("model", "adapter")
    assert base.score != adapted.score
    assert [model["model"] for model in scores["models"]] == ["model", "adapter"]
    assert scores["tasks"] == scores["models"][0]["tasks"]
    assert scores["models"][1]["tasks"]["tales"]["acc"] == adapted.score.acc
    by_metric = {entry["metric"]: entry for entry in scores["differences"]}
    for metric, right in (("acc", "right"), ("acc_norm", "right_norm")):
        entry = by_metric[metric]
        difference = paired_difference(
            *([float(getattr(o, right)) for o in s.outcomes] for s in (base, adapted))
        )
        assert (entry["model"], entry["from"]) == ("adapter", "model")
        assert entry["value"] == pytest.approx(difference.value)
        assert entry["stderr"] == pytest.approx(difference.stderr)
    shown = run("--tasks", "tales.json", "--compare", "adapter").stdout
    value, stderr = (100 * by_metric["acc"][name] for name in ("value", "stderr"))
    assert f"{value:+.2f} ± {stderr:.2f}" in shown


def test_the_adapter_of_the_first_model_is_not_the_others(work):
    args = ("--tasks", "tales.json", "--adapter-path", "adapter")
    scores = score_json(*args, "--compare", "model")
    accs = [model["tasks"]["tales"]["acc_norm"] for model in scores["models"]]
    assert [model["model"] for model in scores["models"]] == ["adapter", "model"]
    assert accs == [
        scored("model", "adapter").score.acc_norm,
        scored("model").score.acc_norm,
    ]


def test_only_one_model_is_in_memory(work, monkeypatch):
    loaded, in_memory = [], []
    opening = evaluate_module.open_model

    def watch(*args):
        in_memory.append(sum(one() is not None for one in loaded))
        opened = opening(*args)
        loaded.append(weakref.ref(opened[1]))
        return opened

    monkeypatch.setattr(evaluate_module, "open_model", watch)
    others = ("--compare", "adapter", "--compare", "demo")
    run("--tasks", "tales.json", "--limit", "2", *others)
    assert in_memory == [0, 0, 0]


def test_texts_of_several_models_are_a_table(work):
    shown = run("--text", "text.txt", "--compare", "adapter").stdout
    head, model, adapter = shown.splitlines()
    assert "bits per byte" in head
    assert (model.split()[0], adapter.split()[0]) == ("model", "adapter")
    assert model.split()[1] != adapter.split()[1]


# Files ---------------------------------------------------------------------------


def test_a_csv_file_has_every_score(work):
    args = ("--tasks", "tales.json", "--text", "text.txt", "--compare", "adapter")
    scores = score_json(*args, "--csv", "scores.csv")
    rows = list(csv.DictReader(io.StringIO((work / "scores.csv").read_text())))
    assert len(rows) == 2 * (2 + 3)
    acc = {row["model"]: row for row in rows if row["metric"] == "acc"}
    for model in scores["models"]:
        expected = 100 * model["tasks"]["tales"]["acc"]
        assert float(acc[model["model"]]["value"]) == pytest.approx(expected)
    difference = next(d for d in scores["differences"] if d["metric"] == "acc")
    got = float(acc["adapter"]["difference_from_first"])
    assert got == pytest.approx(100 * difference["value"])
    assert acc["model"]["difference_from_first"] == ""
    assert all(None not in row and None not in row.values() for row in rows)


def test_a_picture_shows_every_score(work):
    (work / "adapter").rename(work / "a & <b>")
    scores = score_json(
        *("--tasks", "tales.json", "--compare", "a & <b>", "--picture", "scores.svg")
    )
    root = ElementTree.parse(work / "scores.svg").getroot()
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"model", "a & <b>", "tales", "acc, n = 30"} <= set(texts)
    for model in scores["models"]:
        metric = model["tasks"]["tales"]["metrics"]["acc"]
        assert f"{100 * metric['value']:.2f} ± {100 * metric['stderr']:.2f}" in texts


def test_a_report_that_cannot_be_written_is_refused_before_scoring(work):
    (work / "old.csv").write_text("mine")
    tasks = ("evaluate", "--model", "model", "--tasks", "tales.json")
    expect_error(work, *tasks, "--csv", "old.csv", message="old.csv exists already")
    expect_error(work, *tasks, "--csv", "new.txt", message="ends in .csv")
    expect_error(work, *tasks, "--picture", "new.png", message="ends in .svg")
    expect_error(
        work, *tasks, "--csv", "none/new.csv", message="Cannot write none/new.csv"
    )
    run("--tasks", "tales.json", "--csv", "old.csv", "--force")
    assert (work / "old.csv").read_text().startswith("model,task,")


# Suites --------------------------------------------------------------------------


@pytest.fixture
def peft(work, monkeypatch):
    """Two of the suite's files, and a model of the sizes of OpenELM-270M."""
    record = {
        "instruction": "Is the wolf there?\n\nAnswer format: true/false",
        "input": "",
        "output": "the correct answer is true",
    }
    records = [record | {"answer": ("true", "false")[i % 2]} for i in range(12)]
    (work / "peft").mkdir()
    for name in ("boolq", "openbookqa"):
        (work / "peft" / f"{name}.json").write_text(json.dumps(records))
    monkeypatch.setattr(OpenELMConfig, "size_name", "OpenELM-270M")
    return work


def test_a_suite_is_shown_beside_the_published_scores(peft):
    args = ("--suite", "peft", "--tasks-dir", "peft", "--adapter-path", "adapter")
    result = run(*args)
    assert "lacks ARC-Challenge.json, ARC-Easy.json, hellaswag.json" in result.stderr
    assert "adapter beside OpenELM-270M with LoRA" in result.stdout
    assert "CoreNet, README-peft.md, checked" in result.stdout
    scores = score_json(*args)
    (model,) = scores["suite"]["models"]
    by_column = {score["column"]: score for score in model["scores"]}
    boolq = by_column["BoolQ"]
    assert boolq["published"] == 62.14
    assert boolq["value"] == pytest.approx(100 * scores["tasks"]["boolq"]["acc"])
    assert boolq["difference"] == pytest.approx(boolq["value"] - 62.14)
    assert by_column["PIQA"]["value"] is None
    average = model["averages"][0]
    assert average["column"] == "average of 2 of 8"
    assert average["published"] == pytest.approx((62.14 + 28.00) / 2)
    words = result.stdout.split()
    for value in (62.14, boolq["value"], boolq["difference"]):
        assert any(word.lstrip("+") == f"{value:.2f}" for word in words)


def test_the_folders_of_llm_adapters_are_the_same_tasks(peft):
    """Each task is TASK/test.json, so all files have the same name."""
    args = ("--suite", "peft", "--adapter-path", "adapter", "--tasks-dir")
    expected = score_json(*args, "peft")
    for name in ("boolq", "openbookqa"):
        (peft / "adapters" / name).mkdir(parents=True)
        file = peft / "peft" / f"{name}.json"
        file.rename(peft / "adapters" / name / "test.json")
    assert score_json(*args, "adapters") == expected


def test_a_base_without_its_row_and_an_adapter_with_one_are_compared(peft):
    args = ("--suite", "peft", "--tasks-dir", "peft", "--compare", "adapter")
    result = run(*args, "--picture", "suite.svg", "--csv", "suite.csv")
    assert "model: no published scores for this model" in result.stdout
    assert "adapter beside OpenELM-270M with LoRA" in result.stdout
    assert "unverified" in result.stdout
    picture = (peft / "suite.svg").read_text()
    hollow = re.findall(r'<g class="published">.*?<use [^>]*>', picture)
    assert len(hollow) == 3  # two columns and the average
    assert all("var(--orange)" in dot for dot in hollow)  # of the adapter
    left, width = SCORE_AREA
    positions = [float(re.search(r' x="([0-9.]+)"', dot)[1]) for dot in hollow]
    assert pytest.approx(left + width * 0.6214, abs=0.01) in positions
    rows = list(csv.DictReader(io.StringIO((peft / "suite.csv").read_text())))
    published = {(r["model"], r["task"], r["metric"]): r["published"] for r in rows}
    assert published["adapter", "boolq", "acc"] == "62.14"
    assert published["adapter", "boolq", "acc_norm"] == ""
    assert published["model", "boolq", "acc"] == ""


# Bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ("evaluate",),
        ("evaluate", "--limit", "3"),
        ("evaluate", "--suite", "openllm", "--tasks", "piqa"),
        ("evaluate", "--text", "a.txt", "--limit", "3"),
        ("evaluate", "--text", "a.txt", "--num-fewshot", "3"),
        ("evaluate", "--text", "a.txt", "--output", "kept"),
        ("evaluate", "--text", "a.txt", "--picture", "a.svg"),
        ("evaluate", "--tasks", "piqa", "--window", "9"),
    ],
)
def test_wrong_usage_is_code_2(here, args):
    result = call(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--suite", "zero"), "choose zero-shot, openllm, llm360, peft"),
        (("--suite", "peft"), "with --tasks-dir"),
        (("--suite", "peft", "--tasks-dir", "model"), "has none of the files"),
        (("--suite", "openllm", "--num-fewshot", "3"), "leave out --num-fewshot"),
        (("--tasks", "tales.json", "--tasks-dir", "."), "is for --suite peft"),
        (("--tasks", "tales.json", "--num-fewshot", "3"), "tales.json is a file"),
        (
            ("--tasks", "tales.json", "--include-path", "."),
            "is for tasks of the harness",
        ),
        (("--tasks", "tales.json", "--limit", "0"), "--limit is 0"),
        (("--tasks", "x", "--num-fewshot", "-1"), "--num-fewshot is -1"),
        (("--tasks", "x", "--batch-size", "0"), "--batch-size is 0"),
        (("--text", "text.txt", "--window", "0"), "--window is 0"),
        (("--tasks", "none.json"), "none.json"),
        (("--tasks", "tales.json", "--tasks", "./tales.json"), "the name tales"),
        (("--tasks", "tales.json", "--compare", "nowhere"), "no folder nowhere"),
        (("--tasks", "tales.json", "--compare", "model"), "model is named twice"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(
    work, monkeypatch, args, message
):
    monkeypatch.setattr(evaluate_module, "open_model", None)  # nothing is loaded
    expect_error(work, "evaluate", "--model", "model", *args, message=message)


def test_two_models_do_not_share_a_folder_of_answers(work):
    shutil.copytree(work / "model", work / "a" / "model")
    (work / "model").rename(work / "a_model")
    args = ("--model", "a_model", "--compare", "a/model", "--tasks", "tales.json")
    message = "both be in kept/a_model"
    expect_error(work, "evaluate", *args, "--output", "kept", message=message)


def test_a_harness_that_is_not_installed_is_one_sentence(work, monkeypatch):
    monkeypatch.setattr(harness_model, "find_spec", lambda name: None)
    args = ("evaluate", "--model", "model", "--tasks", "arc_easy")
    expect_error(work, *args, message="pip install 'mlx-openelm[eval]'")


# The harness ---------------------------------------------------------------------


@pytest.mark.interop
def test_a_harness_task_and_a_task_file_are_scored_together(work):
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    (work / "own").mkdir()
    (work / "own" / "wept.yaml").write_text(
        "task: wept\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {work}/tales.json}}, "
        f"cache_dir: {work}/cache}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\nmetric_list:\n'
        "- {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "- {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    args = ("--tasks", "wept", "--include-path", "own", "--tasks", "tales.json")
    result = run(*args, "--compare", "adapter", "--json", "--output", "kept")
    scores = json.loads(result.stdout)
    for model in scores["models"]:
        wept, tales = model["tasks"]["wept"], model["tasks"]["tales"]
        for name in ("acc", "acc_norm", "n"):
            assert wept[name] == tales[name]
        assert wept["stderr"] == pytest.approx(tales["stderr"])
    both = {(d["task"], d["metric"]): d["value"] for d in scores["differences"]}
    assert both["wept", "acc"] == pytest.approx(both["tales", "acc"])
    assert (work / "kept" / "adapter" / "wept.json").is_file()
    quiet = ("--json", "--quiet", "--output", "kept")
    again = run(*args, "--compare", "adapter", *quiet)
    assert json.loads(again.stdout) == scores
    assert again.stderr == ""
