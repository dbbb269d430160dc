"""The rows of the batch: one sequence each, which a decode step extends by a token."""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlx_openelm.generation.batching.drawing import BatchSampler, DrawnBatch
from mlx_openelm.generation.batching.sequences import Output, SequenceState
from mlx_openelm.generation.cache import SlotCache
from mlx_openelm.generation.decoding import Token
from mlx_openelm.generation.sampling import find_padding, mask_padding
from mlx_openelm.generation.step import choose_batch_step, queued
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.tuning import DEFAULT, Tuning

REACH = 32  # slots: the attended part of the cache is a multiple of this


class DecodeRows:
    """The sequences that a model extends together, and their rows in its caches.

    A step is queued before the tokens of the one before it are read, so that the
    device does not wait for the host. It draws one unused token for each sequence
    that ends in the meantime.

    Attributes:
        sequences: one for each row.
    """

    def __init__(
        self, model: OpenELM, tokenizer: Tokenizer, tuning: Tuning = DEFAULT
    ) -> None:
        self._model, self._eos_id = model, tokenizer.eos_id
        self._step, self._tuning = choose_batch_step(model, tuning), tuning
        self._padding = find_padding(tokenizer, model.config.vocab_size)
        self.sequences: list[SequenceState] = []
        self.reset()

    def reset(self) -> None:
        """Forget all rows and free their memory."""
        self.sequences = []
        self._cache = [SlotCache() for _ in self._model.layers]
        self._tokens = mx.zeros((0,), mx.int32)  # the newest of each row
        self._sampler = BatchSampler(
            self._model.config.max_context_length, self._eos_id
        )
        self._queued: DrawnBatch | None = None

    def admit(self, sequences: Sequence[SequenceState]) -> None:
        """Give rows to sequences whose prompts are processed but for the last token."""
        if not sequences:
            return
        for row, sequence in enumerate(sequences, start=len(self.sequences)):
            sequence.offset = len(sequence.ids) - 1
            pairs = zip(sequence.parts[::2], sequence.parts[1::2], strict=True)
            for layer, pair in zip(self._cache, pairs, strict=False):
                layer.put(row, *pair)
            sequence.parts = []
        newest = mx.array([s.ids[-1] for s in sequences], mx.int32)
        self._tokens = mx.concatenate([self._tokens, newest])
        self.sequences += sequences
        self._sampler.regroup(self.sequences)

    def step(self) -> Iterator[Output]:
        """Queue a step for all rows; yield the tokens of the step before it."""
        logits = self._build_forward()
        constrained = any(s.request.constraint is not None for s in self.sequences)
        # The constraints need the tokens before it.
        following = None if constrained else self._draw(logits)
        results = following.arrays if following else (logits,)
        with queued(results, self._cache, self._tuning.queue):
            tokens = self._read()
        yield from self._add(tokens)
        continuing = [s for s in self.sequences if not s.has_ended]
        self._queued = following or self._draw(logits)
        if constrained:
            self._queued.queue()
        # Constraints fail while a token is drawn.
        yield from (s.fail(s.error) for s in continuing if s.error is not None)

    def read_queued(self) -> Iterator[Output]:
        """Wait for the tokens of the queued step; yield them, added to the answers."""
        yield from self._add(self._read())

    def _read(self) -> list[tuple[SequenceState, Token]]:
        queued, self._queued = self._queued, None
        return queued.read() if queued is not None else []

    def _add(self, tokens: list[tuple[SequenceState, Token]]) -> Iterator[Output]:
        for sequence, token in tokens:
            if not sequence.has_ended:
                yield sequence.add(token)

    def try_step(self) -> None:
        """Run a step and discard its tokens, to see whether it fails."""
        self._draw(self._build_forward())
        mx.eval(self._tokens)
        for sequence in self.sequences:
            if sequence.error is not None:
                raise sequence.error

    def ended(self) -> Iterator[tuple[SequenceState, list[mx.array]]]:
        """Yield the ended sequences with the keys and values of their tokens.

        Two arrays (1, K, T, H) per layer, of all processed tokens, to be evaluated
        before `remove_ended`, which overwrites them.
        """
        for row, sequence in enumerate(self.sequences):
            if sequence.has_ended:
                count = len(sequence.request.ids) + len(sequence.answer.tokens) - 1
                layers = self._cache if count else ()  # before the first step of one id
                yield (
                    sequence,
                    [part for layer in layers for part in layer.take(row, count)],
                )

    def remove_ended(self) -> None:
        """Remove the rows of ended sequences."""
        ended = [i for i, s in enumerate(self.sequences) if s.has_ended]
        if len(ended) == len(self.sequences):
            self.reset()
        if not self.sequences or not ended:
            return
        kept = list(range(len(self.sequences)))
        for row in reversed(ended):
            last = len(self.sequences) - 1
            length = self.sequences[last].offset  # 0 before the first step of one id
            for layer in self._cache if row < last and length else ():
                layer.move(last, row, length)
            kept[row], self.sequences[row] = kept[last], self.sequences[last]
            del kept[last], self.sequences[last]
        self._tokens = self._tokens[mx.array(kept)]
        self._sampler.regroup(self.sequences)

    def _build_forward(self) -> mx.array:
        """Process the newest token of every row; return the logits (R, V)."""
        offsets = [sequence.offset for sequence in self.sequences]
        rows, offset = mx.arange(len(offsets)), mx.array(offsets)
        reach = -(-(max(offsets) + 1) // REACH) * REACH
        for layer in self._cache:
            layer.rows, layer.offset, layer.reach = rows, offset, reach
        logits = self._step(self._tokens, self._cache)
        for sequence in self.sequences:
            sequence.offset += 1
        return mask_padding(logits, self._padding)

    def _draw(self, logits: mx.array) -> DrawnBatch:
        self._tokens, drawn = self._sampler.draw(logits)
        return drawn
