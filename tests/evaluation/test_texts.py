import json
import math
from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest
from models import TEXT, UNEVEN, build, small_tokenizer

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.texts import evaluate
from mlx_openelm.model.likelihood import log_likelihoods

tokenizer = small_tokenizer()
model = build(UNEVEN)
STORY = "\n  " + TEXT[:700] + "日本 \U0001f600\r\n"  # raw: white space counts


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes(STORY.encode())
    return path


def scored_token_by_token(text, window):
    """Score a text by the definition, each window in its own forward pass."""
    ids = tokenizer.encode(text, bos=False)
    nats = 0.0
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        logits = np.array(model(mx.array([[1, *part[:-1]]])), np.float64)[0]
        shifted = logits - logits.max(-1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        nats -= sum(log_probs[i, token] for i, token in enumerate(part))
    return nats, len(ids)


@pytest.mark.parametrize("window", [1, 7, 16, 64, None])
def test_every_token_is_scored_once_given_the_tokens_before_it(story, window):
    score = evaluate(model, tokenizer, text=story, window=window)
    nats, tokens = scored_token_by_token(STORY, window or UNEVEN.max_context_length)
    assert score.tokens == tokens
    assert score.bytes == len(STORY.encode())
    assert score.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(
        nats / math.log(2) / len(STORY.encode()), rel=1e-5
    )


def test_multiple_files_are_scored_together(story, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Another tale.")
    both = evaluate(model, tokenizer, text=[story, other])
    one, two = (evaluate(model, tokenizer, text=path) for path in (story, other))
    assert both.tokens == one.tokens + two.tokens
    assert both.bytes == one.bytes + two.bytes
    nats = one.nats_per_token * one.tokens + two.nats_per_token * two.tokens
    assert both.nats_per_token * both.tokens == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
def test_chunks_do_not_change_a_likelihood(chunk):
    rng = np.random.default_rng(0)
    inputs, targets = (mx.array(rng.integers(0, 300, (2, 12))) for _ in range(2))
    logits = model(inputs)
    picked = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    expected = picked - mx.logsumexp(logits, axis=-1)
    actual = log_likelihoods(model, inputs, targets, chunk=chunk)
    np.testing.assert_allclose(np.array(actual), np.array(expected), atol=1e-4)


# Tasks ---------------------------------------------------------------------------


def write_task(folder, name, count):
    questions = [
        {"context": f"Once {n}", "choices": ["gold", "a king"], "answer": n % 2}
        for n in range(count)
    ]
    path = folder / name
    path.write_text(json.dumps(questions))
    return path


def test_tasks_are_scored_by_name_and_their_report_is_json(tmp_path):
    paths = [write_task(tmp_path, f"{name}.json", 6) for name in ("wood", "gold")]
    steps = []
    report = evaluate(
        model,
        tokenizer,
        tasks=paths,
        limit=4,
        on_progress=lambda *progress: steps.append(progress),
    )
    assert steps[-1] == (8, 8)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    written = json.loads(json.dumps(asdict(report)))
    assert list(written["tasks"]) == ["wood", "gold"]
    for score in written["tasks"].values():
        assert {"acc", "acc_norm", "stderr", "n"} <= score.keys()
        assert score["n"] == 4
    alone = evaluate(model, tokenizer, tasks=str(paths[0]), limit=4)
    assert alone.tasks["wood"] == report.tasks["wood"]


def test_texts_and_tasks_exclude_each_other(story, tmp_path):
    task = write_task(tmp_path, "wood.json", 2)
    for wrong in ({}, {"text": story, "tasks": task}, {"text": []}, {"tasks": []}):
        with pytest.raises(OpenELMError, match="either `text` or `tasks`"):
            evaluate(model, tokenizer, **wrong)
    with pytest.raises(OpenELMError, match="`limit` needs `tasks`"):
        evaluate(model, tokenizer, text=story, limit=3)
    with pytest.raises(OpenELMError, match="`window` needs `text`"):
        evaluate(model, tokenizer, tasks=task, window=3)
