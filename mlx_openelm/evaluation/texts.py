"""Score a model on texts (perplexity) and on local multiple-choice tasks."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.multiple_choice import TaskScore, score_task
from mlx_openelm.evaluation.scorer import OpenELMScorer, Scorer
from mlx_openelm.evaluation.task_files import read_tasks
from mlx_openelm.input_files import read_text
from mlx_openelm.message_parts import describe_error
from mlx_openelm.model.likelihood import log_likelihoods
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.paths import user_path
from mlx_openelm.text.tokenizer import Tokenizer

BATCH_TOKENS = 4096  # tokens per forward pass

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class TextScore:
    """Scores of a text; logarithms are natural, bytes are those of UTF-8."""

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TaskScores:
    """Accuracies by the name of the task."""

    tasks: dict[str, TaskScore]


@overload
def evaluate(
    model: OpenELM,
    tokenizer: Tokenizer,
    *,
    text: Paths,
    window: int | None = None,
    on_progress: Callable[[int, int], None] = ...,
) -> TextScore: ...


@overload
def evaluate(
    model: OpenELM,
    tokenizer: Tokenizer,
    *,
    tasks: Paths,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] = ...,
) -> TaskScores: ...


def evaluate(
    model: OpenELM,
    tokenizer: Tokenizer,
    *,
    text: Paths | None = None,
    window: int | None = None,
    tasks: Paths | None = None,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TextScore | TaskScores:
    """Score a model on texts or on multiple-choice tasks.

    Args:
        text: one or more files, scored together; see `score_text`.
        window: tokens per window of text.
        tasks: one or more files of questions; see `task_files`.
        limit: number of questions of each task, a fixed random sample.
        on_progress: receives the number of finished windows or questions, and of all.

    Raises:
        OpenELMError: a file is missing or invalid, or the options do not fit.
    """
    if bool(text) == bool(tasks):
        raise OpenELMError("Pass either `text` or `tasks`.")
    if text:
        if limit is not None:
            raise OpenELMError("`limit` needs `tasks`; a text is scored as a whole.")
        return score_text(model, tokenizer, _list(text), window, on_progress)
    if window is not None:
        raise OpenELMError("`window` needs `text`; a question is scored as a whole.")
    assert tasks
    return _score_tasks(model, tokenizer, _list(tasks), limit, on_progress)


def check_texts(paths: Paths) -> None:
    """Read texts, to find their errors before a model is loaded.

    Raises:
        OpenELMError: a file is missing, empty or not UTF-8.
    """
    for path in _list(paths):
        _read_text(path)


def _list(paths: Paths) -> list[Path]:
    return list(map(user_path, [paths] if isinstance(paths, str | Path) else paths))


def _score_tasks(
    model: OpenELM,
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    limit: int | None,
    on_progress: Callable[[int, int], None],
) -> TaskScores:
    tasks = read_tasks(paths, limit=limit)
    total = sum(len(task.questions) for task in tasks)
    scores: dict[str, TaskScore] = {}
    for task in tasks:
        before = sum(score.n for score in scores.values())
        scored = score_task(
            OpenELMScorer(model, tokenizer),
            task,
            on_progress=lambda done, _, before=before: on_progress(  # type: ignore[misc] # of the default
                before + done, total
            ),
        )
        scores[task.name] = scored.score
    return TaskScores(scores)


def score_text(
    model: OpenELM,
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    window: int | None,
    on_progress: Callable[[int, int], None],
) -> TextScore:
    """Score raw text files in windows that each begin with BOS.

    Every token is predicted once, the first of a window from BOS alone; the last window
    of a file may be shorter.

    Args:
        window: tokens predicted per window, at most the context length (the default).

    Raises:
        OpenELMError: a file is missing, empty or not UTF-8, or the window does not fit.
    """
    context = model.config.max_context_length
    window = context if window is None else window
    if not 1 <= window <= context:
        raise OpenELMError(
            f"`window` is {window}; it must be between 1 and the model's context, "
            f"{context}."
        )
    windows: list[list[int]] = []
    num_bytes = 0
    for path in paths:
        content = _read_text(path)
        num_bytes += len(content.encode())
        ids = tokenizer.encode(content, bos=False)
        windows += [ids[i : i + window] for i in range(0, len(ids), window)]
    nats = 0.0
    done = 0
    for batch in _batches(windows):
        nats += _score(model, tokenizer.bos_id, batch)
        done += len(batch)
        on_progress(done, len(windows))
    if not math.isfinite(nats):
        raise OpenELMError(
            f"The log-likelihood of this text is {-nats}: the model's weights are "
            "damaged or overflow. `mlx-openelm convert` reports which."
        )
    return _make_score(nats, sum(map(len, windows)), num_bytes)


def _make_score(nats: float, tokens: int, num_bytes: int) -> TextScore:
    mean = nats / tokens
    return TextScore(
        nats_per_token=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / num_bytes,
        tokens=tokens,
        bytes=num_bytes,
    )


def score_text_of(
    scorer: Scorer,
    paths: Sequence[Path],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TextScore:
    """Score raw text files with any model, in windows of its own context length.

    The tokens are those of its own tokenizer: compare models by the bits per byte.

    Args:
        on_progress: receives the number of finished files and of all files.

    Raises:
        OpenELMError: a file is missing, empty or not UTF-8.
    """
    texts = [_read_text(path) for path in paths]
    requests = {i: (text,) for i, text in enumerate(texts)}
    nats = 0.0
    for done, (_, value) in enumerate(scorer.score_texts(requests), 1):
        nats -= value
        on_progress(done, len(texts))
    tokens = sum(map(scorer.count_tokens, texts))
    return _make_score(nats, tokens, sum(len(text.encode()) for text in texts))


def _batches(windows: list[list[int]]) -> Iterator[list[list[int]]]:
    """Group windows of equal length, so that no padding is needed."""
    by_length: dict[int, list[list[int]]] = {}
    for ids in windows:
        by_length.setdefault(len(ids), []).append(ids)
    for length, group in by_length.items():
        size = max(1, BATCH_TOKENS // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _score(model: OpenELM, bos_id: int, batch: list[list[int]]) -> float:
    """Return the negative log-likelihood of all tokens, in nats."""
    targets = mx.array(batch)  # (B, T)
    bos = mx.full((len(batch), 1), bos_id, dtype=targets.dtype)
    inputs = mx.concatenate([bos, targets[:, :-1]], axis=1)
    total = log_likelihoods(model, inputs, targets).sum()
    return -float(total.item())  # type: ignore[arg-type] # it is real


def _read_text(path: Path) -> str:
    try:
        content = read_text(path)
    except (OSError, ValueError) as error:
        raise OpenELMError(
            f"Cannot read {path} as UTF-8 text: {describe_error(error)}."
        ) from error
    if not content:
        raise OpenELMError(f"{path} is empty; there is nothing to score.")
    return content
