"""Process the prompts of new sequences in chunks, in a fair order.

Between two decode steps at most one chunk is processed, so that long prompts do not
delay the answers in progress. Chunks go in turn to the prompt with the fewest tokens
left, so that a short one is not delayed by long ones, and to the one that has waited
longest, so that every prompt is processed eventually.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_openelm import openblas
from mlx_openelm.generation.batching.prefix_tree import (
    SHORTEST,
    PrefixTree,
    common_prefix,
)
from mlx_openelm.generation.batching.sequences import SequenceState
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.generation.decoding import INTERLEAVED_CHUNK as PREFILL_CHUNK
from mlx_openelm.generation.decoding import DrawnTokens, Token
from mlx_openelm.generation.sampling import (
    find_padding,
    mask_padding,
    top_logprobs,
)
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.token_layout import Sequences
from mlx_openelm.text.tokenizer import Tokenizer


@dataclass(eq=False, slots=True)
class _Started:
    """A prompt that is being processed.

    Attributes:
        cache: keys and values of its first `done` tokens, one cache per layer.
    """

    sequence: SequenceState
    cache: list[KVCache]
    done: int
    scored: list[Token] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.sequence.ids) - 1 - self.done


class PromptQueue:
    """Sequences whose prompts wait or are being processed.

    Attributes:
        tree: keys and values of earlier prompts.
    """

    def __init__(
        self,
        models: dict[str, OpenELM],
        tokenizer: Tokenizer,
        tree: PrefixTree,
        *,
        most_started: int,
    ) -> None:
        """Start empty.

        Args:
            most_started: prompts longer than a chunk that are processed in turn.
        """
        self._models, self.tree, self._most_started = models, tree, most_started
        self._tokenizer = tokenizer
        self._waiting: list[SequenceState] = []
        self._started: list[_Started] = []
        self._chunks = 0
        self._current: list[SequenceState] = []  # of the newest chunk

    def __len__(self) -> int:
        return len(self._waiting) + len(self._started)

    @property
    def sequences(self) -> list[SequenceState]:
        return [*self._waiting, *(started.sequence for started in self._started)]

    def add(self, sequence: SequenceState) -> None:
        self._waiting.append(sequence)

    def remove_ended(self) -> None:
        self._waiting = [s for s in self._waiting if not s.has_ended]
        self._started = [s for s in self._started if not s.sequence.has_ended]

    def read_chunk(self, free_rows: int) -> list[SequenceState]:
        """Process one chunk; return the sequences whose prompts are now complete.

        Args:
            free_rows: how many sequences may have a row, those started included.
        """
        self._chunks += 1
        chosen = self._choose(free_rows)
        if chosen is None:
            return []
        if isinstance(chosen, _Started):
            self._current = [chosen.sequence]
            return self._continue(chosen)
        self._current = group = self._group(chosen, free_rows - len(self._started))
        if len(group) > 1 or len(chosen.ids) == 1:
            return self._read_together(group)
        return self._continue(self._start(chosen))

    def remove_current(self) -> list[SequenceState]:
        """Remove the sequences of the chunk that has failed, and return them."""
        current = self._current
        self._waiting = [s for s in self._waiting if s not in current]
        self._started = [s for s in self._started if s.sequence not in current]
        return current

    # Order -----------------------------------------------------------------------

    def _choose(self, free_rows: int) -> SequenceState | _Started | None:
        may_start = free_rows > len(self._started)
        few_started = len(self._started) < self._most_started
        waiting = [
            sequence
            for sequence in (self._waiting if may_start else ())
            if few_started or self._left(sequence) <= PREFILL_CHUNK
        ]
        candidates: list[SequenceState | _Started] = [*self._started, *waiting]
        key: Callable[[SequenceState | _Started], int]
        key = self._left if self._chunks % 2 else _arrival
        for candidate in sorted(candidates, key=key):
            if isinstance(candidate, _Started) or not self._waits_for(candidate):
                return candidate
        return None

    def _left(self, candidate: SequenceState | _Started) -> int:
        """Return how many tokens are still to be processed."""
        if isinstance(candidate, _Started):
            return candidate.left
        return len(candidate.ids) - 1 - self._cached(candidate)

    def _waits_for(self, sequence: SequenceState) -> bool:
        """Whether a started prompt has a longer prefix of this one than the tree."""
        shared = max(
            (
                common_prefix(started.sequence.array[:-1], sequence.array[:-1])
                for started in self._started
                if started.sequence.request.model == sequence.request.model
            ),
            default=0,
        )
        return shared >= SHORTEST + self._cached(sequence)

    def _cached(self, sequence: SequenceState) -> int:
        """Return how many of its tokens the tree holds now."""
        is_known = sequence.matched_version == self.tree.version
        if not (is_known or sequence.scores_prompt):
            model = sequence.request.model
            sequence.cached = self.tree.match(model, sequence.array[:-1])
            sequence.matched_version = self.tree.version
        return sequence.cached

    def _group(self, chosen: SequenceState, free_rows: int) -> list[SequenceState]:
        """Return prompts to process with a waiting one as a chunk, it included."""
        group, size = [chosen], len(chosen.ids) - 1
        if size > PREFILL_CHUNK or not self._is_plain(chosen):
            return group
        for other in self._waiting:
            if len(group) == free_rows:
                break
            is_same = other.request.model == chosen.request.model
            fits = size + len(other.ids) - 1 <= PREFILL_CHUNK
            if other is not chosen and is_same and fits and self._is_plain(other):
                group.append(other)
                size += len(other.ids) - 1
        return group

    def _is_plain(self, sequence: SequenceState) -> bool:
        """Whether all of the prompt is to be processed, and nothing else computed."""
        return not sequence.scores_prompt and not self._cached(sequence)

    # Work ------------------------------------------------------------------------

    def _start(self, sequence: SequenceState) -> _Started:
        self._waiting.remove(sequence)
        model = self._models[sequence.request.model]
        cache = [KVCache() for _ in model.layers]
        count = self._cached(sequence)
        if count:
            parts = self.tree.fetch(sequence.request.model, sequence.array[:-1])
            for layer, pair in zip(cache, _pairs(parts), strict=True):
                layer.append(*pair)
        started = _Started(sequence, cache, count)
        self._started.append(started)
        return started

    def _continue(self, started: _Started) -> list[SequenceState]:
        """Process a chunk of one prompt."""
        openblas.use_threads(None)
        sequence = started.sequence
        ids = sequence.ids[started.done : len(sequence.ids) - 1][:PREFILL_CHUNK]
        model = self._models[sequence.request.model]
        if ids:
            hidden = model.transformer(mx.array([ids]), started.cache)
            if sequence.scores_prompt:
                following = sequence.ids[started.done + 1 :][: len(ids)]
                padding = find_padding(self._tokenizer, model.config.vocab_size)
                logits = mask_padding(model.head(hidden[0]), padding)
                count = max(1, sequence.request.sampling.logprobs)
                started.scored += _score(logits, following, count)
            mx.eval([layer.state for layer in started.cache])
            started.done += len(ids)
        if started.left:
            return []
        self._started.remove(started)
        parts = [part for layer in started.cache for part in layer.stored()]
        sequence.prompt_tokens = tuple(started.scored)
        self._complete(sequence, parts)
        return [sequence]

    def _read_together(self, group: Sequence[SequenceState]) -> list[SequenceState]:
        """Process several prompts as one row of tokens."""
        openblas.use_threads(None)
        model = self._models[group[0].request.model]
        lengths = [len(sequence.ids) - 1 for sequence in group]
        cache = [KVCache() for _ in model.layers]
        if any(lengths):
            tokens = [i for sequence in group for i in sequence.ids[:-1]]
            layout = Sequences(tuple(length for length in lengths if length))
            model.transformer(mx.array([tokens]), cache, layout=layout)
            mx.eval([layer.state for layer in cache])
        ends = list(itertools.accumulate(lengths))
        for sequence, length, end in zip(group, lengths, ends, strict=True):
            self._waiting.remove(sequence)
            parts = [
                part[..., end - length : end, :]
                for layer in (cache if length else ())
                for part in layer.stored()
            ]
            self._complete(sequence, parts)
        return list(group)

    def _complete(self, sequence: SequenceState, parts: list[mx.array]) -> None:
        sequence.parts = parts
        self.tree.insert(sequence.request.model, sequence.array[:-1], parts)


def _arrival(candidate: SequenceState | _Started) -> int:
    sequence = candidate if isinstance(candidate, SequenceState) else candidate.sequence
    return sequence.arrival


def _pairs(parts: Sequence[mx.array]) -> Iterator[tuple[mx.array, mx.array]]:
    return zip(parts[::2], parts[1::2], strict=True)


def _score(logits: mx.array, following: Sequence[int], count: int) -> list[Token]:
    """Return tokens with log-probabilities and alternatives, by logits (T, V)."""
    tokens = mx.array(list(following))
    return DrawnTokens(tokens, top_logprobs(logits, tokens, count)).read()
