"""The model interface of EleutherAI's lm-evaluation-harness.

Requests of the harness are answered by `score_requests` and `answer_together`. The
harness is the optional extra `eval`, imported inside the functions.
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
from mlx_openelm.evaluation.loglikelihood import (
    encode_requests,
    rolling_requests,
    score_requests,
)
from mlx_openelm.generation.batching.answering import (
    BATCH_SIZE,
    BatchPrompt,
    answer_together,
)
from mlx_openelm.generation.options import Sampling
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.appended_jsonl import (
    JsonLinesFile,
    note_kept_answers,
    parse_line,
)
from mlx_openelm.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # for tasks that set no limit; the harness's own default
SEED = 1234  # of sampled answers

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
    model: OpenELM,
    tokenizer: Tokenizer,
    *,
    batch_size: int = BATCH_SIZE,
    store: "AnswerStore | None" = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """Return the model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate`.

    Every text begins with BOS; there is no chat template. A rolling log-likelihood is
    that of the text after one BOS.

    Args:
        batch_size: number of answers that are generated together.
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
            answers = self._answer("loglikelihood", requests, _score)
            return [(nats, greedy) for nats, greedy in answers]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], **_: Any
        ) -> list[float]:
            return self._answer("loglikelihood_rolling", requests, _score_texts)

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            return self._answer("generate_until", requests, _generate)

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
                for i, answered in answer(model, tokenizer, missing, batch_size):
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


def _score(
    model: OpenELM,
    tokenizer: Tokenizer,
    pairs: Mapping[int, tuple[str, str]],
    batch_size: int,
) -> Iterator[tuple[int, Answer]]:
    """Yield each (context, continuation)'s log-likelihood, and whether it is greedy."""
    requests = encode_requests(tokenizer, list(pairs.values()))
    numbers = list(pairs)
    for index, score in score_requests(model, requests):
        yield numbers[index], (score.nats, score.is_greedy)


def _score_texts(
    model: OpenELM,
    tokenizer: Tokenizer,
    texts: Mapping[int, tuple[str]],
    batch_size: int,
) -> Iterator[tuple[int, Answer]]:
    """Yield each text's log-likelihood, computed in windows of the context length."""
    requests, owners = [], []
    for number, (text,) in texts.items():
        ids = tokenizer.encode(text, bos=False)
        windows = rolling_requests(
            ids, tokenizer.bos_id, model.config.max_context_length
        )
        requests += windows
        owners += [number] * len(windows)
    waiting = Counter(owners)
    nats = dict.fromkeys(texts, 0.0)
    yield from ((number, 0.0) for number in texts if not waiting[number])
    for index, score in score_requests(model, requests):
        owner = owners[index]
        nats[owner] += score.nats
        waiting[owner] -= 1
        if not waiting[owner]:
            yield owner, nats[owner]


def _generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompts: Mapping[int, tuple[str, Mapping[str, Any]]],
    batch_size: int,
) -> Iterator[tuple[int, Answer]]:
    """Yield each prompt's continuation, batched by equal settings."""
    groups: dict[str, list[int]] = {}
    for number, (_, settings) in prompts.items():
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(number)
    for members in groups.values():
        sampling = _read_settings(prompts[members[0]][1])
        context = model.config.max_context_length
        prompt_limit = context - sampling.max_tokens
        if prompt_limit < 1:
            raise OpenELMError(
                f"The task needs {sampling.max_tokens} new tokens, and the model's "
                f"context is {context}; choose another task."
            )
        numbered = (  # truncated at the left, as by the harness
            BatchPrompt(number, tokenizer.encode(prompts[number][0])[-prompt_limit:])
            for number in members
        )
        for answer in answer_together(
            model, tokenizer, numbered, sampling, batch_size=batch_size
        ):
            yield answer.prompt.number, answer.text


def _read_settings(settings: Mapping[str, Any]) -> Sampling:
    """Convert a task's generation_kwargs; greedy unless `do_sample` is set."""
    from lm_eval.models.utils import (  # type: ignore[import-untyped] # it has no stubs
        normalize_gen_kwargs,
    )

    kwargs = normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS)
    sampled = {}
    if kwargs["do_sample"] and kwargs["temperature"]:
        sampled = {
            ours: kwargs[theirs]
            for ours, theirs in (
                *(("temp", "temperature"), ("top_p", "top_p")),
                *(("top_k", "top_k"), ("min_p", "min_p")),
            )
            if kwargs.get(theirs) is not None
        }
    try:
        return Sampling(
            max_tokens=kwargs["max_gen_toks"],
            stop=tuple(text for text in kwargs["until"] if text),
            repetition_penalty=kwargs.get("repetition_penalty") or 1.0,
            seed=SEED,
            **sampled,
        )
    except OpenELMError as error:
        raise OpenELMError(f"Its generation_kwargs are invalid: {error}") from error


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
        if error is None:
            self._path.unlink(missing_ok=True)  # the result replaces it
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
