"""Sampling: draw the next token from logits.

The filters follow their papers (top-p: Holtzman et al., 1904.09751; min-p: Nguyen et
al., 2407.01082; repetition penalty: Keskar et al., 1909.05858), in mlx-lm's order:
penalties, top-p, min-p, top-k, temperature. All functions take the logits (R, V) of R
rows, in any float type, and read nothing back to the host.
"""

import math

import mlx.core as mx

from mlx_openelm.generation import penalties
from mlx_openelm.generation.options import Sampling
from mlx_openelm.text.tokenizer import Tokenizer

_SMALLEST = 1e-6  # a smaller value may be 0 in float32, which would leave no token


def history_length(sampling: Sampling, context_length: int) -> int:
    """Return how many of the last tokens `shape_logits` needs; 0 by default."""
    if sampling.no_repeat_ngram:
        return context_length
    if _penalizes(sampling):
        return min(sampling.repetition_context, context_length)
    return 0


def _penalizes(sampling: Sampling) -> bool:
    occurrences = sampling.presence_penalty or sampling.frequency_penalty
    return sampling.repetition_penalty != 1.0 or bool(occurrences)


def find_padding(tokenizer: Tokenizer, num_rows: int) -> mx.array | None:
    """Return which rows of the embedding have no token, bool (V,); None if all have."""
    rows = [not tokenizer.has(row) for row in range(tokenizer.vocab_size, num_rows)]
    if not any(rows):
        return None
    return mx.array([False] * tokenizer.vocab_size + rows)


def mask_padding(logits: mx.array, padding: mx.array | None) -> mx.array:
    """Set the logits (R, V) of rows without a token to -inf: they are never drawn.

    Args:
        padding: see `find_padding`.
    """
    return logits if padding is None else mx.where(padding, -mx.inf, logits)


def shape_logits(
    logits: mx.array,
    history: mx.array,
    sampling: Sampling,
    *,
    written: int | mx.array,
    eos_id: int,
) -> mx.array:
    """Apply bias, min_tokens, penalties and no_repeat_ngram, in this order.

    Args:
        history: last tokens of prompt and answer, int32 (R, L), the newest at the
            right, padded with -1; L is `history_length` or more.
        written: number of new tokens so far, one for all rows or (R,).

    Returns:
        (R, V) in float32; the same array if no control is set.
    """
    may_be_early = isinstance(written, mx.array) or written < sampling.min_tokens
    early = sampling.min_tokens > 0 and may_be_early
    penalized = _penalizes(sampling)
    if not (sampling.logit_bias or early or penalized or sampling.no_repeat_ngram):
        return logits
    logits = logits.astype(mx.float32)
    if sampling.logit_bias:
        logits = penalties.add_bias(logits, sampling.logit_bias)
    if early:
        least = min(sampling.min_tokens, 2**31 - 1)  # int32
        logits = penalties.forbid_end(logits, written, least, eos_id)
    if penalized:
        length = min(sampling.repetition_context, history.shape[1])
        recent = history[:, -length:]
        logits = penalties.penalize_repetition(
            logits, recent, sampling.repetition_penalty
        )
        if sampling.presence_penalty or sampling.frequency_penalty:
            logits = penalties.penalize_occurrences(
                logits, recent, sampling.presence_penalty, sampling.frequency_penalty
            )
    if sampling.no_repeat_ngram:
        logits = penalties.forbid_ngrams(
            logits, history, sampling.no_repeat_ngram, eos_id
        )
    return logits


def choose_tokens(logits: mx.array, sampling: Sampling) -> mx.array:
    """Return a token id for every row, int32 (R,)."""
    if sampling.temp == 0:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    return mx.random.categorical(temper(logits, sampling)).astype(mx.int32)


def distribution(logits: mx.array, sampling: Sampling) -> mx.array:
    """Return the log-probabilities (R, V), float32, that `choose_tokens` draws from."""
    if sampling.temp == 0:
        chosen = mx.argmax(logits, axis=-1, keepdims=True)
        return mx.where(mx.arange(logits.shape[-1]) == chosen, 0.0, -mx.inf)
    tempered = temper(logits, sampling)
    return tempered - mx.logsumexp(tempered, axis=-1, keepdims=True)


def temper(logits: mx.array, sampling: Sampling) -> mx.array:
    """Return filtered logits divided by the temperature, float32 (R, V)."""
    return keep_likely(logits, sampling) / max(sampling.temp, _SMALLEST)


def keep_likely(logits: mx.array, sampling: Sampling) -> mx.array:
    """Set the logits that top-p, min-p and top-k remove to -inf; float32 (R, V).

    Each filter is a threshold on the logit, so their order does not matter; equal
    logits are all kept or all removed.
    """
    logits = logits.astype(mx.float32)
    thresholds = []
    likeliest = logits
    if 0 < sampling.top_k < logits.shape[-1]:
        likeliest = mx.topk(logits, sampling.top_k, axis=-1)  # in no order
        thresholds.append(likeliest.min(axis=-1, keepdims=True))
    if 0 < sampling.top_p < 1:
        # With top-k, only its tokens are sorted: a full sort dominates the time here.
        falling = -mx.sort(-likeliest, axis=-1)
        probs = mx.exp(falling - mx.logsumexp(logits, axis=-1, keepdims=True))
        before = mx.cumsum(probs, axis=-1) - probs  # mass of the likelier tokens
        kept = before < max(sampling.top_p, _SMALLEST)
        thresholds.append(mx.where(kept, falling, mx.inf).min(axis=-1, keepdims=True))
    if sampling.min_p > 0:
        thresholds.append(logits.max(axis=-1, keepdims=True) + math.log(sampling.min_p))
    for threshold in thresholds:
        logits = mx.where(logits < threshold, -mx.inf, logits)
    return logits


def top_logprobs(
    logits: mx.array, tokens: mx.array, count: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the model's log-probabilities of the drawn and the likeliest tokens.

    Args:
        logits: the model's own logits, (R, V).
        tokens: the drawn tokens, (R,).

    Returns:
        The tokens' log-probabilities (R,), and the ids and log-probabilities of the
        `count` likeliest tokens, likeliest first, (R, count) each.
    """
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    ids = mx.argpartition(-logprobs, min(count, logits.shape[-1] - 1), axis=-1)
    ids = ids[:, :count]
    values = mx.take_along_axis(logprobs, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    ids, values = (mx.take_along_axis(x, order, axis=-1) for x in (ids, values))
    return chosen, ids.astype(mx.int32), values
