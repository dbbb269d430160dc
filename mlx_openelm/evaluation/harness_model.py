"""The model interface of EleutherAI's lm-evaluation-harness.

Requests of the harness are answered by a `Scorer`. The harness is the optional extra
`eval`, imported inside the functions.
"""

import contextlib
import hashlib
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.scorer import Scorer
from mlx_openelm.storage.appended_jsonl import (
    JsonLinesFile,
    note_kept_answers,
    parse_line,
)

Answer = Any  # (nats, is greedy), nats or a text: JSON values


def require_harness() -> None:
    """Raise OpenELMError if the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise OpenELMError(
            "Named tasks need lm-evaluation-harness, which is not installed; run "
            "pip install 'mlx-openelm[eval]'."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Redirect stdout to stderr and suppress logs and warnings."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# The model -----------------------------------------------------------------------


def wrap_model(
    scorer: Scorer,
    *,
    store: "AnswerStore | None" = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """Return a model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate`.

    Args:
        scorer: the model, for example an `OpenELMScorer`.
        store: answers of a stopped run; new ones are added as they come.
        on_progress: receives the number of answered requests and of all requests.
    """
    require_harness()
    stderr = sys.stderr
    with quiet():
        from lm_eval.api.model import LM  # type: ignore[import-untyped] # it has no stubs

    class HarnessModel(LM):  # type: ignore[misc] # untyped
        tokenizer_name = "openelm"

        def loglikelihood(
            self, requests: Sequence[Any], **_: Any
        ) -> list[tuple[float, bool]]:
            answers = self._answer("loglikelihood", requests, scorer.score)
            return [(nats, greedy) for nats, greedy in answers]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], **_: Any
        ) -> list[float]:
            return self._answer("loglikelihood_rolling", requests, scorer.score_texts)

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            return self._answer("generate_until", requests, scorer.generate)

        def _answer(
            self, kind: str, requests: Sequence[Any], answer: Any
        ) -> list[Answer]:
            arguments = {i: request.args for i, request in enumerate(requests)}
            keys = _number(json.dumps([kind, args]) for args in arguments.values())
            answers: dict[int, Answer] = {}
            if store is not None:
                answers = {i: store[key] for i, key in enumerate(keys) if key in store}
            missing = {i: args for i, args in arguments.items() if i not in answers}
            with contextlib.redirect_stderr(stderr):
                on_progress(len(answers), len(requests))
                for i, answered in answer(missing):
                    answers[i] = answered
                    if store is not None:
                        store.add(keys[i], answered)
                    self.cache_hook.add_partial(kind, arguments[i], answered)
                    on_progress(len(answers), len(requests))
            return [answers[i] for i in range(len(requests))]

    return HarnessModel()


def _number(texts: Iterable[str]) -> list[tuple[str, int]]:
    """Return each text with the number of its earlier occurrences."""
    seen: Counter[str] = Counter()
    numbered = []
    for text in texts:
        numbered.append((text, seen[text]))
        seen[text] += 1
    return numbered


# Resuming ------------------------------------------------------------------------


class AnswerStore:
    """Answers in a file, one JSON value per line, from which a stopped run resumes."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Store at `path` the answers that are determined by `run` and their key."""
        self._path, self._run = path, json.dumps(run, sort_keys=True)
        self._known: dict[str, Answer] = {}

    def __enter__(self) -> Self:
        """Read the complete lines of a stopped run; truncate an incomplete one."""
        self._file = JsonLinesFile(self._path)
        size = 0
        for end, line in self._file.read_lines():
            match parse_line(line):
                case [str(key), answer]:
                    self._known[key], size = answer, end
                case _:
                    break
        self._file.truncate(size)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        note_kept_answers(error, len(self._known))

    def __contains__(self, key: tuple[str, int]) -> bool:
        return self._hash(key) in self._known

    def __getitem__(self, key: tuple[str, int]) -> Answer:
        return self._known[self._hash(key)]

    def add(self, key: tuple[str, int], answer: Answer) -> None:
        self._known[self._hash(key)] = answer
        self._file.append([self._hash(key), answer])

    def _hash(self, key: tuple[str, int]) -> str:
        return hashlib.sha256(f"{self._run} {key}".encode()).hexdigest()
