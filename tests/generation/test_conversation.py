"""Conversations: prompts, the context window, and saved files."""

import json
import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import UNEVEN, build, small_tokenizer

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.record_samples import make_samples
from mlx_openelm.finetuning.records import Dataset, Record
from mlx_openelm.generation import conversation as module
from mlx_openelm.generation.conversation import Conversation, read_saved
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import Piece, stream
from mlx_openelm.text.templates import Turn, encode_turns
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.tuning import Tuning

MODEL = build(replace(UNEVEN, max_context_length=512))
TEMPLATES = ("instruct", "alpaca", "openelm-peft")


def make_chat(template: str = "instruct", *, model=MODEL, **options) -> Conversation:
    sampling = Sampling(
        **{"max_tokens": 8, **{k: options.pop(k) for k in SAMPLED & options.keys()}}
    )
    return Conversation(
        model, small_tokenizer(), sampling, template=template, **options
    )


SAMPLED = {"max_tokens", "temp", "seed"}


def send(chat: Conversation, message: str) -> str:
    return "".join(piece.text for piece in chat.reply(message))


def messages(*texts: str) -> tuple[Turn, ...]:
    return tuple(
        Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)
    )


def piece(text: str, finish_reason: str | None = None, token: int = 5) -> Piece:
    last = list(stream(MODEL, small_tokenizer(), [1], Sampling(max_tokens=1)))[-1]
    return replace(last, text=text, finish_reason=finish_reason, token=token)


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """Return the ids of every prompt that the model gets."""
    seen = []

    def watched(model, tokenizer, ids, *args, **options):
        seen.append(list(ids))
        return stream(model, tokenizer, ids, *args, **options)

    monkeypatch.setattr(module, "stream", watched)
    return seen


# Prompts -------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Be kind."])
def test_a_prompt_equals_the_training_sample_up_to_the_answer(template, system):
    turns = messages("Who wept?", "The youngest.", "And why?", " She had nothing.")
    first = (Turn("system", system),) if system else ()
    record = Record("here", (*first, *turns), b"")
    data = Dataset(Path("here"), "messages", (), (record,), "")
    [sample], _ = make_samples(
        data, small_tokenizer(), template=template, max_length=512
    )
    ids, left_space = encode_turns(small_tokenizer(), turns[:3], template, system)
    assert list(sample.tokens[: len(ids)]) == ids
    assert left_space == (template == "openelm-peft")


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_prompt_is_rendered_from_all_turns(template, prompts):
    chat = make_chat(template, system="Be kind.")
    for message in ("Hi", "Who wept?\nAnd why?", "1234"):
        answer = send(chat, message)
        assert chat.turns[-2:] == messages(message, answer)
    fresh = [
        encode_turns(small_tokenizer(), chat.turns[:n], template, "Be kind.")[0]
        for n in (1, 3, 5)
    ]
    assert prompts == fresh
    assert [ids.count(small_tokenizer().bos_id) for ids in prompts] == [1, 1, 1]
    if template == "instruct":
        assert [ids.count(small_tokenizer().eos_id) for ids in prompts] == [2, 4, 6]
    else:
        assert [ids.count(small_tokenizer().eos_id) for ids in prompts] == [0, 1, 2]


def test_without_a_template_the_turns_form_one_text(prompts):
    chat = make_chat("auto")
    assert chat.is_raw
    texts = []
    for message in ("Once upon a time", "", "Then", "\nThe wolf"):
        text = "".join(turn.text for turn in chat.turns)
        new_word = message == "Then" and not text[-1].isspace()
        texts += [" " if new_word else "", message, send(chat, message)]
    whole = "".join(texts[:-1])
    assert prompts[-1] == small_tokenizer().encode(whole)
    assert "a time" + texts[2] + texts[5] in whole  # an empty line continues it


def test_the_templates_last_space_is_not_part_of_the_answer(monkeypatch):
    script = [piece(""), piece(" The"), piece(" wolf", "stop")]
    monkeypatch.setattr(module, "stream", lambda *args, **options: iter(script))
    for template, answer in (("openelm-peft", "The wolf"), ("instruct", " The wolf")):
        chat = make_chat(template)
        assert send(chat, "Who?") == answer
        assert chat.turns == messages("Who?", answer)


