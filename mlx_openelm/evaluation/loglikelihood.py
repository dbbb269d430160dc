"""Continuations get their log-likelihoods, as lm-evaluation-harness defines them.

Whatever requests begin alike is computed once: the prompt of a question's choices, what
the choices themselves share, the examples in front of all questions. The last token of
a continuation goes through no layer at all. The output head sees the scored places.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_openelm import openblas
from mlx_openelm.device import runs_on_linux_cpu
from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.prefix_tree import build_tree, count_common, read_tree
from mlx_openelm.model.chunk_sizes import LOGIT_ROWS
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

ROW_TOKENS = 512 if runs_on_linux_cpu() else 2048  # that are computed together
_MOST_ROWS = 4  # as long may a row be whose beginning is shared by nearly all of it


@dataclass(frozen=True, slots=True)
class Request:
    """How likely is this continuation of this context? Both are token ids."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """The answer, in nats, and whether each token was the likeliest one."""

    nats: float
    is_greedy: bool


def encode_requests(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]
) -> list[Request]:
    """Encode (context, continuation) pairs as the harness does, with BOS.

    White space at the end of a context goes to the continuation, which is what the
    tokens of the whole text have more than those of the context.

    Raises:
        OpenELMError: a text is no Unicode.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = [context + continuation for context, continuation in pairs]
    unique = dict.fromkeys([*contexts, *wholes])
    ids = dict(zip(unique, tokenizer.encode_many(list(unique)), strict=True))
    bos = tokenizer.bos_id
    return [
        Request((bos, *ids[context]), tuple(ids[whole][len(ids[context]) :]))
        for context, whole in zip(contexts, wholes, strict=True)
    ]


def rolling_requests(
    ids: Sequence[int], bos_id: int, context_length: int
) -> list[Request]:
    """Return requests whose log-likelihoods add up to a text's.

    Every token is predicted once. The first window is begun with BOS; a later one sees
    the token before it, and the last one as much as there is room for.

    Args:
        ids: of the text, without BOS.
    """
    L = context_length
    windows = [Request((bos_id,), tuple(ids[:L]))] if ids else []
    for start in range(L, len(ids), L):
        end = min(start + L, len(ids))
        seen = ids[end - L - 1 : start]
        windows.append(Request(tuple(seen), tuple(ids[start:end])))
    return windows


def score_requests(
    model: OpenELM,
    requests: Sequence[Request],
    *,
    row_tokens: int = ROW_TOKENS,
) -> Iterator[tuple[int, LogLikelihood]]:
    """Yield every request's index and log-likelihood, in any order, as they come.

    What is longer than the context length and one token is cut at the left, as the
    harness cuts it.

    Args:
        row_tokens: that go through the model together, about.

    Raises:
        OpenELMError: a context is empty, a continuation has no place in the model's
            context, or the model's numbers are none.
    """
    for request in requests:
        check_request(request, model)
    most = model.config.max_context_length
    openblas.use_threads(None)
    sequences = [_Sequence.of(i, request, most) for i, request in enumerate(requests)]
    for row in _fill_rows(sorted(sequences), row_tokens):
        yield from _score_row(model, row)


@dataclass(frozen=True, slots=True, order=True)
class _Sequence:
    """What goes through the model for a request; in order, neighbours begin alike.

    Attributes:
        inputs: of which the last ones are scored.
        targets: what stands behind each of these.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    index: int

    @classmethod
    def of(cls, index: int, request: Request, most: int) -> "_Sequence":
        whole = (request.context + request.continuation)[-(most + 1) :]
        return cls(whole[:-1], request.continuation, index)


def check_request(request: Request, model: OpenELM) -> None:
    """See that a request can be answered.

    Raises:
        OpenELMError: its context is empty, or its continuation has no place.
    """
    length, most = len(request.continuation), model.config.max_context_length
    if not request.context:
        raise OpenELMError(
            "A context without tokens predicts nothing; begin it with BOS."
        )
    if not 1 <= length <= most:
        raise OpenELMError(
            f"A continuation has {length} tokens; it must have between 1 and the "
            f"context length, {most}."
        )


def _fill_rows(
    sequences: Sequence[_Sequence], row_tokens: int
) -> Iterator[list[_Sequence]]:
    """Yield neighbours that are computed together: about so many tokens.

    What has more in common with its neighbour than not is rather put to it.
    """
    row, filled = list[_Sequence](), 0
    for sequence in sequences:
        inputs = sequence.inputs
        common = count_common(row[-1].inputs, inputs) if row else 0
        new = len(inputs) - common
        if row and filled + new > (
            row_tokens if new > common else _MOST_ROWS * row_tokens
        ):
            yield row
            row, filled, new = [], 0, len(inputs)
        row.append(sequence)
        filled += new
    if row:
        yield row


def _score_row(
    model: OpenELM, row: Sequence[_Sequence]
) -> Iterator[tuple[int, LogLikelihood]]:
    tree = build_tree([sequence.inputs for sequence in row])
    wanted = [  # a place in the row and a target, for every token that is scored
        (tree.place(i, len(sequence.inputs) - len(sequence.targets) + j), target)
        for i, sequence in enumerate(row)
        for j, target in enumerate(sequence.targets)
    ]
    scored = _score_places(model, read_tree(model, tree), wanted)
    for sequence in row:
        tokens = list(itertools.islice(scored, len(sequence.targets)))
        nats = math.fsum(nats for nats, _ in tokens)
        if not math.isfinite(nats):
            raise OpenELMError(
                f"The model gives {nats} for an answer, so its weights are damaged or "
                "overflow; `mlx-openelm convert` refuses such weights and says which."
            )
        yield sequence.index, LogLikelihood(nats, all(greedy for _, greedy in tokens))


def _score_places(
    model: OpenELM, hidden: mx.array, wanted: Sequence[tuple[int, int]]
) -> Iterator[tuple[float, bool]]:
    """Return the log-probability of each target, and whether none is likelier.

    Args:
        hidden: of the whole row, (N, D).
        wanted: places in it with their targets; the logits of a place are computed
            once, for however many targets.
    """
    places = sorted({place for place, _ in wanted})
    rows = {place: i for i, place in enumerate(places)}
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(wanted)
    taken = hidden[mx.array(places)]
    by_chunk = itertools.groupby(order, key=lambda i: rows[wanted[i][0]] // LOGIT_ROWS)
    for chunk, group in by_chunk:
        members = list(group)
        start = chunk * LOGIT_ROWS
        at = mx.array([rows[wanted[i][0]] - start for i in members])
        targets = mx.array([wanted[i][1] for i in members])
        logits = model.head(taken[start : start + LOGIT_ROWS]).astype(mx.float32)
        log_totals = mx.logsumexp(logits, axis=-1)
        nats = logits[at, targets] - log_totals[at]
        greedy = logits.argmax(axis=-1)[at] == targets
        mx.eval(nats, greedy)  # this chunk's logits are gone before the next ones come
        found = zip(_to_list(nats), _to_list(greedy), strict=True)
        for i, score in zip(members, found, strict=True):
            scores[i] = score
    return iter(scores)


def _to_list(array: mx.array) -> list[Any]:
    return array.tolist()  # type: ignore[return-value] # it has an axis
