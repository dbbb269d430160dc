import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import small_tokenizer
from trainings import read_data

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.data_table import tabulate
from mlx_openelm.finetuning.record_formats import TemplateChoice, choose_template
from mlx_openelm.finetuning.record_samples import make_pairs, make_samples
from mlx_openelm.finetuning.records import Data, Dataset, Record
from mlx_openelm.text.templates import Turn, encode_prompt

tokenizer = small_tokenizer()
BOS, EOS = 1, 2
TEMPLATES = ("raw", "instruct", "alpaca", "openelm-peft")
words = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581<"),
    min_size=1,
).filter(str.strip)


def dataset(*conversations, format="prompt+completion", rejected=None) -> Dataset:
    """Return conversations in which user and assistant alternate."""
    records = []
    for i, texts in enumerate(conversations):
        roles = ["assistant"] if len(texts) == 1 else ["user", "assistant"] * len(texts)
        turns = tuple(
            text if isinstance(text, Turn) else Turn(role, text)
            for role, text in zip(roles, texts, strict=False)
        )
        location = f"train.jsonl:{i + 1}"
        key = repr(texts).encode()
        records.append(Record(location, turns, key, rejected and rejected[i]))
    return Dataset(Path("train.jsonl"), format, (), tuple(records), "0" * 64)


def make_one(*texts, template="raw", max_length=10_000, **options):
    samples, _ = make_samples(
        dataset(texts), tokenizer, template=template, max_length=max_length, **options
    )
    (sample,) = samples
    assert sample.tokens.dtype == np.int32
    assert sample.loss_mask.dtype == bool
    assert sample.tokens.shape == sample.loss_mask.shape
    assert sample.tokens[0] == BOS
    assert not sample.loss_mask[0]
    return sample.tokens.tolist(), sample.loss_mask.tolist()


def targets(tokens, loss_mask) -> list[int]:
    return [token for token, count in zip(tokens, loss_mask, strict=True) if count]


# Rendering -----------------------------------------------------------------------

I16 = " " * 16
TASK = "Below is an instruction that describes a task"
REPLY = "Write a response that appropriately completes the request."
PAIRED = ", paired with an input that provides further context. "


def test_apples_peft_template_is_reproduced_byte_for_byte():
    tokens, _ = make_one("Do it.", "the correct answer is 1", template="openelm-peft")
    assert tokens == [
        BOS,
        *tokenizer.encode(
            f"{TASK}. {REPLY}  \n\n{I16}### Instruction:\n{I16}Do it.\n{I16}\n"
            f"{I16}### Response:\n{I16}the correct answer is 1",
            bos=False,
        ),
        EOS,
    ]
    with_input = (Turn("user", "Do it.", input="Here."), "the end")
    tokens, _ = make_one(*with_input, template="openelm-peft")
    assert tokenizer.decode(tokens) == (
        f"{TASK}{PAIRED}{REPLY} \n\n{I16}### Instruction:\n{I16}Do it.\n{I16}\n"
        f"{I16}### Input:\n{I16}Here.\n{I16}\n{I16}### Response:\n{I16}the end"
    )


def test_alpacas_template_has_a_form_with_input():
    text = tokenizer.decode(make_one("Do it.", "Done", template="alpaca")[0])
    assert text == f"{TASK}. {REPLY}\n\n### Instruction:\nDo it.\n\n### Response:\nDone"
    with_input = (Turn("user", "Do it.", input="Here."), "Done")
    assert tokenizer.decode(make_one(*with_input, template="alpaca")[0]) == (
        f"{TASK}{PAIRED}{REPLY}\n\n### Instruction:\nDo it.\n\n### Input:\nHere.\n\n"
        "### Response:\nDone"
    )
    for template, text in (("raw", "Do it.\n\nHere. Done"), ("instruct", "\n\nHere.")):
        assert text in tokenizer.decode(make_one(*with_input, template=template)[0])


def test_a_second_exchange_follows_an_eos_and_has_no_header():
    for template, indent in (("alpaca", ""), ("openelm-peft", I16)):
        turns = ("One?", "1.", "Two?", "2.")
        tokens, _ = make_one(*turns, template=template)
        first, _ = make_one(*turns[:2], template=template)
        gap = f"\n{indent}\n{indent}"
        second = (
            f"\n\n{indent}### Instruction:\n{indent}Two?{gap}### Response:\n{indent}2."
        )
        assert tokens == [*first, *tokenizer.encode(second, bos=False), EOS]