def test_the_stored_template_is_the_default_and_an_unknown_one_is_refused():
    stored = Tokenizer(small_tokenizer().model_proto, template="alpaca")
    assert Conversation(MODEL, stored).template == "alpaca"
    assert Conversation(MODEL, stored, template="instruct").template == "instruct"
    assert Conversation(MODEL, small_tokenizer()).template == "raw"
    with pytest.raises(OpenELMError, match="No template is called 'chatml'"):
        make_chat("chatml")


def test_eos_spelled_as_text_ends_an_answer(monkeypatch):
    samplings = []
    monkeypatch.setattr(
        module,
        "stream",
        lambda m, t, i, sampling, **o: samplings.append(sampling) or iter([piece("x")]),
    )
    for template in ("instruct", "raw"):
        list(make_chat(template).reply("Hi"))
    assert [sampling.stop for sampling in samplings] == [("</s>",), ()]


def test_a_seed_is_set_once_so_that_a_retry_differs():
    answers = []
    for seed in (1, 1, 2):
        chat = make_chat(temp=2.0, seed=seed, max_tokens=24)
        first = send(chat, "Hi")
        again = "".join(p.text for p in chat.retry())
        answers.append((first, again))
        assert first != again
        assert chat.turns == messages("Hi", again)
    assert answers[0] == answers[1] != answers[2]


# Reuse of the context ------------------------------------------------------------


@pytest.fixture
def passed(monkeypatch) -> list[int]:
    """Return the number of tokens of each forward pass."""
    seen: list[int] = []
    kind = type(MODEL.transformer)
    forward = kind.__call__

    def counted(self, tokens, *args, **options):
        seen.append(tokens.shape[1])
        return forward(self, tokens, *args, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    return seen


@pytest.mark.parametrize("template", [*TEMPLATES, "raw"])
def test_processed_tokens_are_not_processed_again(template, passed, prompts):
    roomy = build(replace(UNEVEN, max_context_length=2048))
    chat, before = make_chat(template, max_tokens=24, model=roomy), 0
    for n, message in enumerate(("The wolf wept", "And why?", "Who said that?")):
        passed.clear()
        answer = list(chat.reply(message))
        last, new = answer[-1], len(answer) - 1
        assert last.prompt_tokens == len(prompts[-1])
        assert sum(passed) == len(prompts[-1]) - last.cached_tokens + new
        if n:  # except for tokens that the answer's first piece may change
            assert last.cached_tokens >= before - 8
        before = len(prompts[-1])
    assert before > 100


def test_answers_equal_those_without_a_reused_context(monkeypatch):
    def fresh(model, tokenizer, ids, sampling, **options):
        return stream(model, tokenizer, ids, sampling)

    def converse(*, template: str) -> tuple[Turn, ...]:
        chat = make_chat(template, max_tokens=12)
        for n in range(6):
            send(chat, f"{n} said the wolf")
            with closing(chat.reply("And then?")) as pieces:
                for _ in zip(range(n), pieces, strict=False):
                    pass
            if n % 3 == 2:
                list(chat.retry())
                chat.undo()
        return chat.turns

    reused = {template: converse(template=template) for template in ("instruct", "raw")}
    monkeypatch.setattr(module, "stream", fresh)
    for template, turns in reused.items():
        assert converse(template=template) == turns


def test_after_an_interrupted_step_the_context_is_rebuilt(monkeypatch):
    chat, expected = make_chat(), make_chat()
    for conversation in (chat, expected):
        send(conversation, "Hi")
    layer = MODEL.layers[1]
    forward = type(layer).__call__

    def breaks(self, *args, **options):
        if self is layer:
            raise KeyboardInterrupt
        return forward(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(type(layer), "__call__", breaks)
        with pytest.raises(KeyboardInterrupt):
            send(chat, "Who wept?")
    assert send(chat, "Who wept?") == send(expected, "Who wept?")


def test_every_answer_uses_the_settings_also_after_an_interrupted_step(monkeypatch):
    tuning, used = Tuning(prefill_chunk=3), []

    def interrupted(*args, context, **options):
        used.append(context.tuning)
        raise KeyboardInterrupt
        yield  # as `stream`, a generator

    chat = make_chat(tuning=tuning)
    with monkeypatch.context() as patched:
        patched.setattr(module, "stream", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                send(chat, "Hi")
    assert used == [tuning] * 2


# Stopped answers -----------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_yielded_text_of_a_stopped_answer_is_kept(count, prompts):
    chat, shown = make_chat(), ""
    with closing(chat.reply("Hi")) as pieces:
        for _, got in zip(range(count), pieces, strict=False):
            shown += got.text
    assert chat.turns == (messages("Hi", shown) if shown else ())
    send(chat, "Go on")
    turns = messages(*(("Hi", shown) if shown else ()), "Go on")
    assert prompts[-1] == encode_turns(small_tokenizer(), turns, "instruct")[0]


def test_an_answer_stopped_before_any_text_changes_nothing(monkeypatch):
    chat = make_chat()
    send(chat, "Hi")
    before = chat.turns
    for pieces in (chat.reply("Who?"), chat.retry()):
        pieces.close()
        assert chat.turns == before

    def fails(*args, **options):
        yield piece("")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "stream", fails)
    for pieces in (chat.reply("Who?"), chat.retry()):
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
        assert chat.turns == before


def test_an_empty_answer_is_recorded(monkeypatch):
    script = [piece("", "stop", token=2)]
    monkeypatch.setattr(module, "stream", lambda *args, **options: iter(script))
    chat = make_chat()
    assert send(chat, "Hi") == ""
    assert chat.turns == messages("Hi", "")


def test_undo_and_reset():
    chat = make_chat(system="Be kind.")
    for wrong in (chat.undo, chat.retry):
        with pytest.raises(OpenELMError, match="There is no"):
            wrong()
    send(chat, "Hi")
    kept = chat.turns
    send(chat, "Who?")
    chat.undo()
    assert chat.turns == kept
    chat.reset()
    assert (chat.turns, chat.system) == ((), "Be kind.")


# The context ---------------------------------------------------------------------

lengths = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 60)), max_size=12)


