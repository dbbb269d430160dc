"""`evaluate --checkpoints`: scores over the iterations of a training run."""

import csv
import io
import json
from xml.etree import ElementTree

import pytest
from commands import call, expect_error
from models import TEXT, UNEVEN, small_tokenizer, weights_of, write_pt

import mlx_openelm
from converters.conversion import run as conversion
from mlx_openelm.cli.evaluation.checkpoints import list_checkpoints
from mlx_openelm.evaluation import scorer

pytest.importorskip("torch", reason="needs PyTorch to write .pt files")

WORDS = list(dict.fromkeys(TEXT.split()))[:12]
RECORDS = [
    {
        "question": f"Who said {word}?",
        "choices": [WORDS[(i + step) % len(WORDS)] for step in (1, 5, 8)],
        "answer": i % 3,
    }
    for i, word in enumerate(WORDS)
]
STEPS = (4999, 9999, 14999)
NAMES = [f"run/checkpoint_epoch_0_iter_{step}.pt" for step in STEPS]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A run with three checkpoints and their average, a task and a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for seed, name in enumerate([*NAMES, "run/checkpoint_average.pt"]):
        write_pt(tmp_path / name, weights_of(UNEVEN, seed))
    (tmp_path / "run" / "tokenizer.model").write_bytes(small_tokenizer().model_proto)
    (tmp_path / "tales.json").write_text(json.dumps(RECORDS))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(*args):
    result = call("evaluate", *args)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def score_json(*args):
    return json.loads(run(*args, "--json").stdout)["checkpoints"]


def load_alone(name, folder):
    """Convert one checkpoint as a user does, and load it."""
    mlx_openelm.convert(name, folder, dtype="float32", receipt=False)
    return mlx_openelm.load(folder)


def test_each_checkpoint_has_its_own_scores_in_order(work):
    args = ("--tasks", "tales.json", "--text", "text.txt")
    scores = score_json(*args, "--checkpoints", *NAMES[::-1])
    assert [one["iteration"] for one in scores] == list(STEPS)
    assert [one["checkpoint"] for one in scores] == NAMES
    for name, one in zip(NAMES, scores, strict=True):
        loaded = load_alone(name, f"{name}-mlx")
        expected = mlx_openelm.evaluate(*loaded, text="text.txt")
        assert one["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
        expected = mlx_openelm.evaluate(*loaded, tasks="tales.json").tasks["tales"]
        assert one["tasks"]["tales"]["acc"] == expected.acc
        assert one["tasks"]["tales"]["stderr"] == pytest.approx(expected.stderr)
    assert len({one["bits_per_byte"] for one in scores}) == 3


def test_folders_and_files_are_mixed_and_repeated_options_work(work):
    mlx_openelm.convert(NAMES[0], "step-4999-mlx", dtype="float32", receipt=False)
    args = ("--text", "text.txt", "--checkpoints", NAMES[1], "--checkpoints")
    scores = score_json(*args, "step-4999-mlx", "run/checkpoint_average.pt")
    assert [one["iteration"] for one in scores] == [4999, 9999, None]
    first = score_json("--text", "text.txt", "--checkpoints", NAMES[0])
    assert scores[0]["bits_per_byte"] == pytest.approx(first[0]["bits_per_byte"])


@pytest.mark.parametrize(
    ("name", "iteration"),
    [
        ("checkpoint_epoch_0_iter_329999.pt", 329999),
        ("checkpoint-500", 500),
        ("global_step1000", 1000),
        ("iteration_20.pt", 20),
        ("Steps-7-mlx", 7),
        ("checkpoint_average.pt", None),
    ],
)
def test_the_iteration_is_that_of_the_name(work, name, iteration):
    if name.endswith(".pt"):
        write_pt(work / "run" / name, weights_of(UNEVEN))
    else:
        mlx_openelm.convert(NAMES[0], f"run/{name}", dtype="float32", receipt=False)
    (found,) = list_checkpoints([work / "run" / name], None, offline=True)
    assert found.iteration == iteration


def test_the_folder_of_a_run_stands_for_its_checkpoints(work):
    scores = score_json("--text", "text.txt", "--checkpoints", "run")
    assert [one["checkpoint"] for one in scores] == NAMES


def test_the_table_the_csv_and_the_picture_have_every_score(work):
    args = ("--tasks", "tales.json", "--text", "text.txt", "--csv", "a.csv")
    result = run(*args, "--picture", "a.svg", "--checkpoints", *NAMES)
    scores = score_json(
        "--tasks", "tales.json", "--text", "text.txt", "--checkpoints", *NAMES
    )
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["checkpoint", "iteration"]
    for line, one in zip(lines[1:], scores, strict=False):
        assert f"{one['iteration']:,}" in line
        assert f"{one['bits_per_byte']:.4f}" in line
        assert f"{100 * one['tasks']['tales']['acc']:.2f} ±" in line
    rows = list(csv.DictReader(io.StringIO((work / "a.csv").read_text())))
    assert {row["model"] for row in rows} == set(NAMES)
    root = ElementTree.parse(work / "a.svg").getroot()
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"iteration", "bits per byte", "tales acc (%)"} <= set(texts)
    described = (work / "a.svg").read_text()
    for one in scores:
        assert f"{one['bits_per_byte']:.4g} at {one['iteration']:,}" in described


