"""The chat command, through a pipe and on a terminal."""

import contextlib
import io
import json
import os
import pty
import readline
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import call, make_source
from models import UNEVEN, small_tokenizer
from typer.testing import Result

import mlx_openelm
from mlx_openelm import Sampling, generate, load
from mlx_openelm.cli.chat_session import run_chat
from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import open_model
from mlx_openelm.generation import conversation
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.tuning import DEFAULT

PROGRAM = (sys.executable, "-m", "mlx_openelm", "chat", "--model", "model")
ENDLESS = "50000"  # tokens: about half a minute

SIGN, CTRL_C, CTRL_D = b">>> ", "\x03", "\x04"

PASTES = "libedit" not in (readline.__doc__ or "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a "model" that has a long context and the instruct template."""
    here = tmp_path_factory.mktemp("chat")
    config = replace(UNEVEN, max_context_length=1 << 17)
    mlx_openelm.convert(make_source(here / "source", config=config), here / "model")
    path = here / "model" / "config.json"
    described = json.loads(path.read_text())
    described["mlx_openelm"]["template"] = "instruct"
    path.write_text(json.dumps(described))
    return here


@pytest.fixture
def here(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").symlink_to(folder / "model")
    return tmp_path


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, here: Path, *options: str, **streams) -> None:
        self.screen, terminal = pty.openpty()
        # The first process of a session to open a terminal receives its Ctrl-C.
        opens = ["sh", "-c", 'exec "$@" <"$0"', os.ttyname(terminal)]
        self.process = subprocess.Popen(
            [*opens, *PROGRAM, *options],
            cwd=here,
            stdin=subprocess.DEVNULL,
            **{"stdout": terminal, "stderr": terminal} | streams,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8"},
        )
        os.close(terminal)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def type(self, text: str | bytes) -> None:
        os.write(self.screen, text.encode() if isinstance(text, str) else text)

    def wait_for(self, what: str | bytes, *, seconds: float = 60) -> str:
        """Wait until a text is on the screen; return the output up to it."""
        what, seen = what.encode() if isinstance(what, str) else what, b""
        end = time.monotonic() + seconds
        while what not in seen:
            left = max(0.0, end - time.monotonic())
            if not select.select([self.screen], [], [], left)[0]:
                raise TimeoutError(f"{what!r} does not come after {seen!r}")
            got = self.read()
            assert got, f"it ended before {what!r}, after {seen!r}"
            seen += got
        return seen.decode(errors="replace").replace("\r", "")

    def wait_for_bytes(self, count: int) -> None:
        """Wait for `count` bytes."""
        while count > 0:
            got = self.read()
            assert got, "it ended"
            count -= len(got)

    def read(self) -> bytes:
        try:
            return os.read(self.screen, 1 << 16)
        except OSError:  # Linux, when the other side is closed
            return b""

    def enter(self, line: str | bytes) -> str:
        """Type a line; return the output up to the next prompt."""
        self.type(line + ("\r" if isinstance(line, str) else b"\r"))
        return self.wait_for(SIGN)

    def interrupt(self) -> str:
        """Press Ctrl-C at the prompt; Python may miss one while drawing it."""
        for _ in range(30):
            self.type(CTRL_C)
            with contextlib.suppress(TimeoutError):
                return self.wait_for(SIGN, seconds=2)
        raise AssertionError("Ctrl-C has no effect")

    def terminate(self) -> int:
        """Send SIGTERM until the process ends, for the same reason."""
        for _ in range(100):
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(3)
        raise AssertionError("SIGTERM has no effect")

    def ends(self) -> int:
        while self.read():
            pass
        return self.process.wait(60)


def piped(here: Path, text: str | bytes, *options: str) -> Result:
    with contextlib.chdir(here):
        return call("chat", "--model", "model", *options, input=text)


def saved(path: Path) -> list[str]:
    """The texts of a saved conversation's messages."""
    conversation = json.loads(path.read_text(encoding="utf-8"))
    return [message["content"] for message in conversation["messages"]]


# Through a pipe ------------------------------------------------------------------


def test_a_pipe_gives_the_answers_and_nothing_else_on_stdout(here):
    lines = 'Hi\n\n"""\ntwo\n lines\n"""\nand \\\r\nmore\n/save chat.json\n// x'
    result = piped(here, lines, "-m", "4", "--system", "Be kind.")
    assert result.exit_code == 0, result.stderr_bytes
    system, *texts = saved(here / "chat.json")
    assert (system, texts[::2]) == ("Be kind.", ["Hi", "two\n lines", "and \nmore"])
    model, tokenizer = load(here / "model")
    first = generate(model, tokenizer, "Hi", Sampling(max_tokens=4), system="Be kind.")
    assert texts[1] == first
    answers = "".join(f"{text}\n" for text in texts[1::2]).encode()
    assert result.stdout_bytes.startswith(answers)
    assert result.stdout_bytes.count(b"\n") > answers.count(
        b"\n"
    )  # of the last, unsaved
    assert SIGN not in result.stdout_bytes + result.stderr_bytes
    assert result.stderr_bytes.count(b"[truncated by --max-tokens; 4 tokens at ") == 4
    quiet = piped(here, lines.replace("chat.json", "quiet.json"), "-m", "4", "--quiet")
    assert quiet.stderr_bytes == b""


def test_json_is_one_object_for_each_answer(here):
    result = piped(here, "Hi\nWho?\n/save chat.json\n", "-m", "4", "--json")
    answers_json = [json.loads(line) for line in result.stdout_bytes.splitlines()]
    assert [t["text"] for t in answers_json] == saved(here / "chat.json")[1::2]
    assert [t["generation_tokens"] for t in answers_json] == [4, 4]
    assert answers_json[1]["cached_tokens"] >= answers_json[0]["prompt_tokens"] - 1
    decode = small_tokenizer().decode
    assert all(decode(t["tokens"]).endswith(t["text"].strip()) for t in answers_json)


def test_a_wrong_line_is_reported_and_the_others_are_processed(here):
    (here / "diary").write_text("mine")
    wrong = b"Hi\n/sav x\n\xff\n/save diary\n/load none\n/undo 3\n/load\n/save\n"
    result = piped(here, wrong + b"/save chat.json\nWho?\n", "-m", "4")
    assert result.exit_code == 1
    assert len(saved(here / "chat.json")) == 2
    errors = [
        line for line in result.stderr_bytes.splitlines() if line.startswith(b"error: ")
    ]
    for error, expected in zip(
        errors,
        (
            b"no command /sav;",
            b"not UTF-8",
            b"diary exists already",
            b"none does not exist",
            b"/undo takes no argument",
            b"Give a file",
            b"Give a file",
            b"refused: 7;",
        ),
        strict=True,
    ):
        assert expected in error
    assert (here / "diary").read_text() == "mine"
    assert len(result.stdout_bytes.splitlines()) >= 2
    assert b"Traceback" not in result.stderr_bytes


def test_wrong_options_are_refused_before_the_first_prompt(here):
    for options, message in (
        (("--template", "chatml"), b"No template is called 'chatml'"),
        (("--template", "raw", "--system", "x"), b"takes no system text"),
    ):
        result = piped(here, "Hi\n", *options)
        assert (result.exit_code, result.stdout_bytes) == (1, b"")
        assert message in result.stderr_bytes


def test_a_closed_pipe_is_quiet_and_a_full_disk_is_reported(here):
    feed = "Hi\n" * 50
    with subprocess.Popen(
        [*PROGRAM, "-m", "50", "--quiet"],
        cwd=here,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(feed.encode(), timeout=60)
    assert (process.returncode, errors) == (0, b"")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [*PROGRAM, "-m", "4", "--quiet"],
                cwd=here,
                input=b"Hi\n",
                stdout=full,
                stderr=subprocess.PIPE,
            )
        assert result.returncode == 1
        assert b"No space left" in result.stderr
        assert b"Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_script_is_stopped_as_any_other_command(here, number, code):
    with subprocess.Popen(
        [*PROGRAM, "-m", ENDLESS],
        cwd=here,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdin.write(b"Hi\nWho?\n")
        process.stdin.flush()
        assert process.stdout.read(20)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in errors


def test_a_model_without_a_template_continues_a_text(here):
    result = piped(here, "Once\n\n/save chat.json\n", "-m", "6", "--template", "raw")
    message, first, empty, second = saved(here / "chat.json")
    assert (message, empty) == ("Once", "")
    model, tokenizer = load(here / "model")
    sampling = Sampling(max_tokens=6)
    assert first == generate(model, tokenizer, "Once", sampling, template="raw")
    assert second == generate(
        model, tokenizer, f"Once{first}", sampling, template="raw"
    )
    assert b"no prompt template" in result.stderr_bytes
    assert result.stderr_bytes.count(b"an empty line continues") == 2


# On a terminal -------------------------------------------------------------------


def test_a_conversation_on_a_terminal(here):
    with Terminal(here, "-m", "4") as terminal:
        greeting = terminal.wait_for(SIGN)
        assert "/help shows the commands" in greeting
        assert "truncated by --max-tokens; 4 tokens" in terminal.enter("Hi")
        terminal.type('"""\r')
        terminal.wait_for("... ")
        terminal.type("two\r")
        terminal.wait_for("... ")
        terminal.enter(' lines"""')
        terminal.type("and \\\r")
        terminal.wait_for("... ")
        terminal.enter("more")
        if PASTES:  # bracketed paste: pasted lines are one message
            assert "\x1b[?2004h" in greeting
        terminal.enter(b"\x1b[200~pasted\nlines\x1b[201~" if PASTES else "pasted")
        assert "/retry " in terminal.enter("/help")
        assert "no command /sav;" in terminal.enter("/sav")
        assert "not UTF-8" in terminal.enter(b"\xff")
        assert "greedy decoding" in terminal.enter("/retry")
        assert "saved to chat.json" in terminal.enter("/save chat.json")
        assert "3 messages" in terminal.enter("/undo")
        assert "saved to chat.json" in terminal.enter(b"\x1b[A\x1b[A")  # what was typed
        assert len(saved(here / "chat.json")) == 6
        terminal.enter("/reset")
        assert "error: There is no message" in terminal.enter("/undo")
        assert "system text set" in terminal.enter("/system Be kind.")
        assert "3 messages with answers from chat" in terminal.enter("/load chat.json")
        terminal.enter("/undo")
        assert "chat.json]" in terminal.enter("/save")
        assert saved(here / "chat.json")[::2] == ["Hi", "two\n lines"]
        terminal.type(CTRL_D)
        assert terminal.ends() == 0


def test_ctrl_c_stops_the_answer_and_keeps_its_text_so_far(here):
    with Terminal(here, "-m", ENDLESS) as terminal:
        terminal.wait_for(SIGN)
        terminal.type("Who wept?\r")
        terminal.wait_for("Who wept?")
        terminal.wait_for_bytes(40)
        terminal.type(CTRL_C)
        assert "[stopped; " in terminal.wait_for(SIGN)
        terminal.enter("/save chat.json")
        message, answer = saved(here / "chat.json")
        assert message == "Who wept?"
        assert 10 <= len(answer) < 40_000
        model, tokenizer = load(here / "model")
        whole = generate(model, tokenizer, "Who wept?", Sampling(max_tokens=60))
        assert whole[:10] == answer[:10]
        assert "[Ctrl-D or /quit quits]" in terminal.interrupt()
        terminal.type("/no such thing")
        terminal.wait_for("thing")
        assert "[Ctrl-D or /quit quits]" in terminal.interrupt()
        assert "/retry" in terminal.enter("/help")
        terminal.type("/quit\r")
        assert terminal.ends() == 0


def test_ctrl_c_before_the_first_token_removes_the_message(here, monkeypatch, capsys):
    class Typed(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    def breaks(*args, **options):
        raise KeyboardInterrupt
        yield

    monkeypatch.chdir(here)
    monkeypatch.setattr(conversation, "stream", breaks)
    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(b"Hi\n/save chat.json\n")))
    folder, model, tokenizer = open_model(Console(), "model", None, True)
    run_chat(
        Console(),
        folder,
        model,
        tokenizer,
        Sampling(),
        template="auto",
        system="",
        adapter=None,
        drafter=None,
        make_cache=KVCache,
        tuning=DEFAULT,
        as_json=False,
    )
    output = capsys.readouterr()
    assert output.out == ""
    assert "[stopped before the first token; the message was removed]" in output.err
    assert saved(here / "chat.json") == []


def test_a_second_ctrl_c_stops_at_once_and_the_conversation_continues(here):
    with Terminal(here, "-m", ENDLESS) as terminal:
        terminal.wait_for(SIGN)
        for _ in range(8):
            terminal.type("Hi\r")
            terminal.wait_for("Hi")
            for _ in range(2):
                time.sleep(0.02)
                terminal.type(CTRL_C)
            terminal.enter("/help")
        terminal.type("/quit\r")
        assert terminal.ends() == 0


@pytest.mark.parametrize("busy", [True, False])
def test_sigterm_ends_it_at_once(here, busy):
    with Terminal(here, "-m", ENDLESS) as terminal:
        terminal.wait_for(SIGN)
        if busy:
            terminal.type("Hi\r")
            terminal.wait_for("Hi")
            terminal.wait_for_bytes(20)
        assert terminal.terminate() == 143


def test_answers_can_go_to_a_file_while_lines_are_typed(here):
    with (
        open(here / "answers", "wb") as answers,
        Terminal(here, "-m", "4", stdout=answers) as terminal,
    ):
        terminal.wait_for(SIGN)
        terminal.enter("Hi")
        terminal.enter("/save chat.json")
        terminal.type(CTRL_D)
        assert terminal.ends() == 0
    assert (here / "answers").read_text() == f"{saved(here / 'chat.json')[1]}\n"
