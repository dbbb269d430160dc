"""Paired differences between models."""

import math
import statistics

import pytest

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.paired import paired_difference


def test_differences_are_per_question():
    first, second = (1.0, 1.0, 0.0, 0.0, 0.0, 1.0), (1.0, 0.0, 1.0, 1.0, 0.0, 1.0)
    difference = paired_difference(first, second)
    changes = [0, -1, 1, 1, 0, 0]
    assert difference.value == pytest.approx(1 / 6)
    assert difference.stderr == pytest.approx(statistics.stdev(changes) / math.sqrt(6))
    assert (difference.gained, difference.lost, difference.n) == (2, 1, 6)


def test_equal_answers_have_no_difference():
    difference = paired_difference([1.0, 0.0, 0.3], [1.0, 0.0, 0.3])
    assert (difference.value, difference.stderr) == (0, 0)
    assert paired_difference([1.0], [0.0]).stderr is None


def test_different_numbers_of_scores_are_refused():
    for values in (([1.0], [1.0, 0.0]), ([], [])):
        with pytest.raises(OpenELMError, match="same questions on both sides"):
            paired_difference(*values)
