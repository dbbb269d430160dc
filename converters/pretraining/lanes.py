"""Lanes of documents: what each row of every batch is made of, step after step.

Row i of every batch comes from lane i of `batch_size` lanes. A lane goes through its
own share of each corpus, epoch after epoch, in an order that is a function of the seed,
its number and the number of lanes: however many processes share the lanes, the batches
are the same. Where a lane stands is a handful of integers, so a run goes on exactly.

A lane reads whole files where a corpus has as many files as lanes; else it reads every
file and takes each so many-th document. That costs reading, so where many lanes share
few large files, `data.cache` is for them.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.pretraining.cleaning import DocumentPiece, Rules, Tokens, make_pieces
from converters.pretraining.corpus_files import DamagedFileError, find_files
from converters.pretraining.packing import describe_damage, list_corpora
from converters.pretraining.recipe import DataRecipe, PretrainRecipe
from converters.pretraining.token_cache import CachedDocument, CachedFile, CorpusFile
from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import Tokenizer

State = dict[str, Any]  # JSON values

CUT = "tokens cut off"
_DRAWS = 0xD  # keeps the draws' random numbers apart from the orders'


@dataclass(frozen=True, slots=True)
class LaneCorpus:
    files: tuple[str, ...]
    text_key: str
    weight: float


@dataclass(frozen=True, slots=True)
class LanePlan:
    """All that decides the lanes; workers get a copy."""

    corpora: tuple[LaneCorpus, ...]
    data: DataRecipe
    rules: Rules
    model_proto: bytes
    seed: int
    lanes: int


def plan_lanes(recipe: PretrainRecipe, tokenizer: Tokenizer, length: int) -> LanePlan:
    """Find a recipe's files, and gather what decides its lanes.

    Raises:
        OpenELMError: a pattern matches nothing.
    """
    data = recipe.data
    corpora = tuple(
        LaneCorpus(list_files(data, corpus.files), corpus.text_key, corpus.weight)
        for corpus in list_corpora(data)
    )
    return LanePlan(
        corpora,
        data,
        Rules.of(data, length),
        tokenizer.model_proto,
        recipe.seed,
        recipe.batch_size,
    )


def list_files(data: DataRecipe, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the files of a corpus, without those that are held out."""
    return find_files(patterns, (*data.exclude, *data.heldout))


def fingerprint(plan: LanePlan) -> str:
    """Hash what decides the batches, but for seed and batch size.

    A file is known by its name and size, so a corpus may move to another folder.
    """
    data = plan.data
    parts = [
        *([c.weight, c.text_key, *map(_describe, c.files)] for c in plan.corpora),
        [data.document_start, data.shuffle_block, data.on_damage],
        list(asdict(plan.rules).values()),
        zlib.crc32(plan.model_proto),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _describe(path: str) -> tuple[str, int]:
    try:
        return Path(path).name, Path(path).stat().st_size
    except OSError:  # a link to nowhere, say; whoever reads it tells of it
        return Path(path).name, -1


@dataclass(slots=True)
class _Place:
    """Where a lane stands in a corpus.

    Attributes:
        file: its place in the epoch's order of the lane's files.
        before: documents in the files before it, where the lanes share all files.
        block: the number, in the file, of the document that the block begins with.
        document: its place in the block's order; `piece` is the next one of it.
    """

    epoch: int = 0
    file: int = 0
    before: int = 0
    block: int = 0
    document: int = 0
    piece: int = 0


class _Way:
    """One lane's way through one corpus, for ever."""

    def __init__(
        self,
        plan: LanePlan,
        tokenizer: Tokenizer,
        number: int,
        lane: int,
        place: _Place,
        dropped: Counter[str],
    ) -> None:
        self._plan, self._tokenizer, self._dropped = plan, tokenizer, dropped
        self._corpus, self._number, self._lane = plan.corpora[number], number, lane
        self.place = place
        self._own_files = len(self._corpus.files) >= plan.lanes
        self._documents = self._read()
        # Since a piece was kept: the files that were begun, and what was left out.
        self._fruitless: set[int] = set()
        self._left_out: Counter[str] = Counter()

    def pieces(self) -> Iterator[DocumentPiece]:
        """Yield the pieces of the next document, those that were not yet yielded."""
        document = next(self._documents)
        if isinstance(document, CachedDocument):
            pieces = document.pieces(self.place.piece)
        else:
            pieces = make_pieces(
                document, self._tokenizer, self._plan.rules, start=self.place.piece
            )
        for piece in pieces:
            self.place.piece += 1
            self._count(piece)
            yield piece
        self.place.piece = 0
        self.place.document += 1

    def _count(self, piece: DocumentPiece) -> None:
        if piece.dropped:
            self._leave_out(piece.dropped)
        else:
            self._fruitless.clear()
            self._left_out.clear()
        if piece.num_cut:
            self._dropped[CUT] += piece.num_cut

    def _leave_out(self, reason: str) -> None:
        self._dropped[reason] += 1
        self._left_out[reason] += 1

    def _read(self) -> Iterator[str | CachedDocument]:
        """Yield the lane's documents from the place on, and keep the place."""
        place, files = self.place, self._corpus.files
        while True:
            order = self._shuffle(len(files), place.epoch)
            if self._own_files:
                order = order[self._lane :: self._plan.lanes]
            while place.file < len(order):
                number = order[place.file]
                if place.block == place.document == place.piece == 0:
                    self._fruitless.add(int(number))
                for block in self._read_blocks(files[number]):
                    shuffled = self._shuffle(
                        len(block), place.epoch, int(number), place.block, self._lane
                    )
                    while place.document < len(block):
                        yield block[shuffled[place.document]]
                    place.document = 0
                place.file, place.block = place.file + 1, 0
            self._refuse_nothing()
            place.epoch, place.file, place.before = place.epoch + 1, 0, 0

    def _read_blocks(self, path: str) -> Iterator[list[str | CachedDocument]]:
        """Yield the lane's documents of a file, so many at once."""
        place, plan = self.place, self._plan
        block: list[str | CachedDocument] = []
        number = place.block
        try:
            for document in self._open(path).read(number):
                if self._is_own(number):
                    block.append(document)
                number += 1
                if len(block) == plan.data.shuffle_block:
                    yield block
                    block, place.block = [], number
        except DamagedFileError:
            if plan.data.on_damage == "stop":
                raise
            if self._is_own(number):  # one lane tells of it
                self._leave_out(describe_damage(path))
        yield block
        place.before += number

    def _is_own(self, number: int) -> bool:
        if self._own_files:
            return True
        return (self.place.before + number) % self._plan.lanes == self._lane

    def _open(self, path: str) -> CorpusFile | CachedFile:
        source = CorpusFile(
            path,
            self._corpus.text_key,
            self._plan.data.document_start,
            self._plan.rules,
            self._tokenizer,
        )
        folder = self._plan.data.cache
        return source if folder is None else CachedFile(folder, source)

    def _shuffle(self, count: int, *keys: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self._plan.seed, self._number, *keys])
        return rng.permutation(count)

    def _refuse_nothing(self) -> None:
        """Raise OpenELMError if no file had anything for this lane.

        In one epoch its share may be a single file without a piece that is kept; the
        next one gives it another.
        """
        files = self._corpus.files
        if len(self._fruitless) < len(files):
            return
        where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        if not self._left_out:
            raise OpenELMError(
                f"A corpus ({where}) has too few documents to give one to each of the "
                f"{self._plan.lanes} rows of a batch; lower batch_size, or set "
                "data.packing."
            )
        reasons = ", ".join(f"{n} {why}" for why, n in self._left_out.items())
        raise OpenELMError(
            f"No piece of a corpus ({where}) is left for row {self._lane} of the batch "
            f"({reasons}); lower data.min_tokens and data.min_characters, or set "
            "data.packing."
        )


