"""Units of corpora: files cut into parts of similar size, dealt to readers.

Every document belongs to one unit, and every unit is dealt to one reader in each epoch.
The deal is a function of the files, the seed, the epoch and the number of readers.
"""

import functools
import hashlib
import heapq
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.pretraining.cleaning import Rules
from converters.pretraining.corpus_files import find_files
from converters.pretraining.documents import (
    Unit,
    count_possible_parts,
    is_compressed,
    is_parquet,
)
from converters.pretraining.recipe import (
    DataRecipe,
    PretrainRecipe,
    largest_divisor,
    list_corpora,
)
from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import count_of
from mlx_openelm.text.tokenizer import Tokenizer

UNIT_BYTES = 1 << 26  # of text, at most
LEAST_UNIT_BYTES = 1 << 12  # smaller ones only where there are too few for the readers
COMPRESSED_PARTS = 8  # at most, likewise: each of them decompresses the whole file
UNITS_PER_READER = 8  # wanted, so that readers finish an epoch at a similar time
_COMPRESSED, _PARQUET = 3, 2  # bytes of text per byte of such files, roughly
_DEAL = 0xD  # separates these random numbers from those of the order of documents

Units = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file, the number of its parts, and a rough number of its bytes of text."""

    path: str
    text_key: str
    parts: int
    text_bytes: int


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """Files whose units are read in one random order.

    Attributes:
        share: of the tokens of all groups.
    """

    files: tuple[CorpusFile, ...]
    share: float

    @property
    def num_units(self) -> int:
        return sum(file.parts for file in self.files)


def describe_files(files: Sequence[CorpusFile]) -> str:
    """Return the files of a corpus in words, for messages."""
    first, more = files[0].path, len(files) - 1
    return f"{first} and {more} more" if more else first


@dataclass(frozen=True, slots=True)
class ReadingPlan:
    """All that determines the sequences of the readers; workers get a copy."""

    groups: tuple[UnitGroup, ...]
    data: DataRecipe
    rules: Rules
    model_proto: bytes
    seed: int
    readers: int
    batch_size: int


def plan_reading(
    recipe: PretrainRecipe, tokenizer: Tokenizer, length: int
) -> ReadingPlan:
    """Find a recipe's files and cut them into units.

    Raises:
        OpenELMError: a pattern matches nothing, or there are fewer units than readers.
    """
    readers = recipe.readers
    groups = _make_groups(recipe.data, readers)
    fewest = min(groups, key=lambda group: group.num_units)
    if fewest.num_units < readers and recipe.data.readers is None:
        readers = largest_divisor(recipe.batch_size, fewest.num_units)
        groups = _make_groups(recipe.data, readers)
    elif fewest.num_units < readers and recipe.data.mixture == "natural":
        raise OpenELMError(
            f"A corpus ({describe_files(fewest.files)}) can be cut into "
            f"{count_of(fewest.num_units, 'part')}, fewer than the {readers} readers; "
            "lower data.readers, or store the text as JSON lines, which can be cut "
            "anywhere."
        )
    return ReadingPlan(
        groups,
        recipe.data,
        Rules.of(recipe.data, length),
        tokenizer.model_proto,
        recipe.seed,
        readers,
        recipe.batch_size,
    )


def list_files(data: DataRecipe, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the files of a corpus, without those that are held out."""
    return find_files(patterns, (*data.exclude, *data.heldout))


