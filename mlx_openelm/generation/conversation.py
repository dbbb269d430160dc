"""A conversation with a model: its turns, the context window, and its file.

Every prompt is rendered from the turns, as in training; its common prefix with the
processed tokens is not processed again. Without a template there are no turns: the
model continues one text, to which user and model append.
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
from mlx_openelm.input_files import read_json
from mlx_openelm.message_parts import cannot_access
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.staging import replaced_file, staged_file
from mlx_openelm.text.messages import check_messages
from mlx_openelm.text.templates import RAW, TEMPLATE_NAMES, Turn, encode_turns
from mlx_openelm.text.tokenizer import EOS_TEXT, Tokenizer
from mlx_openelm.tuning import DEFAULT, Tuning


class Conversation:
    """The turns so far, and the model that answers.

    Attributes:
        turns: user and assistant in pairs, also those beyond the context.
        system: the system text, or empty.
        template: one of `TEMPLATE_NAMES`, but never "auto".
        reserved: tokens reserved for an answer: max_tokens, at most half the context.
        omitted_pairs: number of oldest pairs that did not fit into the last prompt.
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
        tuning: Tuning = DEFAULT,
    ) -> None:
        """Start without turns.

        Args:
            template: "auto" is the one stored with the model, or else raw.
            name, adapter: names of model and adapter for the file.
            drafter: draft source of speculative decoding; see `stream`.
            make_cache: constructor of a layer's cache; see `cache_maker`.
            tuning: how work is given to the device.

        Raises:
            OpenELMError: the template does not exist or takes no system text, or the
                system text is too long.
        """
        self.sampling = sampling or Sampling()
        self.template = (tokenizer.template or RAW) if template == "auto" else template
        self.turns: tuple[Turn, ...] = ()
        self.system = ""
        self.omitted_pairs = 0
        self.context_length = model.config.max_context_length
        self.reserved = min(self.sampling.max_tokens, self.context_length // 2)
        self._model, self._tokenizer = model, tokenizer
        self._drafter, self._make_cache = drafter, make_cache
        self._tuning = tuning
        self._context = Context(model, make_cache, tuning)
        self._name, self._adapter = name, adapter
        self.file: Path | None = None
        if self.sampling.seed is not None:  # once, so that a retry gives another answer
            mx.random.seed(self.sampling.seed)
        self._sampling = replace(self.sampling, seed=None)
        if not self.is_raw:  # EOS spelled as text ends the answer, too
            stops = (*self.sampling.stop, EOS_TEXT)
            self._sampling = replace(self._sampling, stop=stops)
        self.set_system(system)

    @property
    def is_raw(self) -> bool:
        """Whether it is one continued text without turns."""
        return self.template == RAW

    def reply(self, message: str) -> Generator[Piece]:
        """Answer a message, piece by piece.

        The yielded text becomes the assistant's turn when the generator ends or is
        closed. Without any text by then, nothing changes.

        Raises:
            OpenELMError: the message does not fit into the context.
        """
        return self._answer(self.turns, message)

    def retry(self) -> Generator[Piece]:
        """Answer the last message again and replace its answer.

        Raises:
            OpenELMError: there is none.
        """
        if not self.turns:
            raise OpenELMError("There is no answer to retry; enter a message first.")
        return self._answer(self.turns[:-2], self.turns[-2].text)

    def undo(self) -> None:
        """Remove the last message and its answer.

        Raises:
            OpenELMError: there is none.
        """
        if not self.turns:
            raise OpenELMError("There is no message to undo; enter one first.")
        self.turns = self.turns[:-2]

    def reset(self) -> None:
        """Remove all turns; keep the system text."""
        self.turns, self.omitted_pairs, self.file = (), 0, None

    def set_system(self, text: str) -> None:
        """Change the system text; keep the turns.

        Raises:
            OpenELMError: the template takes none, or it does not fit into the context.
        """
        if text and self.is_raw:
            *others, last = (n for n in TEMPLATE_NAMES if n not in ("auto", RAW))
            raise OpenELMError(
                "A raw prompt takes no system text; choose `template` "
                f"{', '.join(others)} or {last}."
            )
        self._fit((Turn("user", ""),), text)
        self.system = text

    # Answers ---------------------------------------------------------------------

    def _answer(self, before: tuple[Turn, ...], message: str) -> Generator[Piece]:
        turns = (*before, Turn("user", message))
        self.omitted_pairs, ids, left_space = self._fit(turns, self.system)
        return self._record(turns, ids, left_space)

    def _record(
        self, turns: tuple[Turn, ...], ids: Sequence[int], left_space: bool
    ) -> Generator[Piece]:
        """Yield an answer and append the yielded text to the turns."""
        text, is_complete = "", False
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
                if left_space and piece.text:  # the space belongs to the template
                    piece = replace(piece, text=piece.text.removeprefix(" "))
                    left_space = False
                text += piece.text
                is_complete = piece.finish_reason is not None
                yield piece
        except GeneratorExit:
            raise
        except BaseException:  # in the middle of a step: the cache is undefined
            self._context = Context(model, self._make_cache, self._tuning)
            raise
        finally:
            if text or is_complete:
                self.turns = (*turns, Turn("assistant", text))

    def _fit(self, turns: Sequence[Turn], system: str) -> tuple[int, list[int], bool]:
        """Omit the oldest pairs until the rest and an answer fit into the context.

        Returns:
            The number of omitted pairs; the prompt's ids; whether the prompt leaves its
            last space to the answer's first token.
        """
        most = self.context_length - self.reserved
        pairs = len(turns) // 2

        def encode(omitted: int) -> tuple[list[int], bool]:
            return encode_turns(
                self._tokenizer, turns[2 * omitted :], self.template, system
            )

        # Each omitted pair makes the prompt shorter.
        omitted = bisect_left(
            range(pairs), True, key=lambda count: len(encode(count)[0]) <= most
        )
        ids, left_space = encode(omitted)
        if len(ids) > most:
            what = "system text" if system and not turns[-1].text else "message"
            raise OpenELMError(
                f"The {what} makes a prompt of {len(ids)} tokens, but the context of "
                f"{self.context_length} holds at most {most}, with {self.reserved} "
                "reserved for the answer; shorten it."
            )
        return omitted, ids, left_space

    # The file --------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write all turns, also those beyond the context.

        Only the file from which it was loaded, or to which it was saved, is replaced.

        Raises:
            OpenELMError: the path exists and is another file, or cannot be written.
        """
        try:
            own = os.path.lexists(path) and path.resolve() == self.file
            if own:
                read_saved(path)  # fails if another program has replaced it
            elif os.path.lexists(path):
                raise OpenELMError(
                    f"{path} exists already and is not this conversation's file; "
                    "choose another name."
                )
            with replaced_file(path) if own else staged_file(path) as part:
                part.write_text(self._to_json(), encoding="utf-8")
            self.file = path.resolve()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise OpenELMError(cannot_access(path, error, "write")) from error

    def load(self, path: Path) -> list[str]:
        """Resume a saved conversation; return notes on differences of the settings.

        Raises:
            OpenELMError: the file is not a saved conversation, or its system text does
                not fit this template; nothing has changed.
        """
        saved = read_saved(path)
        self.set_system(saved.system)
        self.turns, self.omitted_pairs, self.file = saved.turns, 0, path.resolve()
        here = (
            ("model", saved.model, self._name),
            ("adapter", saved.adapter, self._adapter),
            ("template", saved.template, self.template),
        )
        return [
            f"it was saved with the {what} {then or 'none'} and resumes with "
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
    """The content of a conversation's file."""

    model: str
    adapter: str | None
    template: str
    system: str
    turns: tuple[Turn, ...]


def read_saved(path: Path) -> SavedConversation:
    """Read and check a saved conversation.

    Raises:
        OpenELMError: the file is missing, damaged, or of another kind.
    """
    try:
        if not path.is_file():  # reading a pipe would block
            raise OpenELMError(f"{path} does not exist or is not a regular file.")
        if path.stat().st_size > _MOST_BYTES:
            raise OpenELMError(f"{path} is too large for a saved conversation.")
        fields = read_json(path)
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise OpenELMError(f"{path} is not a conversation written by /save.")
        return _check_saved(fields)
    except OSError as error:
        raise OpenELMError(cannot_access(path, error)) from error
    except ValueError as error:
        raise OpenELMError(
            f"{path} is damaged or not a saved conversation: {error}."
        ) from error


def _check_saved(fields: Mapping[str, Any]) -> SavedConversation:
    """Raise ValueError if a field is not as `save` writes it."""
    if fields.get("version") != VERSION:
        raise ValueError(f"its version is {fields.get('version')!r}, not {VERSION}")
    model, adapter, template = (fields.get(n) for n in ("model", "adapter", "template"))
    if not (isinstance(model, str) and isinstance(template, str)):
        raise ValueError("it does not name a model and a template")
    if not isinstance(adapter, str | None):
        raise ValueError("its adapter is not a name")
    messages = fields.get("messages")
    checked, problems = ((), []) if messages == [] else check_messages(messages)
    if problems:
        raise ValueError("; ".join(problems))
    turns = list(checked)
    system = turns.pop(0).text if turns and turns[0].role == "system" else ""
    expected = ["user", "assistant"] * (len(turns) // 2)
    if [turn.role for turn in turns] != expected:
        raise ValueError("its messages do not alternate between user and assistant")
    return SavedConversation(model, adapter, template, system, tuple(turns))
