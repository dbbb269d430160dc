"""Data loaders of pre-training, for packed text in memory and for streamed corpora.

A loader returns one process's rows of each batch; its state is a few numbers. Streamed
text comes from `streams`, which worker processes may prefetch.
"""

import contextlib
import multiprocessing
import os
import queue
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from operator import itemgetter
from typing import Any, Protocol

import numpy as np

from converters.pretraining.cleaning import Rules, Tokens
from converters.pretraining.documents import Damage
from converters.pretraining.packing import (
    IGNORED,
    Corpus,
    PackedSequences,
    TokenBatch,
    read_corpora,
    read_corpus,
    repair_documents,
    step_batch,
)
from converters.pretraining.plan import check_readers, share_batch
from converters.pretraining.recipe import DataRecipe, PretrainRecipe, list_corpora
from converters.pretraining.streams import Sequences, State, Streams
from converters.pretraining.units import (
    ReadingPlan,
    fingerprint,
    list_files,
    plan_reading,
)
from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import Tokenizer

_OPEN_FILES = 128  # read in turn for a sample
_PREFETCHED = 4  # batches per worker
_VERSION = 2  # of the positions of streams; 1 had a position of each row


class Loader(Protocol):
    """Returns one process's share of each batch.

    Attributes:
        num_files, num_documents, num_sequences, num_tokens: of one epoch; None if
            unknown before reading it.
        dropped: number of dropped items by reason, in the batches returned so far.
    """

    num_files: int
    num_documents: int | None
    num_sequences: int | None
    num_tokens: int | None
    dropped: Counter[str]

    def next_batch(self) -> TokenBatch:
        """Return this process's rows of the next step's batch.

        Raises:
            OpenELMError: a file is damaged, a corpus has no text that is kept, or a
                worker was killed.
        """

    def state(self) -> State:
        """Return the position after the last batch, for `join_states`."""

    def restore(self, state: State) -> None:
        """Resume from a joined state of any number of processes.

        Raises:
            OpenELMError: the state is of another corpus, seed, batch size, number of
                readers or version.
        """

    def close(self) -> None:
        """Stop the workers."""


def open_loader(
    recipe: PretrainRecipe,
    tokenizer: Tokenizer,
    length: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    corpus: Corpus | None = None,
) -> Loader:
    """Return the loader of process `rank` of `ranks`.

    Args:
        length: targets of a sequence.
        corpus: for packing, the result of `read_corpora`, if it was already read.

    Raises:
        OpenELMError: `ranks` does not divide the batch size or the readers, or no file
            is found.
    """
    share_batch(recipe, ranks)
    if recipe.data.packing:
        corpus = corpus or read_corpora(recipe.data)
        return _PackedLoader(recipe, corpus, tokenizer, length, rank, ranks)
    plan = plan_reading(recipe, tokenizer, length)
    check_readers(plan.readers, ranks)
    return _StreamLoader(plan, rank, ranks)


def join_states(states: Sequence[State]) -> State:
    """Join the states of all processes, by rank, into one for the checkpoint.

    Raises:
        OpenELMError: the processes do not read the same files.
    """
    first, *others = ({**state, "streams": []} for state in states)
    other = [rank for rank, state in enumerate(others, 1) if state != first]
    if other:
        raise OpenELMError(
            f"Process {other[0]} ({len(other)} of {len(states)} in all) would read "
            "different text than process 0: files are missing or differ there; give "
            "all of them the same files."
        )
    streams = [stream for state in states for stream in state["streams"]]
    return {**states[0], "streams": sorted(streams, key=itemgetter("stream"))}


