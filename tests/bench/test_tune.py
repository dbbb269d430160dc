"""`selfcheck --tune`: what is compared, what is chosen, and who reads it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from commands import call

from mlx_openelm.bench import tune
from mlx_openelm.bench.machine import measure_bandwidth
from mlx_openelm.bench.report import Figure
from mlx_openelm.bench.tune import Trial, Workload, tune_machine
from mlx_openelm.cli.views.selfcheck import describe_tuning
from mlx_openelm.errors import OpenELMError
from mlx_openelm.tuning import (
    DEFAULT,
    FILE_VARIABLE,
    STAGED,
    VARIABLES,
    Tuning,
    as_stored,
    environment_of_run,
    read_tuning,
    start_tuned,
)

OPTIONS = {"prompt_tokens": 20, "new_tokens": 6, "steps": 4, "rounds": 1}
SMALL = Workload(**OPTIONS, compiles=False, starts=False)


def run(*arguments, check=True):
    result = call(*arguments)
    assert not check or result.exit_code == 0, result.stderr
    return result


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Store settings for this machine; return a function that does."""

    def store(tuning, **changes):
        path = tmp_path / "config" / "tuning.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(as_stored(tuning) | changes))
        monkeypatch.setenv(FILE_VARIABLE, str(path))
        return path

    return store


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(
        tune, "measure_bandwidth", lambda rounds: measure_bandwidth(2**24, rounds)
    )


# Choice --------------------------------------------------------------------------


def trial(name, rates, *, identical=True):
    return Trial("decode", name, {"queue": name}, Figure.of(rates), None, identical)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([("a", [10, 11, 10]), ("b", [14, 15, 16])], "b"),
        ([("a", [10, 11, 10]), ("b", [14, 15, 16]), ("c", [17, 18, 19])], "c"),
        ([("a", [10, 11, 10]), ("b", [9, 9, 9])], "a"),
        ([("a", [10, 15, 10]), ("b", [14, 14, 14])], "a"),  # within its scatter
        ([("a", [100, 100, 100]), ("b", [102, 102, 102])], "a"),  # within the margin
    ],
)
def test_only_a_setting_that_is_clearly_faster_is_chosen(trials, expected):
    measured = [trial(name, rates) for name, rates in trials]
    assert tune._winner(measured) == {"queue": expected}


def test_a_setting_with_another_output_is_not_chosen():
    measured = [trial("a", [10]), trial("b", [30], identical=False), trial("c", [20])]
    assert tune._winner(measured) == {"queue": "c"}


def test_outputs_are_compared(monkeypatch):
    runs = {
        "a": lambda: (1.0, "same"),
        "b": lambda: (2.0, "same"),
        "c": lambda: (3.0, "other"),
        "d": None,
    }
    settings = {name: {} for name in runs}
    trials = tune._compare("x", runs, settings, 2, float("inf"))
    assert [t.identical for t in trials] == [True, True, False, None]
    assert trials[-1].reason


def test_this_machine_is_measured():
    report = tune_machine(SMALL)
    groups = {t.group for t in report.trials}
    assert groups >= {"decode", "prompt", "training", "wired memory"}
    measured = [t for t in report.trials if t.tokens_per_second is not None]
    assert {t.group for t in measured} == {"decode", "prompt", "training"}
    assert all(t.identical is not None for t in measured)
    assert all(t.bandwidth_share for t in measured if t.group == "decode")
    assert all(t.reason for t in report.trials if t not in measured)
    assert isinstance(report.chosen, Tuning)


def test_variables_are_tried_in_processes_of_their_own(monkeypatch):
    started = []

    class Result:
        stdout = json.dumps([[1.0], "same"]).encode()

    def start(command, env, **_):
        started.append({k: v for k, v in env.items() if k.startswith("MLX_")})
        return Result()

    monkeypatch.setattr(subprocess, "run", start)
    workload = Workload(**OPTIONS)
    trials = tune._try_environments(workload, float("inf"))
    assert len(started) == len(trials) > 5
    assert any(VARIABLES[0] in environment for environment in started)
    assert any(tune.TF32 in environment for environment in started)


@pytest.mark.proof
def test_a_process_measures_and_writes_json():
    ends = time.perf_counter() + 100
    results = [
        tune._measure_in_process(Workload(**OPTIONS), environment, ends)
        for environment in ({}, {tune.TF32: "1"})
    ]
    (rates, digest, reason), (again, same, _) = results
    assert rates
    assert again
    assert digest == same != ""
    assert reason == ""


