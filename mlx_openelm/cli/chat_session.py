"""A conversation on a terminal, or line by line through a pipe.

stdout carries the answers and nothing else. On a terminal Ctrl-C stops an answer, and
an error never ends the conversation.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Generator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.views.generation import generated_json
from mlx_openelm.errors import OpenELMError
from mlx_openelm.signals import Stop, deferred_signals

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_openelm.generation.cache import ModelCache
    from mlx_openelm.generation.conversation import Conversation
    from mlx_openelm.generation.drafters import Drafter
    from mlx_openelm.generation.options import Sampling
    from mlx_openelm.generation.streaming import Piece
    from mlx_openelm.model.openelm import OpenELM
    from mlx_openelm.storage.model_folder import ModelFolder
    from mlx_openelm.text.tokenizer import Tokenizer

SIGN, MORE = ">>> ", "... "  # before a message, and before its further lines
BLOCK = '"""'

HELP = """\
  /help           show this
  /save [FILE]    write the conversation; later into the same file
  /load FILE      go on with a saved one
  /reset          begin anew; the system text stays
  /system [TEXT]  change the system text, or take it away
  /retry          answer the last message again
  /undo           take back the last message and its answer
  /quit           leave, as Ctrl-D does
A line that ends in \\ goes on in the next; \"\"\" begins and ends a block of lines.
Ctrl-C stops an answer; what was said of it stays. // begins a message with a slash."""


def run_chat(
    console: Console,
    folder: "ModelFolder",
    model: "OpenELM",
    tokenizer: "Tokenizer",
    sampling: "Sampling",
    *,
    template: str,
    system: str,
    adapter: Path | None,
    drafter: "Drafter | None",
    make_cache: "Callable[[], ModelCache]",
    as_json: bool,
) -> None:
    """Hold a conversation until the input ends.

    Args:
        adapter: the folder of what is attached to the model, for /save and /load.
        drafter, make_cache: see `Conversation`.
        as_json: one object for each answer, as `generate --json` has it.

    Raises:
        OpenELMError: no such template, or the system text has no place; through a pipe
            also, at the end, that messages were refused.
    """
    from mlx_openelm.generation.conversation import Conversation
    from mlx_openelm.storage.hub import DEMO, is_demo

    conversation = Conversation(
        model,
        tokenizer,
        sampling,
        template=template,
        system=system,
        name=DEMO if is_demo(folder.path) else str(folder.path.resolve()),
        adapter=None if adapter is None else str(adapter.resolve()),
        drafter=drafter,
        make_cache=make_cache,
    )
    _Chat(console, conversation, tokenizer, as_json).run()


@dataclass(frozen=True, slots=True)
class _Command:
    """A line such as "/save talk.json"."""

    name: str
    rest: str


