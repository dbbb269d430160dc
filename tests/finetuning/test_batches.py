import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from trainings import read_data

from mlx_openelm.finetuning.batches import collate, collate_pairs, plan_epoch, share_out
from mlx_openelm.finetuning.record_samples import make_samples
from mlx_openelm.finetuning.samples import Pair, Sample

lengths = st.lists(st.integers(2, 40), max_size=60)


@st.composite
def samples(draw) -> Sample:
    loss_mask = draw(st.lists(st.booleans(), min_size=1, max_size=12).filter(any))
    tokens = [1, *draw(st.lists(st.integers(0, 99), min_size=12, max_size=12))]
    return Sample(
        np.array(tokens[: len(loss_mask) + 1], np.int32),
        np.array([False, *loss_mask]),
        "train.jsonl:1",
    )


# Plans ---------------------------------------------------------------------------


@given(
    lengths,
    st.integers(1, 9),
    st.integers(0, 2**63 - 1),
    st.integers(0, 99),
    st.none() | st.integers(40, 90),
)
def test_every_sample_is_in_every_epoch_once(sizes, batch_size, seed, epoch, pack):
    plan = plan_epoch(sizes, batch_size, seed=seed, epoch=epoch, pack_length=pack)
    assert sorted(i for batch in plan for i in batch) == list(range(len(sizes)))
    assert all(plan)
    if pack is None:
        full = [len(batch) for batch in plan[:-1]]
        assert full == [batch_size] * len(full)
        assert len(plan) == -(-len(sizes) // batch_size)


@given(lengths, st.integers(30, 90))
@example([20, 20], 40)
def test_a_packed_row_is_never_too_long_unless_a_sample_is(sizes, pack):
    rows = plan_epoch(sizes, 1, seed=0, epoch=0, pack_length=pack)
    loads = [sum(sizes[i] for i in row) for row in rows]
    for row, load in zip(rows, loads, strict=True):
        assert load <= pack or len(row) == 1
    # Two rows that fit into one are one.
    assert len(loads) < 2 or sum(sorted(loads)[:2]) > pack
    both = plan_epoch(sizes, 2, seed=0, epoch=0, pack_length=pack)
    joined = [sum(rows[i : i + 2], ()) for i in range(0, len(rows), 2)]
    assert both == joined


def test_the_order_depends_on_seed_and_epoch_alone():
    def plan(seed, epoch):
        return plan_epoch([5] * 40, 4, seed=seed, epoch=epoch)

    assert plan(0, 0) == plan(0, 0)
    assert len({tuple(plan(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    # Independent of the NumPy version, which can change before a run is resumed.
    assert plan_epoch([5] * 8, 8, seed=7, epoch=2) == [(6, 4, 0, 5, 7, 1, 3, 2)]


def test_all_positions_in_an_epoch_are_equally_likely():
    seen = np.zeros((6, 6))
    for epoch in range(3000):
        ((*order,),) = plan_epoch([5] * 6, 6, seed=1, epoch=epoch)
        seen[np.arange(6), order] += 1
    assert np.abs(seen / 500 - 1).max() < 0.2


@given(lengths, st.integers(1, 8), st.randoms(use_true_random=False))
def test_shares_are_complete_and_even(sizes, parts, random):
    indices = random.sample(range(len(sizes)), len(sizes) // 2)
    shares = share_out(indices, sizes, parts)
    assert len(shares) == parts
    assert sorted(i for share in shares for i in share) == sorted(indices)
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max((sizes[i] for i in indices), default=0)
    for share in shares:
        assert list(share) == [i for i in indices if i in share]
    assert shares == share_out(indices, sizes, parts)


def test_the_longest_sample_is_assigned_first():
    assert share_out([0, 1, 2, 3, 4], [1, 1, 1, 1, 4], 2) == [(4,), (0, 1, 2, 3)]


def test_more_parts_than_samples_leaves_some_empty():
    assert sorted(share_out([3], [9] * 4, 3)) == [(), (), (3,)]


# Batches -------------------------------------------------------------------------


@given(st.lists(samples(), min_size=1, max_size=6))
def test_a_batch_has_exactly_the_targets_of_its_samples(chosen):
    batch = collate(chosen)
    row = 0
    expected = []
    for number, sample in enumerate(chosen):
        tokens, loss_mask = sample.tokens.tolist(), sample.loss_mask.tolist()
        last = max(i for i, count in enumerate(loss_mask) if count)
        assert batch.lengths[number] == last
        assert batch.tokens[row : row + last].tolist() == tokens[:last]
        for i in range(1, len(tokens)):
            if loss_mask[i]:
                expected.append((row + i - 1, tokens[i], number))
        row += last
    rows = zip(batch.positions, batch.targets, batch.sequence, strict=True)
    assert [tuple(map(int, row)) for row in rows] == expected
    assert len(batch.tokens) == row == sum(batch.lengths)
    assert len(batch.targets) == sum(int(sample.loss_mask.sum()) for sample in chosen)
    for part in ("tokens", "positions", "targets", "sequence"):
        assert getattr(batch, part).dtype == np.int32


def test_tokens_from_the_last_target_on_are_not_inputs():
    tokens = np.array([1, 5, 6, 7, 8], np.int32)
    loss_mask = np.array([False, False, True, False, False])
    batch = collate([Sample(tokens, loss_mask, "")])
    assert (batch.tokens.tolist(), batch.lengths) == ([1, 5], (2,))
    assert (batch.positions.tolist(), batch.targets.tolist()) == ([1], [6])


@given(st.lists(st.tuples(samples(), samples()), min_size=1, max_size=4))
def test_a_batch_of_pairs_has_all_chosen_then_all_rejected_answers(both):
    pairs = [Pair(chosen, rejected, "") for chosen, rejected in both]
    batch = collate_pairs(pairs)
    order = [chosen for chosen, _ in both] + [rejected for _, rejected in both]
    expected = collate(order)
    for field in dataclasses.fields(batch):
        ours, theirs = getattr(batch, field.name), getattr(expected, field.name)
        assert np.array_equal(ours, theirs)
    per_sequence = np.bincount(batch.sequence, minlength=2 * len(pairs))
    assert per_sequence.tolist() == [int(sample.loss_mask.sum()) for sample in order]


# Real data -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def gsm8k(shared: Path) -> tuple[Sample, ...]:
    from mlx_openelm.storage.tokenizer_finder import read_tokenizer

    llama = read_tokenizer(shared / "data" / "llama-tokenizer")
    file = shared / "data" / "gsm8k" / "test.jsonl"
    data = read_data(file, prompt_key="question", completion_key="answer").train
    return make_samples(data, llama, template="raw", max_length=2048)[0]


def test_packed_rows_of_gsm8k_are_full(gsm8k):
    sizes = [len(sample.tokens) for sample in gsm8k]
    for pack, share in ((2048, 0.97), (1024, 0.95)):
        rows = plan_epoch(sizes, 1, seed=0, epoch=0, pack_length=pack)
        assert sum(sizes) / (len(rows) * pack) > share


def test_an_epoch_of_gsm8k_trains_every_target(gsm8k):
    sizes = [len(sample.tokens) for sample in gsm8k]
    targets = sum(int(sample.loss_mask.sum()) for sample in gsm8k)
    for pack in (None, 2048):
        plan = plan_epoch(sizes, 4, seed=0, epoch=0, pack_length=pack)
        batches = [collate([gsm8k[i] for i in batch]) for batch in plan]
        assert sum(len(batch.targets) for batch in batches) == targets
        # The last target is EOS, so all tokens but one of each sample are inputs.
        assert sum(len(b.tokens) for b in batches) == sum(sizes) - len(sizes)
