"""Units of corpora: files cut into parts of similar size, dealt to readers.

Every document belongs to one unit, and every unit is dealt to one reader in each epoch.
The deal is a function of the files, the seed, the epoch and the number of readers.
"""

import functools
import hashlib
import heapq
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.pretraining.cleaning import Rules
from converters.pretraining.corpus_files import find_files
from converters.pretraining.documents import FileForm, Unit, inspect_file
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
LEAST_UNIT_BYTES = 1 << 8  # smaller ones only where there are too few for the readers
UNITS_PER_READER = 32  # wanted, so that readers and corpora are at a similar place
_MOST_DOUBLINGS = 16  # of the parts that a file has at little cost
_DEAL = 0xD  # separates these random numbers from those of the order of documents

Units = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of a corpus, which has a number, and into how many parts it is cut."""

    corpus: int
    path: str
    text_key: str
    parts: int
    form: FileForm

    @property
    def part_bytes(self) -> float:
        """Bytes of text of a part, roughly."""
        return max(1, self.form.text_bytes) / self.parts


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

    A file is identified by its name, size and form, which determines how it is cut, so
    a corpus may move to another folder.
    """
    data = plan.data
    parts = [
        *([g.share, *map(_describe, g.files)] for g in plan.groups),
        [data.document_start, data.shuffle_block, data.mixture],
        list(asdict(plan.rules).values()),
        zlib.crc32(plan.model_proto),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _describe(file: CorpusFile) -> tuple[str, int, str, FileForm]:
    name = Path(file.path).name
    return name, _count_bytes(file.path), file.text_key, file.form


def _count_bytes(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:  # such as a broken link, which is reported when it is read
        return -1


# Cutting -----------------------------------------------------------------------------


def _make_groups(data: DataRecipe, readers: int) -> tuple[UnitGroup, ...]:
    """Return a group of each corpus with a share, and one of all others."""
    natural: list[CorpusFile] = []
    shared: list[tuple[list[CorpusFile], float]] = []
    for number, corpus in enumerate(list_corpora(data)):
        files = [
            CorpusFile(
                number, path, corpus.text_key, 1, inspect_file(path, corpus.text_key)
            )
            for path in list_files(data, corpus.files)
        ]
        if corpus.token_share is None:
            natural += files
        else:
            shared.append((files, corpus.token_share))
    total = sum(share for _, share in shared)
    if natural:
        shared.append((natural, 1 - total))
        total = 1.0
    whole = data.mixture == "corenet"
    return tuple(
        UnitGroup(tuple(files if whole else _cut(files, readers)), share / total)
        for files, share in shared
    )


def _cut(files: Sequence[CorpusFile], readers: int) -> list[CorpusFile]:
    """Cut files into units; smaller ones if they are too few for the readers."""
    parts = [1] * len(files)
    alone = readers == 1 and len({file.corpus for file in files}) == 1
    wanted = 1 if alone else readers * UNITS_PER_READER
    for limit, factor, enough in _list_limits(readers, wanted):
        for i, form in enumerate(file.form for file in files):
            most = min(form.cheap_parts * factor, form.most_parts)
            parts[i] = max(1, min(-(-form.text_bytes // limit), most))
        if sum(parts) >= enough:
            break
    return [replace(file, parts=parts[i]) for i, file in enumerate(files)]


def _list_limits(readers: int, wanted: int) -> Iterator[tuple[int, int, int]]:
    """Yield limits for smaller and smaller units.

    They are the most bytes of text of a unit, a factor of the parts that a file has at
    little cost, and the number of units that suffices.
    """
    for power in range((UNIT_BYTES // LEAST_UNIT_BYTES).bit_length()):
        yield UNIT_BYTES >> power, 1, wanted
    for power in range(_MOST_DOUBLINGS):
        yield LEAST_UNIT_BYTES, 1 << power, readers
    for power in range(LEAST_UNIT_BYTES.bit_length()):
        yield LEAST_UNIT_BYTES >> power, 1 << _MOST_DOUBLINGS, readers


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
        """Return units in random order, and for each the reader with the least text.

        The units of each corpus are spread evenly, so that the readers have the data's
        shares at any time.
        """
        files = self._plan.groups[group].files
        rng = np.random.default_rng([self._plan.seed, group, epoch, _DEAL])
        parts = [file.parts for file in files]
        sizes = np.repeat([file.part_bytes for file in files], parts)
        corpora = np.repeat([file.corpus for file in files], parts)
        places = np.empty(len(sizes))
        for corpus in np.unique(corpora):
            own = np.flatnonzero(corpora == corpus)
            places[own] = (rng.permutation(len(own)) + rng.random()) / len(own)
        order = np.argsort(places)
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
