"""Constrained output: answers that follow a JSON schema, a pattern or a grammar.

Before each token a parser computes which tokens may follow; all others are masked
(Willard and Louf, 2307.09702; the parser is llguidance's). Importing llguidance takes
0.1 s, so it is imported inside the functions.
"""

import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.options import ConstraintOptions
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.paths import user_path
from mlx_openelm.text.tokenizer import SPACE, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_PROBED_TOKENS = 3  # when a grammar is compiled
# Limits of the parser: they bound the memory of a grammar to about 20 MB, and the time
# of a step. Its lexer creates states as they are needed, and copies share them.
_MOST_LEXER_STATES = 50_000
_MOST_STEP_FUEL = 20_000  # expressions that a step may create
_LONGEST_REASON = 500  # characters of an error of the compiler
# Some whitespace is fixed: a small model may otherwise fill its answer with it.
_JSON_LAYOUT = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class Constraint(Protocol):
    """Which tokens may follow in one answer."""

    @property
    def description(self) -> str:
        """The grammar that it enforces, as text."""

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Return which of the tokens may be next, bool (V,)."""

    def accept(self, token: int) -> None:
        """Advance by a token."""

    def copy(self) -> "Constraint":
        """Return the constraint in its present state, to be advanced separately.

        Copies share the limits of the parser: use them for the answers of one request.
        """

    def restarted(self) -> "Constraint":
        """Return the constraint at the start of an answer, with limits of its own."""


def read_constraint(
    options: ConstraintOptions, tokenizer: Tokenizer, vocab_size: int
) -> Constraint | None:
    """Return the constraint that the options describe; None if there is none.

    Raises:
        OpenELMError: the file cannot be read, or the grammar cannot be compiled.
    """
    if options.json_schema is not None:
        schema = read_mapping(user_path(options.json_schema))
        return GrammarCompiler(tokenizer, vocab_size).json_schema(schema)
    if options.regex is not None:
        return GrammarCompiler(tokenizer, vocab_size).regex(options.regex)
    return None


class GrammarCompiler:
    """Compiles grammars for the tokens of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Prepare to compile; the first grammar also prepares the tokens.

        Args:
            vocab_size: rows of the embedding; rows without a piece are never allowed.
        """
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    @cached_property
    def _tokens(self) -> "LLTokenizer":
        return _build_tokens(self._tokenizer, self._vocab_size)

    def json_object(self) -> Constraint:
        """Return a constraint to any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Any) -> Constraint:
        """Return a constraint to JSON that is valid under a schema.

        Raises:
            OpenELMError: it is not a schema, or uses what cannot be enforced.
        """
        if not isinstance(schema, dict):
            raise OpenELMError("The JSON schema is not an object.")
        options = schema.get("x-guidance", {})
        if not isinstance(options, dict):
            raise OpenELMError("The JSON schema's x-guidance is not an object.")
        laid_out = {**schema, "x-guidance": {**_JSON_LAYOUT, **options}}
        # A model may begin its answer with a space, which JSON allows.
        grammar = f'start: " "? value\nvalue: %json {json.dumps(laid_out)}\n'
        return self._compile(grammar, "JSON schema")

    def regex(self, pattern: str) -> Constraint:
        """Return a constraint to texts that match a regular expression as a whole.

        Raises:
            OpenELMError: it is not a regular expression, or uses look-around,
                back-references or other operators beyond regular languages.
        """
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_regex(pattern)
        return self._compile(grammar, "regular expression")

    def grammar(self, text: str) -> Constraint:
        """Return a constraint to a context-free grammar in Lark's notation.

        Raises:
            OpenELMError: it is not such a grammar; its first rule is `start`.
        """
        from llguidance import LLMatcher

        return self._compile(LLMatcher.grammar_from_lark(text), "grammar")

    def _compile(self, grammar: str, kind: str) -> Constraint:
        matcher = _make_matcher(self._tokens, grammar)
        probe = self._try_tokens(matcher)
        if probe.is_error():
            raise OpenELMError(f"The {kind} cannot be used: {_reason(probe)}.")
        return _MatcherConstraint(self._tokens, grammar, matcher)

    def _try_tokens(self, matcher: "LLMatcher") -> "LLMatcher":
        """Return a copy after some tokens; a grammar that is too large fails there.

        The first mask of a large grammar takes a second; the lexer keeps what it needs.
        """
        probe = matcher.deep_copy()
        for _ in range(_PROBED_TOKENS):
            if probe.is_error():
                break
            bits = np.frombuffer(probe.compute_bitmask(), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
            if not len(allowed) or allowed[0] == self._tokenizer.eos_id:
                break
            probe.consume_token(int(allowed[0]))
        return probe


class _MatcherConstraint:
    def __init__(
        self, tokens: "LLTokenizer", grammar: str, matcher: "LLMatcher"
    ) -> None:
        self._tokens, self._grammar, self._matcher = tokens, grammar, matcher

    @property
    def description(self) -> str:
        return self._grammar

    def allowed(self, vocab_size: int) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little")[:vocab_size].astype(np.bool_)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> Constraint:
        matcher = self._matcher.deep_copy()
        return _MatcherConstraint(self._tokens, self._grammar, matcher)

    def restarted(self) -> Constraint:
        matcher = _make_matcher(self._tokens, self._grammar)
        return _MatcherConstraint(self._tokens, self._grammar, matcher)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OpenELMError(
                f"The answer cannot be constrained further: {_reason(self._matcher)}."
            )


def _make_matcher(tokens: "LLTokenizer", grammar: str) -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_lexer_states=_MOST_LEXER_STATES, step_lexer_fuel=_MOST_STEP_FUEL
    )
    return LLMatcher(tokens, grammar, log_level=0, limits=limits)