@pytest.mark.parametrize("template", ["instruct", "alpaca", "openelm-peft"])
def test_a_system_text_has_the_same_position_as_at_generation(template):
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "One?"),
        Turn("assistant", "the"),
    ]
    tokens, loss_mask = make_one(*turns, template=template)
    text = re.sub(" +\n", "\n", tokenizer.decode(tokens))  # dummy spaces after EOS
    assert text.startswith(
        {
            "instruct": "<|system|>\nBe brief.\n<|user|>\nOne?",
            "alpaca": "Be brief.\n\n### Instruction:\nOne?",
            "openelm-peft": f"Be brief.\n\n{I16}### Instruction:\n{I16}One?",
        }[template]
    )
    prompt_ids = encode_prompt(
        tokenizer, "One?", template=template, system="Be brief.", as_trained=True
    )
    assert tokens[: loss_mask.index(True)] == prompt_ids


def test_raw_joins_prompt_and_completion_by_one_space():
    for prompt, answer, text in (
        ("Hi", "there", "Hi there"),
        ("Hi\n", "there", "Hi\nthere"),
        ("Hi ", "there", "Hi there"),
        ("Hi", "\n\nthere", "Hi\n\nthere"),
        ("", "there", "there"),
    ):
        tokens, loss_mask = make_one(prompt, answer)
        assert tokens == [*tokenizer.encode(text), EOS]
        assert tokenizer.decode(targets(tokens, loss_mask)).strip() == "there"


def test_instruct_repeats_zephyrs_turns():
    tokens, _ = make_one("One?", "1.", "Two?", "2.", template="instruct")
    segments = [
        "<|system|>\n",
        "\n<|user|>\nOne?",
        "\n<|assistant|>\n1.",
        "\n<|user|>\nTwo?",
        "\n<|assistant|>\n2.",
    ]
    expected = [BOS]
    for segment in segments:
        expected += [*tokenizer.encode(segment, bos=False), EOS]
    assert tokens == expected


@pytest.mark.parametrize("template", TEMPLATES)
@given(prompt=words, answer=words)
def test_generation_and_training_have_the_same_prompt_ids(template, prompt, answer):
    """The prompt's ids at generation are the sample's ids before the answer.

    If the prompt ends in a space, that space belongs to the first token of the answer,
    and `as_trained` leaves it out.
    """
    tokens, loss_mask = make_one(prompt, answer, template=template)
    start = loss_mask.index(True)
    prompt_ids = [
        encode_prompt(tokenizer, prompt, template=template, as_trained=as_trained)
        for as_trained in (False, True)
    ]
    common = max(
        next(
            (i for i, (a, b) in enumerate(zip(ids, tokens, strict=False)) if a != b),
            len(ids),
        )
        for ids in prompt_ids
    )
    assert start == common
    assert loss_mask[start:] == [True] * (len(tokens) - start)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_of_words_has_the_same_ids_at_generation(template):
    for prompt in ("Who came?", "Once upon a", "Who? "):
        tokens, loss_mask = make_one(prompt, "the old woman", template=template)
        start = loss_mask.index(True)
        trained = encode_prompt(tokenizer, prompt, template=template, as_trained=True)
        assert trained == tokens[:start]
        if template in ("instruct", "alpaca"):
            assert encode_prompt(tokenizer, prompt, template=template) == trained


def test_a_conversation_that_a_template_does_not_support_is_reported():
    turns = [("Hi", "Hello"), ("One?", "1.", "Two?", "2.")]
    with pytest.raises(OpenELMError, match=r"train\.jsonl:2: .*raw.*instruct"):
        make_samples(dataset(*turns), tokenizer, template="raw", max_length=99)
    with pytest.raises(OpenELMError, match="'zephyr'"):
        make_samples(dataset(*turns), tokenizer, template="zephyr", max_length=99)


