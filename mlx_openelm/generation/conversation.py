"""A conversation with a model: its turns, what of them the model still sees, its file.

Every prompt is rendered afresh from the turns, so the model reads what it was trained
on; what of it has gone through the model already is not processed again. A model
without a template has no turns: it goes on with one text, to which both sides add.
"""

import json
import os
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.cache import KVCache, ModelCache
from mlx_openelm.generation.decoding import Context
from mlx_openelm.generation.drafters import Drafter
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import Piece, stream
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.staging import replaced_file, staged_file
from mlx_openelm.text.messages import check_messages
from mlx_openelm.text.templates import RAW, TEMPLATE_NAMES, Turn, encode_turns
from mlx_openelm.text.tokenizer import EOS_TEXT, Tokenizer


class Conversation:
    """What was said so far, and the model that answers.

    Attributes:
        turns: the user's and the assistant's, in pairs; all of them, seen or not.
        system: the system text; empty where there is none.
        template: a name out of `TEMPLATE_NAMES`, but never "auto".
        room: tokens kept free for an answer: max_tokens, at most half of the context.
        forgotten: the oldest pairs that the last prompt had no room for.
        file: where this conversation was saved or loaded, or None.
    """

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        sampling: Sampling | None = None,
        *,
        template: str = "auto",
        system: str = "",
        name: str = "",
        adapter: str | None = None,
        drafter: Drafter | None = None,
        make_cache: Callable[[], ModelCache] = KVCache,
    ) -> None:
        """Begin with no turns.

        Args:
            template: "auto" is the one stored with the model, raw where there is none.
            name, adapter: what the file says of the model.
            drafter: guesses tokens; see `stream`.
            make_cache: of one layer; see `cache_maker`.

        Raises:
            OpenELMError: no such template, or the system text has no place.
        """
        self.sampling = sampling or Sampling()
        self.template = (tokenizer.template or RAW) if template == "auto" else template
        self.turns: tuple[Turn, ...] = ()
        self.system = ""
        self.forgotten = 0
        self.context_length = model.config.max_context_length
        self.room = min(self.sampling.max_tokens, self.context_length // 2)
        self._model, self._tokenizer = model, tokenizer
        self._drafter, self._make_cache = drafter, make_cache
        self._context = Context(model, make_cache)
        self._name, self._adapter = name, adapter
        self.file: Path | None = None
        if self.sampling.seed is not None:  # once: a second try is to be another one
            mx.random.seed(self.sampling.seed)
        self._sampling = replace(self.sampling, seed=None)
        if not self.is_raw:  # an answer that spells it means it
            stops = (*self.sampling.stop, EOS_TEXT)
            self._sampling = replace(self._sampling, stop=stops)
        self.set_system(system)

    @property
    def is_raw(self) -> bool:
        """Whether it is one text that goes on, and no turns."""
        return self.template == RAW

    def reply(self, message: str) -> Generator[Piece]:
        """Answer a message, piece by piece.

        What was yielded becomes the assistant's turn when the generator ends or is
        closed. Where it was closed or failed before a word, nothing has changed.

        Raises:
            OpenELMError: the message does not fit into the context.
        """
        return self._answer(self.turns, message)

    def retry(self) -> Generator[Piece]:
        """Answer the last message again, in place of the last answer.

        Raises:
            OpenELMError: there is none.
        """
        if not self.turns:
            raise OpenELMError("There is no answer yet that could be tried again.")
        return self._answer(self.turns[:-2], self.turns[-2].text)

    def undo(self) -> None:
        """Take back the last message and its answer.

        Raises:
            OpenELMError: there is none.
        """
        if not self.turns:
            raise OpenELMError("There is no message yet that could be taken back.")
        self.turns = self.turns[:-2]

    def reset(self) -> None:
        """Begin anew; the system text stays."""
        self.turns, self.forgotten, self.file = (), 0, None

    def set_system(self, text: str) -> None:
        """Change the system text; the turns stay.

        Raises:
            OpenELMError: the template has no place for it, or the context.
        """
        if text and self.is_raw:
            *others, last = (n for n in TEMPLATE_NAMES if n not in ("auto", RAW))
            raise OpenELMError(
                "A raw prompt has no place for a system text; choose `template` "
                f"{', '.join(others)} or {last}."
            )
        self._fit((Turn("user", ""),), text)
        self.system = text

    # Answers ---------------------------------------------------------------------

    def _answer(self, before: tuple[Turn, ...], message: str) -> Generator[Piece]:
        turns = (*before, Turn("user", message))
        self.forgotten, ids, left_space = self._fit(turns, self.system)
        return self._record(turns, ids, left_space)

    def _record(
        self, turns: tuple[Turn, ...], ids: Sequence[int], left_space: bool
    ) -> Generator[Piece]:
        """Yield an answer, and keep of it what was yielded."""
        said, whole = "", False
        model, tokenizer, sampling = self._model, self._tokenizer, self._sampling
        pieces = stream(
            model,
            tokenizer,
            ids,
            sampling,
            context=self._context,
            drafter=self._drafter,
        )
        try:
            for piece in pieces:
                if left_space and piece.text:  # it belongs to the template
                    piece = replace(piece, text=piece.text.removeprefix(" "))
                    left_space = False
                said += piece.text
                whole = piece.finish_reason is not None
                yield piece
        except GeneratorExit:
            raise
        except BaseException:  # in the middle of a step: nobody knows what it holds
            self._context = Context(model, self._make_cache)
            raise
        finally:
            if said or whole:
                self.turns = (*turns, Turn("assistant", said))

    def _fit(self, turns: Sequence[Turn], system: str) -> tuple[int, list[int], bool]:
        """Leave out the oldest pairs until the rest, and an answer, has room.

        Returns:
            The number of pairs left out; the prompt's ids; whether the prompt's last
            space was left to the answer's first word.
        """
        most = self.context_length - self.room
        pairs = len(turns) // 2

        def encode(left_out: int) -> tuple[list[int], bool]:
            return encode_turns(
                self._tokenizer, turns[2 * left_out :], self.template, system
            )

        # A prompt without a pair is shorter than with it.
        left_out = bisect_left(
            range(pairs), True, key=lambda count: len(encode(count)[0]) <= most
        )
        ids, left_space = encode(left_out)
        if len(ids) > most:
            what = "system text" if system and not turns[-1].text else "message"
            raise OpenELMError(
                f"The {what} makes a prompt of {len(ids)} tokens, and with {self.room} "
                f"kept for the answer the context of {self.context_length} has room "
                f"for {most}; shorten it."
            )
        return left_out, ids, left_space

    # The file --------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the whole conversation, whatever the model still sees of it.

        Its own file, where it was saved or loaded before, is replaced; no other is.

        Raises:
            OpenELMError: something else is there, or the disk refuses.
        """
        try:
            own = os.path.lexists(path) and path.resolve() == self.file
            if own:
                read_saved(path)  # or it has become something else
            elif os.path.lexists(path):
                raise OpenELMError(
                    f"{path} exists already and is not this conversation's file; "
                    "choose another name."
                )
            with replaced_file(path) if own else staged_file(path) as part:
                part.write_text(self._to_json(), encoding="utf-8")
            self.file = path.resolve()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise OpenELMError(f"Cannot write {path}: {error}.") from error

    def load(self, path: Path) -> list[str]:
        """Go on with a saved conversation; return notes on what is different here.

        Raises:
            OpenELMError: the file is no conversation, or cannot go on with this
                template; nothing has changed.
        """
        saved = read_saved(path)
        self.set_system(saved.system)
        self.turns, self.forgotten, self.file = saved.turns, 0, path.resolve()
        here = (
            ("model", saved.model, self._name),
            ("adapter", saved.adapter, self._adapter),
            ("template", saved.template, self.template),
        )
        return [
            f"it was held with the {what} {then or 'none'}, and goes on with "
            f"{now or 'none'}"
            for what, then, now in here
            if then != now
        ]

    def _to_json(self) -> str:
        system = [Turn("system", self.system)] if self.system else []
        described = {
            "format": FORMAT,
            "version": VERSION,
            "model": self._name,
            "adapter": self._adapter,
            "template": self.template,
            "settings": asdict(self.sampling),
            "messages": [
                {"role": turn.role, "content": turn.text}
                for turn in (*system, *self.turns)
            ],
        }
        return json.dumps(described, indent=2, ensure_ascii=False) + "\n"


# Saved conversations -------------------------------------------------------------

FORMAT = "mlx-openelm chat"
VERSION = 1
_MOST_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class SavedConversation:
    """What a file tells of a conversation."""

    model: str
    adapter: str | None
    template: str
    system: str
    turns: tuple[Turn, ...]


def read_saved(path: Path) -> SavedConversation:
    """Read and check a saved conversation.

    Raises:
        OpenELMError: the file is missing, damaged, or is something else.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OpenELMError(f"{path} is not there, or is no file.")
        if path.stat().st_size > _MOST_BYTES:
            raise OpenELMError(f"{path} is too large for a saved conversation.")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise OpenELMError(f"{path} is not a conversation that /save has written.")
        return _check_saved(found)
    except OSError as error:
        raise OpenELMError(f"Cannot read {path}: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise OpenELMError(
            f"{path} is damaged or is no saved conversation: {error}."
        ) from error


def _check_saved(found: Mapping[str, Any]) -> SavedConversation:
    """Raise ValueError where something is not as `save` writes it."""
    if found.get("version") != VERSION:
        raise ValueError(f"its version is {found.get('version')!r}, not {VERSION}")
    model, adapter, template = (found.get(n) for n in ("model", "adapter", "template"))
    if not (isinstance(model, str) and isinstance(template, str)):
        raise ValueError("it names no model or no template")
    if not isinstance(adapter, str | None):
        raise ValueError("its adapter is no name")
    messages = found.get("messages")
    checked, problems = ((), []) if messages == [] else check_messages(messages)
    if problems:
        raise ValueError("; ".join(problems))
    turns = list(checked)
    system = turns.pop(0).text if turns and turns[0].role == "system" else ""
    expected = ["user", "assistant"] * (len(turns) // 2)
    if [turn.role for turn in turns] != expected:
        raise ValueError("its messages are not a user's and an assistant's in turn")
    return SavedConversation(model, adapter, template, system, tuple(turns))
