"""Tokenizing records: tokens, loss mask and truncation.

Prompt and answer are tokenized together. The targets are the tokens that generation
would have to produce: all after the tokens that the prompt alone determines. Lengths
are in tokens, with BOS and EOS.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.data_table import SplitTable, tabulate_split
from mlx_openelm.finetuning.record_formats import TEXT
from mlx_openelm.finetuning.records import Dataset, Record
from mlx_openelm.finetuning.samples import PackedSamples, Pair, Sample
from mlx_openelm.text.repair import repair
from mlx_openelm.text.templates import Exchange, render
from mlx_openelm.text.tokenizer import Tokenizer

_CHUNK = 4096  # records tokenized together: enough for all cores, little memory


def make_samples(
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    template: str,
    mask_prompt: bool | None = None,
    last_turn_only: bool = False,
    repair_text: bool = False,
    max_length: int,
    on_progress: Callable[[int], None] = lambda records: None,
) -> tuple[PackedSamples, SplitTable]:
    """Tokenize records for supervised training; also return their statistics.

    A long plain text is split into pieces. Of other long records the answer is
    truncated at its end; the prompt is truncated, at its start, only if it would leave
    no token of the answer.

    Args:
        mask_prompt: False includes the prompt in the loss.
        last_turn_only: train on the last answer of a conversation only.
        repair_text: repair the rendered texts with ftfy.
        max_length: at least 2 tokens.
        on_progress: receives the number of finished records.

    Raises:
        OpenELMError: the template does not support a conversation.
    """
    assert max_length >= 2, max_length
    is_text = dataset.format == TEXT
    cut = prompt_cut = empty = 0

    def make() -> Iterator[Sample]:
        nonlocal cut, prompt_cut, empty
        for record, (whole,) in _tokenize(
            dataset,
            tokenizer,
            "raw" if is_text else template,
            mask_prompt=mask_prompt is not False,
            last_turn_only=last_turn_only,
            repair_text=repair_text,
            on_progress=on_progress,
        ):
            if is_text and not record.turns[0].text.strip():
                empty += 1
            elif len(whole.tokens) <= max_length:
                yield whole
            elif is_text:
                yield from _split(whole, max_length)
                cut += 1
            else:
                first = int(whole.loss_mask.argmax())
                # Keep as much of the answer as fits, then as much of the prompt.
                drop = min(first, len(whole.tokens) - max_length + 1) - 1
                drop = drop if first >= max_length else 0
                yield _shorten(whole, drop, max_length)
                cut += len(whole.tokens) - drop > max_length
                prompt_cut += drop > 0

    samples = PackedSamples(make())
    table = tabulate_split(dataset, samples, max_length)
    return samples, replace(
        table, cut=cut, prompt_cut=prompt_cut, nothing_to_learn=empty
    )


def make_pairs(
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    template: str,
    max_length: int,
    max_prompt_length: int,
    repair_text: bool = False,
    on_progress: Callable[[int], None] = lambda records: None,
) -> tuple[tuple[Pair, ...], SplitTable]:
    """Tokenize preferences; also return their statistics.

    If the prompt with the longer answer exceeds `max_length`, the prompt is truncated
    at its start to `max_prompt_length` tokens, then the answers at their end. The
    targets are the last answers only.

    Args:
        on_progress: receives the number of finished records.

    Raises:
        OpenELMError: the lengths are too small for a prompt and an answer, or the
            template does not support a conversation.
    """
    if not 2 <= max_prompt_length < max_length:
        raise OpenELMError(
            f"`max_prompt_length` is {max_prompt_length} and `max_seq_length` "
            f"{max_length}; the former must be at least 2 and less than the latter."
        )
    pairs: list[Pair] = []
    cut = prompt_cut = equal = 0
    for record, both in _tokenize(
        dataset,
        tokenizer,
        template,
        mask_prompt=True,
        last_turn_only=True,
        repair_text=repair_text,
        on_progress=on_progress,
    ):
        longest = max(len(sample.tokens) for sample in both)
        prompt = max(int(sample.loss_mask.argmax()) for sample in both)
        drop = max(0, prompt - max_prompt_length) if longest > max_length else 0
        chosen, rejected = (_shorten(sample, drop, max_length) for sample in both)
        if np.array_equal(chosen.tokens, rejected.tokens):
            equal += 1
            continue
        pairs.append(Pair(chosen, rejected, record.place))
        cut += longest - drop > max_length
        prompt_cut += drop > 0
    table = tabulate_split(dataset, pairs, max_length)
    return tuple(pairs), replace(
        table, cut=cut, prompt_cut=prompt_cut, nothing_to_learn=equal
    )


def _tokenize(
    dataset: Dataset,
    tokenizer: Tokenizer,
    template: str,
    *,
    mask_prompt: bool,
    last_turn_only: bool,
    repair_text: bool,
    on_progress: Callable[[int], None],
) -> Iterator[tuple[Record, list[Sample]]]:
    """Yield each record with its sequence or, for a preference, its two sequences.

    Its arrays are views of those of a chunk.
    """
    for first in range(0, len(dataset.records), _CHUNK):
        chunk = dataset.records[first : first + _CHUNK]
        rendered = [_render(record, template) for record in chunk]
        exchanges = [e for versions in rendered for turns in versions for e in turns]
        spans = _encode(
            exchanges,
            tokenizer,
            rendered=template != "raw",
            mask_prompt=mask_prompt,
            repair_text=repair_text,
        )
        bos = tokenizer.bos_id
        tokens: list[int] = []
        runs: list[int] = []  # of False and True in turn: the loss mask
        ends: list[int] = []  # of the sequences
        for versions in rendered:
            for turns in versions:
                tokens.append(bos)
                masked = 1
                for i, (ids, prompt) in enumerate(islice(spans, len(turns)), 1):
                    is_context = mask_prompt and last_turn_only and i < len(turns)
                    left_out = len(ids) if is_context else prompt
                    tokens += ids
                    runs += (masked + left_out, len(ids) - left_out)
                    masked = 0
                ends.append(len(tokens))
        values, counts = np.array(tokens, np.int32), np.array(runs)
        mask = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        begin, at = 0, iter(ends)
        for record, versions in zip(chunk, rendered, strict=True):
            samples = []
            for end in islice(at, len(versions)):
                samples.append(Sample(values[begin:end], mask[begin:end], record.place))
                begin = end
            yield record, samples
        on_progress(first + len(chunk))


def _render(record: Record, template: str) -> list[list[Exchange]]:
    try:
        chosen = render(record.turns, template)
        if record.rejected is None:
            return [chosen]
        rejected = replace(record.turns[-1], text=record.rejected)
        return [chosen, render((*record.turns[:-1], rejected), template)]
    except OpenELMError as error:
        raise OpenELMError(f"{record.place}: {error}") from error


def _encode(
    exchanges: Sequence[Exchange],
    tokenizer: Tokenizer,
    *,
    rendered: bool,
    mask_prompt: bool,
    repair_text: bool,
) -> Iterator[tuple[list[int], int]]:
    """Yield the ids of each exchange, with EOS, and the number of its prompt's ids."""
    texts = [e.context + e.answer for e in exchanges]
    contexts = [e.context for e in exchanges]
    if repair_text:
        texts, contexts = list(map(repair, texts)), list(map(repair, contexts))
    encoded = tokenizer.encode_many(texts, rendered=rendered)
    eos = tokenizer.eos_id
    if not mask_prompt or not any(contexts):
        for ids in encoded:
            yield [*ids, eos], 0
        return
    prompts = tokenizer.encode_many(contexts, rendered=rendered)
    # The last space of a prompt can belong to the first token of the answer.
    spaced = [i for i, context in enumerate(contexts) if context.endswith(" ")]
    stripped = [contexts[i][:-1] for i in spaced]
    others = dict(
        zip(spaced, tokenizer.encode_many(stripped, rendered=rendered), strict=True)
    )
    for i, (ids, prompt) in enumerate(zip(encoded, prompts, strict=True)):
        length = _common_prefix_length(ids, prompt)
        if i in others:
            length = max(length, _common_prefix_length(ids, others[i]))
        ids.append(eos)
        yield ids, length


def _common_prefix_length(ids: Sequence[int], prefix: Sequence[int]) -> int:
    if ids[: len(prefix)] == prefix:
        return len(prefix)
    differ = (i for i, (a, b) in enumerate(zip(ids, prefix, strict=False)) if a != b)
    return next(differ, len(ids))


# Truncation ------------------------------------------------------------------------


def _shorten(sample: Sample, drop: int, max_length: int) -> Sample:
    """Drop `drop` tokens after BOS, then truncate the end to `max_length`."""
    if drop == 0 and len(sample.tokens) <= max_length:
        return sample
    kept = np.r_[0, 1 + drop : min(len(sample.tokens), max_length + drop)]
    return Sample(sample.tokens[kept], sample.loss_mask[kept], sample.place)


def _split(sample: Sample, max_length: int) -> Iterator[Sample]:
    """Split a plain text into pieces that each start with BOS; no token is lost."""
    bos, rest = sample.tokens[:1], sample.tokens[1:]
    for i in range(0, len(rest), max_length - 1):
        tokens = np.concatenate([bos, rest[i : i + max_length - 1]])
        yield Sample(tokens, np.arange(len(tokens)) > 0, sample.place)
