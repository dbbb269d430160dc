"""Pairs of preferences in rows of a number of tokens (`pack`)."""

import pytest
from trainings import make_pairs, make_recipe

from mlx_openelm.finetuning.plan import Order
from mlx_openelm.finetuning.samples import lengths_of


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_pairs_fill_rows_in_whole(objective):
    lengths = lengths_of(make_pairs())
    options = {"objective": objective, "epochs": 1.0, "iters": None}
    options |= {"batch_size": 1, "grad_accumulation_steps": 1}
    plain = Order(lengths, make_recipe(**options))
    longest = 2 * max(lengths)
    packed = Order(lengths, make_recipe(**options, pack=True, max_seq_length=longest))
    assert packed.steps < plain.steps == len(lengths)
    rows = [packed.batch(step) for step in range(packed.steps)]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= longest for row in rows)
