"""Log-likelihoods of continuations, as lm-evaluation-harness defines them.

Common prefixes of requests are computed once: the prompt of a question's choices, the
common beginning of choices, few-shot examples. The last token of a continuation is not
an input. The output head is applied only to scored positions.
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

ROW_TOKENS = 512 if runs_on_linux_cpu() else 2048  # tokens of a row
_MOST_ROWS = 4  # factor by which a row may be longer if its sequences share most tokens


@dataclass(frozen=True, slots=True)
class Request:
    """A continuation to score, and its context; both are token ids."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Log-likelihood in nats, and whether greedy decoding gives the continuation."""

    nats: float
    is_greedy: bool


def encode_requests(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]
) -> list[Request]:
    """Encode (context, continuation) pairs as the harness does, with BOS.

    White space at the end of a context belongs to the continuation. The continuation's
    tokens are those of the whole text after as many as the context has.

    Raises:
        OpenELMError: a text is not valid Unicode.
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
    """Return requests whose log-likelihoods add up to that of a text.

    Every token is scored once. The context of the first window is BOS, of a later one
    the token before it; that of the last one fills the context length.

    Args:
        ids: tokens of the text, without BOS.
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
    """Yield the index and log-likelihood of each request, in any order.

    Requests longer than the context length plus one token are truncated at the left, as
    in the harness.

    Args:
        row_tokens: approximate number of tokens per forward pass.

    Raises:
        OpenELMError: a context is empty, a continuation does not fit into the model's
            context, or a log-likelihood is not finite.
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
    """Inputs and targets of a request; sorted, neighbours share long prefixes.

    Attributes:
        inputs: tokens; the outputs at the last ones are scored.
        targets: the token after each of these.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    index: int

    @classmethod
    def of(cls, index: int, request: Request, most: int) -> "_Sequence":
        whole = (request.context + request.continuation)[-(most + 1) :]
        return cls(whole[:-1], request.continuation, index)


def check_request(request: Request, model: OpenELM) -> None:
    """Check that a request can be scored.

    Raises:
        OpenELMError: its context is empty, or its continuation is empty or too long.
    """
    length, most = len(request.continuation), model.config.max_context_length
    if not request.context:
        raise OpenELMError("A context has no tokens; it must at least have BOS.")
    if not 1 <= length <= most:
        raise OpenELMError(
            f"A continuation has {length} tokens; it must have between 1 and the "
            f"context length, {most}."
        )


def _fill_rows(
    sequences: Sequence[_Sequence], row_tokens: int
) -> Iterator[list[_Sequence]]:
    """Yield groups of neighbours of about `row_tokens` tokens.

    A group may grow longer while a sequence shares at least half of its tokens with the
    previous one.
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
    requested = [  # a place in the row and a target, for every token that is scored
        (tree.place(i, len(sequence.inputs) - len(sequence.targets) + j), target)
        for i, sequence in enumerate(row)
        for j, target in enumerate(sequence.targets)
    ]
    scored = _score_places(model, read_tree(model, tree), requested)
    for sequence in row:
        tokens = list(itertools.islice(scored, len(sequence.targets)))
        nats = math.fsum(nats for nats, _ in tokens)
        if not math.isfinite(nats):
            raise OpenELMError(
                f"The log-likelihood of an answer is {nats}: the model's weights are "
                "damaged or overflow. `mlx-openelm convert` reports which."
            )
        yield sequence.index, LogLikelihood(nats, all(greedy for _, greedy in tokens))


def _score_places(
    model: OpenELM, hidden: mx.array, requested: Sequence[tuple[int, int]]
) -> Iterator[tuple[float, bool]]:
    """Return the log-probability of each target, and whether it is the argmax.

    Args:
        hidden: hidden states of the row, (N, D).
        requested: pairs of a place in the row and a target; the logits of a place are
            computed once for all its targets.
    """
    places = sorted({place for place, _ in requested})
    rows = {place: i for i, place in enumerate(places)}
    order = sorted(range(len(requested)), key=lambda i: requested[i])
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(requested)
    taken = hidden[mx.array(places)]
    by_chunk = itertools.groupby(
        order, key=lambda i: rows[requested[i][0]] // LOGIT_ROWS
    )
    for chunk, group in by_chunk:
        members = list(group)
        start = chunk * LOGIT_ROWS
        at = mx.array([rows[requested[i][0]] - start for i in members])
        targets = mx.array([requested[i][1] for i in members])
        logits = model.head(taken[start : start + LOGIT_ROWS]).astype(mx.float32)
        log_totals = mx.logsumexp(logits, axis=-1)
        nats = logits[at, targets] - log_totals[at]
        greedy = logits.argmax(axis=-1)[at] == targets
        mx.eval(nats, greedy)  # frees this chunk's logits
        pairs = zip(_to_list(nats), _to_list(greedy), strict=True)
        for i, score in zip(members, pairs, strict=True):
            scores[i] = score
    return iter(scores)


def _to_list(array: mx.array) -> list[Any]:
    return array.tolist()  # type: ignore[return-value] # not a scalar
