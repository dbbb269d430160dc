"""Log-likelihoods of continuations with prefix sharing."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SCALED, TEXT, UNEVEN, build, small_tokenizer

from mlx_openelm.device import FORCED_PATH
from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.loglikelihood import (
    Request,
    encode_requests,
    rolling_requests,
    score_requests,
)
from mlx_openelm.evaluation.prefix_tree import build_tree
from mlx_openelm.model.lora import LoRAEmbedding, LoRALinear

tokenizer = small_tokenizer()
CONTEXT = UNEVEN.max_context_length


def quantized():
    model = build(SCALED)
    nn.quantize(model, 64, 4, class_predicate=lambda p, m: hasattr(m, "to_quantized"))
    return model


def adapted():
    """Return a model with an adapter on its embedding and linear layers."""
    model = build(UNEVEN)
    parts = {}
    for i, (path, module) in enumerate(model.named_modules()):
        kind = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding}.get(type(module))
        if kind is None:
            continue
        rows, columns = module.weight.shape
        a, b = (columns, rows) if kind is LoRALinear else (rows, columns)
        key = mx.random.key(i)
        lora_a = mx.random.normal((a, 2), key=key) * 0.3
        lora_b = mx.random.normal((2, b), key=key) * 0.3
        parts[path] = kind(module, lora_a, lora_b, 2.0)
    model.update_modules(nn.utils.tree_unflatten(list(parts.items())))
    return model


MODELS = {
    "tied": build(UNEVEN),
    "untied": build(replace(UNEVEN, share_input_output_layers=False)),
    "quantized": quantized(),
}
model = MODELS["tied"]


def score_alone(model, request):
    """Score a request by the definition, in float64, in its own forward pass."""
    whole = (request.context + request.continuation)[-(CONTEXT + 1) :]
    logits = np.array(model(mx.array([whole[:-1]])).astype(mx.float32), np.float64)[0]
    n = len(request.continuation)
    logits = logits[-n:]
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nats = sum(log_probs[i, token] for i, token in enumerate(request.continuation))
    return nats, list(log_probs.argmax(-1)) == list(request.continuation)


def score(model, requests):
    """Return the log-likelihoods in the order of the requests."""
    scores = dict(score_requests(model, requests))
    return [scores[index] for index in range(len(requests))]


def assert_right(model, requests, **options):
    scores = dict(score_requests(model, requests, **options))
    assert sorted(scores) == list(range(len(requests)))
    for index, request in enumerate(requests):
        nats, is_greedy = score_alone(model, request)
        assert scores[index].nats == pytest.approx(nats, abs=1e-4)
        assert scores[index].is_greedy == is_greedy


# Few different tokens, so that most sequences share prefixes; long ones are truncated.
tokens = st.lists(st.integers(3, 5), max_size=6)
contexts = st.builds(
    lambda stem, times, end: (1, *stem * times, *end),
    tokens,
    st.integers(0, 12),
    tokens,
)
continuations = st.lists(st.integers(3, 6), min_size=1, max_size=8).map(tuple)
requests = st.lists(st.builds(Request, contexts, continuations), max_size=12)


@settings(max_examples=25)
@given(requests=requests, kind=st.sampled_from(list(MODELS)), row=st.integers(1, 200))
def test_shared_scores_equal_those_of_single_requests(requests, kind, row):
    assert_right(MODELS[kind], requests, row_tokens=row)


def test_an_adapter_is_applied_in_every_layer_and_the_embedding():
    with_adapter = adapted()
    request = Request((1, 40, 50), (60, 70))
    assert score_alone(with_adapter, request) != score_alone(model, request)
    assert_right(with_adapter, [request, Request((1, 40, 50), (60, 71, 8))])


def test_scores_on_the_path_of_a_gpu_are_those_of_the_cpu(monkeypatch):
    stems = [(1, 40, n) for n in range(50, 53)]
    requests = [Request(s, (7, 8, n)) for s in stems for n in (4, 5)]
    expected = [scored.nats for scored in score(model, requests)]
    monkeypatch.setenv(FORCED_PATH, "1")
    actual = [scored.nats for scored in score(model, requests)]
    assert actual == pytest.approx(expected, abs=1e-4)


def test_a_bfloat16_model_scores_like_a_single_request():
    half = build(UNEVEN)
    half.set_dtype(mx.bfloat16)
    whole = Request((1,), tuple(range(10, 70)))
    alone, _ = score_alone(half, whole)
    (scored,) = score(half, [whole])
    assert scored.nats == pytest.approx(alone, abs=1e-4)


def test_logits_are_computed_in_chunks(monkeypatch):
    monkeypatch.setattr("mlx_openelm.evaluation.loglikelihood.LOGIT_ROWS", 7)
    stems = [(1, 40, n) for n in range(50, 56)]
    assert_right(model, [Request(s, (7, 8, 9, n)) for s in stems for n in (4, 5)])


def test_greedy_means_the_likeliest_token_at_every_position():
    ids = [1, 40, 50]
    for _ in range(4):
        ids.append(int(model(mx.array([ids]))[0, -1].argmax()))
    context, greedy = tuple(ids[:3]), tuple(ids[3:])
    first = (greedy[0] ^ 1, *greedy[1:])
    last = (*greedy[:-1], greedy[-1] ^ 1)
    scored = score(model, [Request(context, c) for c in (greedy, first, last)])
    assert [s.is_greedy for s in scored] == [True, False, False]


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1))
def test_a_row_has_every_prefix_once(sequences):
    sequences.sort()
    tree = build_tree(sequences)
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert len(tree.tokens) == len(prefixes)
    for i, sequence in enumerate(sequences):
        places = [tree.place(i, n) for n in range(len(sequence))]
        assert [tree.tokens[place] for place in places] == sequence
        assert [tree.positions[place] for place in places] == list(range(len(sequence)))
    with pytest.raises(IndexError):
        tree.place(0, len(sequences[0]))


def test_labels_that_differ_in_their_last_token_add_no_inputs(monkeypatch):
    rows = []
    monkeypatch.setattr(
        "mlx_openelm.evaluation.loglikelihood.build_tree",
        lambda sequences: rows.append(build_tree(sequences)) or rows[-1],
    )
    prompt, label = (1, 40, 50, 60), (7, 8)
    score(model, [Request(prompt, (*label, n)) for n in (10, 11, 12, 13)])
    assert [row.tokens for row in rows] == [(*prompt, *label)]


def test_a_row_grows_beyond_its_size_for_a_long_shared_prefix(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "mlx_openelm.evaluation.loglikelihood.build_tree",
        lambda sequences: sizes.append(len(sequences)) or build_tree(sequences),
    )
    stem = (1, *range(10, 30))
    few_shot = [Request((*stem, n, n), (5,)) for n in range(40, 80)]
    list(score_requests(model, few_shot, row_tokens=21))
    assert sizes == [31, 9]  # 21 + 31 * 2 are less than four rows
    sizes.clear()
    no_context = [Request((1,), (n, 9, 9, 9)) for n in range(40, 80)]
    list(score_requests(model, no_context, row_tokens=21))
    assert max(sizes) == 6  # a single shared token does not extend a row


def test_invalid_requests_and_weights_are_refused():
    with pytest.raises(OpenELMError, match=r"65 tokens.*between 1 and.*64"):
        score(model, [Request((1,), (5,) * 65)])
    with pytest.raises(OpenELMError, match="0 tokens"):
        score(model, [Request((1,), ())])
    with pytest.raises(OpenELMError, match="at least have BOS"):
        score(model, [Request((), (5,))])
    damaged = build(UNEVEN)
    damaged.transformer.norm.weight = mx.full((64,), mx.nan)
    with pytest.raises(OpenELMError, match="weights are damaged or overflow"):
        score(damaged, [Request((1,), (5,))])


# Encoding ------------------------------------------------------------------------

PAIRS = [
    ("Once upon a time", " there was a king"),
    ("Once upon a time \n  ", "there was"),
    ("the wolf", "'s wood"),
    ("", "Once"),
    (" \n", " Once"),
    ("日本", " \U0001f600"),
    ("Answer:\n" + " " * 16, "the correct answer is answer1"),
]


@pytest.mark.interop
def test_pairs_are_encoded_as_the_harness_does():
    from lm_eval.api.model import TemplateLM

    class Harness(TemplateLM):
        eot_token_id = tokenizer.eos_id
        prefix_token_id = tokenizer.bos_id
        generate_until = loglikelihood_rolling = None

        def tok_encode(self, string, add_special_tokens=None, **_):
            return tokenizer.encode(string, bos=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests, **_):
            return [(context, continuation) for _, context, continuation in requests]

    class Instance:
        def __init__(self, args):
            self.args = args

    Harness.__abstractmethods__ = frozenset()
    theirs = Harness().loglikelihood(list(map(Instance, PAIRS)), disable_tqdm=True)
    ours = encode_requests(tokenizer, PAIRS)
    assert [(list(r.context), list(r.continuation)) for r in ours] == theirs


def test_white_space_belongs_to_the_continuation_and_bos_comes_first():
    pairs = [("Once upon \n", " a time"), ("", "Once")]
    request, alone = encode_requests(tokenizer, pairs)
    assert request.context == tuple(tokenizer.encode("Once upon"))
    whole = tuple(tokenizer.encode("Once upon \n a time"))
    assert request.context + request.continuation == whole
    assert whole[0] == tokenizer.bos_id
    assert alone.context == (tokenizer.bos_id,)
    assert alone.continuation == tuple(tokenizer.encode("Once", bos=False))


@pytest.mark.interop
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 128, 129, 200])
def test_rolling_windows_equal_those_of_the_harness(length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(100, 100 + length))
    theirs = [
        make_disjoint_window(window)
        for window in get_rolling_token_windows(ids, 1, CONTEXT, 1)
    ]
    ours = rolling_requests(ids, 1, CONTEXT)
    assert [(list(r.context), list(r.continuation)) for r in ours] == theirs


def test_rolling_requests_score_every_token_once():
    ids = tokenizer.encode(TEXT[:400], bos=False)
    assert len(ids) > 2 * CONTEXT
    windows = rolling_requests(ids, tokenizer.bos_id, CONTEXT)
    assert [token for w in windows for token in w.continuation] == ids
    assert_right(model, windows)
