"""Log-probabilities, as OpenAI's clients read them."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from mlx_openelm.generation.decoding import Token
from mlx_openelm.text.tokenizer import SPACE, StreamDecoder, Tokenizer

Spell = Callable[[int], tuple[str, list[int]]]


class TokenOffsets:
    """Where in an answer the text of each token begins.

    The tokens of one character's bytes begin at the character.
    """

    def __init__(
        self, tokenizer: Tokenizer, decoder: StreamDecoder, start: int
    ) -> None:
        self._tokenizer, self._decoder, self._end = tokenizer, decoder, start

    def add(self, token: int) -> int:
        """Return the offset of the next token."""
        is_byte = self._tokenizer.byte_of(token) is not None
        if not is_byte:
            self._end += len(self._decoder.finish())
        text = self._decoder.add(token)
        self._end += len(text)
        own = not self._decoder.is_incomplete if is_byte else len(text)
        return self._end - own


def make_speller(tokenizer: Tokenizer) -> Spell:
    """Return a function that returns a token's text and bytes, and keeps them.

    The text of a byte is as OpenAI writes it.
    """

    @cache
    def spell(id: int) -> tuple[str, list[int]]:
        piece, byte = tokenizer.piece(id), tokenizer.byte_of(id)
        if byte is not None:
            return f"bytes:\\x{byte.hex()}", list(byte)
        if id >= tokenizer.vocab_size:  # an added token, or a row without a token
            return piece or f"<{id}>", list(piece.encode())
        text = piece.replace(SPACE, " ")
        return text, list(text.encode())

    return spell


def describe_for_completions(
    spell: Spell, tokens: Sequence[Token], offsets: Sequence[int], count: int
) -> dict[str, Any]:
    """Return a completion's "logprobs", with `count` alternatives of each token."""
    others = [
        {spell(id)[0]: _finite(value) for id, value in token.alternatives[:count]}
        or None
        for token in tokens
    ]
    return {
        "tokens": [spell(token.id)[0] for token in tokens],
        "token_logprobs": [
            None if token.logprob is None else _finite(token.logprob)
            for token in tokens
        ],
        "top_logprobs": others if any(others) else None,
        "text_offset": list(offsets),
    }


def describe_for_chat(
    spell: Spell, tokens: Sequence[Token], count: int
) -> dict[str, Any]:
    """Return a chat's "logprobs", with `count` alternatives of each token."""

    def describe(id: int, logprob: float | None) -> dict[str, Any]:
        text, data = spell(id)
        assert logprob is not None
        return {"token": text, "logprob": _finite(logprob), "bytes": data}

    content = [
        describe(token.id, token.logprob)
        | {"top_logprobs": [describe(*one) for one in token.alternatives[:count]]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # as OpenAI's: JSON has no infinity
