"""Answers of the engine as the JSON documents of OpenAI's API."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_openelm.generation.batching.sequences import Output
from mlx_openelm.generation.decoding import Token
from mlx_openelm.serving.completions import Choice, Completion
from mlx_openelm.serving.logprobs import (
    AnswerChunk,
    describe_for_chat,
    describe_for_completions,
)
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.version import __version__


async def read_chunks(
    outputs: AsyncGenerator[Output, None], choice: Choice, tokenizer: Tokenizer
) -> AsyncGenerator[AnswerChunk, None]:
    """Yield texts with the tokens that they were made of.

    Withheld text (half a character, the beginning of a stop text) waits for what comes
    next.

    Raises:
        OpenELMError: the request has failed.
    """
    drops_space, echo = choice.drops_space, choice.echo
    scores_prompt = choice.request.scores_prompt
    pending: list[Token] = []
    count = 0
    async for output in outputs:
        if output.error is not None:
            raise output.error
        if echo or scores_prompt:
            first = _prompt_tokens(choice, output) if scores_prompt else []
            yield AnswerChunk(echo, first, None, 0, output.cached_tokens)
            echo, scores_prompt = "", False
        count += output.token is not None
        text, reason = output.text, output.finish_reason
        if drops_space and text:
            text, drops_space = text.removeprefix(" "), False
        is_eos = output.token is not None and output.token.id == tokenizer.eos_id
        if output.token is not None and not is_eos:
            pending.append(output.token)
        if reason or text:
            if reason == "stop" and not is_eos and not text:
                pending = []  # they are the stop text
            yield AnswerChunk(text, pending, reason, count, output.cached_tokens)
            pending = []


def _prompt_tokens(choice: Choice, output: Output) -> list[Token]:
    """Return the prompt's tokens; the first has no log-probability."""
    return [Token(choice.request.ids[0]), *output.prompt_tokens]


@dataclass
class ResponseWriter:
    """Builds the documents of one completion."""

    completion: Completion
    tokenizer: Tokenizer
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.completion.is_chat else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4()}"
        self._offsets: dict[int, int] = {}  # of the text of each choice

    def start_event(self, choice: Choice) -> dict[str, Any] | None:
        """Return a stream's first document of a choice, which names the role."""
        if not self.completion.is_chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._document(
            [{"index": choice.index, "delta": delta, "finish_reason": None}]
        )

    def event(self, choice: Choice, chunk: AnswerChunk) -> dict[str, Any]:
        """Return a stream's next document of a choice."""
        body: dict[str, Any] = {"index": choice.index}
        if self.completion.is_chat:
            body["delta"] = {"content": chunk.text} if chunk.text else {}
        else:
            body["text"] = chunk.text
        body["logprobs"] = self._logprobs(choice, [chunk])
        body["finish_reason"] = chunk.finish_reason
        return self._document([body])

    def usage_event(self, chunks: dict[int, AnswerChunk]) -> dict[str, Any]:
        """Return a stream's last document, by the last chunk of each choice."""
        return {**self._document([]), "usage": self.usage(chunks)}

    def whole(self, chunks: dict[int, list[AnswerChunk]]) -> dict[str, Any]:
        """Return a whole response, by the chunks of each choice."""
        choices = []
        for choice in self.completion.choices:
            own = chunks[choice.index]
            text = "".join(chunk.text for chunk in own)
            body: dict[str, Any] = {"index": choice.index}
            if self.completion.is_chat:
                body["message"] = {"role": "assistant", "content": text}
            else:
                body["text"] = text
            body["logprobs"] = self._logprobs(choice, own)
            body["finish_reason"] = own[-1].finish_reason
            choices.append(body)
        last = {index: own[-1] for index, own in chunks.items()}
        return {**self._document(choices), "usage": self.usage(last)}

    def usage(self, chunks: dict[int, AnswerChunk]) -> dict[str, Any]:
        """Return the numbers of tokens; a prompt of several choices counts once."""
        prompts: dict[int, int] = {}
        cached: dict[int, int] = {}
        for choice in self.completion.choices:
            prompts[choice.prompt] = len(choice.request.ids)
            cached.setdefault(choice.prompt, chunks[choice.index].cached)
        total, drawn = sum(prompts.values()), sum(c.count for c in chunks.values())
        return {
            "prompt_tokens": total,
            "completion_tokens": drawn,
            "total_tokens": total + drawn,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }

    def _logprobs(
        self, choice: Choice, chunks: Sequence[AnswerChunk]
    ) -> dict[str, Any] | None:
        count = self.completion.logprobs
        if count is None:
            return None
        if self.completion.is_chat:
            return describe_for_chat(self.tokenizer, chunks, count)
        offset = self._offsets.get(choice.index, 0)
        self._offsets[choice.index] = offset + sum(len(c.text) for c in chunks)
        return describe_for_completions(self.tokenizer, chunks, offset, count)

    def _document(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "text_completion"
        if self.completion.is_chat:
            kind = "chat.completion" + (".chunk" if self.completion.stream else "")
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.completion.model,
            "system_fingerprint": f"mlx-openelm-{__version__}",
            "choices": choices,
        }
