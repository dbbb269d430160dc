"""Answers of the engine as the JSON documents of OpenAI's API."""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mlx_openelm.generation.batching.sequences import Output
from mlx_openelm.generation.decoding import Token
from mlx_openelm.serving.completions import Choice, Completion
from mlx_openelm.serving.logprobs import (
    Spell,
    TokenOffsets,
    describe_for_chat,
    describe_for_completions,
)
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.version import __version__


@dataclass(frozen=True, slots=True)
class AnswerChunk:
    """A part of an answer.

    Attributes:
        tokens: the tokens that its text was made of, if their log-probabilities are
            requested.
        offsets: where in the text of the answer each token begins.
    """

    choice: Choice
    text: str
    tokens: Sequence[Token] = ()
    offsets: Sequence[int] = ()
    finish_reason: str | None = None


class _ChoiceReader:
    """Makes the chunks of one choice of its outputs.

    Attributes:
        count: number of tokens drawn for the answer so far.
        cached: prompt tokens that were not processed again.
    """

    def __init__(self, choice: Choice, tokenizer: Tokenizer) -> None:
        self.count = self.cached = 0
        self.choice, self._tokenizer = choice, tokenizer
        request = choice.request
        self._scores = request.sampling.logprobs > 0
        decoder = tokenizer.stream_decoder(
            request.ids, keeps_first_space=request.constraint is not None
        )
        self._length = len(choice.echo)  # of the text so far
        self._offsets = TokenOffsets(tokenizer, decoder, self._length)
        self._has_started = False
        self._drops_space = choice.drops_space
        self._pending: list[tuple[Token, int]] = []

    def add(self, output: Output) -> Iterator[AnswerChunk]:
        """Yield the chunks that an output completes.

        Withheld text (half a character, the beginning of a stop text) waits for what
        comes next.
        """
        if not self._has_started:
            self._has_started = True
            yield from self._echo(output)
        token, text, reason = output.token, output.text, output.finish_reason
        self.cached = output.cached_tokens
        self.count += token is not None
        is_eos = token is not None and token.id == self._tokenizer.eos_id
        if self._scores and token is not None and not is_eos:
            self._pending.append((token, self._offsets.add(token.id)))
        if not reason and not text:
            return
        self._length += len(text)
        if reason == "stop" and not is_eos:  # the others are the stop text
            self._pending = [p for p in self._pending if p[1] < self._length]
        if self._drops_space and text:
            text, self._drops_space = text.removeprefix(" "), False
        tokens, offsets = (
            zip(*self._pending, strict=True) if self._pending else ((), ())
        )
        self._pending = []
        yield AnswerChunk(self.choice, text, tokens, offsets, reason)

    def _echo(self, output: Output) -> Iterator[AnswerChunk]:
        request = self.choice.request
        tokens: list[Token] = []
        if request.scores_prompt:  # the first token has no log-probability
            tokens = [Token(request.ids[0]), *output.prompt_tokens]
        if self.choice.echo or tokens:
            offsets = TokenOffsets(self._tokenizer, self._tokenizer.stream_decoder(), 0)
            places = [offsets.add(token.id) for token in tokens]
            yield AnswerChunk(self.choice, self.choice.echo, tokens, places)


class ResponseWriter:
    """Builds the documents of one completion."""

    def __init__(
        self, completion: Completion, tokenizer: Tokenizer, spell: Spell
    ) -> None:
        prefix = "chatcmpl" if completion.is_chat else "cmpl"
        self._completion, self._spell = completion, spell
        self._id, self._created = f"{prefix}-{uuid.uuid4()}", int(time.time())
        self._readers = {
            choice.request: _ChoiceReader(choice, tokenizer)
            for choice in completion.choices
        }

    def read(self, output: Output) -> Iterator[AnswerChunk]:
        """Yield the chunks that an output completes.

        Raises:
            OpenELMError: the request has failed.
        """
        if output.error is not None:
            raise output.error
        yield from self._readers[output.request].add(output)

    def start_events(self) -> Iterator[dict[str, Any]]:
        """Yield a stream's first documents, which name the roles."""
        if self._completion.is_chat:
            delta = {"role": "assistant", "content": ""}
            for choice in self._completion.choices:
                start = {"index": choice.index, "delta": delta, "finish_reason": None}
                yield self._document([start])

    def event(self, chunk: AnswerChunk) -> dict[str, Any]:
        """Return a stream's next document of a choice."""
        body: dict[str, Any] = {"index": chunk.choice.index}
        if self._completion.is_chat:
            body["delta"] = {"content": chunk.text} if chunk.text else {}
        else:
            body["text"] = chunk.text
        body["logprobs"] = self._logprobs([chunk])
        body["finish_reason"] = chunk.finish_reason
        return self._document([body])

    def usage_event(self) -> dict[str, Any]:
        """Return a stream's last document."""
        return {**self._document([]), "usage": self._usage()}

    def whole(self, chunks: Sequence[AnswerChunk]) -> str:
        """Return a whole response as JSON, by the chunks of all choices.

        `json.dumps` holds Python's global lock, so each choice has a call of its own.
        """
        own: dict[int, list[AnswerChunk]] = {}
        for chunk in chunks:
            own.setdefault(chunk.choice.index, []).append(chunk)
        choices = ", ".join(
            json.dumps(self._whole_choice(own[choice.index]))
            for choice in self._completion.choices
        )
        rest = {**self._document([]), "usage": self._usage()}
        del rest["choices"]
        return f'{json.dumps(rest)[:-1]}, "choices": [{choices}]}}'

    def _whole_choice(self, chunks: Sequence[AnswerChunk]) -> dict[str, Any]:
        text = "".join(chunk.text for chunk in chunks)
        body: dict[str, Any] = {"index": chunks[0].choice.index}
        if self._completion.is_chat:
            body["message"] = {"role": "assistant", "content": text}
        else:
            body["text"] = text
        body["logprobs"] = self._logprobs(chunks)
        body["finish_reason"] = chunks[-1].finish_reason
        return body

    def _usage(self) -> dict[str, Any]:
        """Return the numbers of tokens; a prompt of several choices counts once."""
        prompts: dict[int, int] = {}
        cached: dict[int, int] = {}
        for request, reader in self._readers.items():
            number = reader.choice.prompt
            prompts[number] = len(request.ids)
            cached.setdefault(number, reader.cached)
        total = sum(prompts.values())
        drawn = sum(reader.count for reader in self._readers.values())
        return {
            "prompt_tokens": total,
            "completion_tokens": drawn,
            "total_tokens": total + drawn,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }

    def _logprobs(self, chunks: Sequence[AnswerChunk]) -> dict[str, Any] | None:
        count = self._completion.logprobs
        if count is None:
            return None
        tokens = list(chain.from_iterable(chunk.tokens for chunk in chunks))
        if self._completion.is_chat:
            return describe_for_chat(self._spell, tokens, count)
        offsets = list(chain.from_iterable(chunk.offsets for chunk in chunks))
        return describe_for_completions(self._spell, tokens, offsets, count)

    def _document(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "text_completion"
        if self._completion.is_chat:
            kind = "chat.completion" + (".chunk" if self._completion.stream else "")
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._completion.model,
            "system_fingerprint": f"mlx-openelm-{__version__}",
            "choices": choices,
        }
