"""Batches of pre-training, from text in memory or from corpora that none holds.

A loader gives one process its rows of every step's batch, and says in a few numbers
where it stands. Streamed text comes from lanes, which workers may read ahead.
"""

import contextlib
import itertools
import multiprocessing
import os
import queue
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from converters.pretraining.cleaning import Rules, Tokens
from converters.pretraining.corpus_files import DamagedFileError
from converters.pretraining.lanes import (
    LanePlan,
    Lanes,
    Rows,
    State,
    fingerprint,
    list_files,
    plan_lanes,
)
from converters.pretraining.packing import (
    IGNORED,
    Corpus,
    PackedSequences,
    TokenBatch,
    list_corpora,
    read_corpora,
    read_corpus,
    repair_documents,
    step_batch,
)
from converters.pretraining.recipe import DataRecipe, PretrainRecipe
from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import Tokenizer

_OPEN_FILES = 128  # that a sample is taken from at once
_AHEAD = 4  # batches that a worker makes before they are asked for


class Loader(Protocol):
    """Where a training process gets its share of every batch.

    Attributes:
        num_files, num_documents, num_sequences, num_tokens: of one epoch; None where
            that is not known before it is read.
        dropped: what was left out, by reason, in batches that this loader handed out.
    """

    num_files: int
    num_documents: int | None
    num_sequences: int | None
    num_tokens: int | None
    dropped: Counter[str]

    def next_batch(self) -> TokenBatch:
        """Return this process's rows of the next step's batch.

        Raises:
            OpenELMError: a file is damaged, a lane finds nothing, or a worker died.
        """

    def state(self) -> State:
        """Return what `join_states` needs to go on behind the last batch."""

    def restore(self, state: State) -> None:
        """Go on from a joined state, of whatever number of processes.

        Raises:
            OpenELMError: it is the state of another corpus, seed or batch size.
        """

    def close(self) -> None:
        """End what still runs."""


def open_loader(
    recipe: PretrainRecipe,
    tokenizer: Tokenizer,
    length: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    corpus: Corpus | None = None,
) -> Loader:
    """Return the batches of process `rank` of `ranks`.

    Args:
        length: tokens of a sequence that are predicted.
        corpus: for packing, what `read_corpora` gave, where it was read already.

    Raises:
        OpenELMError: the ranks do not divide the batch, or no file is found.
    """
    if recipe.batch_size % ranks:
        raise OpenELMError(
            f"batch_size {recipe.batch_size} cannot be shared by {ranks} processes; "
            "choose a multiple of their number."
        )
    if recipe.data.packing:
        corpus = corpus or read_corpora(recipe.data)
        return _PackedLoader(recipe, corpus, tokenizer, length, rank, ranks)
    return _LaneLoader(plan_lanes(recipe, tokenizer, length), rank, ranks)


def join_states(states: Sequence[State]) -> State:
    """Join the states of all processes into the one that a checkpoint holds."""
    lanes = [lane for state in states for lane in state["lanes"]]
    return {**states[0], "lanes": lanes}