def read_recipe_documents(
    data: DataRecipe, *, heldout: bool = False, characters: int | None = None
) -> Iterator[str]:
    """Yield repaired documents: all training text, held-out text, or a sample.

    Args:
        heldout: yield the files of `data.heldout`, each as one document.
        characters: size of the sample, which is taken from all files in turn.

    Raises:
        OpenELMError: a pattern matches nothing, or a file is damaged and `on_damage`
            is "stop".
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
    for first in range(rounds):  # each with files from all corpora
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
    for item in repair_documents(path, data.document_start, text_key):
        if isinstance(item, Damage):
            item.drop(path, data.on_damage)
        else:
            yield item


# Packed text ---------------------------------------------------------------------


class _PackedLoader:
    """Batches of text in memory. The state is the step, which determines the batch."""

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
        self._identity = {
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
        if rank == 0:  # all ranks read the same text; count it once
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
        return {**self._identity, "step": self._step, "streams": []}

    def restore(self, state: State) -> None:
        _check_identity(self._identity, state)
        self._step = state["step"]

    def close(self) -> None:
        pass


def _check_identity(identity: Mapping[str, Any], state: State) -> None:
    """Raise OpenELMError if a state is of other data."""
    if state.get("form") == "lanes" or state.get("version", _VERSION) != _VERSION:
        raise OpenELMError(
            "The checkpoint's position in the text is of another version of "
            "mlx-openelm, which read the text in another order. Start a new run from "
            "its weights: mlx-openelm pretrain -c RECIPE --init "
            "OLD/training_checkpoint_last.pt --output NEW"
        )
    names = {"form": "data.packing", "data": "the text", "readers": "data.readers"}
    other = [names.get(key, key) for key in identity if identity[key] != state.get(key)]
    if other:
        raise OpenELMError(
            "Cannot resume with other data; changed since the checkpoint: "
            f"{', '.join(other)}. Restore that, or start a new run."
        )


# Streamed text -------------------------------------------------------------------


class _StreamLoader:
    """Batches of streamed text: this process's streams, read by it or its workers."""

    def __init__(self, plan: ReadingPlan, rank: int, ranks: int) -> None:
        self._plan = plan
        self._own = range(rank, plan.readers, ranks)
        self._states: dict[int, State] = {}
        self._parts: list[Streams | _Worker] = []
        self._identity = {
            "form": "streams",
            "version": _VERSION,
            "data": fingerprint(plan),
            "seed": plan.seed,
            "batch_size": plan.batch_size,
            "readers": plan.readers,
        }
        self.num_files = sum(len(group.files) for group in plan.groups)
        self.num_documents: int | None = None
        self.num_sequences: int | None = None
        self.num_tokens: int | None = None
        self.dropped: Counter[str] = Counter()

    def next_batch(self) -> TokenBatch:
        self._parts = self._parts or self._start()
        by_stream: dict[int, list[Tokens]] = {}
        for result in [part.next_sequences() for part in self._parts]:
            self._states |= {state["stream"]: state for state in result.states}
            self.dropped += result.dropped
            by_stream |= result.by_stream
        turns = zip(*(by_stream[number] for number in self._own), strict=True)
        return _pad([row for turn in turns for row in turn], self._plan.rules)

    def state(self) -> State:
        streams = [self._states[n] for n in self._own if n in self._states]
        return {**self._identity, "streams": streams}

    def restore(self, state: State) -> None:
        _check_identity(self._identity, state)
        states = {stream["stream"]: stream for stream in state["streams"]}
        if states and len(states) != self._plan.readers:
            raise OpenELMError(
                f"The checkpoint has the positions of {len(states)} readers instead of "
                f"{self._plan.readers}; it is incomplete, so use an older one."
            )
        self.close()
        self._states = states

    def close(self) -> None:
        for part in self._parts:
            part.close()
        self._parts = []

    def _start(self) -> list["Streams | _Worker"]:
        count = min(self._plan.data.workers, len(self._own))
        if count == 0:
            return [Streams(self._plan, self._own, self._states)]
        return [
            _Worker(self._plan, self._own[i::count], self._states) for i in range(count)
        ]


def _pad(rows: Sequence[Tokens], rules: Rules) -> TokenBatch:
    """Return padded inputs and targets; positions after EOS are ignored targets."""
    inputs = np.zeros((len(rows), rules.length), np.int64)
    targets = np.full((len(rows), rules.length), IGNORED, np.int64)
    for i, tokens in enumerate(rows):
        inputs[i, : len(tokens) - 1] = tokens[:-1]
        targets[i, : len(tokens) - 1] = tokens[1:]
    return TokenBatch(inputs, targets)


# Workers -------------------------------------------------------------------------


class _Worker:
    """A process that prefetches the sequences of some streams."""

    def __init__(
        self, plan: ReadingPlan, numbers: Sequence[int], states: Mapping[int, State]
    ) -> None:
        # Not fork, which would copy the locks of PyTorch's threads and CUDA's state.
        context = multiprocessing.get_context("spawn")
        # Not a queue: a pipe raises an error if the other process dies.
        self._reader, writer = context.Pipe(duplex=False)
        own = {n: states[n] for n in numbers if n in states}
        self._process = context.Process(
            target=_work, args=(plan, numbers, own, writer), daemon=True
        )
        self._process.start()
        writer.close()

    def next_sequences(self) -> Sequences:
        try:
            result: Sequences | Exception = self._reader.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise OpenELMError(
                "A data worker ended with exit code "
                f"{self._process.exitcode}; if it ran out of memory, lower "
                "data.workers or data.shuffle_block."
            ) from error
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._reader.close()


def _work(
    plan: ReadingPlan,
    numbers: Sequence[int],
    states: Mapping[int, State],
    writer: Connection,
) -> None:
    """Send sequences until an error, or until the parent process ends."""
    os.setsid()  # on Ctrl-C the parent stops the workers after a checkpoint
    prefetched: queue.Queue[Sequences | Exception] = queue.Queue(_PREFETCHED)
    streams = Streams(plan, numbers, states)
    threading.Thread(
        target=_read_ahead, args=(streams, prefetched), daemon=True
    ).start()
    with contextlib.suppress(BrokenPipeError):
        item: Sequences | Exception | None = None
        while not isinstance(item, Exception):
            item = prefetched.get()
            writer.send(item)


def _read_ahead(
    streams: Streams, prefetched: "queue.Queue[Sequences | Exception]"
) -> None:
    try:
        while True:
            prefetched.put(streams.next_sequences())
    except OpenELMError as error:
        prefetched.put(OpenELMError(str(error)))
    except Exception:  # a bug; the parent raises it with this traceback
        prefetched.put(RuntimeError(traceback.format_exc()))
