"""A fine-tuning run on a terminal, in a log, and with --quiet."""

import fcntl
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from places import ROOT

from mlx_openelm.cli import console as console_module
from mlx_openelm.cli.console import Console
from mlx_openelm.cli.views.finetuning import TrainingView

ROWS = [
    {"event": "note", "text": "3 [records] were cut"},
    {"event": "start", "step": 0, "steps": 600},
    {"event": "eval", "step": 0, "loss": 2.9, "tokens": 0, "best": True},
    {"event": "step", "step": 10, "loss": 2.5, "tokens_per_second": 812.4},
    {"event": "skip", "step": 17, "loss": None, "samples": ["a.jsonl:12", "a.jsonl:9"]},
    {"event": "step", "step": 20, "loss": None, "tokens_per_second": 800.0},
    {"event": "eval", "step": 200, "loss": 2.125, "tokens": 9, "best": True},
    {
        "event": "sample",
        "step": 200,
        "prompt": "Once",
        "text": " up\non\n\x1b[31ma [/]",
    },
    {"event": "save", "step": 200},
    {"event": "resume", "step": 200},
    {"event": "eval", "step": 400, "loss": math.nan, "tokens": 9, "best": False},
    {"event": "step", "step": 1600, "loss": 1.75, "tokens_per_second": 799.6},
    {"event": "end", "step": 1600, "reason": "done"},
]
LINES = """\
3 [records] were cut
step 0: validation loss 2.9000, before training
step 17: batch skipped, its loss or gradient is not finite (a.jsonl:12, a.jsonl:9)
step 200: validation loss 2.1250, the best
step 200: Once up on \\x1b[31ma [/]
step 200: saved
Resuming after step 200.
step 400: validation loss not finite
Trained 1,600 steps; best 2.1250 at step 200.
"""


def show(rows, *, quiet=False):
    with TrainingView(Console(quiet=quiet)) as view:
        for row in rows:
            view(row)


def test_every_event_except_steps_is_a_line_on_stderr(capsys):
    show(ROWS)
    assert capsys.readouterr() == ("", LINES)


def test_quiet_prints_nothing(capsys):
    show(ROWS, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_progress_is_an_occasional_line(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    steps = [
        {"event": "step", "step": n, "loss": 2.0, "tokens_per_second": 9.0, "steps": 8}
        for n in range(1, 7)
    ]
    show(steps)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"Training: {n} of 8 loss 2.0000, 9 tokens/s" for n in (2, 4, 6)]


def test_preferences_show_the_accuracy(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    row = {"event": "step", "step": 3, "loss": 0.5, "accuracy": 0.75, "margin": 0.1}
    show([{**row, "tokens_per_second": 5.0}])
    assert "loss 0.5000, accuracy 75%, 5 tokens/s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reason", "lines"),
    [
        ("patience", "Stopped early at step 7: no better validation loss.\n"),
        ("interrupted", ""),  # the program reports it, with what is saved
        ("something new", "Ended at step 7.\n"),
    ],
)
def test_the_last_line_has_the_reason(reason, lines, capsys):
    show([{"event": "end", "step": 7, "reason": reason}])
    assert capsys.readouterr().err == lines


def test_a_batch_of_many_samples_is_still_one_line(capsys):
    names = [f"a.jsonl:{n}" for n in range(20)]
    show([{"event": "skip", "step": 1, "samples": names}])
    lines = capsys.readouterr().err
    assert lines.count("\n") == 1
    assert lines.endswith("a.jsonl:7 and 12 more)\n")


def test_a_terminal_of_80_columns_has_a_bar_with_all_figures():
    """The bar shows the figures of each step, and notes stay above it."""
    code = f"""
import sys, time
from mlx_openelm.cli.console import Console
from mlx_openelm.cli.views.finetuning import TrainingView
with TrainingView(Console()) as view:
    time.sleep(1.0)
    for row in {ROWS[1:4] + ROWS[6:7] + ROWS[11:12]!r}:
        view(row | ({{"steps": 3200}} if row["event"] == "step" else {{}}))
        time.sleep(0.15)
print(sorted(sys.modules.keys() & {{"mlx", "numpy", "yaml", "huggingface_hub"}}))
"""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    shown = _read_all(controller)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "[]\n")  # nothing slow was imported
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[\??[\d;]*[A-Za-z]", "", shown))
    bars = [line for line in lines if line.startswith("Training")]
    assert all(len(line) <= 80 for line in bars)
    first = r"Training \S* *10/3200 loss 2\.5000, valid 2\.900, 812 tokens/s +[-\d:]+"
    last = r"Training \S* *1600/3200 loss 1\.7500, valid 2\.125, 800 tokens/s +[-\d:]+"
    assert any(re.fullmatch(first, line) for line in bars), bars
    assert any(re.fullmatch(last, line) for line in bars), bars
    assert "step 200: validation loss 2.1250, the best" in lines


def _read_all(controller):
    output = b""
    try:
        while more := os.read(controller, 1 << 16):
            output += more
    except OSError:  # Linux: the other end is closed
        pass
    finally:
        os.close(controller)
    return output.decode()