def test_a_stopped_run_converts_and_scores_only_what_is_missing(work, monkeypatch):
    args = ("--tasks", "tales.json", "--output", "kept", "--checkpoints", *NAMES)
    expected = score_json("--tasks", "tales.json", "--checkpoints", *NAMES)
    converted, real, stops = [], conversion.convert, [KeyboardInterrupt()]

    def watch(source, *rest, **options):
        converted.append(str(source))
        if stops and converted == NAMES[:2]:
            raise stops.pop()
        return real(source, *rest, **options)

    monkeypatch.setattr(conversion, "convert", watch)
    assert call("evaluate", *args).exit_code == 130
    assert score_json(*args) == expected
    assert converted == [NAMES[0], NAMES[1], NAMES[1], NAMES[2]]
    converted.clear()
    assert score_json(*args) == expected  # nothing is converted again
    assert converted == []
    smaller = score_json(*args, "--limit", "3")  # other settings are scored
    assert [one["tasks"]["tales"]["n"] for one in smaller] == [3, 3, 3]


def test_answers_of_another_limit_are_taken_over(work, monkeypatch):
    args = ("--tasks", "tales.json", "--output", "kept", "--checkpoints", NAMES[0])
    score_json(*args, "--limit", "5")
    sizes, real = [], scorer.score_requests
    monkeypatch.setattr(
        scorer, "score_requests", lambda m, r: [sizes.append(len(r)), real(m, r)][1]
    )
    scores = score_json(*args)
    assert sum(sizes) == 3 * (len(RECORDS) - 5)
    assert scores == score_json("--tasks", "tales.json", "--checkpoints", NAMES[0])


def test_a_changed_checkpoint_is_not_mixed_with_old_answers(work):
    args = ("--tasks", "tales.json", "--output", "kept", "--checkpoints", NAMES[0])
    score_json(*args)
    write_pt(work / NAMES[0], weights_of(UNEVEN, 7))
    result = call("evaluate", *args)
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert score_json(*args, "--force") == score_json(
        "--tasks", "tales.json", "--checkpoints", NAMES[0]
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("none.pt",), "There is no checkpoint none.pt"),
        ((NAMES[0], f"./{NAMES[0]}"), "is named twice"),
    ],
)
def test_bad_checkpoints_are_one_sentence(work, args, message):
    command = ("evaluate", "--text", "text.txt", "--checkpoints")
    expect_error(work, *command, *args, message=message)


def test_a_tokenizer_elsewhere_is_named(work):
    (work / "run" / "tokenizer.model").rename(work / "other.model")
    args = ("--text", "text.txt", "--checkpoints", NAMES[0])
    assert score_json(*args, "--tokenizer", "other.model")


@pytest.mark.parametrize("flag", ["--model", "--compare", "--adapter-path"])
def test_options_of_other_models_are_wrong_usage(work, flag):
    args = ("--text", "text.txt", "--checkpoints", NAMES[0], flag, "demo")
    result = call("evaluate", *args)
    assert result.exit_code == 2
    assert "--checkpoints" in result.stderr


def test_a_tokenizer_without_checkpoints_is_wrong_usage(work):
    assert call("evaluate", "--text", "text.txt", "--tokenizer", "x").exit_code == 2


def test_stored_scores_are_those_of_the_tokenizer(work):
    """With another tokenizer, stored scores are not returned."""
    (work / "other.model").write_bytes(small_tokenizer().model_proto)
    args = ("--text", "text.txt", "--checkpoints", NAMES[0], "--output", "out")
    score_json(*args)
    stored = work / "out" / NAMES[0].replace("/", "_") / "scores.json"
    before = stored.read_text()
    score_json(*args, "--tokenizer", "other.model")
    assert stored.read_text() != before


def test_an_adapter_is_refused_by_its_name(work):
    (work / "adapter").mkdir()
    (work / "adapter" / "adapter_config.json").write_text("{}")
    (work / "adapter" / "adapters.safetensors").write_bytes(b"")
    args = ("evaluate", "--text", "text.txt", "--checkpoints", "adapter")
    message = "adapter: an adapter, not a model; score it with --compare"
    expect_error(work, *args, message=message)
