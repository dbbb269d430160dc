"""Statistics of the training data, for data.json and the report."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.record_formats import TEXT, TemplateChoice
from mlx_openelm.finetuning.records import Data, Dataset, Record
from mlx_openelm.finetuning.samples import Samples, sizes_of, targets_of
from mlx_openelm.message_parts import count_of
from mlx_openelm.text.tokenizer import EOS_TEXT

_BUCKETS = 8


@dataclass(frozen=True, slots=True)
class SplitTable:
    """Statistics of one split.

    Attributes:
        samples: number of sequences, or of pairs.
        tokens, targets: numbers of tokens and of targets in all samples.
        edges, lengths: histogram; lengths[i] sequences have more than edges[i] and at
            most edges[i + 1] tokens.
        cut: records that are truncated at the end; for plain texts, split into pieces.
        prompt_cut: records whose prompt is truncated at the start.
        nothing_to_learn: records without targets: empty texts, equal answers.
        spelt_eos: records with `</s>` in a text.
        duplicates: records that are equal to an earlier one, ignoring white space.
        in_train: records that are also in the training split.
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
    """Statistics of all splits, the prompt template, and warnings."""

    template: str
    reason: str
    digest: str
    train: SplitTable
    valid: SplitTable | None
    test: SplitTable | None
    warnings: tuple[str, ...]


def tabulate_split(dataset: Dataset, samples: Samples, max_length: int) -> SplitTable:
    """Return the statistics of one split and its samples."""
    sizes = sizes_of(samples)
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
        spelt_eos=sum(map(_contains_eos, records)),
        duplicates=len(records) - len({record.key for record in records}),
    )


def _contains_eos(record: Record) -> bool:
    for turn in record.turns:
        if EOS_TEXT in turn.text or EOS_TEXT in turn.input:
            return True
    return EOS_TEXT in (record.rejected or "")


def tabulate(
    data: Data, choice: TemplateChoice, splits: Mapping[str, SplitTable]
) -> DataTable:
    """Combine the statistics of all splits, and add warnings.

    Raises:
        OpenELMError: there are no training samples.
    """
    warnings = list(data.notes)
    train_keys = {record.key for record in data.train.records}
    tables = dict(splits)
    for split in ("valid", "test"):
        if split in tables:
            in_train = sum(r.key in train_keys for r in data.splits[split].records)
            tables[split] = replace(tables[split], in_train=in_train)
    for split, table in tables.items():
        warnings += _warn(split, table)
    train = tables["train"]
    if not train.samples:
        raise OpenELMError(
            f"{train.file} has nothing to train on: all texts are empty, or all pairs "
            "have equal answers."
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
    """Yield a sentence for each property that is probably unintended."""
    too_long = "truncated at the maximum length"
    if table.format == TEXT:
        too_long = "longer than the maximum length, so split into pieces without loss"
    for count, description in (
        (table.in_train, f"also in train, so the {split} loss is too low"),
        (table.duplicates, "equal to an earlier record"),
        (table.cut, too_long),
        (table.prompt_cut, "so long that the prompt is truncated at its start"),
        (table.nothing_to_learn, "left out, because there is nothing to train on"),
        (table.spelt_eos, f"the text contains {EOS_TEXT}, which the template adds"),
    ):
        if count:
            yield f"{count_of(count, 'record')} of {split}: {description}."
