"""Multiple-choice tasks: score the choices of each question and the accuracy.

The model's answer is the choice of the highest log-likelihood (acc), or of the highest
log-likelihood per character (acc_norm).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.scorer import Scorer
from mlx_openelm.evaluation.task_files import Question, Task
from mlx_openelm.storage.ordered_jsonl import JsonObject, hash_key, open_answers

TOGETHER = 64  # questions scored together; at most these are lost on a stop


@dataclass(frozen=True, slots=True)
class Outcome:
    """The scores of a question's choices.

    Attributes:
        line: the record's number in its file.
        loglikelihoods: of the choices, in nats.
        lengths: of the choices, in characters.
        answer: index of the right choice.
    """

    line: int
    loglikelihoods: tuple[float, ...]
    lengths: tuple[int, ...]
    answer: int

    @property
    def choice(self) -> int:
        """Index of the likeliest choice; the first of equal ones."""
        return self.loglikelihoods.index(max(self.loglikelihoods))

    @property
    def choice_norm(self) -> int:
        """Index of the choice of the highest log-likelihood per character."""
        scores = zip(self.loglikelihoods, self.lengths, strict=True)
        rates = [nats / length for nats, length in scores]
        return rates.index(max(rates))

    @property
    def right(self) -> bool:
        return self.choice == self.answer

    @property
    def right_norm(self) -> bool:
        return self.choice_norm == self.answer


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Accuracies and their standard errors, which are None for one question."""

    acc: float
    acc_norm: float
    stderr: float | None
    acc_norm_stderr: float | None
    n: int


@dataclass(frozen=True, slots=True)
class ScoredTask:
    """A task's score and outcomes, in the order of its questions.

    Attributes:
        digest: identifies the questions.
    """

    task: str
    digest: str
    score: TaskScore
    outcomes: tuple[Outcome, ...]


def score_task(
    scorer: Scorer,
    task: Task,
    *,
    limit: int | None = None,
    output: Path | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ScoredTask:
    """Score the questions of a task.

    Args:
        limit: number of first questions to score.
        output: file to which outcomes are written as they come, one JSON object per
            line. A run resumes from an output of a stopped run or of another limit.
        force: replace an output of another model or task.
        on_progress: receives the number of finished questions and of all questions.

    Raises:
        OpenELMError: the output belongs to another run, is another kind of file or
            cannot be written, a choice does not fit into the model's context, or the
            weights are damaged.
    """
    scored = Task(task.name, task.questions[:limit])
    total = len(scored.questions)
    job = _Job(scorer, task, resumable=output is not None)
    with open_answers(output, job.find_place, force=force) as answers:
        outcomes = {
            place: outcome
            for place, outcome in job.resumed.items()
            if place < total and place in answers
        }
        on_progress(len(outcomes), total)
        missing = [place for place in range(total) if place not in outcomes]
        for start in range(0, len(missing), TOGETHER):
            for place, outcome in job.answer(missing[start : start + TOGETHER]):
                outcomes[place] = outcome
                answers.add(place, job.describe(place, outcome))
                on_progress(len(outcomes), total)
    in_order = tuple(outcomes[place] for place in range(total))
    return ScoredTask(scored.name, scored.digest, summarize(in_order), in_order)


def summarize(outcomes: Sequence[Outcome]) -> TaskScore:
    """Return the score of one or more outcomes."""
    acc, stderr = mean_and_stderr([float(o.right) for o in outcomes])
    acc_norm, acc_norm_stderr = mean_and_stderr([float(o.right_norm) for o in outcomes])
    return TaskScore(acc, acc_norm, stderr, acc_norm_stderr, len(outcomes))


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Return a mean and its standard error as the harness does; None for one value."""
    n = len(values)
    return fmean(values), stdev(values) / math.sqrt(n) if n > 1 else None


class _Job:
    """The task and the settings that determine its outcomes.

    Attributes:
        resumed: outcomes that the output already holds, by the place of their question.
    """

    def __init__(self, scorer: Scorer, task: Task, *, resumable: bool) -> None:
        self._scorer, self._task = scorer, task
        self._places = {q.line: place for place, q in enumerate(task.questions)}
        self._model_key = scorer.key if resumable else ""
        self.resumed: dict[int, Outcome] = {}

    def answer(self, places: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
        """Yield the outcomes of questions, each as soon as its choices are scored."""
        owners: list[tuple[int, int]] = []  # place and choice
        pairs: dict[int, tuple[str, str]] = {}
        for place in places:
            question = self._task.questions[place]
            self._check(question)
            for choice, pair in enumerate(question.pairs):
                pairs[len(owners)] = pair
                owners.append((place, choice))
        scores: dict[int, dict[int, float]] = {place: {} for place in places}
        for index, (value, _) in self._scorer.score(pairs):
            place, choice = owners[index]
            question, known = self._task.questions[place], scores[place]
            known[choice] = value
            if len(known) == len(question.choices):
                nats = tuple(known[i] for i in range(len(known)))
                lengths = tuple(map(len, question.choices))
                yield place, Outcome(question.line, nats, lengths, question.answer)

    def describe(self, place: int, outcome: Outcome) -> JsonObject:
        """Return the JSON object of an outcome."""
        return {
            **asdict(outcome),
            "choice": outcome.choice,
            "choice_norm": outcome.choice_norm,
            "right": outcome.right,
            "right_norm": outcome.right_norm,
            "key": self._key(place),
        }

    def find_place(self, answer: JsonObject) -> int | None:
        """Return the place of an outcome of an earlier run of this job, or None."""
        place = self._places.get(answer["line"])
        if place is None or answer.get("key") != self._key(place):
            return None
        question = self._task.questions[place]
        lengths = tuple(map(len, question.choices))
        nats = _read_numbers(answer.get("loglikelihoods"))
        if len(nats) != len(lengths):
            return None
        self.resumed[place] = Outcome(question.line, nats, lengths, question.answer)
        return place

    def _check(self, question: Question) -> list[Any]:
        """Return how a question is encoded; an error names its record."""
        try:
            return self._scorer.check(question.pairs)
        except OpenELMError as error:
            where = f"{self._task.name}, record {question.line}"
            raise OpenELMError(f"{where}: {error}") from error

    def _key(self, place: int) -> str:
        question = self._task.questions[place]
        return hash_key(asdict(question), self._check(question), self._model_key)


def _read_numbers(values: object) -> tuple[float, ...]:
    """Return the values if they are a list of finite floats, else ()."""
    numbers = values if isinstance(values, list) else []
    finite = all(isinstance(v, float) and math.isfinite(v) for v in numbers)
    return tuple(numbers) if finite else ()