def test_the_template_is_chosen_by_request_model_and_format():
    assert choose_template("alpaca", "instruct", "messages").name == "alpaca"
    assert choose_template("auto", "alpaca", "messages").name == "alpaca"
    assert choose_template(None, None, "messages").name == "instruct"
    assert choose_template(None, None, "preferences in messages").name == "instruct"
    assert choose_template(None, None, "alpaca").name == "alpaca"
    assert choose_template(None, None, "prompt+completion").name == "raw"
    text = choose_template(None, "instruct", "text")
    assert text == TemplateChoice("raw", "plain texts have no prompt")
    with pytest.raises(OpenELMError, match="plain texts"):
        choose_template("instruct", None, "text")


# The loss mask -------------------------------------------------------------------


@pytest.mark.parametrize("template", ["instruct", "alpaca", "openelm-peft"])
def test_the_loss_is_on_all_answers_with_their_eos(template):
    turns = ("One?", "and one more", "Two?", "two, she said", "More?", "no")
    tokens, loss_mask = make_one(*turns, template=template)
    trained = tokenizer.decode(targets(tokens, loss_mask)).replace(" ", "")
    assert trained == "andonemoretwo,shesaidno"
    assert targets(tokens, loss_mask).count(EOS) == 3
    last_tokens, last = make_one(*turns, template=template, last_turn_only=True)
    assert last_tokens == tokens
    assert tokenizer.decode(targets(tokens, last)).strip() == "no"
    assert targets(tokens, last)[-1] == EOS
    everything = make_one(*turns, template=template, mask_prompt=False)
    assert everything == (tokens, [False] + [True] * (len(tokens) - 1))


def test_a_turn_after_the_last_answer_is_left_out():
    whole = make_one("One?", "1.", template="instruct")
    assert make_one("One?", "1.", "Two?", template="instruct") == whole


def test_the_number_of_targets_is_exact():
    _, loss_mask = make_one("Who came?", "the old woman")
    assert sum(loss_mask) == len(tokenizer.encode("the old woman", bos=False)) + 1
    _, loss_mask = make_one("Who came?", "the old woman", mask_prompt=False)
    assert sum(loss_mask) == len(tokenizer.encode("Who came? the old woman"))


# Truncation ----------------------------------------------------------------------


@given(words, st.integers(2, 12))
def test_a_long_text_is_split_without_loss(text, max_length):
    data = dataset((text,), format="text")
    pieces, table = make_samples(data, tokenizer, template="raw", max_length=max_length)
    joined = [token for piece in pieces for token in piece.tokens[1:].tolist()]
    assert [BOS, *joined] == [*tokenizer.encode(text), EOS]
    for piece in pieces:
        assert piece.tokens[0] == BOS
        assert piece.loss_mask.tolist() == [False] + [True] * (len(piece.tokens) - 1)
        assert len(piece.tokens) <= max_length
    assert table.cut == (len(pieces) > 1)
    assert table.targets == len(joined)


def test_a_long_answer_is_truncated_at_its_end_and_a_prompt_at_its_start():
    prompt, answer = "Once upon a time " * 3, "there was a king " * 3
    tokens, loss_mask = make_one(prompt, answer)
    start, length = loss_mask.index(True), len(tokens)

    def truncate(max_length):
        samples, table = make_samples(
            dataset((prompt, answer)), tokenizer, template="raw", max_length=max_length
        )
        return samples[0].tokens.tolist(), samples[0].loss_mask.tolist(), table

    for max_length in range(2, length + 2):
        truncated, mask, table = truncate(max_length)
        assert len(truncated) == min(length, max_length)
        assert truncated[0] == BOS
        assert any(mask)
        assert not mask[0]
        if max_length >= length:
            assert (truncated, table.cut, table.prompt_cut) == (tokens, 0, 0)
        elif max_length > start:
            assert truncated == tokens[:max_length]
            assert mask == loss_mask[:max_length]
            assert (table.cut, table.prompt_cut) == (1, 0)
        else:
            first = min(start, length - max_length + 1)
            assert truncated[1:] == tokens[first : first + max_length - 1]
            assert mask[1:] == loss_mask[first : first + max_length - 1]
            fits = length - start <= max_length - 1
            assert (table.cut, table.prompt_cut) == (not fits, 1)