def _reason(matcher: "LLMatcher") -> str:
    """Return the compiler's message without its position and picture of the place."""
    lines = matcher.get_error().partition("<state>")[0].strip().splitlines()
    kept = [line.strip() for line in lines if not re.match(r"\s*(\d+ \||\^)", line)]
    text = " ".join(kept).partition(": ")[2] or " ".join(kept)
    if text == "NoExtensionBias":
        return "no text matches it"
    return text[:_LONGEST_REASON].rstrip(".")


def keep_allowed(logits: mx.array, shaped: mx.array, allowed: mx.array) -> mx.array:
    """Set the logits of other than the allowed tokens to -inf, (R, V) all.

    Where penalties have banned every allowed token, the unshaped logits decide.
    """
    kept = mx.where(allowed, shaped, -mx.inf)
    some = mx.any(kept > -mx.inf, axis=-1, keepdims=True)
    return mx.where(some, kept, mx.where(allowed, logits, -mx.inf))


class _TokenBytes:
    """A tokenizer's pieces as bytes, as llguidance reads them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        processor = tokenizer.processor
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for token in range(tokenizer.num_ids):
            piece = tokenizer.piece(token)
            is_piece = token < tokenizer.vocab_size
            byte = tokenizer.byte_of(token)
            if byte is not None:
                self.tokens.append(byte)
            elif (
                not is_piece or processor.IsControl(token) or processor.IsUnknown(token)
            ):
                self.tokens.append(b"\xff" + piece.encode())
                self.special_token_ids.append(token)
            else:
                self.tokens.append(piece.replace(SPACE, " ").encode())
        self._encode = processor.encode
        self._newline = int(processor.PieceToId("<0x0A>"))

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text in the middle of another, without a dummy space."""
        if not isinstance(text, str):
            raise TypeError("only strings are encoded")
        ids: list[int] = self._encode(f"\n{text}")
        if self._newline in ids:
            ids = ids[ids.index(self._newline) + 1 :]
            if b"".join(self.tokens[i] for i in ids) == text.encode():
                return ids
        return [self.tokens.index(bytes([byte])) for byte in text.encode()]


def _build_tokens(tokenizer: Tokenizer, vocab_size: int) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapper = TokenizerWrapper(_TokenBytes(tokenizer))
    return LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=tokenizer.eos_id)
