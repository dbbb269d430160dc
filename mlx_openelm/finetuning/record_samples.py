"""Tokenizing records: tokens, loss mask and truncation.

Prompt and answer are tokenized together. The targets are the tokens that generation
would have to produce: all after the tokens that the prompt alone determines. Lengths
are in tokens, with BOS and EOS.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.data_table import SplitTable, tabulate_split
from mlx_openelm.finetuning.record_formats import TEXT
from mlx_openelm.finetuning.records import Dataset, Record
from mlx_openelm.finetuning.samples import Pair, Sample
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
    max_length: int,
) -> tuple[tuple[Sample, ...], SplitTable]:
    """Tokenize records for supervised training; also return their statistics.

    A long plain text is split into pieces. Of other long records the answer is
    truncated at its end; the prompt is truncated, at its start, only if it would leave
    no token of the answer.

    Args:
        mask_prompt: False includes the prompt in the loss.
        last_turn_only: train on the last answer of a conversation only.
        max_length: at least 2 tokens.

    Raises:
        OpenELMError: the template does not support a conversation.
    """
    assert max_length >= 2, max_length
    is_text = dataset.format == TEXT
    samples: list[Sample] = []
    cut = prompt_cut = empty = 0
    for record, (whole,) in _tokenize(
        dataset,
        tokenizer,
        "raw" if is_text else template,
        mask_prompt=mask_prompt is not False,
        last_turn_only=last_turn_only,
    ):
        if is_text and not record.turns[0].text.strip():
            empty += 1
        elif len(whole.tokens) <= max_length:
            samples.append(whole)
        elif is_text:
            samples += _split(whole, max_length)
            cut += 1
        else:
            first = int(whole.loss_mask.argmax())
            # Keep as much of the answer as fits, then as much of the prompt.
            drop = min(first, len(whole.tokens) - max_length + 1) - 1
            drop = drop if first >= max_length else 0
            samples.append(_shorten(whole, drop, max_length))
            cut += len(whole.tokens) - drop > max_length
            prompt_cut += drop > 0
    table = tabulate_split(dataset, samples, max_length)
    return tuple(samples), replace(
        table, cut=cut, prompt_cut=prompt_cut, nothing_to_learn=empty
    )


def make_pairs(
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    template: str,
    max_length: int,
    max_prompt_length: int,
) -> tuple[tuple[Pair, ...], SplitTable]:
    """Tokenize preferences; also return their statistics.

    If the prompt with the longer answer exceeds `max_length`, the prompt is truncated
    at its start to `max_prompt_length` tokens, then the answers at their end. The
    targets are the last answers only.

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
) -> Iterator[tuple[Record, list[Sample]]]:
    """Yield each record with its sequence or, for a preference, its two sequences."""
    for first in range(0, len(dataset.records), _CHUNK):
        chunk = dataset.records[first : first + _CHUNK]
        rendered = [_render(record, template) for record in chunk]
        exchanges = [e for versions in rendered for turns in versions for e in turns]
        spans = _encode(
            exchanges,
            tokenizer,
            rendered=template != "raw",
            mask_prompt=mask_prompt,
        )
        for record, versions in zip(chunk, rendered, strict=True):
            samples = []
            for turns in versions:
                ids, starts = zip(*islice(spans, len(turns)), strict=True)
                tokens, loss_mask = [tokenizer.bos_id], [False]
                for i, (part, start) in enumerate(zip(ids, starts, strict=True), 1):
                    is_context = mask_prompt and last_turn_only and i < len(turns)
                    masked = len(part) if is_context else start
                    tokens += part
                    loss_mask += [False] * masked + [True] * (len(part) - masked)
                arrays = np.array(tokens, np.int32), np.array(loss_mask, bool)
                samples.append(Sample(*arrays, record.place))
            yield record, samples


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
) -> Iterator[tuple[list[int], int]]:
    """Yield the ids of each exchange, with EOS, and the number of its prompt's ids."""
    texts = [e.context + e.answer for e in exchanges]
    prompts = [e.context if mask_prompt else "" for e in exchanges]
    # The last space of a prompt can belong to the first token of the answer.
    stripped = [prompt[:-1] if prompt.endswith(" ") else "" for prompt in prompts]
    encoded = (
        tokenizer.encode_many(strings, rendered=rendered)
        for strings in (texts, prompts, stripped)
    )
    for ids, *prefixes in zip(*encoded, strict=True):
        length = max(_common_prefix_length(ids, prefix) for prefix in prefixes)
        yield [*ids, tokenizer.eos_id], length


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