def test_a_process_that_does_not_end_is_ended():
    workload = Workload(**OPTIONS)
    measured = tune._measure_in_process(workload, {}, time.perf_counter() + 0.01)
    assert measured == ([], "", "no time was left")


def test_the_reason_of_a_process_that_fails_is_not_the_time(monkeypatch):
    monkeypatch.setattr(tune, "_PROCESS", "raise SystemExit({!r})")
    workload = Workload(**OPTIONS)
    measured = tune._measure_in_process(workload, {}, time.perf_counter() + 60)
    assert measured == ([], "", "the process failed")


def test_nothing_is_started_after_the_time_limit():
    runs = {"a": lambda: pytest.fail("started"), "b": None}
    trials = tune._compare("x", runs, {name: {} for name in runs}, 2, 0.0)
    assert [trial.tokens_per_second for trial in trials] == [None, None]
    assert all(trial.reason for trial in trials)
    assert tune._winner(trials) == {}


def test_a_time_limit_inside_of_a_round_leaves_settings_unmeasured(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    runs = dict.fromkeys("abc", lambda: (1.0, "same"))
    trials = tune._compare("x", runs, {name: {} for name in runs}, 2, 4)
    assert [trial.tokens_per_second is not None for trial in trials] == [
        *(True, True, False)
    ]


def test_a_report_without_time_has_no_settings():
    report = tune_machine(replace(SMALL, seconds=0.0))
    assert report.chosen == DEFAULT
    assert all(trial.reason for trial in report.trials)


# The file ------------------------------------------------------------------------


def test_settings_are_read_back(stored):
    tuning = Tuning(STAGED, True, 512, False, environment={VARIABLES[0]: "50"})
    stored(tuning)
    assert read_tuning() == tuning


def test_settings_of_another_machine_or_version_are_ignored(stored):
    stored(Tuning(STAGED), host={"name": "another"})
    assert read_tuning() is None
    stored(Tuning(STAGED), format=99)
    assert read_tuning() is None
    assert start_tuned() == DEFAULT


@pytest.mark.parametrize(
    "settings",
    [
        {"queue": "sideways"},
        {"prefill_chunk": 0},
        {"prefill_chunk": "many"},
        {"compiled": 1},
        {"unknown": True},
        {"environment": {"PATH": "1"}},
        {"environment": {VARIABLES[0]: "x"}},
        {"environment": {VARIABLES[0]: 20}},
        {"environment": []},
        [],
        None,
    ],
)
def test_damaged_settings_are_one_error(stored, settings):
    stored(DEFAULT, settings=settings)
    with pytest.raises(OpenELMError, match="are damaged"):
        read_tuning()


def test_variables_are_set_unless_they_are_set_already(stored, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "7")
    monkeypatch.delenv(VARIABLES[0])
    stored(Tuning(environment=dict.fromkeys(VARIABLES, "50")))
    start_tuned(ignored=True)
    assert VARIABLES[0] not in os.environ
    start_tuned()
    assert [os.environ[name] for name in VARIABLES] == ["50", "7"]
    os.environ.pop(VARIABLES[0])
    start_tuned(variables={VARIABLES[0]: "9"})  # of a run to resume
    assert os.environ[VARIABLES[0]] == "9"


def test_a_run_without_a_state_has_no_variables(tmp_path):
    assert environment_of_run(tmp_path / "state.safetensors") == {}
    (tmp_path / "state.safetensors").write_bytes(b"x")
    assert environment_of_run(tmp_path / "state.safetensors") == {}


def test_a_run_with_damaged_variables_has_none(tmp_path):
    import mlx.core as mx

    state = tmp_path / "state.safetensors"
    for run in ([], {"environment": []}, {"environment": {VARIABLES[0]: 20}}):
        metadata = {"state": json.dumps({"run": run})}
        mx.save_safetensors(str(state), {"a": mx.zeros(1)}, metadata)
        assert environment_of_run(state) == {}


# Commands ------------------------------------------------------------------------


_RESUME = """
import json, sys
import mlx_openelm.tuning as tuning

def start_tuned(**options):
    print(json.dumps([options["variables"], "mlx.core" in sys.modules]))
    sys.exit()

tuning.start_tuned = start_tuned
from mlx_openelm.cli.main import main
sys.argv = ["mlx-openelm", "lora", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(
    "options", [("--adapter-path", "adapters/train"), ("-c", "recipe.yaml")]
)
def test_a_resumed_run_has_its_variables_before_mlx_is_imported(tmp_path, options):
    import mlx.core as mx

    run = tmp_path / "adapters" / "train"
    run.mkdir(parents=True)
    for folder in (run, tmp_path):
        (folder / "recipe.yaml").write_text("data: train.jsonl")
    state = json.dumps({"run": {"environment": {VARIABLES[0]: "20"}}})
    mx.save_safetensors(
        str(run / "state.safetensors"), {"a": mx.zeros(1)}, {"state": state}
    )
    result = subprocess.run(
        [sys.executable, "-c", _RESUME, "--resume", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == [{VARIABLES[0]: "20"}, False]


def test_a_config_folder_that_cannot_be_written_is_an_error_at_once(
    tmp_path, monkeypatch
):
    (tmp_path / "config").write_text("a file")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "config" / "tuning.json"))
    monkeypatch.setattr(tune, "tune_machine", lambda *_: pytest.fail("measured"))
    failed = run("selfcheck", "--tune", check=False)
    assert failed.exit_code == 1
    assert "Cannot write" in failed.stderr
    assert FILE_VARIABLE in failed.stderr


def test_selfcheck_keeps_what_won(stored, tmp_path, monkeypatch):
    path = stored(DEFAULT)
    path.unlink()
    monkeypatch.setattr(Workload, "of_device", classmethod(lambda cls: SMALL))
    monkeypatch.setattr(tune, "_winner", lambda trials: {"queue": STAGED})
    report = json.loads(run("selfcheck", "--tune", "--json").stdout)
    assert report["chosen"]["queue"] == STAGED
    assert report["trials"]
    sent = json.loads(path.with_name("tuning-report.json").read_text())
    assert sent == report
    assert json.loads(path.read_text())["settings"]["queue"] == STAGED


def test_the_time_limit_is_an_option(stored, monkeypatch):
    stored(DEFAULT)
    limits = []

    def measure(workload, on_trial):
        limits.append(workload.seconds)
        raise OpenELMError("Enough.")

    monkeypatch.setattr(tune, "tune_machine", measure)
    run("selfcheck", "--tune", check=False)
    run("selfcheck", "--tune", "--seconds", 30, check=False)
    assert limits == [tune.SECONDS, 30]
    assert run("selfcheck", "--seconds", 30, check=False).exit_code == 2


def test_inspect_shows_the_settings_and_a_damaged_file_is_an_error(stored):
    stored(Tuning(STAGED, environment={VARIABLES[0]: "50"}))
    shown = run("inspect", "demo").stdout
    assert describe_tuning(Tuning(STAGED)) in shown
    path = stored(DEFAULT, settings={"queue": "x"})
    failed = run("generate", "Once", "-m", "2", check=False)
    assert failed.exit_code != 0
    assert str(path) in failed.stderr.replace("\n", "")
    assert run("generate", "Once", "-m", "2", "--no-tuning").exit_code == 0


def test_commands_use_the_settings(stored, monkeypatch):
    stored(Tuning(STAGED, prefill_chunk=3))
    used = []
    from mlx_openelm.generation import decoding

    original = decoding.Context.read

    def read(self, model, ids):
        used.append(self.tuning)
        return original(self, model, ids)

    monkeypatch.setattr(decoding.Context, "read", read)
    text = run("generate", "Once upon a time", "-m", "5", "--temp", "0").stdout
    plain = run(
        "generate", "Once upon a time", "-m", "5", "--temp", "0", "--no-tuning"
    ).stdout
    assert text == plain
    assert used == [Tuning(STAGED, prefill_chunk=3), DEFAULT]


@pytest.mark.parametrize("options", [(), ("--no-tuning",)])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_draft_model_and_a_chat_use_the_settings(
    stored, monkeypatch, command, options
):
    tuning = Tuning(STAGED, prefill_chunk=3)
    stored(tuning)
    used = []
    from mlx_openelm.generation import decoding

    original = decoding.choose_step

    def choose(model, chosen):
        used.append(chosen)
        return original(model, chosen)

    monkeypatch.setattr(decoding, "choose_step", choose)
    drafts = ("--draft-model", "demo", "-m", "8", "--temp", "0")
    if command == "chat":
        result = call("chat", *drafts, *options, input="Once upon a time\n")
    else:
        result = call("generate", "Once upon a time", *drafts, *options)
    assert result.exit_code == 0, result.stderr
    assert used == [DEFAULT if options else tuning] * 2  # of the model and the draft


def test_settings_of_another_machine_are_noted_once(stored):
    path = stored(Tuning(STAGED), host={"name": "another"})
    shown = " ".join(run("generate", "Once", "-m", "2").stderr.split())
    assert shown.count("another machine") == 1
    assert str(path).rsplit("/", 1)[-1] in shown
    ignored = run("generate", "Once", "-m", "2", "--no-tuning")
    assert "another machine" not in ignored.stderr
