"""Samples in arrays, and the tokens of many records against those of one at a time."""

import json
import random

import numpy as np
import pytest
from models import TEXT, small_tokenizer

from mlx_openelm.finetuning.preparation import prepare
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.record_formats import (
    preference_formats,
    supervised_formats,
)
from mlx_openelm.finetuning.record_samples import make_pairs, make_samples
from mlx_openelm.finetuning.records import hold_out, read_data
from mlx_openelm.finetuning.samples import (
    PackedSamples,
    Sample,
    lengths_of,
    sizes_of,
    targets_of,
)
from mlx_openelm.text.templates import render

tokenizer = small_tokenizer()
WORDS = [*TEXT.split()[:40], "</s>", "a  b", "日本", "x\n"]


def draw(chance, most):
    words = " ".join(chance.choices(WORDS, k=chance.randint(1, most)))
    return words + chance.choice(["", " ", "\n"])


def conversations(count):
    chance = random.Random(0)
    for _ in range(count):
        turns = [{"role": "system", "content": draw(chance, 3)}]
        turns *= chance.random() < 0.3
        for _ in range(chance.randint(1, 3)):
            turns.append({"role": "user", "content": draw(chance, 6)})
            turns.append({"role": "assistant", "content": draw(chance, 6) + "."})
        yield {"messages": turns}


def common(a, b):
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


def tokenize_one(record, template, *, mask, last):
    """Tokens and loss mask of a record, by the definition."""
    tokens, loss_mask = [tokenizer.bos_id], [False]
    exchanges = render(record.turns, template)
    for i, exchange in enumerate(exchanges, 1):
        context = exchange.context
        (ids,) = tokenizer.encode_many([context + exchange.answer], rendered=True)
        prompts = [context, context[:-1] if context.endswith(" ") else ""]
        encoded = tokenizer.encode_many(prompts, rendered=True)
        masked = max(common(ids, prompt) for prompt in encoded) if mask else 0
        ids = [*ids, tokenizer.eos_id]
        masked = len(ids) if mask and last and i < len(exchanges) else masked
        tokens += ids
        loss_mask += [False] * masked + [True] * (len(ids) - masked)
    return tokens, loss_mask


@pytest.mark.parametrize("template", ["instruct", "alpaca", "openelm-peft"])
@pytest.mark.parametrize(
    ("mask", "last"), [(True, False), (True, True), (False, False)]
)
def test_records_are_tokenized_as_one_by_one(tmp_path, template, mask, last):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in conversations(60)))
    dataset, finished = read_data(path, supervised_formats()).train, []
    samples, table = make_samples(
        dataset,
        tokenizer,
        template=template,
        mask_prompt=mask,
        last_turn_only=last,
        max_length=10_000,
        on_progress=finished.append,
    )
    assert isinstance(samples, PackedSamples)
    for record, sample in zip(dataset.records, samples, strict=True):
        tokens, loss_mask = tokenize_one(record, template, mask=mask, last=last)
        assert (sample.tokens.tolist(), sample.loss_mask.tolist()) == (
            tokens,
            loss_mask,
        )
        assert sample.place == record.place
    assert table.tokens == sum(len(sample.tokens) for sample in samples)
    assert finished[-1] == len(dataset.records)


def test_packed_samples_are_the_samples(monkeypatch):
    monkeypatch.setattr("mlx_openelm.finetuning.samples._BLOCK", 3)
    chance = np.random.default_rng(0)
    made = [
        Sample(
            chance.integers(0, 300, n).astype(np.int32), chance.random(n) < 0.5, str(n)
        )
        for n in (5, 1, 7, 2, 9, 3, 4)
    ]
    packed = PackedSamples(iter(made))
    assert len(packed) == len(made)
    for index in (*range(7), -1):
        for name in ("tokens", "loss_mask"):
            expected, array = getattr(made[index], name), getattr(packed[index], name)
            assert array.dtype == expected.dtype
            assert array.tolist() == expected.tolist()
        assert packed[index].place == made[index].place
    assert [sample.place for sample in packed[1:5:2]] == ["1", "2"]
    for count in (lengths_of, sizes_of, targets_of):
        assert count(packed) == count(made)
    with pytest.raises(IndexError):
        packed[7]
    assert (len(PackedSamples([])), lengths_of(PackedSamples([]))) == (0, [])


def test_pairs_are_counted_by_pair_and_by_sequence(tmp_path):
    path = tmp_path / "d.jsonl"
    record = {"prompt": "a king", "chosen": "went", "rejected": "said nothing"}
    path.write_text(json.dumps(record) + "\n")
    data = read_data(path, preference_formats("dpo", None)).train
    pairs, _ = make_pairs(
        data, tokenizer, template="raw", max_length=99, max_prompt_length=9
    )
    sizes = [len(pairs[0].chosen.tokens), len(pairs[0].rejected.tokens)]
    assert (sizes_of(pairs), lengths_of(pairs)) == (sizes, [sum(sizes)])


def test_the_progress_of_reading_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_openelm.finetuning.records._REPORT_EVERY", 2)
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    reports = []
    prepare(
        FinetuneRecipe(data=str(path), epochs=1),
        on_progress=lambda *report: reports.append(report),
    )
    units = [unit for _, _, unit in reports]
    assert units == ["MB"] * 5 + ["records"]
    assert reports[-1] == (9, 9, "records")


def test_held_out_records_have_the_smallest_keys(tmp_path):
    path = tmp_path / "d.jsonl"
    texts = [f"text {i % 90}" for i in range(100)]  # ten occur twice
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = read_data(path, supervised_formats())
    records = (*data.train.records, *data.valid.records)
    kept, held_out = hold_out(records)
    smallest, expected = sorted({record.key for record in records}), 0
    for key in smallest:
        count = sum(record.key == key for record in records)
        if expected + count <= 10:
            expected += count
            assert all(r in held_out for r in records if r.key == key)
    assert len(held_out) == expected
    assert len(kept) == 100 - expected
