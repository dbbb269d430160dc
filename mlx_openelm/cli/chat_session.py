"""A conversation on a terminal, or line by line through a pipe.

stdout gets only the answers. On a terminal, Ctrl-C stops an answer, and errors do not
end the conversation.
"""

import contextlib
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
from mlx_openelm.input_files import BOM, MAX_RECORD_BYTES
from mlx_openelm.message_parts import count_of
from mlx_openelm.paths import user_path
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
    from mlx_openelm.tuning import Tuning

SIGN, MORE = ">>> ", "... "  # prompts for a message and for its further lines
BLOCK = '"""'

HELP = """\
  /help           show this
  /save [FILE]    save the conversation; without FILE, to the same file again
  /load FILE      continue a saved conversation
  /reset          start a new conversation; the system text is kept
  /system [TEXT]  set the system text, or remove it
  /retry          generate the last answer again
  /undo           remove the last message and its answer
  /quit           quit (also Ctrl-D)
\\ at the end of a line continues the message on the next line; \"\"\" starts and ends
a message of more than one line. Ctrl-C stops an answer and keeps its text so far.
Start a message with // if its first character is a slash."""


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
    tuning: "Tuning",
    as_json: bool,
) -> None:
    """Hold a conversation until the input ends.

    Args:
        adapter: the folder of the model's adapter, for /save and /load.
        drafter, make_cache, tuning: see `Conversation`.
        as_json: write one object for each answer, as `generate --json` does.

    Raises:
        OpenELMError: the template is unknown or has no place for the system text; with
            a pipe, at the end, lines were refused.
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
        tuning=tuning,
    )
    _Chat(console, conversation, tokenizer, as_json).run()


@dataclass(frozen=True, slots=True)
class _Command:
    """A command line, such as "/save chat.json"."""

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
        self._console, self._chat = console, conversation
        self._replies = Console()  # answers to commands, which --quiet does not hide
        self._lines = _Lines()
        self._tokenizer, self._as_json = tokenizer, as_json
        self._refused = 0  # lines
        self._reported = 0  # messages that left the context

    def run(self) -> None:
        self._greet()
        while True:
            try:
                if not self._turn():
                    break
            except EOFError:
                if self._lines.from_terminal:
                    self._replies.note("")
                break
            except KeyboardInterrupt:
                if not self._lines.from_terminal:
                    raise
                self._replies.note("\n[Ctrl-D or /quit quits]")
            except OpenELMError as error:
                self._refused += 1
                self._console.error(str(error))
        if self._refused and not self._lines.from_terminal:
            raise OpenELMError(
                f"Lines that were refused: {self._refused}; see the errors above."
            )

    def _greet(self) -> None:
        if self._chat.is_raw:
            self._console.note(
                "[no prompt template: the model continues your text; --template "
                "instruct makes it a chat]"
            )
        if self._lines.from_terminal:
            self._console.note("[/help shows the commands, Ctrl-D quits]")

    def _turn(self) -> bool:
        """Handle one message or command; return whether the conversation continues."""
        typed = self._read()
        if isinstance(typed, _Command):
            return self._execute(typed)
        if typed or (self._chat.is_raw and self._chat.turns):  # "" continues the text
            self._show(self._chat.reply(typed))
        return True

    # Input -----------------------------------------------------------------------

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
        """Return a message's next line; None at the end of the input."""
        try:
            return self._lines.read(MORE)
        except EOFError:
            return None

    # Commands --------------------------------------------------------------------

    def _execute(self, command: _Command) -> bool:
        """Execute a command; return whether the conversation continues."""
        name, rest, chat = command.name, command.rest, self._chat
        if rest and name in ("help", "reset", "retry", "undo", "quit"):
            raise OpenELMError(
                f"/{name} takes no argument; to send this as a message, type //{name}."
            )
        match name:
            case "help":
                self._replies.note(HELP)
            case "save":
                path = _path(rest) if rest or chat.file is None else chat.file
                chat.save(path)
                self._console.note(f"[saved to {path}]")
            case "load":
                path = _path(rest)
                differences = chat.load(path)
                self._reported = 0
                self._console.note(f"[{self._count_pairs()} from {path}]")
                for difference in differences:
                    self._console.note(f"[{difference}]")
            case "reset":
                chat.reset()
                self._console.note("[new conversation]")
            case "system":
                chat.set_system(rest)
                self._console.note(
                    "[system text set]" if rest else "[system text removed]"
                )
            case "retry":
                if chat.sampling.temp == 0:
                    self._console.note(
                        "[greedy decoding: the same answer unless --temp is above 0]"
                    )
                self._show(chat.retry())
            case "undo":
                chat.undo()
                self._console.note(f"[removed; {self._count_pairs()} left]")
            case "quit" | "exit":
                return False
            case _:
                raise OpenELMError(
                    f"There is no command /{name}; /help lists them. To send it as a "
                    f"message, type //{name}."
                )
        return True

    def _count_pairs(self) -> str:
        count = len(self._chat.turns) // 2
        return f"{count_of(count, 'message')} with answers"

    # Answers ---------------------------------------------------------------------

    def _show(self, pieces: "Generator[Piece]") -> None:
        """Stream an answer; Ctrl-C on a terminal stops it."""
        self._note_forgotten()
        before, shown, stop = self._chat.turns, [], Stop()
        with contextlib.closing(pieces):
            try:
                first = next(pieces)  # Ctrl-C stops this at once
                with deferred_signals() as stop:
                    for piece in chain([first], pieces):
                        shown.append(piece)
                        if piece.text and not self._as_json:
                            self._console.answer(piece.text, end="")
                        if stop.number is not None:
                            break
            except KeyboardInterrupt:  # before the first token, or a second Ctrl-C
                stop.number = signal.SIGINT
        if shown and self._as_json:
            self._console.answer_json(generated_json(shown, self._tokenizer))
        elif shown:
            self._console.answer("")
        if stop.number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        if stop.number is not None and not self._lines.from_terminal:
            raise KeyboardInterrupt
        if self._chat.turns is before:
            self._console.note(
                "[stopped before the first token; the message was removed]"
            )
        elif shown:
            self._note_end(shown[-1], stopped=stop.number is not None)

    def _note_forgotten(self) -> None:
        """Report, once, that the oldest messages have left the context."""
        count, length = self._chat.omitted_pairs, self._chat.context_length
        if count > self._reported:
            first = "message and its answer"
            if count > 1:
                first = f"{count} messages and their answers"
            self._console.note(
                f"[the context of {length} tokens is full: the first {first} no longer "
                "fit]"
            )
        self._reported = count

    def _note_end(self, last: "Piece", *, stopped: bool) -> None:
        used = last.prompt_tokens + last.generation_tokens
        length = self._chat.context_length
        match last.finish_reason:
            case _ if stopped:
                end = "stopped; "
            case "length" if used == length:
                end = f"truncated: the context of {length} is full; "
            case "length":
                end = "truncated by --max-tokens; "
            case "loop":
                end = "truncated: it repeats itself; "
            case _:
                end = ""
        drafts = ""
        if last.drafted_tokens:
            drafts = (
                f", {last.accepted_tokens} of "
                f"{count_of(last.drafted_tokens, 'draft token')} accepted"
            )
        if end and self._chat.is_raw:
            end += "an empty line continues; "
        if not self._chat.turns[-1].text:
            end = "empty answer; "
        self._console.note(
            f"[{end}{count_of(last.generation_tokens, 'token')} at "
            f"{last.generation_tps:.0f}/s"
            f"{drafts}, {used} of {length} in the context]"
        )