@given(lengths, st.sampled_from(["", "Be kind."]), st.integers(1, 300))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_as_few_pairs_as_possible_are_omitted(monkeypatch, lengths, system, max_tokens):
    words = ["the", "wolf", "said", "love", "gold", "wept", "1234"]
    seen: list[list[int]] = []
    answer = ""

    def scripted(model, tokenizer, ids, *args, **options):
        seen.append(list(ids))
        yield piece_of(answer)

    ready = piece("", "stop")

    def piece_of(text: str) -> Piece:
        return replace(ready, text=text)

    monkeypatch.setattr(module, "stream", scripted)
    chat = make_chat("instruct", system=system, max_tokens=max_tokens)
    most = 512 - min(max_tokens, 256)
    rng = random.Random(7)

    def fits(left_out: int, turns) -> bool:
        rest = turns[2 * left_out :]
        return len(encode_turns(small_tokenizer(), rest, "instruct", system)[0]) <= most

    for message_length, answer_length in lengths:
        message = " ".join(rng.choices(words, k=message_length))
        answer = " ".join(rng.choices(words, k=answer_length))
        before = chat.turns
        turns = (*before, Turn("user", message))
        pairs = len(before) // 2
        if not fits(pairs, turns):
            omitted = chat.omitted_pairs
            with pytest.raises(OpenELMError, match=r"The message makes a prompt of \d"):
                chat.reply(message)
            assert (chat.turns, chat.omitted_pairs) == (before, omitted)
            continue
        list(chat.reply(message))
        expected = next(n for n in range(pairs + 1) if fits(n, turns))
        assert chat.omitted_pairs == expected
        rest = turns[2 * expected :]
        assert seen[-1] == encode_turns(small_tokenizer(), rest, "instruct", system)[0]
        assert chat.turns == (*turns, Turn("assistant", answer))  # all turns are kept


