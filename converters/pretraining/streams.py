"""Streams of sequences: what each row of every batch is made of.

Row i of a batch comes from stream i modulo the number of streams, in turn. A stream
reads its units of each epoch, one after the other, in an order that is a function of
seed and number of streams: any number of processes and workers may share the streams,
and the batches are the same. A few integers are the position of a stream, so that a run
resumes exactly.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from converters.pretraining.cleaning import DocumentPiece, Tokens, make_pieces
from converters.pretraining.documents import Damage
from converters.pretraining.token_cache import CachedDocument, CachedUnit, CorpusUnit
from converters.pretraining.units import Dealer, ReadingPlan, Units, describe_files
from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import Tokenizer

State = dict[str, Any]  # JSON values

CUT = "tokens cut off"
BLOCK_CHARACTERS = 1 << 22  # of documents that are shuffled together, about

Document = str | CachedDocument


@dataclass(slots=True)
class _Position:
    """Position of a stream in a group of files.

    Attributes:
        unit: index among the units of the stream in the epoch.
        block: number, in the unit, of the first item of a block of documents.
        document: index in the shuffled block; `piece` is its next piece.
    """

    epoch: int = 0
    unit: int = 0
    block: int = 0
    document: int = 0
    piece: int = 0


class _GroupReader:
    """Reads the sequences of one stream from one group of files, without end."""

    def __init__(
        self, streams: "Streams", group: int, stream: int, position: _Position
    ) -> None:
        self._streams, self._plan = streams, streams.plan
        self._group, self._stream = group, stream
        self.position = position
        # Since a piece was kept: the units that were opened, and what was dropped.
        self._without_output: set[int] = set()
        self._dropped: Counter[str] = Counter()

    def read(self) -> Iterator[Tokens]:
        """Yield the tokens of each piece that is kept; the position is after it."""
        position = self.position
        while True:
            units = self._streams.dealer.deal(self._group, position.epoch, self._stream)
            for unit in map(int, units[position.unit :]):
                self._without_output.add(unit)
                yield from self._read_unit(unit)
                position.unit, position.block = position.unit + 1, 0
            self._refuse_nothing(units)
            position.epoch, position.unit = position.epoch + 1, 0

    def _read_unit(self, unit: int) -> Iterator[Tokens]:
        position = self.position
        for block in self._read_blocks(unit):
            order = self._shuffle(len(block), unit)
            while position.document < len(block):
                yield from self._read_document(block[order[position.document]])
                position.document, position.piece = position.document + 1, 0
            position.document = 0

    def _read_blocks(self, unit: int) -> Iterator[list[Document]]:
        """Yield the documents that are shuffled together."""
        data, position = self._plan.data, self.position
        in_order = data.shuffle_block == 1 or data.mixture == "corenet"
        source = self._streams.open(self._group, unit)
        block: list[Document] = []
        characters, number = 0, position.block
        for item in source.read(number):
            number += 1
            if isinstance(item, Damage):
                self._drop(item.drop(source.path, data.on_damage))
                continue
            block.append(item)
            characters += len(item)
            if (
                in_order
                or len(block) == data.shuffle_block
                or characters >= BLOCK_CHARACTERS
            ):
                yield block
                block, characters, position.block = [], 0, number
        yield block

    def _shuffle(self, count: int, unit: int) -> Sequence[int]:
        if count < 2:
            return range(count)
        place = self.position
        keys = [self._plan.seed, self._group, place.epoch, unit, place.block]
        order: list[int] = np.random.default_rng(keys).permutation(count).tolist()
        return order

    def _read_document(self, document: Document) -> Iterator[Tokens]:
        """Yield the pieces of a document from the position on."""
        for piece in self._streams.make_pieces(document, self.position.piece):
            self.position.piece += 1
            if piece.num_cut:
                self._streams.dropped[CUT] += piece.num_cut
            if piece.dropped:
                self._drop(piece.dropped)
            else:
                self._without_output.clear()
                self._dropped.clear()
                yield piece.tokens

    def _drop(self, reason: str) -> None:
        self._streams.dropped[reason] += 1
        self._dropped[reason] += 1

    def _refuse_nothing(self, units: Units) -> None:
        """Raise OpenELMError if no unit that is dealt has a piece that is kept.

        In one epoch the stream's `units` may have none; the next deal has others,
        except as CoreNet deals.
        """
        files = self._plan.groups[self._group].files
        count = sum(file.parts for file in files)
        advice = "lower data.min_tokens and data.min_characters, or set data.packing"
        if self._plan.data.mixture == "corenet":
            own = sorted(set(map(int, units)))
            files, count = tuple(files[i] for i in own), len(own)
            advice += ", or data.mixture: natural"
        if len(self._without_output) < count:
            return
        counts = (f"{n} {why}" for why, n in self._dropped.items())
        reasons = ", ".join(counts) or "no documents"
        raise OpenELMError(
            f"No text of a corpus ({describe_files(files)}) is left ({reasons}); "
            f"{advice}."
        )


class _Stream:
    """Sequences of all groups, each with its share of the tokens."""

    def __init__(self, streams: "Streams", number: int, state: State | None) -> None:
        plan = streams.plan
        self._number = number
        self._shares = np.array([group.share for group in plan.groups])
        if state is None:  # random, so that the streams start with different groups
            rng = np.random.default_rng([plan.seed, number])
            lengths = rng.integers(plan.rules.length + 1, size=len(plan.groups))
            state = {"tokens": lengths.tolist(), "positions": [[]] * len(plan.groups)}
        self._tokens = np.array(state["tokens"], np.int64)
        self._groups = [
            _GroupReader(streams, i, number, _Position(*position))
            for i, position in enumerate(state["positions"])
        ]
        self._sequences = [group.read() for group in self._groups]

    def next_sequence(self) -> Tokens:
        """Return a sequence of the group that is furthest below its share."""
        wanted = self._shares * self._tokens.sum()
        group = int(np.argmax(wanted - self._tokens))
        tokens = next(self._sequences[group])
        self._tokens[group] += len(tokens) - 1  # targets
        return tokens

    def state(self) -> State:
        positions = [[*asdict(group.position).values()] for group in self._groups]
        return {
            "stream": self._number,
            "tokens": self._tokens.tolist(),
            "positions": positions,
        }


@dataclass(frozen=True, slots=True)
class Sequences:
    """Sequences of some streams, by stream; their states after that; drop counts."""

    by_stream: dict[int, list[Tokens]]
    states: list[State]
    dropped: Counter[str]


class Streams:
    """Some streams of a plan, read by one process."""

    def __init__(
        self, plan: ReadingPlan, numbers: Sequence[int], states: Mapping[int, State]
    ) -> None:
        self.plan, self.dealer = plan, Dealer(plan)
        self.dropped: Counter[str] = Counter()
        self._tokenizer = Tokenizer(plan.model_proto)
        self._streams = {n: _Stream(self, n, states.get(n)) for n in numbers}

    def next_sequences(self) -> Sequences:
        """Return the sequences of the next batch."""
        count = self.plan.batch_size // self.plan.readers
        by_stream = {
            number: [stream.next_sequence() for _ in range(count)]
            for number, stream in self._streams.items()
        }
        dropped = self.dropped.copy()
        self.dropped.clear()
        states = [stream.state() for stream in self._streams.values()]
        return Sequences(by_stream, states, dropped)

    def open(self, group: int, number: int) -> CorpusUnit | CachedUnit:
        file, unit = self.dealer.find(group, number)
        data = self.plan.data
        source = CorpusUnit(
            unit, file.text_key, data.document_start, self.plan.rules, self._tokenizer
        )
        return source if data.cache is None else CachedUnit(data.cache, source)

    def make_pieces(self, document: Document, start: int) -> Iterator[DocumentPiece]:
        if isinstance(document, CachedDocument):
            return document.pieces(start)
        return make_pieces(document, self._tokenizer, self.plan.rules, start=start)

    def close(self) -> None:
        pass
