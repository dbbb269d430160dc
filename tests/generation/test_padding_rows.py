"""Rows of the embedding without a piece are never drawn, however likely they are."""

from dataclasses import replace

import mlx.core as mx
import pytest
from models import UNEVEN, build, small_tokenizer

from mlx_openelm.generation.batching.answering import BatchPrompt, answer_together
from mlx_openelm.generation.conversation import Conversation
from mlx_openelm.generation.drafters import LookupDrafter, ModelDrafter, check_draft
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.sampling import find_padding
from mlx_openelm.generation.streaming import generate, stream
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.added_tokens import AddedToken, AddedTokens
from mlx_openelm.text.tokenizer import Tokenizer

PIECES = 300
tokenizer = small_tokenizer(PIECES)
PROMPT = [1, 40, 50, 60, 40, 50, 60, 40, 50]


def with_hot_rows(model: OpenELM, extra: int = 2) -> OpenELM:
    """Return a copy with rows that always have the largest logit among them."""
    wider = build(replace(model.config, vocab_size=PIECES + extra))
    weights = dict(mlx_flatten(model))
    name = "transformer.token_embeddings.weight"
    hot = 100 * mx.random.normal((model.config.model_dim,), key=mx.random.key(3))
    rows = [hot * (-1) ** i for i in range(extra)]
    weights[name] = mx.concatenate([weights[name], mx.stack(rows)])
    wider.load_weights(list(weights.items()))
    return wider


def mlx_flatten(model: OpenELM) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


exact = build(replace(UNEVEN, vocab_size=PIECES))
padded = with_hot_rows(exact)


def test_the_model_itself_keeps_all_its_rows() -> None:
    logits = padded(mx.array([PROMPT]))
    assert logits.shape[-1] == PIECES + 2
    assert (logits.argmax(-1) >= PIECES).all().item()  # the rows are likely
    assert mx.isfinite(logits).all().item()


GREEDY = Sampling(max_tokens=20)
CONTROLS = {
    "greedy": GREEDY,
    "bias": replace(GREEDY, logit_bias=((PIECES, 1000.0), (7, 1.0))),
    "penalty": replace(GREEDY, repetition_penalty=1.3),
    "ngrams": replace(GREEDY, no_repeat_ngram=2, min_tokens=5),
}


@pytest.mark.parametrize("draft", ["", "lookup", "model"])
def test_log_probabilities_are_those_of_the_model_without_them(draft: str) -> None:
    sampling = replace(GREEDY, logprobs=3)
    drafter = {"": None, "lookup": LookupDrafter(4), "model": ModelDrafter(padded)}
    expected = list(stream(exact, tokenizer, PROMPT, sampling))
    pieces = list(stream(padded, tokenizer, PROMPT, sampling, drafter=drafter[draft]))
    (answer,) = answer_together(padded, tokenizer, [BatchPrompt(0, PROMPT)], sampling)
    batched = [(t.id, t.logprob, t.alternatives) for t in answer.drawn]
    for found in [(p.token, p.logprob, p.top_logprobs) for p in pieces], batched:
        for (token, logprob, top), piece in zip(found, expected, strict=True):
            assert token == piece.token
            assert logprob == pytest.approx(piece.logprob, abs=1e-4)
            assert [t for t, _ in top] == [t for t, _ in piece.top_logprobs]


@pytest.mark.parametrize("sampling", CONTROLS.values(), ids=CONTROLS)
@pytest.mark.parametrize("draft", ["", "lookup", "model"])
def test_a_greedy_answer_is_that_of_the_model_without_them(
    sampling: Sampling, draft: str
) -> None:
    expected_by = replace(sampling, logit_bias=sampling.logit_bias[1:])
    expected = [p.token for p in stream(exact, tokenizer, PROMPT, expected_by)]
    drafter = {"": None, "lookup": LookupDrafter(4), "model": ModelDrafter(padded)}
    pieces = stream(padded, tokenizer, PROMPT, sampling, drafter=drafter[draft])
    assert [piece.token for piece in pieces] == expected


def test_drafts_have_none_of_them() -> None:
    drafter = ModelDrafter(padded)
    list(stream(padded, tokenizer, PROMPT, GREEDY, drafter=drafter))
    assert drafter.accepted == drafter.drafted > 0


FILTERS = {
    "temperature": Sampling(max_tokens=40, temp=1.0, seed=1),
    "filters": Sampling(max_tokens=40, temp=2.0, top_p=0.9, top_k=50, min_p=0.01),
    "hot": Sampling(max_tokens=40, temp=50.0, seed=2, logprobs=3),
}


@pytest.mark.parametrize("sampling", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("draft", ["", "lookup", "model"])
def test_a_sampled_answer_has_none_of_them(sampling: Sampling, draft: str) -> None:
    drafter = {"": None, "lookup": LookupDrafter(4), "model": ModelDrafter(padded)}
    pieces = stream(padded, tokenizer, PROMPT, sampling, drafter=drafter[draft])
    assert all(piece.token < PIECES for piece in pieces)


@pytest.mark.parametrize("sampling", [*CONTROLS.values(), *FILTERS.values()])
def test_a_batch_has_none_of_them(sampling: Sampling) -> None:
    prompts = [BatchPrompt(n, PROMPT[: n + 1]) for n in range(5)]
    answers = list(answer_together(padded, tokenizer, prompts, sampling, batch_size=3))
    assert len(answers) == 5
    assert all(token < PIECES for answer in answers for token in answer.tokens)
    if sampling is GREEDY:
        for a in answers:
            alone = stream(exact, tokenizer, a.prompt.ids, sampling)
            assert [t.id for t in a.drawn] == [piece.token for piece in alone]


def test_a_conversation_has_none_of_them() -> None:
    conversation = Conversation(padded, tokenizer, Sampling(max_tokens=10))
    pieces = list(conversation.reply("Once"))
    assert pieces
    assert all(piece.token < PIECES for piece in pieces)


def test_a_prompt_may_hold_them() -> None:
    prompt = [1, PIECES, 40, 50, PIECES, 40, 50]
    drafter = LookupDrafter(4)
    text = generate(padded, tokenizer, prompt, GREEDY)
    assert generate(padded, tokenizer, prompt, GREEDY, drafter=drafter) == text
    sampled = Sampling(max_tokens=20, temp=1.0)
    pieces = stream(padded, tokenizer, prompt, sampled, drafter=LookupDrafter(4))
    assert all(piece.token < PIECES for piece in pieces)


def test_an_added_token_may_be_drawn() -> None:
    added = AddedTokens([AddedToken(PIECES, "<x>"), AddedToken(PIECES + 1, "<y>")])
    extended = Tokenizer(tokenizer.model_proto, added=added)
    assert find_padding(extended, PIECES + 2) is None
    text = generate(padded, extended, PROMPT, Sampling(max_tokens=3))
    assert text.replace("<x>", "").replace("<y>", "") == ""
    check_draft(padded, extended, padded, extended)
    gap = Tokenizer(
        tokenizer.model_proto, added=AddedTokens([AddedToken(PIECES + 1, "<y>")])
    )
    rows = find_padding(gap, PIECES + 3)
    assert rows is not None
    assert rows.tolist() == [False] * PIECES + [True, False, True]


def test_ordinary_models_have_no_mask() -> None:
    assert find_padding(tokenizer, PIECES) is None
