"""Paired differences between models."""

import math
import statistics

import pytest

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.multiple_choice import Outcome, ScoredTask, sum_up
from mlx_openelm.evaluation.paired import compare, paired_difference


def scored(rights, rights_norm=None, *, task="wood", digest="d"):
    """A task whose first of two choices is the likeliest, the second for its length."""
    outcomes = tuple(
        Outcome(n + 1, (-1.0, -2.0), (1, 1 if right == norm else 9), 0 if right else 1)
        for n, (right, norm) in enumerate(
            zip(rights, rights_norm or rights, strict=True)
        )
    )
    assert tuple(map(int, (o.right for o in outcomes))) == rights
    return ScoredTask(task, digest, sum_up(outcomes), outcomes)


def test_a_difference_is_taken_question_by_question():
    first, second = (1, 1, 0, 0, 0, 1), (1, 0, 1, 1, 0, 1)
    difference = compare(scored(first), scored(second)).acc
    changes = [0, -1, 1, 1, 0, 0]
    assert difference.value == pytest.approx(1 / 6)
    assert difference.stderr == pytest.approx(statistics.stdev(changes) / math.sqrt(6))
    assert (difference.gained, difference.lost, difference.n) == (2, 1, 6)


def test_each_accuracy_has_a_difference_of_its_own():
    compared = compare(
        scored((1, 1, 1, 0), (0, 1, 0, 0)), scored((1, 0, 0, 0), (1, 1, 1, 0))
    )
    assert compared.task == "wood"
    assert compared.acc.value == -0.5
    assert compared.acc_norm.value == 0.5


def test_models_that_answer_alike_do_not_differ():
    difference = paired_difference([1.0, 0.0, 0.3], [1.0, 0.0, 0.3])
    assert (difference.value, difference.stderr) == (0, 0)
    assert paired_difference([1.0], [0.0]).stderr is None


def test_other_questions_cannot_be_compared():
    first = scored((1, 0))
    for other in (scored((1, 0), digest="e"), scored((1, 0), task="gold")):
        with pytest.raises(OpenELMError, match="not the same questions"):
            compare(first, other)
    for values in (([1.0], [1.0, 0.0]), ([], [])):
        with pytest.raises(OpenELMError, match="same questions on both sides"):
            paired_difference(*values)
