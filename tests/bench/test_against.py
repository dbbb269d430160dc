"""`bench --against mlx-lm`: the pairs of each round, and a true comparison."""

import json

import pytest
from commands import call

from mlx_openelm.bench import against
from mlx_openelm.bench.against import OURS, THEIRS
from mlx_openelm.errors import OpenELMError

SPEEDS = {
    OURS: [{"decode": 10.0, "prompt": 50.0}, {"decode": 14.0, "prompt": 80.0}],
    THEIRS: [{"decode": 5.0, "prompt": 100.0}, {"decode": 10.0, "prompt": 100.0}],
}


def faked(calls):
    left = {engine: list(rows) for engine, rows in SPEEDS.items()}

    def measure(engine):
        calls.append(engine)
        return left[engine].pop(0)

    return measure


def test_ratios_are_those_of_the_pairs_of_each_round():
    calls = []
    decode, prompt = against._compare(("decode", "prompt"), "tokens/s", faked(calls), 2)
    assert calls == [OURS, THEIRS, THEIRS, OURS]  # each is first in every other round
    assert (decode.ratio.low, decode.ratio.high) == (1.4, 2.0)
    assert prompt.ratio.median == pytest.approx(0.65)
    assert (decode.ours.median, decode.theirs.median) == (12.0, 7.5)


def test_fewer_seconds_are_a_ratio_above_one():
    seconds = {OURS: 2.0, THEIRS: 6.0}
    (measure,) = against._compare(
        ("shell",), "s", lambda engine: {"shell": seconds[engine]}, 1
    )
    assert measure.ratio.median == 3.0


def test_a_program_that_fails_is_reported_in_its_row():
    def fail(engine):
        raise OpenELMError(f"{engine} failed: no memory")

    (measure,) = against._compare(("shell",), "s", fail, 2)
    assert measure.problem == f"{OURS} failed: no memory"
    assert measure.ratio is None


@pytest.fixture
def quick(monkeypatch):
    speeds = {"decode": {"decode": 3.0, "prompt": 9.0}, "train": {"train": 4.0}}
    monkeypatch.setattr(against, "_in_process", lambda engine, step, _: speeds[step])
    monkeypatch.setattr(against, "_time_shell", lambda engine, model: 1.0)

    def fail(engine, model):
        raise OpenELMError("mlx-lm failed: no disk")

    monkeypatch.setattr(against, "_time_convert", fail)


def test_the_report_is_a_table_a_picture_and_json(quick, tmp_path):
    chart = tmp_path / "chart.svg"
    arguments = ("bench", "--against", "mlx-lm", "--rounds", "2")
    table = call(*arguments, "--chart", chart)
    assert table.exit_code == 0, table.stderr
    for words in ("new tokens", "1.00 to 1.00", "mlx-lm failed: no disk", "Ratio:"):
        assert words in table.stdout
    assert "times as fast as mlx-lm" in chart.read_text()
    report = json.loads(call(*arguments, "--json", "--quiet").stdout)
    assert [m["name"] for m in report["measures"]][:2] == ["new tokens", "prompt"]
    assert report["measures"][0]["ratio"]["median"] == 1.0


@pytest.mark.parametrize(
    "options", [("--size", "270M"), ("--bits", "4"), ("--batch", "2")]
)
def test_it_compares_one_model_as_stored(quick, options):
    result = call("bench", "--against", "mlx-lm", *options)
    assert result.exit_code == 2
    assert options[0] in result.stderr


def test_without_mlx_lm_it_says_what_to_install(quick, monkeypatch):
    monkeypatch.setattr(against, "find_spec", lambda name: None)
    result = call("bench", "--against", "mlx-lm")
    assert result.exit_code == 1
    assert "pip install mlx-lm" in result.stderr


@pytest.mark.proof
@pytest.mark.interop
def test_both_programs_are_measured():
    result = call(
        *("bench", "--against", "mlx-lm", "--rounds", "1", "--prompt-tokens", "20"),
        *("-m", "6", "--json", "--quiet"),
    )
    assert result.exit_code == 0, result.stderr
    measures = json.loads(result.stdout)["measures"]
    assert len(measures) == 5
    for measure in measures:
        assert measure["problem"] == "", measure
        assert measure["ratio"]["median"] > 0
