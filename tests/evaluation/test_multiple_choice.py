"""Multiple-choice tasks: scores, and the output file."""

import json
import math
import statistics
from dataclasses import replace

import pytest
from models import SCALED, UNEVEN, build, small_tokenizer

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation import multiple_choice as scoring
from mlx_openelm.evaluation import scorer as requests_scoring
from mlx_openelm.evaluation.loglikelihood import encode_requests, score_requests
from mlx_openelm.evaluation.multiple_choice import (
    Outcome,
    mean_and_stderr,
    score_task,
    summarize,
)
from mlx_openelm.evaluation.scorer import OpenELMScorer
from mlx_openelm.evaluation.task_files import Question, Task

tokenizer = small_tokenizer()
model = build(UNEVEN)
WORDS = ("gold", "a wolf", "the old woman", "wood and the king", "daughters")


def make_task(count=20, name="wood"):
    questions = [
        Question(n + 1, f"Once {n} {WORDS[n % 5]} said", WORDS[: 2 + n % 4], n % 2, " ")
        for n in range(count)
    ]
    return Task(name, tuple(questions))


TASK = make_task()


@pytest.fixture(autouse=True)
def few_together(monkeypatch):
    monkeypatch.setattr(scoring, "TOGETHER", 4)


def score_alone(request):
    ((_, scored),) = score_requests(model, [request])
    return scored.nats


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_choice_is_scored_after_its_context():
    scored = score_task(OpenELMScorer(model, tokenizer), TASK)
    assert [o.line for o in scored.outcomes] == list(range(1, 21))
    for question, outcome in zip(TASK.questions, scored.outcomes, strict=True):
        pairs = [(question.context, f" {choice}") for choice in question.choices]
        alone = list(map(score_alone, encode_requests(tokenizer, pairs)))
        assert outcome.loglikelihoods == pytest.approx(alone, abs=1e-4)
        assert outcome.lengths == tuple(map(len, question.choices))
        assert outcome.answer == question.answer
    assert scored.score == summarize(scored.outcomes)
    assert (scored.task, scored.digest) == ("wood", TASK.digest)


def test_the_likeliest_choice_is_by_sum_or_per_character():
    outcome = Outcome(1, (-3.0, -4.0, -3.0), (2, 8, 5), 1)
    assert (outcome.choice, outcome.right) == (0, False)  # the first of equal ones
    assert (outcome.choice_norm, outcome.right_norm) == (1, True)


def test_a_score_is_the_fraction_of_right_answers():
    first, second = (
        Outcome(1, (-1.0, -2.0), (1, 4), 0),
        Outcome(2, (-1.0, -2.0), (1, 1), 0),
    )
    score = summarize([first, second, Outcome(3, (-1.0, -2.0), (1, 1), 1)])
    assert score.acc == pytest.approx(2 / 3)
    assert score.acc_norm == pytest.approx(1 / 3)
    assert score.stderr == pytest.approx(math.sqrt((2 / 3) * (1 / 3) / 2))
    assert score.n == 3
    assert summarize([first]).stderr is None


@pytest.mark.interop
def test_the_standard_error_equals_that_of_the_harness():
    from lm_eval.api.metrics import mean_stderr

    values = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    mean, stderr = mean_and_stderr(values)
    assert mean == statistics.mean(values)
    assert stderr == pytest.approx(mean_stderr(values))


# The output ----------------------------------------------------------------------


def test_outcomes_are_written_in_order(tmp_path):
    output = tmp_path / "wood.jsonl"
    scored = score_task(OpenELMScorer(model, tokenizer), TASK, output=output)
    written = lines_of(output)
    assert [line["line"] for line in written] == list(range(1, 21))
    for line, outcome in zip(written, scored.outcomes, strict=True):
        assert tuple(line["loglikelihoods"]) == outcome.loglikelihoods
        assert line["choice"] == outcome.choice
        assert line["right"] == outcome.right
        assert line["right_norm"] == outcome.right_norm
    assert [path.name for path in tmp_path.iterdir()] == ["wood.jsonl"]


class Killed(BaseException):
    pass


def run_until(count, output, task=TASK):
    def kill(done, total):
        if done == count:
            raise Killed

    with pytest.raises(Killed):
        score_task(
            OpenELMScorer(model, tokenizer), task, output=output, on_progress=kill
        )


def count_scored(monkeypatch):
    """Return a list to which the size of each batch of requests is appended."""
    sizes = []
    real = requests_scoring.score_requests

    def score(model, requests):
        sizes.append(len(requests))
        return real(model, requests)

    monkeypatch.setattr(requests_scoring, "score_requests", score)
    return sizes