class _Chat:
    def __init__(
        self,
        console: Console,
        conversation: "Conversation",
        tokenizer: "Tokenizer",
        as_json: bool,
    ) -> None:
        self._console, self._talk = console, conversation
        self._reply = Console()  # what was asked for is said, be it quiet or not
        self._lines = _Lines()
        self._tokenizer, self._as_json = tokenizer, as_json
        self._refused = 0  # lines
        self._told = 0  # of the messages that left the context

    def run(self) -> None:
        self._greet()
        while True:
            try:
                if not self._turn():
                    break
            except EOFError:
                if self._lines.from_terminal:
                    self._reply.note("")
                break
            except KeyboardInterrupt:
                if not self._lines.from_terminal:  # a script's is meant for the script
                    raise
                self._reply.note("\n[Ctrl-D or /quit leaves]")
            except OpenELMError as error:
                self._refused += 1
                self._console.error(str(error))
        if self._refused and not self._lines.from_terminal:
            raise OpenELMError(
                f"Lines that were refused: {self._refused}; the errors above say why."
            )

    def _greet(self) -> None:
        if self._talk.is_raw:
            self._console.note(
                "[without a template the model goes on with what you type, as one "
                "text; --template instruct makes turns of it]"
            )
        if self._lines.from_terminal:
            self._console.note("[/help shows the commands, Ctrl-D leaves]")

    def _turn(self) -> bool:
        """Read what is typed and do it; return whether the conversation goes on."""
        typed = self._read()
        if isinstance(typed, _Command):
            return self._obey(typed)
        if typed or (self._talk.is_raw and self._talk.turns):  # "": a text goes on
            self._show(self._talk.reply(typed))
        return True

    # What is typed ---------------------------------------------------------------

    def _read(self) -> _Command | str:
        line = self._lines.read(SIGN)
        if line.lstrip().startswith(BLOCK):
            return self._read_block(line.lstrip().removeprefix(BLOCK))
        while line.endswith("\\"):
            more = self._read_more()
            line = line[:-1] + ("" if more is None else f"\n{more}")
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.removeprefix("/").partition(" ")
            return _Command(name, rest.strip())
        return line.removeprefix("/")

    def _read_block(self, text: str) -> str:
        while not text.rstrip().endswith(BLOCK):
            more = self._read_more()
            if more is None:
                return text.removeprefix("\n")
            text += f"\n{more}"
        return text.rstrip().removesuffix(BLOCK).removeprefix("\n").removesuffix("\n")

    def _read_more(self) -> str | None:
        """Return a message's next line; None where the input ends."""
        try:
            return self._lines.read(MORE)
        except EOFError:
            return None

    # Commands --------------------------------------------------------------------

    def _obey(self, command: _Command) -> bool:
        """Do what is asked; return whether the conversation goes on."""
        name, rest, talk = command.name, command.rest, self._talk
        if rest and name in ("help", "reset", "retry", "undo", "quit"):
            raise OpenELMError(
                f"/{name} takes nothing behind it; // begins a message with a slash."
            )
        match name:
            case "help":
                self._reply.note(HELP)
            case "save":
                path = _path(rest) if rest or talk.file is None else talk.file
                talk.save(path)
                self._console.note(f"[saved in {path}]")
            case "load":
                path = _path(rest)
                differences = talk.load(path)
                self._told = 0
                self._console.note(f"[{self._count_pairs()} from {path}]")
                for difference in differences:
                    self._console.note(f"[{difference}]")
            case "reset":
                talk.reset()
                self._console.note("[begun anew]")
            case "system":
                talk.set_system(rest)
                self._console.note(
                    "[a new system text]" if rest else "[no system text]"
                )
            case "retry":
                if talk.sampling.temp == 0:
                    self._console.note("[greedy: only --temp above 0 varies an answer]")
                self._show(talk.retry())
            case "undo":
                talk.undo()
                self._console.note(f"[taken back; {self._count_pairs()} before it]")
            case "quit" | "exit":
                return False
            case _:
                raise OpenELMError(
                    f"There is no command /{name}; /help shows them, and // begins a "
                    "message with a slash."
                )
        return True

    def _count_pairs(self) -> str:
        count = len(self._talk.turns) // 2
        return f"{count} message{'' if count == 1 else 's'} with answers"

    # Answers ---------------------------------------------------------------------

    def _show(self, pieces: "Generator[Piece]") -> None:
        """Print an answer as it comes; Ctrl-C on a terminal ends it."""
        self._note_forgotten()
        before, shown, stop = self._talk.turns, [], Stop()
        with contextlib.closing(pieces):
            try:
                first = next(pieces)  # until here Ctrl-C is at once
                with deferred_signals() as stop:
                    for piece in chain([first], pieces):
                        shown.append(piece)
                        if piece.text and not self._as_json:
                            self._console.answer(piece.text, end="")
                        if stop.number is not None:
                            break
            except KeyboardInterrupt:  # before the first word, or the second Ctrl-C
                stop.number = signal.SIGINT
        if shown and self._as_json:
            self._console.answer_json(generated_json(shown, self._tokenizer))
        elif shown:
            self._console.answer("")
        if stop.number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        if stop.number is not None and not self._lines.from_terminal:
            raise KeyboardInterrupt
        if self._talk.turns is before:
            self._console.note("[stopped before the first word; nothing was kept]")
        elif shown:
            self._note_end(shown[-1], stopped=stop.number is not None)

    def _note_forgotten(self) -> None:
        """Say it once when the oldest messages have left the context."""
        count, length = self._talk.omitted_pairs, self._talk.context_length
        if count > self._told:
            first = "message" if count == 1 else f"{count} messages"
            self._console.note(
                f"[the context of {length} is full: the model no longer sees the first "
                f"{first} and what it answered]"
            )
        self._told = count

    def _note_end(self, last: "Piece", *, stopped: bool) -> None:
        used = last.prompt_tokens + last.generation_tokens
        length = self._talk.context_length
        match last.finish_reason:
            case _ if stopped:
                end = "stopped; "
            case "length" if used == length:
                end = f"cut, for the context of {length} is full; "
            case "length":
                end = "cut by --max-tokens; "
            case "loop":
                end = "cut, for it went round in a loop; "
            case _:
                end = ""
        guesses = ""
        if last.drafted_tokens:
            guesses = f", {last.accepted_tokens} of {last.drafted_tokens} guesses right"
        if end and self._talk.is_raw:
            end += "an empty line goes on; "
        if not self._talk.turns[-1].text:
            end = "it has nothing to say; "
        self._console.note(
            f"[{end}{last.generation_tokens} tokens at {last.generation_tps:.0f}/s"
            f"{guesses}, {used} of {length} in the context]"
        )


def _path(text: str) -> Path:
    if not text:
        raise OpenELMError("Say the file behind the command.")
    return Path(os.path.expanduser(text))


class _Lines:
    """What comes in, line by line.

    Attributes:
        from_terminal: a person types, and sees a sign before each line.
    """

    def __init__(self) -> None:
        self.from_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._edited = self.from_terminal and sys.stdout.isatty()
        if self._edited:
            with contextlib.suppress(ImportError):
                import readline  # arrow keys, and what was typed before

                # What is pasted is one message, however many lines it has.
                readline.parse_and_bind("set enable-bracketed-paste on")

    def read(self, sign: str) -> str:
        """Return the next line without its end.

        Raises:
            EOFError: there is none.
            OpenELMError: it is not UTF-8.
        """
        try:
            if self._edited:
                line = input(sign)
                line.encode()
                return line
            if self.from_terminal:  # the answers go elsewhere, so the sign must not
                sys.stderr.write(sign)
                sys.stderr.flush()
            read = b"" if sys.stdin is None else sys.stdin.buffer.readline()
            if not read:
                raise EOFError
            return read.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeError as error:
            raise OpenELMError(f"This line is not UTF-8 text: {error}.") from error