def _path(text: str) -> Path:
    if not text:
        raise OpenELMError("Give a file after the command.")
    return user_path(text)


class _Lines:
    """Lines of the input.

    Attributes:
        from_terminal: the lines are typed, after a prompt.
    """

    def __init__(self) -> None:
        self.from_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._edited = self.from_terminal and sys.stdout.isatty()
        if self._edited:
            with contextlib.suppress(ImportError):
                import readline  # arrow keys and history

                # Pasted text is one message, however many lines it has.
                readline.parse_and_bind("set enable-bracketed-paste on")

    def read(self, sign: str) -> str:
        """Return the next line without its newline.

        Raises:
            EOFError: the input has ended.
            OpenELMError: it is not UTF-8.
        """
        try:
            if self._edited:
                line = input(sign)
                line.encode()
                return line
            if self.from_terminal:  # stdout is a file: the prompt goes to stderr
                sys.stderr.write(sign)
                sys.stderr.flush()
            read = b""
            if sys.stdin is not None:
                read = sys.stdin.buffer.readline(MAX_RECORD_BYTES)
            if not read:
                raise EOFError
            read = read.removeprefix(BOM)  # of a file as the input
            return read.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeError as error:
            raise OpenELMError(f"This line is not UTF-8 text: {error}.") from error