def test_empty_texts_are_left_out_and_counted():
    data = dataset(("",), ("Once",), (" \n",), format="text")
    samples, table = make_samples(data, tokenizer, template="raw", max_length=99)
    assert [sample.place for sample in samples] == ["train.jsonl:2"]
    assert (table.records, table.samples, table.nothing_to_learn) == (3, 1, 2)


# Preferences ---------------------------------------------------------------------


def make_pair(prompt, chosen, rejected, **options):
    data = dataset((prompt, chosen), rejected=[rejected])
    limits = {"max_length": 99, "max_prompt_length": 49} | options
    return make_pairs(data, tokenizer, template="raw", **limits)


def test_a_pair_is_the_same_prompt_with_two_answers():
    ((pair,), table) = make_pair("Who came?", "the wolf", "nobody")
    for side, answer in ((pair.chosen, "the wolf"), (pair.rejected, "nobody")):
        expected = make_one("Who came?", answer)
        assert (side.tokens.tolist(), side.loss_mask.tolist()) == expected
    assert (table.samples, sum(table.lengths)) == (1, 2)
    assert table.tokens == len(pair.chosen.tokens) + len(pair.rejected.tokens)


def test_the_loss_of_a_preference_is_on_the_last_answer():
    data = dataset(("One?", "1.", "Two?", "two"), rejected=["none"])
    limits = {"max_length": 999, "max_prompt_length": 499}
    ((pair,), _) = make_pairs(data, tokenizer, template="instruct", **limits)
    for side, answer in ((pair.chosen, "two"), (pair.rejected, "none")):
        trained = targets(side.tokens.tolist(), side.loss_mask.tolist())
        assert tokenizer.decode(trained).strip() == answer
        assert trained[-1] == EOS


def test_long_preferences_are_truncated_as_for_openelm_instruct():
    prompt, short, long = "Once upon a time" * 3, "yes", "there was a king " * 3
    ((whole,), _) = make_pair(prompt, short, long, max_length=999)
    start = whole.chosen.loss_mask.tolist().index(True)
    length = len(whole.rejected.tokens)
    limits = {"max_length": length - 3, "max_prompt_length": start - 2}
    ((pair,), table) = make_pair(prompt, short, long, **limits)
    assert (table.prompt_cut, table.cut) == (1, 1)
    for side, before in ((pair.chosen, whole.chosen), (pair.rejected, whole.rejected)):
        kept = [BOS, *before.tokens[3:].tolist()][: limits["max_length"]]
        assert side.tokens.tolist() == kept
        assert side.loss_mask.tolist().index(True) == start - 2
    ((pair,), table) = make_pair(
        prompt, short, long, max_length=length, max_prompt_length=3
    )
    assert (table.prompt_cut, table.cut) == (0, 0)  # it fits: nothing is truncated
    assert pair.rejected.tokens.tolist() == whole.rejected.tokens.tolist()


def test_pairs_with_equal_answers_are_left_out():
    samples, table = make_pair("Who?", "he", "he")
    assert (samples, table.nothing_to_learn) == ((), 1)
    options = {"max_length": 8, "max_prompt_length": 4}
    samples, table = make_pair("Who?", "a a a a a b", "a a a a a c", **options)
    # truncated to equal texts
    assert (samples, table.nothing_to_learn) == ((), 1)


# Statistics ----------------------------------------------------------------------


def test_the_table_has_statistics_and_is_json(tmp_path):
    texts = ["a story", "a  story", "b </s>", "c " * 99, ""]
    for name, some in (("train", texts), ("valid", ["a story\n", "d"])):
        lines = [json.dumps({"text": text}) for text in some]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = read_data(tmp_path)
    train, valid = (
        make_samples(split, tokenizer, template="raw", max_length=16)[1]
        for split in (data.train, data.valid)
    )
    choice = choose_template(None, None, data.train.format)
    table = tabulate(data, choice, {"train": train, "valid": valid})
    assert (table.train.records, table.train.duplicates) == (5, 1)
    assert (table.train.spelt_eos, table.train.cut) == (1, 1)
    assert table.train.nothing_to_learn == 1
    assert table.valid.in_train == 1
    assert table.train.edges == (0, 1, 2, 4, 8, 16)
    assert sum(table.train.lengths) == table.train.samples
    assert table.train.longest == 16
    assert table.test is None
    assert "1 record of valid: also in train, so the valid loss is too low." in (
        table.warnings
    )
    assert len(table.warnings) == 5
    assert json.loads(json.dumps(dataclasses.asdict(table)))["digest"] == data.digest