class _Lane:
    """A row of every batch: documents of all corpora, drawn by their weights."""

    def __init__(
        self,
        plan: LanePlan,
        tokenizer: Tokenizer,
        lane: int,
        state: State | None,
        dropped: Counter[str],
    ) -> None:
        self._seed, self._lane = plan.seed, lane
        weights = np.array([corpus.weight for corpus in plan.corpora])
        self._bounds = np.cumsum(weights / weights.sum())
        self._drawn = state["drawn"] if state else 0
        places = state["places"] if state else [[]] * len(plan.corpora)
        self._ways = [
            _Way(plan, tokenizer, i, lane, _Place(*place), dropped)
            for i, place in enumerate(places)
        ]
        self._sequences = self._read()

    def next_sequence(self) -> Tokens:
        """Return BOS, tokens and EOS of the next piece that is kept."""
        return next(self._sequences)

    def state(self) -> State:
        places = [[*asdict(way.place).values()] for way in self._ways]
        return {"lane": self._lane, "drawn": self._drawn, "places": places}

    def _read(self) -> Iterator[Tokens]:
        while True:
            rng = np.random.default_rng([self._seed, self._lane, self._drawn, _DRAWS])
            corpus = int(np.searchsorted(self._bounds, rng.random(), side="right"))
            way = self._ways[min(corpus, len(self._ways) - 1)]
            for piece in way.pieces():
                if not piece.dropped:
                    yield piece.tokens
            self._drawn += 1


@dataclass(frozen=True, slots=True)
class Rows:
    """One sequence of each lane, the lanes' states behind them, what was left out."""

    rows: list[Tokens]
    states: list[State]
    dropped: Counter[str]


class Lanes:
    """Some lanes of a plan, read by one process."""

    def __init__(
        self, plan: LanePlan, lanes: Sequence[int], states: Mapping[int, State]
    ) -> None:
        tokenizer = Tokenizer(plan.model_proto)
        self._dropped: Counter[str] = Counter()
        self._lanes = [
            _Lane(plan, tokenizer, lane, states.get(lane), self._dropped)
            for lane in lanes
        ]

    def next_rows(self) -> Rows:
        rows = [lane.next_sequence() for lane in self._lanes]
        dropped = self._dropped.copy()
        self._dropped.clear()
        return Rows(rows, [lane.state() for lane in self._lanes], dropped)

    def close(self) -> None:
        pass
