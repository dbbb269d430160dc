"""Our model, as EleutherAI's lm-evaluation-harness wants a model to be.

The harness (the extra `eval`) asks; the answers come from the same engines as
everywhere. It is imported inside the functions: nothing else needs it.
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
from mlx_openelm.generation.batching import BATCH_SIZE, BatchPrompt, answer_together
from mlx_openelm.generation.options import Sampling
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.appended_jsonl import (
    JsonLinesFile,
    note_kept_answers,
    parse_line,
)
from mlx_openelm.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # where a task does not say; the harness's own default
SEED = 1234  # of what is drawn

Answer = Any  # (nats, is greedy), nats or a text: JSON values


def need_harness() -> None:
    """Raise OpenELMError where the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise OpenELMError(
            "Named tasks are run by lm-evaluation-harness, which is not installed; "
            "pip install 'mlx-openelm[eval]'."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave stdout to the answer; of stderr, downloads may have it."""
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
    kept: "KeptAnswers | None" = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """Return the model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate`.

    Every text begins with BOS; there is no chat template. A rolling log-likelihood is
    that of the text behind one BOS.

    Args:
        batch_size: answers that are written at once.
        kept: answers of a stopped run; new ones are added as they come.
        on_progress: called with requests answered and requests in all.
    """
    need_harness()
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
            wanted = {i: request.args for i, request in enumerate(requests)}
            keys = _number(json.dumps([kind, args]) for args in wanted.values())
            found: dict[int, Answer] = {}
            if kept is not None:
                found = {i: kept[key] for i, key in enumerate(keys) if key in kept}
            missing = {i: args for i, args in wanted.items() if i not in found}
            with contextlib.redirect_stderr(stderr):
                on_progress(len(found), len(requests))
                for i, answered in answer(model, tokenizer, missing, batch_size):
                    found[i] = answered
                    if kept is not None:
                        kept.add(keys[i], answered)
                    self.cache_hook.add_partial(kind, wanted[i], answered)
                    on_progress(len(found), len(requests))
            return [found[i] for i in range(len(requests))]

    return HarnessModel()


def _number(texts: Iterable[str]) -> list[tuple[str, int]]:
    """Return each text with how often it came before."""
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
    for index, found in score_requests(model, requests):
        yield numbers[index], (found.nats, found.is_greedy)


def _score_texts(
    model: OpenELM,
    tokenizer: Tokenizer,
    texts: Mapping[int, tuple[str]],
    batch_size: int,
) -> Iterator[tuple[int, Answer]]:
    """Yield each text's log-likelihood, in windows as long as the context."""
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
    for index, found in score_requests(model, requests):
        owner = owners[index]
        nats[owner] += found.nats
        waiting[owner] -= 1
        if not waiting[owner]:
            yield owner, nats[owner]


def _generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompts: Mapping[int, tuple[str, Mapping[str, Any]]],
    batch_size: int,
) -> Iterator[tuple[int, Answer]]:
    """Yield each prompt's continuation; those of the same settings go together."""
    groups: dict[str, list[int]] = {}
    for number, (_, settings) in prompts.items():
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(number)
    for members in groups.values():
        sampling = _read_settings(prompts[members[0]][1])
        context = model.config.max_context_length
        room = context - sampling.max_tokens
        if room < 1:
            raise OpenELMError(
                f"Up to {sampling.max_tokens} new tokens are wanted, and the model's "
                f"context is {context}; say another task."
            )
        numbered = (  # what is too long is cut at the left, as the harness does
            BatchPrompt(number, tokenizer.encode(prompts[number][0])[-room:])
            for number in members
        )
        for said in answer_together(
            model, tokenizer, numbered, sampling, batch_size=batch_size
        ):
            yield said.prompt.number, said.text


def _read_settings(said: Mapping[str, Any]) -> Sampling:
    """Return a task's generation_kwargs; greedy unless they say `do_sample`."""
    from lm_eval.models.utils import (  # type: ignore[import-untyped] # it has no stubs
        normalize_gen_kwargs,
    )

    found = normalize_gen_kwargs(dict(said), MAX_NEW_TOKENS)
    sampled = {}
    if found["do_sample"] and found["temperature"]:
        sampled = {
            ours: found[theirs]
            for ours, theirs in (
                *(("temp", "temperature"), ("top_p", "top_p")),
                *(("top_k", "top_k"), ("min_p", "min_p")),
            )
            if found.get(theirs) is not None
        }
    try:
        return Sampling(
            max_tokens=found["max_gen_toks"],
            stop=tuple(text for text in found["until"] if text),
            repetition_penalty=found.get("repetition_penalty") or 1.0,
            seed=SEED,
            **sampled,
        )
    except OpenELMError as error:
        raise OpenELMError(f"Its generation_kwargs are wrong: {error}") from error


# Going on ------------------------------------------------------------------------


class KeptAnswers:
    """Answers in a file, a JSON object a line, for a run that may be stopped."""

    def __init__(self, path: Path, said: Mapping[str, Any]) -> None:
        """Say the file, and what all its answers depend on (the model, say)."""
        self._path, self._said = path, json.dumps(said, sort_keys=True)
        self._known: dict[str, Answer] = {}

    def __enter__(self) -> Self:
        """Read the whole lines of a stopped run; what it has left of one is cut off."""
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
            self._path.unlink(missing_ok=True)  # the result is written
        note_kept_answers(error, len(self._known))

    def __contains__(self, key: tuple[str, int]) -> bool:
        return self._hash(key) in self._known

    def __getitem__(self, key: tuple[str, int]) -> Answer:
        return self._known[self._hash(key)]

    def add(self, key: tuple[str, int], answer: Answer) -> None:
        self._known[self._hash(key)] = answer
        self._file.append([self._hash(key), answer])

    def _hash(self, key: tuple[str, int]) -> str:
        return hashlib.sha256(f"{self._said} {key}".encode()).hexdigest()