@pytest.mark.parametrize("count", [1, 7, 19])
def test_a_killed_run_resumes(tmp_path, monkeypatch, count):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    expected = score_task(OpenELMScorer(model, tokenizer), TASK, output=whole)
    run_until(count, stopped)
    with stopped.open("a") as file:  # an incomplete line
        file.write('{"line": 1')
    sizes, steps = count_scored(monkeypatch), []
    scored = score_task(
        OpenELMScorer(model, tokenizer),
        TASK,
        output=stopped,
        on_progress=lambda *at: steps.append(at),
    )
    # Rows may be composed differently, which changes the last bits.
    for ours, theirs in zip(scored.outcomes, expected.outcomes, strict=True):
        assert ours.loglikelihoods == pytest.approx(theirs.loglikelihoods, abs=1e-4)
    assert scored.score == expected.score
    assert steps == [(n, 20) for n in range(count, 21)]
    assert sum(sizes) < sum(len(q.choices) for q in TASK.questions)
    assert len(lines_of(stopped)) == 20


def test_a_finished_run_is_read_and_not_repeated(tmp_path, monkeypatch):
    output = tmp_path / "wood.jsonl"
    first = score_task(OpenELMScorer(model, tokenizer), TASK, output=output)
    sizes, before = count_scored(monkeypatch), output.read_bytes()
    assert score_task(OpenELMScorer(model, tokenizer), TASK, output=output) == first
    assert sizes == []
    assert output.read_bytes() == before


def test_answers_of_another_limit_are_taken_over(tmp_path, monkeypatch):
    output = tmp_path / "wood.jsonl"
    scorer = OpenELMScorer(model, tokenizer)
    expected = score_task(scorer, TASK, limit=8)
    score_task(scorer, TASK, limit=5, output=output)
    sizes = count_scored(monkeypatch)
    larger = score_task(scorer, TASK, limit=8, output=output)
    assert sum(sizes) == sum(len(q.choices) for q in TASK.questions[5:8])
    assert (larger.score, larger.digest) == (expected.score, expected.digest)
    sizes.clear()
    smaller = score_task(scorer, TASK, limit=5, output=output)
    assert (smaller.score.n, sizes) == (5, [])
    assert smaller.outcomes == larger.outcomes[:5]
    assert len(lines_of(output)) == 8  # nothing is lost
    assert smaller.digest == score_task(scorer, make_task(5)).digest


def change_question(**changes):
    questions = list(TASK.questions)
    questions[2] = replace(questions[2], **changes)
    return Task(TASK.name, tuple(questions))


def test_another_model_or_task_is_refused_unless_forced(tmp_path):
    output = tmp_path / "wood.jsonl"
    score_task(OpenELMScorer(model, tokenizer), TASK, output=output)
    before = output.read_bytes()
    others = [
        (build(UNEVEN, 1), TASK),
        (model, change_question(context="Twice")),
        (model, change_question(answer=1)),
    ]
    for other, task in others:
        with pytest.raises(OpenELMError, match="`force`"):
            score_task(OpenELMScorer(other, tokenizer), task, output=output)
        assert output.read_bytes() == before
    changed = [*lines_of(output)[:-1], lines_of(output)[-1] | {"key": "other"}]
    output.write_text("".join(json.dumps(line) + "\n" for line in changed))
    score_task(OpenELMScorer(model, tokenizer), TASK, output=output, force=True)
    assert len(lines_of(output)) == 20
    other = build(SCALED)
    forced = score_task(
        OpenELMScorer(other, tokenizer), TASK, output=output, force=True
    )
    assert forced == score_task(OpenELMScorer(other, tokenizer), TASK)
    assert len(lines_of(output)) == 20


def test_an_outcome_without_its_numbers_is_not_reused(tmp_path):
    output = tmp_path / "wood.jsonl"
    score_task(OpenELMScorer(model, tokenizer), TASK, output=output)
    for wrong in ([-1.0], "none", [math.nan, -1.0]):
        first, *rest = lines_of(output)
        lines = [first | {"loglikelihoods": wrong}, *rest]
        output.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(OpenELMError, match="`force`"):
            score_task(OpenELMScorer(model, tokenizer), TASK, output=output)


def test_a_choice_that_is_too_long_is_reported():
    long = Question(7, "Once", ("a", "wolf " * 200), 0, " ")
    with pytest.raises(OpenELMError, match=r"wood, record 7: .* tokens"):
        score_task(OpenELMScorer(model, tokenizer), Task("wood", (long,)))


def test_a_long_context_is_truncated_at_the_left():
    long = Question(1, "wolf " * 200 + "said the", ("king", "wood"), 0, " ")
    scored = score_task(OpenELMScorer(model, tokenizer), Task("long", (long,)))
    for (context, continuation), nats in zip(
        long.pairs, scored.outcomes[0].loglikelihoods, strict=True
    ):
        (request,) = encode_requests(tokenizer, [(context, continuation)])
        assert len(request.context) > UNEVEN.max_context_length
        assert nats == pytest.approx(score_alone(request), abs=1e-4)
