"""Log-probabilities, as OpenAI's clients read them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_openelm.text.tokenizer import SPACE, Tokenizer


class ResponseToken(Protocol):
    """A drawn token, as mlx-lm tells of it."""

    token: int
    logprob: float
    top_tokens: Any  # dicts, each with id and logprob, in no order


@dataclass(frozen=True, slots=True)
class ResponseChunk:
    """A text, the tokens that it was made of, and how many there were in all."""

    text: str
    tokens: Sequence[ResponseToken]
    finish_reason: str | None
    count: int


def describe_for_completions(
    tokenizer: Tokenizer, parts: Iterable[ResponseChunk], place: int
) -> dict[str, Any]:
    """Return a completion's "logprobs"; `place` is where the first text stands."""
    tokens, own, others, places = [], [], [], []
    for part in parts:
        for token in part.tokens:
            tokens.append(_spell(tokenizer, token.token)[0])
            own.append(_finite(token.logprob))
            others.append(
                {_spell(tokenizer, id)[0]: value for id, value in _likeliest(token)}
            )
            places.append(place)
        place += len(part.text)
    return {
        "tokens": tokens,
        "token_logprobs": own,
        "top_logprobs": others if any(others) else None,
        "text_offset": places,
    }


def describe_for_chat(
    tokenizer: Tokenizer, parts: Iterable[ResponseChunk], place: int
) -> dict[str, Any]:
    """Return a chat completion's "logprobs"."""

    def describe(id: int, logprob: float) -> dict[str, Any]:
        text, data = _spell(tokenizer, id)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    content = [
        describe(token.token, _finite(token.logprob))
        | {"top_logprobs": [describe(*other) for other in _likeliest(token)]}
        for part in parts
        for token in part.tokens
    ]
    return {"content": content, "refusal": None}


def _likeliest(token: ResponseToken) -> list[tuple[int, float]]:
    found = [(other["id"], _finite(other["logprob"])) for other in token.top_tokens]
    return sorted(found, key=lambda pair: -pair[1])


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # as OpenAI's: JSON has no infinity


def _spell(tokenizer: Tokenizer, id: int) -> tuple[str, bytes]:
    """Return a token's text and bytes; a byte's text is as OpenAI writes it."""
    processor = tokenizer.processor
    if id >= tokenizer.vocab_size:  # a row of the embedding that pads it
        return f"<{id}>", b""
    piece = processor.IdToPiece(id)
    if processor.IsByte(id):
        return f"bytes:\\x{piece[3:5].lower()}", bytes.fromhex(piece[3:5])
    text = piece.replace(SPACE, " ")
    return text, text.encode()