def fingerprint(plan: ReadingPlan) -> str:
    """Hash what determines the batches, except seed, batch size and readers.

    A file is identified by its name and size, so a corpus may move to another folder.
    """
    data = plan.data
    parts = [
        *([g.share, *map(_describe, g.files)] for g in plan.groups),
        [data.document_start, data.shuffle_block, data.mixture],
        list(asdict(plan.rules).values()),
        zlib.crc32(plan.model_proto),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _describe(file: CorpusFile) -> tuple[str, int, str]:
    return Path(file.path).name, _count_bytes(file.path), file.text_key


def _count_bytes(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:  # such as a broken link, which is reported when it is read
        return -1


# Cutting -----------------------------------------------------------------------------


def _make_groups(data: DataRecipe, readers: int) -> tuple[UnitGroup, ...]:
    """Return a group of each corpus with a share, and one of all others."""
    natural: list[tuple[str, str]] = []
    shared: list[tuple[list[tuple[str, str]], float]] = []
    for corpus in list_corpora(data):
        files = [(path, corpus.text_key) for path in list_files(data, corpus.files)]
        if corpus.token_share is None:
            natural += files
        else:
            shared.append((files, corpus.token_share))
    total = sum(share for _, share in shared)
    if natural:
        shared.append((natural, 1 - total))
        total = 1.0
    return tuple(
        UnitGroup(_cut(files, readers, whole=data.mixture == "corenet"), share / total)
        for files, share in shared
    )


def _cut(
    files: Sequence[tuple[str, str]], readers: int, *, whole: bool
) -> tuple[CorpusFile, ...]:
    """Cut files into units; smaller ones if they are too few for the readers."""
    sizes = [_estimate_text(path) for path, _ in files]
    parts = [1] * len(files)
    most = [0] * len(files)  # possible parts; 0: unknown yet, as that opens the file
    for limit, most_compressed, wanted in () if whole else _list_limits(readers):
        for i, (path, _) in enumerate(files):
            count = -(-sizes[i] // limit)
            if is_compressed(path):
                count = min(count, most_compressed)
            if count > 1:
                most[i] = most[i] or count_possible_parts(path)
                parts[i] = min(count, most[i])
        if sum(parts) >= wanted:
            break
    return tuple(
        CorpusFile(path, text_key, parts[i], sizes[i])
        for i, (path, text_key) in enumerate(files)
    )


def _list_limits(readers: int) -> Iterator[tuple[int, int, int]]:
    """Yield limits for ever smaller units.

    They are the most bytes of text of a unit, the most parts of a compressed file, and
    the number of units that suffices.
    """
    limit = UNIT_BYTES
    while limit > LEAST_UNIT_BYTES:
        yield limit, COMPRESSED_PARTS, readers * UNITS_PER_READER
        limit //= 2
    compressed = COMPRESSED_PARTS
    while limit:
        yield limit, compressed, readers
        limit, compressed = limit // 2, compressed * 2


def _estimate_text(path: str) -> int:
    """Return a rough number of bytes of text in a file."""
    ratio = _COMPRESSED if is_compressed(path) else _PARQUET if is_parquet(path) else 1
    return max(1, ratio * _count_bytes(path))


# Dealing -----------------------------------------------------------------------------


class Dealer:
    """Deals the units of a plan to its readers."""

    def __init__(self, plan: ReadingPlan) -> None:
        self._plan = plan
        self._ends = [np.cumsum([f.parts for f in g.files]) for g in plan.groups]
        # Readers are at most a few epochs apart.
        self._deal_epoch = functools.lru_cache(4 * len(plan.groups))(self._deal_units)

    def deal(self, group: int, epoch: int, reader: int) -> Units:
        """Return the numbers of the units of a reader, in its order."""
        if self._plan.data.mixture == "corenet":
            return self._deal_files(group, epoch, reader)
        order, owners = self._deal_epoch(group, epoch)
        units: Units = order[owners == reader]
        return units

    def find(self, group: int, number: int) -> tuple[CorpusFile, Unit]:
        """Return a unit by its number, and its file."""
        ends = self._ends[group]
        i = int(np.searchsorted(ends, number, side="right"))
        file = self._plan.groups[group].files[i]
        first = int(ends[i]) - file.parts
        return file, Unit(file.path, number - first, file.parts)

    def _deal_units(self, group: int, epoch: int) -> tuple[Units, Units]:
        """Return units in random order, and for each the reader with the least text."""
        files = self._plan.groups[group].files
        rng = np.random.default_rng([self._plan.seed, group, epoch, _DEAL])
        sizes = np.repeat(
            [file.text_bytes / file.parts for file in files],
            [file.parts for file in files],
        )
        order = rng.permutation(len(sizes))
        readers = rng.permutation(self._plan.readers).tolist()
        loads = [(0.0, place, reader) for place, reader in enumerate(readers)]
        owners = np.empty(len(order), np.int64)
        for i, size in enumerate(sizes[order].tolist()):
            load, place, owners[i] = loads[0]
            heapq.heapreplace(loads, (load + size, place, int(owners[i])))
        return order, owners

    def _deal_files(self, group: int, epoch: int, reader: int) -> Units:
        """Deal whole files as CoreNet does: once, shuffled again in each epoch.

        The last round is completed with files drawn at random.
        """
        plan = self._plan
        count = len(plan.groups[group].files)
        rng = np.random.default_rng([plan.seed, group, _DEAL])
        order = rng.permutation(count)
        more = rng.integers(count, size=-count % plan.readers)
        own = np.concatenate([order, more])[reader :: plan.readers]
        if epoch:
            rng = np.random.default_rng([plan.seed, group, epoch, reader, _DEAL])
            own = rng.permutation(own)
        return own
