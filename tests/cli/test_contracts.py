"""Contracts of the command line: stdout, stderr, exit codes, JSON fields."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from commands import call, expect_error, snapshot
from models import TEXT, small_tokenizer
from places import ROOT

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.texts import evaluate
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate
from mlx_openelm.recipe_loader import bundled_recipes
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.version import __version__

MODEL = ("--model", "model")
HEAVY = ("mlx", "mlx_lm", "numpy", "sentencepiece", "torch", "transformers", "yaml")


def run(*args, code=None, **options):
    started = ["-c", code] if code else ["-m", "mlx_openelm"]
    return subprocess.run(
        [sys.executable, *started, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        **options,
    )


def answer(*args, **options):
    """Return the stdout of a command, which must succeed."""
    result = call(*args, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


# The program ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [("--help",), ("generate", "-h"), ("convert", "--help")]
)
def test_help_imports_no_large_library(args):
    code = f"""
import atexit, sys
atexit.register(lambda: print(sorted(sys.modules.keys() & {set(HEAVY)})))
from mlx_openelm.cli.main import main
main()
"""
    result = run(*args, code=code)
    assert result.returncode == 0
    assert "Usage" in result.stdout
    assert result.stdout.endswith("[]\n")


def test_the_package_runs_as_a_module():
    result = run("--version")
    assert (result.returncode, result.stderr) == (0, "")
    version = re.escape(__version__)
    pattern = rf"mlx-openelm {version} \(mlx [\d.]+, mlx-lm [\d.]+\)\n"
    assert re.fullmatch(pattern, result.stdout)


@pytest.mark.parametrize(
    "args",
    [
        ("--nonsense",),
        ("nonsense",),
        ("generate", "Hi", *MODEL, "--nonsense"),
        ("generate", "Hi", *MODEL, "--max-tokens", "many"),
        ("generate", "Hi", *MODEL, "--prompt", "Hi"),
        ("convert",),
        ("inspect",),
        ("inspect", "model", "--context", "0"),
        ("evaluate", *MODEL),
        ("pretrain",),
    ],
)
def test_wrong_usage_is_code_2_and_writes_nothing_to_stdout(here, args):
    before = snapshot(here)
    result = call(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage" in result.stderr
    assert snapshot(here) == before


def test_a_traceback_is_shown_on_demand_only(here, monkeypatch):
    expect_error(here, "inspect", "nowhere", message="There is no folder nowhere")
    monkeypatch.setenv("MLX_OPENELM_DEBUG", "1")
    result = call("inspect", "nowhere")
    assert isinstance(result.exception, OpenELMError)
    monkeypatch.setenv("MLX_OPENELM_DEBUG", "0")
    assert isinstance(call("inspect", "nowhere").exception, SystemExit)


# The prompt ----------------------------------------------------------------------


def test_a_prompt_is_an_argument_an_option_or_stdin(here):
    greedy = ("generate", *MODEL, "-m", "8")
    expected = generate(*load("model"), "Once upon", Sampling(max_tokens=8))
    assert answer(*greedy, "Once upon") == expected
    assert answer(*greedy, "--prompt", "Once upon") == expected
    assert answer(*greedy, "-p", "Once upon") == expected
    for piped in ("Once upon", "Once upon\n"):  # the newline that `echo` adds
        assert answer(*greedy, input=piped) == expected
        assert answer(*greedy, "-", input=piped) == expected
    assert answer(*greedy, input="Once upon\n\n") != expected
    assert answer(*greedy, "Once") != expected


def test_a_terminal_without_a_prompt_is_wrong_usage(here):
    controller, terminal = pty.openpty()
    try:
        result = run("generate", *MODEL, stdin=terminal)
    finally:
        os.close(controller)
        os.close(terminal)
    assert (result.returncode, result.stdout) == (2, "")
    assert "give a prompt" in result.stderr


# generate ------------------------------------------------------------------------


def test_json_of_generate_is_one_document_with_the_documented_fields(here):
    result = call("generate", "Once", *MODEL, "-m", "5", "--json")
    report = json.loads(result.stdout)
    assert report.keys() >= {
        *("text", "tokens", "finish_reason", "prompt_tokens", "generation_tokens"),
        *("prompt_tps", "generation_tps", "peak_memory_bytes", "time_to_first_token_s"),
    }
    assert report["text"] == small_tokenizer().decode(report["tokens"])
    assert report["text"] == answer("generate", "Once", *MODEL, "-m", "5")
    assert (report["finish_reason"], report["generation_tokens"]) == ("length", 5)
    assert result.stdout.count("\n") == 1


def test_stdout_is_the_answer_and_stderr_one_line_of_statistics(here):
    args = ("generate", "Once", *MODEL, "-m", "5")
    streamed, whole, quiet = (
        call(*args),
        call(*args, "--no-stream"),
        call(*args, "--quiet"),
    )
    assert streamed.stdout == whole.stdout == quiet.stdout != ""
    assert quiet.stderr == ""
    statistics = [
        line for line in streamed.stderr.splitlines() if "prompt tokens" in line
    ]
    assert len(statistics) == 1
    assert "5 new" in statistics[0]
    assert all(re.fullmatch(r"\[.*\]", line) for line in streamed.stderr.splitlines())


def test_a_full_context_is_reported(here):
    result = call("generate", "Once", *MODEL, "-m", "999")
    assert "[the context of 64 is full]" in result.stderr
    assert "context" not in call("generate", "Once", *MODEL, "-m", "9").stderr


def test_the_environment_names_the_default_model(here, monkeypatch):
    monkeypatch.setenv("MLX_OPENELM_MODEL", "model")
    expected = answer("generate", "Once", *MODEL, "-m", "5")
    assert answer("generate", "Once", "-m", "5") == expected
    expect_error(
        here, "generate", "Once", "--model", "nowhere", message="no folder nowhere"
    )


def test_flags_override_the_models_defaults(here):
    defaults = here / "model" / "generation_config.json"
    defaults.write_text(json.dumps({"max_new_tokens": 3, "repetition_penalty": 9.0}))
    args = ("generate", "Once", *MODEL, "--json")
    report = json.loads(answer(*args))
    assert report["generation_tokens"] == 3
    overridden = json.loads(answer(*args, "-m", "4", "--repetition-penalty", "1"))
    assert overridden["generation_tokens"] == 4
    plain = generate(*load("model"), "Once", Sampling(max_tokens=4))
    assert overridden["text"] == plain


def test_a_seed_repeats_an_answer(here):
    args = ("generate", "Once", *MODEL, "--temp", "1", "-m", "20", "--seed")
    assert answer(*args, "3") == answer(*args, "3")
    assert answer(*args, "3") != answer(*args, "4")


@pytest.mark.parametrize("option", ["--temp", "--top-p"])
def test_a_tiny_temperature_or_top_p_is_greedy(here, option):
    args = ("generate", "Once", *MODEL, "-m", "9")
    drawn = answer(*args, "--temp", "1", option, "1e-300", "--seed", "1")
    assert drawn == answer(*args)


# Other commands ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"), [((), "source-mlx"), (("--q-bits", "8"), "source-mlx-8bit")]
)
def test_convert_prints_the_path_which_has_a_default(here, options, name):
    group = ("--q-group-size", "32")
    result = call("convert", "source", *options, *group)
    assert (result.exit_code, result.stdout) == (0, f"{name}\n")
    assert f"mlx-openelm generate --model {name}" in result.stderr
    open_folder(here / name)
    result = call("convert", "--hf-path", "source", "--mlx-path", "x/y z é", "--quiet")
    assert (result.stdout, result.stderr) == ("x/y z é\n", "")
    open_folder(here / "x" / "y z é")


def test_json_of_convert_is_its_report(here):
    report = json.loads(answer("convert", "source", "--json"))
    assert report["path"] == "source-mlx"
    assert (
        report["num_parameters"] == open_folder(here / "source").config.num_parameters
    )
    assert (report["dtype"], report["bits"]) == ("bfloat16", None)


def test_json_of_evaluate_has_the_documented_fields(here):
    (here / "text.txt").write_text(TEXT)
    args = ("evaluate", "--text", "text.txt", *MODEL, "--window", "32")
    report = json.loads(answer(*args, "--json"))
    score = evaluate(*load("model"), text="text.txt", window=32)
    assert report.keys() == {
        *("nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes")
    }
    assert report["bits_per_byte"] == pytest.approx(score.bits_per_byte)
    assert report["bytes"] == len(TEXT.encode())
    assert f"{score.bits_per_byte:.4f} bits per byte" in answer(*args)


def test_inspect_reads_no_weight_and_has_json(here):
    path = here / "model" / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + bytes(len(content) - start))
    report = json.loads(answer("inspect", "model", "--json"))
    config = open_folder(here / "model").config
    assert report["num_parameters"] == config.num_parameters
    shown = answer("inspect", "model", "--quiet")
    assert f"{config.num_parameters:,} parameters" in shown
    assert "source" in shown


def test_recipes_are_listed_shown_and_copied(here):
    name, path = next(iter(bundled_recipes().items()))
    assert answer("recipes") == answer("recipes", "list")
    assert answer("recipes").startswith(name)
    assert json.loads(answer("recipes", "list", "--json")).keys() == {
        *bundled_recipes()
    }
    assert answer("recipes", "show", name) == path.read_text()
    assert answer("recipes", "copy", name) == f"{path.name}\n"
    assert answer("recipes", "copy", name, "mine.yaml") == "mine.yaml\n"
    assert (here / "mine.yaml").read_text() == path.read_text()
    expect_error(here, "recipes", "copy", name, message="exists already")


def test_warnings_of_other_libraries_are_not_in_the_output(here):
    result = run("generate", "Once", *MODEL, "-m", "3", "--quiet", "--json")
    assert result.stderr == ""
    assert json.loads(result.stdout)["generation_tokens"] == 3


def test_convert_writes_the_receipt_and_inspect_shows_it(here):
    flags = ("--q-bits", "4", "--q-group-size", "32")
    (here / "mine.txt").write_text(TEXT)
    result = call("convert", "source", *flags, "--calibration", "mine.txt")
    assert (result.exit_code, result.stdout) == (0, "source-mlx-4bit\n")
    assert "Receipt: mean KL" in result.stderr
    assert "mine.txt" in result.stderr
    receipt = open_folder(here / "source-mlx-4bit").metadata["receipt"]
    assert 0 < receipt["mean_kl"] < receipt["p99_kl"]
    assert "mean KL" in call("inspect", "source-mlx-4bit").stdout
    result = call("convert", "source", *flags, "--no-receipt", "--mlx-path", "bare")
    assert "Receipt" not in result.stderr
    assert "receipt" not in open_folder(here / "bare").metadata
    result = call(
        "convert", "source", *flags, "--tokenizer", "none", "--mlx-path", "mute"
    )
    assert "No receipt: measuring it needs" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Cannot read mine.txt"),
        (b"\xff\xfe", "as UTF-8 text"),
        (b"short", "calibration text has"),
    ],
)
def test_a_wrong_calibration_text_is_refused_before_the_conversion(
    here, content, message
):
    if content is not None:
        (here / "mine.txt").write_bytes(content)
    flags = ("--q-bits", "4", "--q-group-size", "32", "--calibration", "mine.txt")
    expect_error(here, "convert", "source", *flags, message=message)
