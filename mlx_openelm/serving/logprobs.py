"""Log-probabilities, as OpenAI's clients read them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_openelm.generation.decoding import Token
from mlx_openelm.text.tokenizer import SPACE, Tokenizer


@dataclass(frozen=True, slots=True)
class AnswerChunk:
    """A part of an answer.

    Attributes:
        tokens: the tokens that its text was made of.
        count: number of tokens drawn for the answer so far.
        cached: prompt tokens that were not processed again.
    """

    text: str
    tokens: Sequence[Token]
    finish_reason: str | None
    count: int
    cached: int = 0


def describe_for_completions(
    tokenizer: Tokenizer, chunks: Iterable[AnswerChunk], offset: int, count: int
) -> dict[str, Any]:
    """Return a completion's "logprobs".

    Args:
        offset: where the first chunk begins in the text.
        count: number of alternatives.
    """
    tokens, own, others, offsets = [], [], [], []
    for chunk in chunks:
        for token in chunk.tokens:
            tokens.append(_spell(tokenizer, token.id)[0])
            own.append(None if token.logprob is None else _finite(token.logprob))
            others.append(
                {
                    _spell(tokenizer, id)[0]: _finite(value)
                    for id, value in token.alternatives[:count]
                }
                or None
            )
            offsets.append(offset)
        offset += len(chunk.text)
    return {
        "tokens": tokens,
        "token_logprobs": own,
        "top_logprobs": others if any(others) else None,
        "text_offset": offsets,
    }


def describe_for_chat(
    tokenizer: Tokenizer, chunks: Iterable[AnswerChunk], count: int
) -> dict[str, Any]:
    """Return a chat completion's "logprobs", with `count` alternatives a token."""

    def describe(id: int, logprob: float | None) -> dict[str, Any]:
        text, data = _spell(tokenizer, id)
        assert logprob is not None
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        describe(token.id, token.logprob)
        | {"top_logprobs": [describe(*one) for one in token.alternatives[:count]]}
        for chunk in chunks
        for token in chunk.tokens
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # as OpenAI's: JSON has no infinity


def _spell(tokenizer: Tokenizer, id: int) -> tuple[str, bytes]:
    """Return a token's text and bytes; a byte's text is as OpenAI writes it."""
    processor = tokenizer.processor
    piece = tokenizer.piece(id)
    if id >= tokenizer.vocab_size:  # an added token, or a row without a token
        return piece or f"<{id}>", piece.encode()
    if processor.IsByte(id):
        return f"bytes:\\x{piece[3:5].lower()}", bytes.fromhex(piece[3:5])
    text = piece.replace(SPACE, " ")
    return text, text.encode()