@pytest.mark.parametrize(("more", "omitted"), [(0, 0), (1, 1)])
def test_a_prompt_may_fill_the_context_to_the_last_token(more, omitted):
    turns = messages("wolf " * 40, "gold " * 20, "Who?")
    ids, _ = encode_turns(small_tokenizer(), turns, "instruct")
    assert 256 <= len(ids) < 512
    chat = make_chat(max_tokens=512 - len(ids) + more)
    chat.turns = turns[:2]
    chat.reply("Who?").close()
    assert chat.omitted_pairs == omitted


def test_the_prompts_of_a_long_conversation_stay_in_the_context(prompts):
    chat = make_chat("alpaca", max_tokens=32, system="Tell.")
    for n in range(16):
        send(chat, f"Then {n}, said the old woman, the wolf wept")
    assert chat.omitted_pairs > 5
    assert len(chat.turns) == 32
    assert all(len(ids) + 32 <= 512 for ids in prompts)
    first = encode_turns(small_tokenizer(), messages("Hi"), "alpaca", "Tell.")[0][:5]
    assert all(ids[:5] == first for ids in prompts)  # the system turn stays


def test_a_system_text_that_does_not_fit_the_context_or_template_is_refused():
    with pytest.raises(OpenELMError, match="The system text makes a prompt of"):
        make_chat(system="wolf " * 512)
    with pytest.raises(OpenELMError, match="takes no system text; choose"):
        make_chat("raw", system="Be kind.")
    chat = make_chat(system="Be kind.")
    send(chat, "Hi")
    with pytest.raises(OpenELMError, match="The system text"):
        chat.set_system("wolf " * 512)
    assert chat.system == "Be kind."
    chat.set_system("Be short.")
    assert len(chat.turns) == 2


def test_half_a_character_is_refused_and_the_turns_are_kept():
    chat = make_chat("raw")
    send(chat, "Hi")
    before = chat.turns
    with pytest.raises(OpenELMError, match="not valid UTF-8"):
        chat.reply("\udcff")
    assert chat.turns == before


# The file ------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@given(st.lists(st.tuples(texts, texts), max_size=4), texts)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_saved_conversation_is_loaded_unchanged(tmp_path, pairs, system):
    chat, path = make_chat(name="demo", adapter="a"), tmp_path / "chat.json"
    path.unlink(missing_ok=True)
    chat.system = system
    chat.turns = messages(*(text for pair in pairs for text in pair))
    chat.save(path)
    other = make_chat(name="demo", adapter="a")
    assert other.load(path) == []
    assert (other.turns, other.system) == (chat.turns, system)


def test_the_file_is_json_with_messages_model_template_and_settings(tmp_path):
    chat = make_chat(system="Be kind.", name="demo", temp=0.5, seed=3)
    answer = send(chat, "Hi \u2603")
    chat.save(tmp_path / "chat.json")
    fields = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert fields["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi \u2603"},
        {"role": "assistant", "content": answer},
    ]
    assert (fields["model"], fields["adapter"]) == ("demo", None)
    assert (fields["template"], fields["settings"]["seed"]) == ("instruct", 3)
    assert fields["settings"]["stop"] == []
    assert list(tmp_path.iterdir()) == [tmp_path / "chat.json"]


def test_only_its_own_file_is_replaced(tmp_path):
    chat, path = make_chat(), tmp_path / "chat.json"
    for there in (b"my diary", b"", json.dumps({"format": "other"}).encode()):
        path.write_bytes(there)
        with pytest.raises(OpenELMError, match="not this conversation's file"):
            chat.save(path)
        assert path.read_bytes() == there
    path.unlink()
    send(chat, "Hi")
    chat.save(path)
    first = path.read_bytes()
    send(chat, "Who?")
    chat.save(path)
    assert path.read_bytes() != first
    second = path.read_bytes()
    other = make_chat()
    with pytest.raises(OpenELMError, match="not this conversation's file"):
        other.save(path)
    chat.reset()
    with pytest.raises(OpenELMError, match="not this conversation's file"):
        chat.save(path)
    assert path.read_bytes() == second
    other.load(path)
    other.undo()
    other.save(path)
    assert path.read_bytes() == first
    path.write_text("my diary")  # replaced by another program
    with pytest.raises(OpenELMError, match="damaged or not a saved"):
        other.save(path)
    assert path.read_text() == "my diary"


