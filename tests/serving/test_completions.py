"""Completions: the answers are those of `generate`."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from servers import (
    CONTEXT,
    GREEDY,
    complete,
    events,
    healthy,
    post,
    request,
    send,
    serving,
    space_of,
)

from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate, stream

PROMPTS = ("Once upon a time", "The king", " a", "日本語, naïve", "I\n\n", "x" * 90)


def usage_of(model, tokenizer, prompt, sampling):
    *_, last = stream(model, tokenizer, prompt, sampling, template="raw")
    return last.finish_reason, last.prompt_tokens, last.generation_tokens


def test_greedy_completions_are_those_of_generate(client, small):
    with ThreadPoolExecutor(len(PROMPTS)) as pool:  # in one batch
        answers = list(pool.map(lambda prompt: complete(client, prompt), PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = generate(*small, prompt, GREEDY, template="raw")
        assert answer.choices[0].text == expected
        usage = answer.usage
        found = answer.choices[0].finish_reason, usage.prompt_tokens
        reported = (*found, usage.completion_tokens)
        assert reported == usage_of(*small, prompt, GREEDY)
        assert answer.model == "tiny"
    assert len({answer.choices[0].text for answer in answers}) == len(PROMPTS)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=40, temp=1.5, seed=11),
        Sampling(max_tokens=9, temp=1.5, seed=2**64 - 1),
        Sampling(max_tokens=40, temp=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=3),
        Sampling(max_tokens=40, repetition_penalty=1.3),
        Sampling(max_tokens=40, repetition_penalty=1.3, repetition_context=4),
        Sampling(max_tokens=30, min_tokens=25, logit_bias=((2, 6.0),)),
        Sampling(max_tokens=30, no_repeat_ngram=2),
        Sampling(max_tokens=30, presence_penalty=1.5, frequency_penalty=0.5),
    ],
    ids=str,
)
def test_sampled_completions_are_those_of_generate(client, small, sampling):
    options = {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "min_tokens": sampling.min_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "repetition_context_size": sampling.repetition_context,
        "no_repeat_ngram_size": sampling.no_repeat_ngram,
    }
    for prompt in PROMPTS[1:3]:
        answer = complete(
            client,
            prompt,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temp,
            top_p=sampling.top_p,
            seed=sampling.seed,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias={str(id): bias for id, bias in sampling.logit_bias},
            extra_body=options,
        )
        expected = generate(*small, prompt, sampling, template="raw")
        assert answer.choices[0].text == expected


def test_options_of_the_command_are_the_defaults(small, openai):
    sampling = Sampling(max_tokens=7, temp=1.2, top_k=9, seed=4)
    given = {"max_tokens": 7, "temp": 1.2, "top_k": 9, "seed": 4}
    with serving(*small, given=given) as server:
        for prompt in PROMPTS[:2]:
            status, answer = post(server.url, {"prompt": prompt})
            expected = generate(*small, prompt, sampling, template="raw")
            assert (status, answer["choices"][0]["text"]) == (200, expected)
        status, answer = post(server.url, {"prompt": "a", "temperature": 0})
        expected = generate(*small, "a", Sampling(max_tokens=7), template="raw")
        assert answer["choices"][0]["text"] == expected


def test_without_a_seed_answers_differ(client):
    texts = {complete(client, "a", temperature=1.5).choices[0].text for _ in range(4)}
    assert len(texts) > 1


def test_a_joined_stream_is_the_whole_answer(client):
    for prompt in PROMPTS:
        options = {"stream_options": {"include_usage": True}}
        *parts, counts = complete(client, prompt, stream=True, **options)
        whole = complete(client, prompt)
        texts = [part.choices[0].text for part in parts]
        assert "".join(texts) == whole.choices[0].text
        reasons = [part.choices[0].finish_reason for part in parts]
        assert reasons[:-1] == [None] * (len(parts) - 1)
        assert reasons[-1] == whole.choices[0].finish_reason
        assert counts.choices == []
        assert counts.usage.completion_tokens == whole.usage.completion_tokens
        assert counts.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_stream_ends_with_done(server):
    data = request(server.url, "/v1/completions", {"prompt": "a", "stream": True})
    status, headers, body = send(server.url, data)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["connection"] == "close"
    assert events(body)[-1] == "[DONE]"
    assert all("usage" not in event for event in events(body)[:-1])


def test_characters_of_several_tokens_are_whole_in_a_stream(client, small):
    options = {"temperature": 1.0, "max_tokens": 90, "seed": 5}
    # Nothing but the bytes of these characters, and EOS banned.
    processor = small[1].processor
    names = [f"<0x{byte:02X}>" for byte in "日本é".encode()]
    bias = {str(processor.PieceToId(name)): 100.0 for name in names}
    chunks = [
        chunk.choices[0].text
        for chunk in complete(client, "a", stream=True, logit_bias=bias, **options)
    ]
    whole = complete(client, "a", logit_bias=bias, **options).choices[0].text
    assert "".join(chunks) == whole
    characters = {c for c in "".join(chunks) if c not in "\ufffd"}
    assert characters
    assert characters <= set("日本é") | {chr(n) for n in range(0x80, 0x10000)}


def test_a_leading_space_is_kept(client, small):
    bias = {str(space_of(small[1])): 100}
    answer = complete(client, "a", max_tokens=1, logit_bias=bias)
    assert answer.choices[0].text.startswith(" ")
    stop = answer.choices[0].text * 3  # its tokens are not reported
    options = {"logit_bias": bias, "logprobs": 0, "stop": stop}
    answer = complete(client, "a", max_tokens=9, **options)
    assert (answer.choices[0].text, answer.choices[0].logprobs.tokens) == ("", [])
    assert answer.usage.completion_tokens == 3


def test_stop_texts_end_the_answer_as_in_generate(client, small):
    expected = generate(*small, "The king", GREEDY, template="raw")
    for start in range(0, len(expected) - 3, 6):
        stop = expected[start : start + 3]
        answer = complete(client, "The king", stop=[stop, "not in it"])
        sampling = replace(GREEDY, stop=(stop, "not in it"))
        text = generate(*small, "The king", sampling, template="raw")
        assert answer.choices[0].text == text
        assert answer.choices[0].finish_reason == "stop"
        streamed = complete(client, "The king", stop=stop, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == text


def test_no_limit_ends_at_the_context(client):
    bias = {"2": -100}
    for options in (
        {"max_tokens": -1},
        {"extra_body": {"max_completion_tokens": -1}},
        {"max_tokens": 2**63 - 1},
    ):
        answer = complete(client, [5] * (CONTEXT - 3), logit_bias=bias, **options)
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("older", [None, 0, 1, 9])
@pytest.mark.parametrize("newer", [1, 3])
def test_max_completion_tokens_replaces_max_tokens(server, older, newer):
    body = {"prompt": "a", "max_tokens": older, "max_completion_tokens": newer}
    body |= {"logit_bias": {"2": -99}}
    status, answer = post(server.url, body)
    assert (status, answer["usage"]["completion_tokens"]) == (200, newer)
    body |= {"echo": True, "max_completion_tokens": 0}
    status, answer = post(server.url, body)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 0)


def test_a_prompt_may_be_ids(client, small):
    ids = small[1].encode("The king")
    expected = generate(*small, "The king", GREEDY, template="raw")
    for prompt in (ids, [ids], ["The king"]):
        assert complete(client, prompt).choices[0].text == expected


# Several answers -----------------------------------------------------------------


def test_lists_of_prompts_are_answered_in_their_order(client, small):
    ids = [small[1].encode(prompt) for prompt in PROMPTS]
    expected = [generate(*small, p, GREEDY, template="raw") for p in PROMPTS]
    for prompts in (list(PROMPTS), ids):
        answer = complete(client, prompts)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [*range(len(PROMPTS))]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        chunks = list(complete(client, prompts, stream=True))
        for index, text in enumerate(expected):
            own = [c.choices[0].text for c in chunks if c.choices[0].index == index]
            assert "".join(own) == text


def test_n_answers_of_each_prompt(client, small):
    sampling = Sampling(max_tokens=9, temp=1.5, seed=7)
    options = {"n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 9}
    answer = complete(client, ["a", "The king"], **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    texts = [choice.text for choice in answer.choices]
    # The first answer is that of `generate` with this seed; the others differ.
    assert texts[0] == generate(*small, "a", sampling, template="raw")
    assert len(set(texts)) == 6
    again = complete(client, ["a", "The king"], **options)
    assert [choice.text for choice in again.choices] == texts
    count = len(small[1].encode("a")) + len(small[1].encode("The king"))
    assert answer.usage.prompt_tokens == count  # each prompt once


def test_too_many_answers_are_refused(server):
    for change in (
        {"prompt": ["a"] * 129},
        {"prompt": ["a"] * 65, "n": 2},
        {"n": 129},
    ):
        status, answer = post(server.url, {"prompt": "a", "max_tokens": 1} | change)
        assert status == 400
        assert "128" in answer["error"]["message"]
    healthy(server.url)


# Prefixes ------------------------------------------------------------------------


def test_answers_can_be_continued_from_what_is_kept(client, small):
    tokenizer, ids = small[1], small[1].encode("Continue this, please. " * 3)
    for _ in range(4):
        pieces = list(stream(*small, ids, replace(GREEDY, max_tokens=5)))
        answer = complete(client, ids, max_tokens=5)
        assert answer.choices[0].text == "".join(piece.text for piece in pieces)
        ids = [*ids, *(p.token for p in pieces if p.token != tokenizer.eos_id)]
    usage = complete(client, ids, max_tokens=5).usage
    cached = usage.prompt_tokens_details.cached_tokens
    assert len(ids) - 6 <= cached < len(ids)
    assert usage.prompt_tokens == len(ids)
