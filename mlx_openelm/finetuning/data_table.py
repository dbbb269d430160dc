"""Statistics of the training data, as data.json and the report show them."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.record_formats import TEXT, TemplateChoice
from mlx_openelm.finetuning.records import Data, Dataset, Record
from mlx_openelm.finetuning.samples import Samples, targets_of
from mlx_openelm.text.tokenizer import EOS_TEXT

_BUCKETS = 8


@dataclass(frozen=True, slots=True)
class SplitTable:
    """What was found in one file.

    Attributes:
        samples: sequences, or pairs of them.
        tokens, targets: of all samples; targets are the tokens that count.
        edges, lengths: lengths[i] sequences are longer than edges[i] and no longer than
            edges[i + 1] tokens.
        cut: records whose end did not fit, or plain texts in more than one piece.
        prompt_cut: records whose prompt lost its beginning.
        nothing_to_learn: records that are left out: empty texts, equal answers.
        spelt_eos: records that hold `</s>` in a text.
        duplicates: records that repeat an earlier one, but for white space.
        in_train: records that are among those to train on too.
    """

    file: str
    format: str
    fields: tuple[str, ...]
    digest: str
    records: int
    samples: int
    tokens: int
    targets: int
    edges: tuple[int, ...]
    lengths: tuple[int, ...]
    shortest: int
    median: int
    longest: int
    spelt_eos: int
    duplicates: int
    cut: int = 0
    prompt_cut: int = 0
    nothing_to_learn: int = 0
    in_train: int = 0


@dataclass(frozen=True, slots=True)
class DataTable:
    """What will be trained on, as data.json and the report show it."""

    template: str
    reason: str
    digest: str
    train: SplitTable
    valid: SplitTable | None
    test: SplitTable | None
    warnings: tuple[str, ...]


def tabulate_split(dataset: Dataset, samples: Samples, max_length: int) -> SplitTable:
    """Return the statistics of one file and its samples."""
    sequences = [sequence for sample in samples for sequence in sample.sequences]
    sizes = [len(sample.tokens) for sample in sequences]
    edges = sorted({0, *(-(-max_length // 2**i) for i in range(_BUCKETS))})
    lengths, _ = np.histogram(np.array(sizes) - 0.5, edges)
    records = dataset.records
    return SplitTable(
        file=str(dataset.path),
        format=dataset.format,
        fields=dataset.fields,
        digest=dataset.digest,
        records=len(records),
        samples=len(samples),
        tokens=sum(sizes),
        targets=sum(targets_of(samples)),
        edges=tuple(edges),
        lengths=tuple(lengths.tolist()),
        shortest=min(sizes, default=0),
        median=int(statistics.median_low(sizes)) if sizes else 0,
        longest=max(sizes, default=0),
        spelt_eos=sum(map(_spells_eos, records)),
        duplicates=len(records) - len({record.key for record in records}),
    )


def _spells_eos(record: Record) -> bool:
    texts = (text for turn in record.turns for text in (turn.text, turn.input))
    return any(EOS_TEXT in text for text in (*texts, record.rejected or ""))


def tabulate(
    data: Data, choice: TemplateChoice, splits: Mapping[str, SplitTable]
) -> DataTable:
    """Put the tables of all files together, with what a person should know of them.

    Raises:
        OpenELMError: nothing is left to train on.
    """
    warnings = list(data.notes)
    known = {record.key for record in data.train.records}
    tables = dict(splits)
    for split in ("valid", "test"):
        if split in tables:
            shared = sum(record.key in known for record in data.splits[split].records)
            tables[split] = replace(tables[split], in_train=shared)
    for split, table in tables.items():
        warnings += _warn(split, table)
    train = tables["train"]
    if not train.samples:
        raise OpenELMError(
            f"{train.file} has nothing to learn from: its texts are empty, or its "
            "answers are equal."
        )
    return DataTable(
        template=choice.name,
        reason=choice.reason,
        digest=data.digest,
        train=train,
        valid=tables.get("valid"),
        test=tables.get("test"),
        warnings=tuple(warnings),
    )


def _warn(split: str, table: SplitTable) -> Iterator[str]:
    """Yield a sentence for all that a person may not have meant."""
    for count, what in (
        (table.in_train, "also in train, so {split} says too little"),
        (table.duplicates, "there before"),
        (
            table.cut,
            "longer than fits in one sequence, and cut"
            + (
                " into pieces: nothing is lost"
                if table.format == TEXT
                else " at their end"
            ),
        ),
        (table.prompt_cut, "so long that the beginning of the prompt is dropped"),
        (table.nothing_to_learn, "left out, with nothing to learn"),
        (table.spelt_eos, f"spelling {EOS_TEXT} in the text, which the template adds"),
    ):
        if count:
            are = "record of {split} is" if count == 1 else "records of {split} are"
            yield f"{count} {are} {what}.".format(split=split)