def test_lengths_are_counted_up_to_their_edge():
    data = dataset(*[("x" * n,) for n in range(1, 15)], format="text")
    samples, table = make_samples(data, tokenizer, template="raw", max_length=16)
    sizes = [len(sample.tokens) for sample in samples]
    assert table.lengths == tuple(
        sum(low < size <= high for size in sizes)
        for low, high in zip(table.edges, table.edges[1:], strict=False)
    )
    assert table.median in sizes


def test_data_without_targets_is_refused():
    empty = dataset(("",), format="text")
    _, table = make_samples(empty, tokenizer, template="raw", max_length=16)
    choice = TemplateChoice("raw", "")
    with pytest.raises(OpenELMError, match="nothing to train on"):
        tabulate(Data(empty, None, None, ()), choice, {"train": table})


# Other tools ---------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("template", ["instruct", "alpaca", "raw"])
def test_mlx_lm_has_the_same_tokens_and_the_same_prompt(shared, tmp_path, template):
    """With a chat template that renders the same, through transformers' tokenizer."""
    from mlx_lm.tuner.datasets import CompletionsDataset
    from transformers import AutoTokenizer

    from mlx_openelm.storage.tokenizer_finder import read_tokenizer, write_tokenizer

    llama = read_tokenizer(shared / "data" / "llama-tokenizer")
    write_tokenizer(llama, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    user, answer = "{{ messages[0].content }}", "{{ messages[1].content }}</s>"
    before, after = {
        "instruct": (
            "<|system|>\n</s>\n<|user|>\n" + user + "</s>\n<|assistant|>\n",
            answer,
        ),
        "alpaca": (
            f"{TASK}. {REPLY}\n\n### Instruction:\n{user}\n\n### Response:\n",
            answer,
        ),
        "raw": (user, " " + answer),
    }[template]
    ends = "{% if not add_generation_prompt %}" + after + "{% endif %}"
    theirs.chat_template = "<s>" + before + ends
    file = shared / "data" / "gsm8k" / "test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()[:60]]
    keys = {"prompt_key": "question", "completion_key": "answer"}
    theirs_read = CompletionsDataset(rows, theirs, *keys.values(), mask_prompt=True)
    whole = read_data(file, **keys)
    samples, _ = make_samples(whole.train, llama, template=template, max_length=2048)
    ours = {sample.place: sample for sample in samples}
    compared = 0
    for i, row in enumerate(rows, 1):
        sample = ours.get(f"test.jsonl:{i}")
        if sample is not None:  # not held out
            tokens, offset = theirs_read.process(row)
            assert sample.tokens.tolist() == tokens
            assert sample.loss_mask.tolist().index(True) == offset
            compared += 1
    assert compared > 40


def test_prompts_of_gsm8k_have_the_same_ids_at_generation(shared):
    from mlx_openelm.storage.tokenizer_finder import read_tokenizer

    llama = read_tokenizer(shared / "data" / "llama-tokenizer")
    file = shared / "data" / "gsm8k" / "test.jsonl"
    data = read_data(file, prompt_key="question", completion_key="answer").train
    data = dataclasses.replace(data, records=data.records[:200])
    for template in TEMPLATES:
        samples, table = make_samples(data, llama, template=template, max_length=2048)
        assert table.samples == 200
        for record, sample in zip(data.records, samples, strict=True):
            start = int(sample.loss_mask.argmax())
            prompt = record.turns[0].text
            prompt_ids = encode_prompt(
                llama, prompt, template=template, as_trained=True
            )
            answer = record.turns[1].text
            if template == "openelm-peft" and not answer[0].isascii():
                continue
            if template == "openelm-peft" and answer[0].isdigit():
                # Llama's digits have no leading space, so the prompt keeps it.
                prompt_ids = encode_prompt(llama, prompt, template=template)
            assert sample.tokens[:start].tolist() == prompt_ids
