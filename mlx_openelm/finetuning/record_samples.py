"""Records become token samples: what the model reads, and where it learns.

A text is tokenized as a whole, answer and prompt together, and what counts are the
tokens that generation would have to find: all that do not belong to the prompt alone.
Lengths are in tokens, BOS and EOS included.
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

_AT_ONCE = 4096  # records tokenized together: enough for all cores, little memory


def make_samples(
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    template: str,
    mask_prompt: bool | None = None,
    last_turn_only: bool = False,
    max_length: int,
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
    """Tokenize preferences, and say what was found; the last answers alone count.

    Where prompt and longer answer do not fit, the prompt keeps its last
    `max_prompt_length` tokens; what is still too long loses its end.

    Raises:
        OpenELMError: the lengths leave no room for a prompt and an answer, or a
            conversation has no place in the template.
    """
    if not 2 <= max_prompt_length < max_length:
        raise OpenELMError(
            f"`max_prompt_length` is {max_prompt_length} and `max_seq_length` "
            f"{max_length}; a pair needs 2 tokens or more of a prompt, and room for an "
            "answer."
        )
    pairs: list[Pair] = []
    cut = prompt_cut = equal = 0
    for record, both in _tokenize(
        dataset,
        tokenizer,
        template,
        masks=True,
        last_turn_only=True,
    ):
        longest = max(len(sample.tokens) for sample in both)
        prompt = max(int(sample.counts.argmax()) for sample in both)
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
    masks: bool,
    last_turn_only: bool,
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
