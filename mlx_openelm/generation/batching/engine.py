"""Continuous batching: each decode step serves all answers in progress.

While decoding is bound by reading the weights, a step costs hardly more for many rows
than for one. Requests join and leave at every step (Yu et al., Orca, OSDI 2022); their
prompts are processed in chunks between the steps.
"""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_openelm import openblas
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.batching.prefix_tree import PrefixLimits, PrefixTree
from mlx_openelm.generation.batching.prompts import PromptQueue
from mlx_openelm.generation.batching.rows import DecodeRows
from mlx_openelm.generation.batching.sequences import (
    BatchRequest,
    DeadlineError,
    Output,
    SequenceState,
    has_passed,
)
from mlx_openelm.generation.stopping import Answer
from mlx_openelm.generation.streaming import check_length
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.tuning import DEFAULT, Tuning

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much is processed at a time.

    Attributes:
        answers: sequences that are decoded together.
        prompts: long prompts that are processed in turn.
        fills_rows: process prompts until no row is free, not one chunk between two
            steps: more tokens per second, but unevenly.
        kept: limits of the prompts that are kept for later ones.
        tuning: how steps are given to the device.
    """

    answers: int = 32
    prompts: int = 4
    fills_rows: bool = False
    kept: PrefixLimits = field(default_factory=PrefixLimits)
    tuning: Tuning = DEFAULT


class Engine:
    """Answers requests, all together; `step` does the work.

    An engine belongs to one thread: MLX's streams do. A request that fails ends alone.
    """

    def __init__(
        self,
        models: Mapping[str, OpenELM],
        tokenizer: Tokenizer,
        limits: EngineLimits,
    ) -> None:
        """Start without requests.

        Args:
            models: the models by name; those with adapters share the base's weights.
        """
        self._models, self._tokenizer, self._limits = dict(models), tokenizer, limits
        self._tree = PrefixTree(limits.kept)
        self._queue = PromptQueue(
            self._models, tokenizer, self._tree, most_started=limits.prompts
        )
        self._rows = {
            name: DecodeRows(model, tokenizer, limits.tuning)
            for name, model in models.items()
        }
        self._arrivals = 0

    @property
    def waiting(self) -> int:
        """Number of requests without a row."""
        return len(self._queue)

    @property
    def decoding(self) -> int:
        """Number of requests with a row."""
        return sum(len(rows.sequences) for rows in self._rows.values())

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.decoding

    @property
    def kept_bytes(self) -> int:
        """Size of the kept prompts."""
        return self._tree.nbytes

    def add(self, request: BatchRequest) -> None:
        """Let a request take part from the next step on.

        Raises:
            OpenELMError: its prompt is empty, too long, or holds ids out of range.
        """
        sampling = request.sampling
        budget = check_length(request.ids, self._models[request.model], sampling)
        answer = Answer(
            self._tokenizer,
            request.ids,
            sampling,
            budget,
            keeps_first_space=request.constraint is not None,
        )
        self._arrivals += 1
        self._queue.add(
            SequenceState(request, answer, self._arrivals, list(request.ids))
        )

    def cancel(self, requests: Iterable[BatchRequest]) -> None:
        """Remove requests, if they have not ended; their rows are free at once."""
        gone = set(requests)
        for sequence in self._sequences():
            if sequence.request in gone:
                sequence.error = OpenELMError("The request was cancelled.")
        self._remove_ended()

    def step(self) -> list[Output]:
        """Process a chunk of prompts and decode a token for each answer in progress.

        Returns:
            What it added to the answers, in no particular order.
        """
        outputs = self._fail_late()
        for rows in self._rows.values():
            if rows.sequences:
                outputs += self._decode(rows)
        self._remove_ended()
        outputs += self._read_prompts()
        if self.is_idle:
            openblas.use_threads(None)
        return outputs

    # Parts of a step -------------------------------------------------------------

    def _fail_late(self) -> list[Output]:
        """Fail the requests whose deadline has passed."""
        late = [s for s in self._sequences() if has_passed(s.request.deadline)]
        return [
            sequence.fail(
                DeadlineError("The request was not complete at its deadline.")
            )
            for sequence in late
        ]

    def _decode(self, rows: DecodeRows) -> list[Output]:
        outputs: list[Output] = []
        sequences = [s for s in rows.sequences if not s.has_ended]
        try:
            for output in rows.step():
                outputs.append(output)
        except Exception as error:
            with suppress(Exception):  # the step before may have failed itself
                for output in rows.read_queued():
                    outputs.append(output)
            rows.reset()
            ended = {output.request for output in outputs if output.is_last}
            continuing = [s for s in sequences if s.request not in ended]
            outputs += self._recover(continuing, error)
        return outputs

    def _remove_ended(self) -> None:
        """Free the rows of ended sequences; keep their keys and values for others."""
        self._queue.remove_ended()
        for rows in self._rows.values():
            with suppress(Exception):  # keeping is optional; a bad step fails later
                for sequence, parts in rows.ended():
                    ids = [*sequence.request.ids, *sequence.answer.tokens][:-1]
                    self._tree.insert(sequence.request.model, np.array(ids), parts)
            continuing = [s for s in rows.sequences if not s.has_ended]
            try:
                rows.remove_ended()
            except Exception:  # must not end the other requests
                log.exception("A row was not removed.")
                rows.reset()
                self._restart(continuing)

    def _read_prompts(self) -> list[Output]:
        """Process a chunk; give rows to the sequences whose prompts are complete."""
        outputs: list[Output] = []
        while len(self._queue) and self.decoding < self._limits.answers:
            try:
                complete = self._queue.read_chunk(self._limits.answers - self.decoding)
            except Exception as error:
                outputs += self._recover(self._queue.remove_current(), error)
                continue
            outputs += self._admit(complete)
            if not self._limits.fills_rows:
                break
        return outputs

    def _admit(self, sequences: Sequence[SequenceState]) -> list[Output]:
        """Give rows to sequences, except to those that only score their prompts."""
        scored = [s for s in sequences if not s.request.generates]
        outputs = [sequence.end_after_prompt() for sequence in scored]
        for name, rows in self._rows.items():
            own = [s for s in sequences if s.request.model == name and s not in scored]
            try:
                rows.admit(own)
            except Exception as error:
                together = [s for s in rows.sequences if s not in own] + own
                rows.reset()
                outputs += self._recover(together, error)
        return outputs

    # Failures --------------------------------------------------------------------

    def _recover(
        self, sequences: Sequence[SequenceState], error: Exception
    ) -> list[Output]:
        """After a failed step or chunk: fail the sequences that also fail alone.

        The others are processed again. Where all succeed alone, as when a batch is too
        large for the memory, those fail that have no new token since the last time.
        """
        mx.clear_cache()
        alone: dict[SequenceState, Exception] = {}
        for sequence in sequences:
            failure = error if len(sequences) == 1 else self._try_alone(sequence)
            if failure is not None:
                alone[sequence] = failure
        if not alone:
            alone = {sequence: error for sequence in sequences if sequence.has_failed}
            for sequence in sequences:
                sequence.has_failed = True
        self._restart([s for s in sequences if s not in alone])
        return [sequence.fail(failure) for sequence, failure in alone.items()]

    def _try_alone(self, sequence: SequenceState) -> Exception | None:
        """Process a sequence's prompt and its next step; return what fails."""
        sequence.restart()
        nothing_kept = PrefixTree(PrefixLimits(prompts=0, bytes=0))
        queue = PromptQueue(self._models, self._tokenizer, nothing_kept, most_started=1)
        rows = DecodeRows(self._models[sequence.request.model], self._tokenizer)
        queue.add(sequence)
        try:
            while not queue.read_chunk(1):
                pass
            rows.admit([sequence])
            rows.try_step()
        except Exception as error:
            return error
        return None

    def _restart(self, sequences: Sequence[SequenceState]) -> None:
        """Process sequences without rows again; their answers stay as they are."""
        for sequence in sequences:
            sequence.restart()
            self._queue.add(sequence)

    def _sequences(self) -> list[SequenceState]:
        decoding = (rows.sequences for rows in self._rows.values())
        return [*self._queue.sequences, *itertools.chain.from_iterable(decoding)]
