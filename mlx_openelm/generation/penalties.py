"""Logits change by what was written before, and by what a person wants or bans.

Every function takes the logits (R, V) of R rows in float32 and returns them changed, on
the device and without reading a value back. A history (R, L) holds the last tokens of
prompt and answer, int32, the newest at the right, -1 where there is none.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_openelm.errors import OpenELMError


def check_bias(bias: Sequence[tuple[int, float]], rows: int) -> None:
    """Check that a model of so many rows has the tokens of a bias.

    Raises:
        OpenELMError: it has not.
    """
    unknown = [token for token, _ in bias if token >= rows]
    if unknown:
        raise OpenELMError(
            f"`logit_bias` names the token {unknown[0]}; "
            f"the model's tokens are 0 to {rows - 1}."
        )


def add_bias(logits: mx.array, bias: Sequence[tuple[int, float]]) -> mx.array:
    """Add to the logits of single tokens; pairs of one token add up."""
    check_bias(bias, logits.shape[-1])
    ids, values = zip(*bias, strict=True)
    return logits.at[:, mx.array(ids)].add(mx.array(values, mx.float32))


def forbid_end(
    logits: mx.array, written: int | mx.array, min_tokens: int, eos_id: int
) -> mx.array:
    """Ban EOS where fewer than `min_tokens` are written: an int, or (R,) of them."""
    early = mx.array(written) < min_tokens
    return logits.at[:, eos_id].add(mx.where(early, -mx.inf, 0.0))


def penalize_repetition(
    logits: mx.array, history: mx.array, penalty: float
) -> mx.array:
    """Divide positive and multiply negative logits of what is in the history."""
    newest = history[:, -1:]
    # A place without a token stands for the newest one: it is penalized once all the
    # same. A row without any token keeps its logits.
    places = mx.maximum(mx.where(history < 0, newest, history), 0)
    factor = mx.where(newest < 0, 1.0, penalty)
    picked = mx.take_along_axis(logits, places, axis=-1)
    picked = mx.where(picked > 0, picked / factor, picked * factor)
    return mx.put_along_axis(logits, places, picked, axis=-1)


def forbid_ngrams(
    logits: mx.array, history: mx.array, size: int, eos_id: int
) -> mx.array:
    """Ban what would end a run of `size` tokens that is in the history already.

    EOS is never banned: it ends the answer and is no part of it. A row in which no
    token would be left keeps its logits.
    """
    (rows, length), vocabulary = history.shape, logits.shape[-1]
    starts = length - size + 1
    if starts < 1:
        return logits
    followers = history[:, size - 1 :]  # (R, starts)
    repeats = followers >= 0
    for place in range(size - 1):
        newest = history[:, starts + place, None]  # of the last size - 1 tokens
        # Where the newest run has empty places, every earlier one has more.
        repeats &= history[:, place : place + starts] == newest
    # What is not banned is put into a column of its own, which is cut off.
    places = mx.where(repeats & (followers != eos_id), followers, vocabulary)
    banned = mx.put_along_axis(
        mx.zeros((rows, vocabulary + 1), mx.bool_), places, mx.array(True), axis=-1
    )[:, :vocabulary]
    shaped = mx.where(banned, -mx.inf, logits)
    if starts < vocabulary - 1:  # then there are tokens left, beside a banned EOS
        return shaped
    nothing_left = mx.all(shaped == -mx.inf, axis=-1, keepdims=True)
    return mx.where(nothing_left, logits, shaped)
