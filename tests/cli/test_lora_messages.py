"""What `lora` proposes: after a run, for a complete run, and to resume one."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
from commands import call, expect_error

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.views.finetuning import show_trained
from mlx_openelm.finetuning.preparation import shorten_prompt
from mlx_openelm.finetuning.records import Record
from mlx_openelm.finetuning.result import FinetuneReport
from mlx_openelm.text.templates import Turn

KING = "Once there was a king."
SHORT = ("--model", "model", "--iters", "2", "--batch-size", "2")


@pytest.fixture
def lora(here):
    records = [{"prompt": f"king {i}", "completion": "the queen"} for i in range(12)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (here / "train.jsonl").write_text(text)
    return ("lora", "--data", "train.jsonl")


def interrupt_run(lora, monkeypatch):
    """Start a run that receives Ctrl-C in its first step."""
    from mlx_openelm.finetuning.trainer import Trainer

    update = Trainer.update

    def interrupted(self, stop):
        os.kill(os.getpid(), signal.SIGINT)
        return update(self, stop)

    monkeypatch.setattr(Trainer, "update", interrupted)
    ran = call(*lora, *SHORT)
    monkeypatch.setattr(Trainer, "update", update)
    return ran


# A run that is there already -----------------------------------------------------


def test_a_complete_run_is_not_to_be_resumed(here, lora):
    assert call(*lora, *SHORT).exit_code == 0
    says = "adapters/train has a complete run of 2 steps; use --force to replace it"
    message = expect_error(here, *lora, *SHORT, message=says)
    assert "--resume" not in message
    expect_error(here, *lora, "--resume", message="is complete, at step 2; use --force")


def test_an_interrupted_run_is_reported_once_and_resumed(here, lora, monkeypatch):
    ran = interrupt_run(lora, monkeypatch)
    assert (ran.exit_code, ran.stderr.count("Interrupted")) == (130, 1)
    expect_error(
        here, *lora, *SHORT, message="saved at step 1; use --resume to continue it"
    )
    _, _, command = ran.stderr.partition("Resume with: ")
    ran = call(*shlex.split(command)[1:])
    assert ran.exit_code == 0, ran.stderr
    assert "template: raw\n" in ran.stderr


def test_the_data_name_the_run_to_resume(here, lora, monkeypatch):
    interrupt_run((*lora, "--rank", "4"), monkeypatch)
    ran = call(*lora, "--resume")  # the other options are the run's
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout == "adapters/train\n"


def test_resume_alone_asks_for_the_folder(here, lora):
    ran = call("lora", "--resume")
    assert (ran.exit_code, ran.stdout) == (2, "")
    words = " ".join(ran.stderr.replace("│", " ").split())
    assert "--resume: needs the folder of the run: --resume --adapter-path DIR" in words
    assert "--data" not in words
    assert call(*lora, *SHORT).exit_code == 0
    assert "--adapter-path adapters/train" in call("lora", "--resume").stderr


# The next command ----------------------------------------------------------------


def trained(path: Path, **changes) -> FinetuneReport:
    values = dict.fromkeys(FinetuneReport.__slots__, 0)
    figures = {"first_loss": 3.0, "last_loss": 2.5, "best_loss": 2.0, "best_step": 4}
    values |= {"path": path, "unit": "token", "steps": 9, "test_loss": None, **figures}
    return FinetuneReport(**{**values, **changes})


@pytest.mark.parametrize(
    ("best_step", "adapter"), [(4, "run/best"), (9, "run"), (0, "run"), (None, "run")]
)
def test_the_adapter_with_the_lowest_loss_is_proposed(
    tmp_path, monkeypatch, capsys, best_step, adapter
):
    monkeypatch.chdir(tmp_path)
    Path("run/best").mkdir(parents=True)
    show_trained(Console(), trained(Path("run"), best_step=best_step), "Who is it?")
    out, err = capsys.readouterr()
    assert out == "run\n"
    command = f"mlx-openelm generate --adapter-path {adapter} 'Who is it?'"
    assert err.splitlines()[-1] == command
    assert ("did not fall" in err) == (best_step == 0)


@pytest.mark.parametrize(
    ("prompt", "command"), [("", "'Once upon a time'"), ("-x is", "-- '-x is'")]
)
def test_the_proposed_prompt_is_not_an_option(tmp_path, capsys, prompt, command):
    show_trained(Console(), trained(tmp_path), prompt)
    assert capsys.readouterr().err.endswith(f" {command}\n")


@pytest.mark.parametrize(
    ("turns", "prompt"),
    [
        ([Turn("user", "Who?"), Turn("assistant", "I.")], "Who?"),
        ([Turn("system", "S"), Turn("user", "Who\nis it?")], "Who is it?"),
        ([Turn("user", "word " * 50)], ("word " * 20).strip()),
        ([Turn("user", "w" * 300)], "w" * 100),
        ([Turn("assistant", f"{KING} " * 9)], f"{KING} Once there was a"),
        ([Turn("user", "  "), Turn("assistant", "a")], ""),
    ],
)
def test_the_prompt_is_the_first_of_the_data(turns, prompt):
    assert shorten_prompt([Record("a:1", tuple(turns), b"")]) == prompt
