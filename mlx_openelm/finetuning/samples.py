"""Records become token samples: what the model reads, and where it learns.

A text is tokenized as a whole, answer and prompt together, and what counts are the
tokens that generation would have to find: all that do not belong to the prompt alone.
Lengths are in tokens, BOS and EOS included.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.record_formats import (
    ALPACA,
    MESSAGES,
    PREFERENCE_MESSAGES,
    TEXT,
)
from mlx_openelm.finetuning.records import Data, Dataset, Record
from mlx_openelm.text.templates import Exchange, render
from mlx_openelm.text.tokenizer import EOS_TEXT, Tokenizer

_AT_ONCE = 4096  # records tokenized together: enough for all cores, little memory
_BUCKETS = 8

Progress = Callable[[int, int], None]  # records done, records


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence.

    Attributes:
        tokens: int32 (L,); BOS first, EOS last unless it is cut.
        counts: bool (L,); a token that counts is a target of the loss. BOS never is.
        place: the record, "train.jsonl:17".
    """

    tokens: npt.NDArray[np.int32]
    counts: npt.NDArray[np.bool_]
    place: str


@dataclass(frozen=True, slots=True)
class Pair:
    """The same prompt with the better and the worse answer."""

    chosen: Sample
    rejected: Sample
    place: str


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
class TemplateChoice:
    """The template that renders the records, and why it is that."""

    name: str
    reason: str


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


def choose_template(
    said: str | None, stored: str | None, format: str
) -> TemplateChoice:
    """Choose what renders records of `format`.

    Args:
        said: what a person asked for; None or "auto": nothing.
        stored: what is stored with the model, if anything.

    Raises:
        OpenELMError: a template is said for plain texts, which have no prompt.
    """
    if said == "auto":
        said = None
    if format == TEXT:
        if said not in (None, "raw"):
            raise OpenELMError(
                f"--template {said} has no place for plain texts; leave it out, or "
                "give records with prompt and completion."
            )
        return TemplateChoice("raw", "plain texts are trained on as they are")
    if said is not None:
        return TemplateChoice(said, "it was asked for")
    if stored is not None:
        return TemplateChoice(stored, "it is stored with the model")
    if format in (MESSAGES, PREFERENCE_MESSAGES):
        return TemplateChoice("instruct", "the records are conversations")
    if format == ALPACA:
        return TemplateChoice("alpaca", "the records are Alpaca's")
    return TemplateChoice("raw", "neither the model nor the records ask for another")


# Records to samples --------------------------------------------------------------


def make_samples(
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    template: str,
    mask_prompt: bool | None = None,
    last_turn_only: bool = False,
    max_length: int,
    on_progress: Progress | None = None,
) -> tuple[tuple[Sample, ...], SplitTable]:
    """Tokenize records to train on, and say what was found.

    Too long a plain text becomes several pieces. Too long an answer loses its end, and
    only where a prompt leaves no room at all, the prompt loses its beginning.

    Args:
        mask_prompt: False: the loss is on the prompt too. Plain texts have none.
        last_turn_only: of a conversation, only the last answer counts.
        max_length: at least 2 tokens.

    Raises:
        OpenELMError: a conversation has no place in the template.
    """
    assert max_length >= 2, max_length
    is_text = dataset.format == TEXT
    samples: list[Sample] = []
    cut = prompt_cut = empty = 0
    masks = mask_prompt is not False
    for record, (whole,) in _tokenize(
        dataset,
        tokenizer,
        "raw" if is_text else template,
        masks=masks,
        last_turn_only=last_turn_only,
        on_progress=on_progress,
    ):
        if is_text and not record.turns[0].text.strip():
            empty += 1
        elif len(whole.tokens) <= max_length:
            samples.append(whole)
        elif is_text:
            samples += _split(whole, max_length)
            cut += 1
        else:
            first = int(whole.counts.argmax())
            # As much of the answer as fits, behind as much of the prompt as then fits.
            drop = min(first, len(whole.tokens) - max_length + 1) - 1
            drop = drop if first >= max_length else 0
            samples.append(_shorten(whole, drop, max_length))
            cut += len(whole.tokens) - drop > max_length
            prompt_cut += drop > 0
    table = _tabulate(dataset, len(samples), samples, max_length)
    return tuple(samples), replace(
        table, cut=cut, prompt_cut=prompt_cut, nothing_to_learn=empty
    )


def make_pairs(
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    template: str,
    max_length: int,
    max_prompt_length: int | None = None,
    on_progress: Progress | None = None,
) -> tuple[tuple[Pair, ...], SplitTable]:
    """Tokenize preferences, and say what was found; the last answers alone count.

    Where prompt and longer answer do not fit, the prompt keeps its last
    `max_prompt_length` tokens (half of `max_length` if it is not given); what is still
    too long loses its end.

    Raises:
        OpenELMError: a conversation has no place in the template.
    """
    room = max_prompt_length or max_length // 2
    assert 1 <= room < max_length, (room, max_length)
    pairs: list[Pair] = []
    cut = prompt_cut = equal = 0
    for record, both in _tokenize(
        dataset,
        tokenizer,
        template,
        masks=True,
        last_turn_only=True,
        on_progress=on_progress,
    ):
        longest = max(len(sample.tokens) for sample in both)
        prompt = max(int(sample.counts.argmax()) for sample in both)
        drop = max(0, prompt - room) if longest > max_length else 0
        chosen, rejected = (_shorten(sample, drop, max_length) for sample in both)
        if np.array_equal(chosen.tokens, rejected.tokens):
            equal += 1
            continue
        pairs.append(Pair(chosen, rejected, record.place))
        cut += longest - drop > max_length
        prompt_cut += drop > 0
    sequences = [sample for pair in pairs for sample in (pair.chosen, pair.rejected)]
    table = _tabulate(dataset, len(pairs), sequences, max_length)
    return tuple(pairs), replace(
        table, cut=cut, prompt_cut=prompt_cut, nothing_to_learn=equal
    )