def read_recipe_documents(
    data: DataRecipe, *, heldout: bool = False, characters: int | None = None
) -> Iterator[str]:
    """Yield repaired documents: the whole text, its held-out part, or a sample.

    Args:
        heldout: yield the files of `data.heldout`, each as one document.
        characters: stop behind so many, which are taken from all files in turn.

    Raises:
        OpenELMError: a pattern matches nothing, or a file is damaged and `on_damage`
            is not to skip it.
    """
    if heldout:
        yield from read_corpus(data.heldout, text_key=data.text_key).documents
        return
    files = [
        (path, corpus.text_key)
        for corpus in list_corpora(data)
        for path in list_files(data, corpus.files)
    ]
    if characters is None:
        for path, text_key in files:
            yield from _read_repaired(data, path, text_key)
        return
    taken = 0
    rounds = -(-len(files) // _OPEN_FILES)
    for first in range(rounds):  # so that each round has files from everywhere
        readers = [_read_repaired(data, *file) for file in files[first::rounds]]
        while readers:
            for reader in readers.copy():
                document = next(reader, None)
                if document is None:
                    readers.remove(reader)
                    continue
                yield document
                taken += len(document)
                if taken >= characters:
                    return


def _read_repaired(data: DataRecipe, path: str, text_key: str) -> Iterator[str]:
    try:
        yield from repair_documents(path, data.document_start, text_key)
    except DamagedFileError:
        if data.on_damage == "stop":
            raise


# Packed text ---------------------------------------------------------------------


class _PackedLoader:
    """Text in memory: a batch is a function of the step, which is all the state."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        corpus: Corpus,
        tokenizer: Tokenizer,
        length: int,
        rank: int,
        ranks: int,
    ) -> None:
        self._recipe, self._rank, self._ranks = recipe, rank, ranks
        self._sequences = PackedSequences(corpus.documents, tokenizer, length)
        self._step = 0
        self._about = {
            "form": "packed",
            "data": self._sequences.checksum,
            "seed": recipe.seed,
            "batch_size": recipe.batch_size,
        }
        self.num_files = corpus.num_files
        self.num_documents: int | None = len(corpus.documents)
        self.num_sequences: int | None = len(self._sequences)
        self.num_tokens: int | None = self._sequences.num_tokens
        self.dropped = Counter[str]()
        if rank == 0:  # all have read it, one tells of it
            self.dropped += corpus.dropped

    def next_batch(self) -> TokenBatch:
        batch = step_batch(
            self._sequences,
            step=self._step,
            batch_size=self._recipe.batch_size,
            seed=self._recipe.seed,
            rank=self._rank,
            ranks=self._ranks,
        )
        self._step += 1
        return batch

    def state(self) -> State:
        return {**self._about, "step": self._step, "lanes": []}

    def restore(self, state: State) -> None:
        _refuse_other(self._about, state)
        self._step = state["step"]

    def close(self) -> None:
        pass


def _refuse_other(about: Mapping[str, Any], state: State) -> None:
    """Raise OpenELMError if a state belongs to other data."""
    names = {"form": "data.packing", "data": "the text"}
    other = [names.get(key, key) for key in about if about[key] != state.get(key)]
    if other:
        verb = "are" if len(other) > 1 else "is"
        raise OpenELMError(
            f"The checkpoint was made with other data: {', '.join(other)} {verb} not "
            "what it was; bring that back, or begin a new run."
        )


# Streamed text -------------------------------------------------------------------


class _LaneLoader:
    """The lanes of one process, read by itself or by its workers."""

    def __init__(self, plan: LanePlan, rank: int, ranks: int) -> None:
        self._plan = plan
        share = plan.lanes // ranks
        self._own = range(rank * share, (rank + 1) * share)
        self._states: dict[int, State] = {}
        self._parts: list[Lanes | _Worker] = []
        self._about = {
            "form": "lanes",
            "data": fingerprint(plan),
            "seed": plan.seed,
            "batch_size": plan.lanes,
        }
        self.num_files = sum(len(corpus.files) for corpus in plan.corpora)
        self.num_documents: int | None = None
        self.num_sequences: int | None = None
        self.num_tokens: int | None = None
        self.dropped: Counter[str] = Counter()

    def next_batch(self) -> TokenBatch:
        self._parts = self._parts or self._start()
        found = [part.next_rows() for part in self._parts]
        for part in found:
            self._states |= {state["lane"]: state for state in part.states}
            self.dropped += part.dropped
        return _pad([row for part in found for row in part.rows], self._plan.rules)

    def state(self) -> State:
        lanes = [self._states[lane] for lane in self._own if lane in self._states]
        return {**self._about, "lanes": lanes}

    def restore(self, state: State) -> None:
        _refuse_other(self._about, state)
        lanes = {lane["lane"]: lane for lane in state["lanes"]}
        if lanes and len(lanes) != self._plan.lanes:
            raise OpenELMError(
                f"The checkpoint knows where {len(lanes)} of {self._plan.lanes} rows "
                "were; it is not whole, so take an older one."
            )
        self.close()
        self._states = lanes

    def close(self) -> None:
        for part in self._parts:
            part.close()
        self._parts = []

    def _start(self) -> list["Lanes | _Worker"]:
        count = min(self._plan.data.workers, len(self._own))
        if count == 0:
            return [Lanes(self._plan, self._own, self._states)]
        bounds = [i * len(self._own) // count for i in range(count + 1)]
        return [
            _Worker(self._plan, self._own[a:b], self._states)
            for a, b in itertools.pairwise(bounds)
        ]


def _pad(rows: Sequence[Tokens], rules: Rules) -> TokenBatch:
    """Return sequences as inputs and targets; what is behind EOS is not learnt."""
    inputs = np.zeros((len(rows), rules.length), np.int64)
    targets = np.full((len(rows), rules.length), IGNORED, np.int64)
    for i, tokens in enumerate(rows):
        inputs[i, : len(tokens) - 1] = tokens[:-1]
        targets[i, : len(tokens) - 1] = tokens[1:]
    return TokenBatch(inputs, targets)


# Workers -------------------------------------------------------------------------


class _Worker:
    """A process that reads some lanes ahead."""

    def __init__(
        self, plan: LanePlan, lanes: Sequence[int], states: Mapping[int, State]
    ) -> None:
        # Spawned: a fork would copy the threads' locks of PyTorch, and CUDA's state.
        context = multiprocessing.get_context("spawn")
        # A pipe and no queue: it tells of the other side's death in mid-message.
        self._reader, writer = context.Pipe(duplex=False)
        own = {lane: states[lane] for lane in lanes if lane in states}
        self._process = context.Process(
            target=_work, args=(plan, lanes, own, writer), daemon=True
        )
        self._process.start()
        writer.close()

    def next_rows(self) -> Rows:
        try:
            found: Rows | Exception = self._reader.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise OpenELMError(
                "A process that reads the data ended with the code "
                f"{self._process.exitcode}; if the machine is short of memory, lower "
                "data.workers or data.shuffle_block."
            ) from error
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._reader.close()


def _work(
    plan: LanePlan,
    numbers: Sequence[int],
    states: Mapping[int, State],
    writer: Connection,
) -> None:
    """Send rows until an error, or until the parent is gone."""
    os.setsid()  # Ctrl-C in a terminal is the parent's to obey: it saves first
    made: queue.Queue[Rows | Exception] = queue.Queue(_AHEAD)
    lanes = Lanes(plan, numbers, states)
    threading.Thread(target=_read_ahead, args=(lanes, made), daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        item: Rows | Exception | None = None
        while not isinstance(item, Exception):
            item = made.get()
            writer.send(item)


def _read_ahead(lanes: Lanes, made: "queue.Queue[Rows | Exception]") -> None:
    try:
        while True:
            made.put(lanes.next_rows())
    except OpenELMError as error:
        made.put(OpenELMError(str(error)))
    except Exception:  # a bug of ours; the parent shows where
        made.put(RuntimeError(traceback.format_exc()))
