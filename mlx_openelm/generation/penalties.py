"""Logit bias and penalties for repeated tokens.

Every function maps logits (R, V) of R rows in float32 to new logits, on the device,
without reading a value back. A history (R, L), int32, holds the last tokens of prompt
and answer, the newest at the right, padded with -1.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_openelm.errors import OpenELMError


def check_bias(bias: Sequence[tuple[int, float]], rows: int) -> None:
    """Check the token ids of a bias for a model with a vocabulary of `rows` rows.

    Raises:
        OpenELMError: a token id is out of range.
    """
    unknown = [token for token, _ in bias if token >= rows]
    if unknown:
        raise OpenELMError(
            f"`logit_bias` names the token {unknown[0]}; "
            f"the model's tokens are 0 to {rows - 1}."
        )


def add_bias(logits: mx.array, bias: Sequence[tuple[int, float]]) -> mx.array:
    """Add biases to the logits of single tokens; biases of the same token add up."""
    check_bias(bias, logits.shape[-1])
    ids, values = zip(*bias, strict=True)
    return logits.at[:, mx.array(ids)].add(mx.array(values, mx.float32))


def forbid_end(
    logits: mx.array, written: int | mx.array, min_tokens: int, eos_id: int
) -> mx.array:
    """Ban EOS where `written`, an int or (R,), is less than `min_tokens`."""
    early = mx.array(written) < min_tokens
    return logits.at[:, eos_id].add(mx.where(early, -mx.inf, 0.0))


def penalize_repetition(
    logits: mx.array, history: mx.array, penalty: float
) -> mx.array:
    """Divide positive and multiply negative logits of the tokens in the history."""
    newest = history[:, -1:]
    # Padding is replaced by the newest token, which is still penalized only once. A row
    # without any token keeps its logits.
    places = mx.maximum(mx.where(history < 0, newest, history), 0)
    factor = mx.where(newest < 0, 1.0, penalty)
    picked = mx.take_along_axis(logits, places, axis=-1)
    picked = mx.where(picked > 0, picked / factor, picked * factor)
    return mx.put_along_axis(logits, places, picked, axis=-1)


def penalize_occurrences(
    logits: mx.array, history: mx.array, presence: float, frequency: float
) -> mx.array:
    """Subtract OpenAI's penalties: once for, and for each, occurrence in the history.

    Source: OpenAI's API reference, "frequency and presence penalties".
    """
    rows, vocabulary = logits.shape
    places = mx.where(history < 0, vocabulary, history)  # padding: an extra column
    counts = mx.zeros((rows, vocabulary + 1)).at[mx.arange(rows)[:, None], places]
    count = counts.add(1.0)[:, :vocabulary]
    return logits - presence * (count > 0) - frequency * count


def forbid_ngrams(
    logits: mx.array, history: mx.array, size: int, eos_id: int
) -> mx.array:
    """Ban tokens that would repeat a sequence of `size` tokens of the history.

    EOS is never banned. A row in which no token would be left keeps its logits.
    """
    (rows, length), vocabulary = history.shape, logits.shape[-1]
    starts = length - size + 1
    if starts < 1:
        return logits
    followers = history[:, size - 1 :]  # (R, starts)
    repeats = followers >= 0
    for place in range(size - 1):
        newest = history[:, starts + place, None]  # of the last size - 1 tokens
        # Where the newest sequence has padding, every earlier one has more of it.
        repeats &= history[:, place : place + starts] == newest
    # Entries that ban nothing go to an extra column, which is cut off.
    places = mx.where(repeats & (followers != eos_id), followers, vocabulary)
    banned = mx.put_along_axis(
        mx.zeros((rows, vocabulary + 1), mx.bool_), places, mx.array(True), axis=-1
    )[:, :vocabulary]
    shaped = mx.where(banned, -mx.inf, logits)
    if starts < vocabulary - 1:  # a token other than EOS is left
        return shaped
    nothing_left = mx.all(shaped == -mx.inf, axis=-1, keepdims=True)
    return mx.where(nothing_left, logits, shaped)