def _tokenize(
    dataset: Dataset,
    tokenizer: Tokenizer,
    template: str,
    *,
    masks: bool,
    last_turn_only: bool,
    on_progress: Progress | None,
) -> Iterator[tuple[Record, list[Sample]]]:
    """Yield each record with its sequence or, of a preference, with both."""
    for first in range(0, len(dataset.records), _AT_ONCE):
        chunk = dataset.records[first : first + _AT_ONCE]
        rendered = [_render(record, template) for record in chunk]
        exchanges = [e for versions in rendered for turns in versions for e in turns]
        spans = _encode(exchanges, tokenizer, rendered=template != "raw", masks=masks)
        for record, versions in zip(chunk, rendered, strict=True):
            samples = []
            for turns in versions:
                ids, starts = zip(*islice(spans, len(turns)), strict=True)
                tokens, counts = [tokenizer.bos_id], [False]
                for i, (part, start) in enumerate(zip(ids, starts, strict=True), 1):
                    is_context = masks and last_turn_only and i < len(turns)
                    masked = len(part) if is_context else start
                    tokens += part
                    counts += [False] * masked + [True] * (len(part) - masked)
                samples.append(
                    Sample(
                        np.array(tokens, np.int32), np.array(counts, bool), record.place
                    )
                )
            yield record, samples
        if on_progress is not None:
            on_progress(first + len(chunk), len(dataset.records))


def _render(record: Record, template: str) -> list[list[Exchange]]:
    try:
        chosen = render(record.turns, template)
        if record.rejected is None:
            return [chosen]
        worse = replace(record.turns[-1], text=record.rejected)
        return [chosen, render((*record.turns[:-1], worse), template)]
    except OpenELMError as error:
        raise OpenELMError(f"{record.place}: {error}") from error


def _encode(
    exchanges: Sequence[Exchange], tokenizer: Tokenizer, *, rendered: bool, masks: bool
) -> Iterator[tuple[list[int], int]]:
    """Yield every exchange's ids, EOS included, and how many are the prompt's alone."""
    texts = [e.context + e.answer for e in exchanges]
    prompts = [e.context if masks else "" for e in exchanges]
    # A prompt's last space may be the beginning of the answer's first piece.
    shorter = [prompt[:-1] if prompt.endswith(" ") else "" for prompt in prompts]
    whole, alone, without_space = (
        tokenizer.encode_many(some, rendered=rendered)
        for some in (texts, prompts, shorter)
    )
    for ids, *heads in zip(whole, alone, without_space, strict=True):
        yield [*ids, tokenizer.eos_id], max(_count_common(ids, head) for head in heads)


def _count_common(ids: Sequence[int], head: Sequence[int]) -> int:
    """Return how many ids both begin with."""
    if ids[: len(head)] == head:
        return len(head)
    differ = (i for i, (a, b) in enumerate(zip(ids, head, strict=False)) if a != b)
    return next(differ, len(ids))


# Too long ------------------------------------------------------------------------


def _shorten(sample: Sample, drop: int, max_length: int) -> Sample:
    """Leave out `drop` tokens behind BOS, and the end that is then still too much."""
    if drop == 0 and len(sample.tokens) <= max_length:
        return sample
    kept = np.r_[0, 1 + drop : min(len(sample.tokens), max_length + drop)]
    return Sample(sample.tokens[kept], sample.counts[kept], sample.place)


def _split(sample: Sample, max_length: int) -> Iterator[Sample]:
    """Yield a plain text in pieces, each begun with BOS: no token is lost."""
    bos, rest = sample.tokens[:1], sample.tokens[1:]
    for i in range(0, len(rest), max_length - 1):
        tokens = np.concatenate([bos, rest[i : i + max_length - 1]])
        yield Sample(tokens, np.arange(len(tokens)) > 0, sample.place)


# What was found ------------------------------------------------------------------


def _tabulate(
    dataset: Dataset, num_samples: int, sequences: Sequence[Sample], max_length: int
) -> SplitTable:
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
        samples=num_samples,
        tokens=sum(sizes),
        targets=sum(int(sample.counts.sum()) for sample in sequences),
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
    data: Data,
    choice: TemplateChoice,
    *,
    train: SplitTable,
    valid: SplitTable | None = None,
    test: SplitTable | None = None,
) -> DataTable:
    """Put the tables of all files together, with what a person should know of them."""
    warnings = list(data.notes)
    known = {record.key for record in data.train.records}
    tables: dict[str, SplitTable | None] = {"train": train}
    for split, dataset, table in (
        ("valid", data.valid, valid),
        ("test", data.test, test),
    ):
        if dataset is None or table is None:
            tables[split] = None
            continue
        shared = sum(record.key in known for record in dataset.records)
        tables[split] = replace(table, in_train=shared)
    for split, table in tables.items():
        if table is not None:
            warnings += _warn(split, table)
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
        valid=tables["valid"],
        test=tables["test"],
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


def lengths_of(samples: "Sequence[Sample] | Sequence[Pair]") -> list[int]:
    """Return the tokens of each sample; of a pair, of both its sequences."""
    return [
        len(s.tokens)
        if isinstance(s, Sample)
        else len(s.chosen.tokens) + len(s.rejected.tokens)
        for s in samples
    ]
