"""Texts are repaired with ftfy before they are tokenized, as CoreNet does."""

import json

import pytest
from models import small_tokenizer
from trainings import read_data

from mlx_openelm.finetuning.further_objectives.choice import make_objective
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.text.templates import render

ftfy = pytest.importorskip("ftfy", reason="needs ftfy")

BROKEN = [
    {
        "instruction": "Say “schÃ¶n” &amp; ﬁne",
        "output": "the correct answer is cafe\u0301",
    },
    {"instruction": "1 < 2", "output": "&amp; so on"},  # "<": no HTML after it
    {"instruction": "Why?\r\n", "output": "Why not"},
]


def samples(tmp_path, **options):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(BROKEN))
    recipe = FinetuneRecipe(data=str(path), max_seq_length=1024, **options)
    dataset = read_data(path).train
    made, _ = make_objective(recipe).make_samples(
        dataset, small_tokenizer(), "openelm-peft"
    )
    texts = []
    for record in dataset.records:
        (exchange,) = render(record.turns, "openelm-peft")
        texts.append(exchange.context + exchange.answer)
    return [one.tokens.tolist() for one in made], texts, made


def expected_ids(text):
    tokenizer = small_tokenizer()
    return [*tokenizer.encode(text), tokenizer.eos_id]


def test_the_whole_text_is_repaired_as_ftfy_does(tmp_path):
    ids, texts, _ = samples(tmp_path, repair_text=True, mask_prompt=False)
    repaired = [ftfy.fix_text(text, normalization="NFC") for text in texts]
    assert ids == [expected_ids(text) for text in repaired]
    assert repaired != texts


def test_without_the_option_texts_are_unchanged(tmp_path):
    ids, texts, _ = samples(tmp_path)
    assert ids == [expected_ids(text) for text in texts]


def test_the_answer_alone_is_in_the_loss(tmp_path):
    """The loss starts with the answer, in the repaired text too."""
    _, texts, made = samples(tmp_path, repair_text=True)
    tokenizer = small_tokenizer()
    for sample, text in zip(made, texts, strict=True):
        targets = sample.tokens[sample.loss_mask].tolist()
        answer = ftfy.fix_text(text, normalization="NFC").rpartition(" " * 16)[2]
        assert tokenizer.decode(targets[:-1]).strip() == answer.strip()