@pytest.mark.parametrize(
    "name", ["", "/dev/null", "no/such\0name", "x" * 300, "/dev/full/chat.json"]
)
def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path, name):
    with pytest.raises(OpenELMError, match=r"\.$"):
        make_chat().save(tmp_path / name)
    with pytest.raises(OpenELMError, match=r"\.$"):
        make_chat().load(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def saved_answer() -> dict:
    return {"role": "assistant", "content": "Yes?"}


def saved(**changes) -> dict:
    return {
        "format": "mlx-openelm chat",
        "version": 1,
        "model": "demo",
        "adapter": None,
        "template": "instruct",
        "messages": [
            {"role": "user", "content": "Hi"},
            saved_answer(),
        ],
    } | changes


@pytest.mark.parametrize(
    "fields",
    [
        [],
        {},
        saved(format="else"),
        saved(version=2),
        saved(model=None),
        saved(template=7),
        saved(adapter=7),
        saved(messages=None),
        saved(messages={"role": "user"}),
        saved(messages=["Hi"]),
        saved(messages=[{"role": "user", "content": "Hi"}]),
        saved(messages=[{"role": "user"}, {"role": "assistant", "content": ""}]),
        saved(messages=[{"role": "user", "content": 7}, saved_answer()]),
        saved(messages=[{"role": "assistant", "content": "Hi"}] * 2),
        saved(messages=[*saved()["messages"], {"role": "system", "content": ""}]),
        saved(messages=[{"role": "user", "content": "\ud800"}, saved_answer()]),
    ],
)
def test_an_invalid_file_is_refused_and_changes_nothing(tmp_path, fields):
    chat, path = make_chat(system="Be kind."), tmp_path / "chat.json"
    send(chat, "Hi")
    before = chat.turns
    path.write_text(json.dumps(fields))
    with pytest.raises(OpenELMError, match=r"chat.json is .*\.$"):
        chat.load(path)
    assert (chat.turns, chat.system, chat.file) == (before, "Be kind.", None)


def test_damaged_files_raise_no_other_error(tmp_path):
    path, rng = tmp_path / "chat.json", random.Random(3)
    whole = json.dumps(saved()).encode()
    path.write_bytes(whole)
    assert read_saved(path).turns == messages("Hi", "Yes?")
    damaged = [whole[:n] for n in range(len(whole))]
    for _ in range(300):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] = rng.randrange(256)
        damaged.append(bytes(changed))
    refused = 0
    for content in (*damaged, b"[" * 100_000, b"\xff\xfe", b"9" * 5000):
        path.write_bytes(content)
        try:
            read_saved(path)
        except OpenELMError:
            refused += 1
    assert refused > len(whole) + 200


def test_differences_of_the_settings_are_noted(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(saved(model="other", adapter="a", template="alpaca")))
    notes = make_chat(name="demo").load(path)
    assert [note.split(" and")[0] for note in notes] == [
        "it was saved with the model other",
        "it was saved with the adapter a",
        "it was saved with the template alpaca",
    ]
    assert all(note.endswith(("demo", "none", "instruct")) for note in notes)


def test_a_system_text_cannot_be_loaded_with_a_raw_template(tmp_path):
    path = tmp_path / "chat.json"
    system = {"role": "system", "content": "Be kind."}
    path.write_text(json.dumps(saved(messages=[system, *saved()["messages"]])))
    chat = make_chat("raw")
    with pytest.raises(OpenELMError, match="takes no system text"):
        chat.load(path)
    assert chat.turns == ()
