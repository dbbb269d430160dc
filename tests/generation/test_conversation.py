"""A conversation: what the model reads, what it no longer sees, and the file."""

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

MODEL = build(replace(UNEVEN, max_context_length=512))
TEMPLATES = ("instruct", "alpaca", "openelm-peft")


def begin(template: str = "instruct", *, model=MODEL, **options) -> Conversation:
    sampling = Sampling(
        **{"max_tokens": 8, **{k: options.pop(k) for k in SAMPLED & options.keys()}}
    )
    return Conversation(
        model, small_tokenizer(), sampling, template=template, **options
    )


SAMPLED = {"max_tokens", "temp", "seed"}


def say(talk: Conversation, message: str) -> str:
    return "".join(piece.text for piece in talk.reply(message))


def messages(*texts: str) -> tuple[Turn, ...]:
    return tuple(
        Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)
    )


def piece(text: str, finish_reason: str | None = None, token: int = 5) -> Piece:
    last = list(stream(MODEL, small_tokenizer(), [1], Sampling(max_tokens=1)))[-1]
    return replace(last, text=text, finish_reason=finish_reason, token=token)


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """The ids of every prompt that is given to the model."""
    seen = []

    def watched(model, tokenizer, ids, *args, **options):
        seen.append(list(ids))
        return stream(model, tokenizer, ids, *args, **options)

    monkeypatch.setattr(module, "stream", watched)
    return seen


# What the model reads ------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Be kind."])
def test_a_prompt_is_what_training_reads_up_to_the_answer(template, system):
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
def test_every_prompt_is_a_fresh_rendering_of_all_turns(template, prompts):
    talk = begin(template, system="Be kind.")
    for message in ("Hi", "Who wept?\nAnd why?", "1234"):
        said = say(talk, message)
        assert talk.turns[-2:] == messages(message, said)
    fresh = [
        encode_turns(small_tokenizer(), talk.turns[:n], template, "Be kind.")[0]
        for n in (1, 3, 5)
    ]
    assert prompts == fresh
    assert [ids.count(small_tokenizer().bos_id) for ids in prompts] == [1, 1, 1]
    if template == "instruct":
        assert [ids.count(small_tokenizer().eos_id) for ids in prompts] == [2, 4, 6]
    else:
        assert [ids.count(small_tokenizer().eos_id) for ids in prompts] == [0, 1, 2]


def test_without_a_template_both_sides_add_to_one_text(prompts):
    talk = begin("auto")
    assert talk.is_raw
    texts = []
    for message in ("Once upon a time", "", "Then", "\nThe wolf"):
        text = "".join(turn.text for turn in talk.turns)
        begins_word = message == "Then" and not text[-1].isspace()
        texts += [" " if begins_word else "", message, say(talk, message)]
    whole = "".join(texts[:-1])
    assert prompts[-1] == small_tokenizer().encode(whole)
    assert "a time" + texts[2] + texts[5] in whole  # an empty line goes on


def test_the_templates_last_space_is_no_part_of_the_answer(monkeypatch):
    script = [piece(""), piece(" The"), piece(" wolf", "stop")]
    monkeypatch.setattr(module, "stream", lambda *args, **options: iter(script))
    for template, said in (("openelm-peft", "The wolf"), ("instruct", " The wolf")):
        talk = begin(template)
        assert say(talk, "Who?") == said
        assert talk.turns == messages("Who?", said)


def test_the_stored_template_is_the_default_and_an_unknown_one_is_refused():
    stored = Tokenizer(small_tokenizer().model_proto, template="alpaca")
    assert Conversation(MODEL, stored).template == "alpaca"
    assert Conversation(MODEL, stored, template="instruct").template == "instruct"
    assert Conversation(MODEL, small_tokenizer()).template == "raw"
    with pytest.raises(OpenELMError, match="No template is called 'chatml'"):
        begin("chatml")


def test_an_answer_that_spells_eos_ends_there(monkeypatch):
    asked = []
    monkeypatch.setattr(
        module,
        "stream",
        lambda m, t, ids, sampling, **o: asked.append(sampling) or iter([piece("x")]),
    )
    for template in ("instruct", "raw"):
        list(begin(template).reply("Hi"))
    assert [sampling.stop for sampling in asked] == [("</s>",), ()]


def test_a_seed_counts_once_so_that_a_second_try_differs():
    said = []
    for seed in (1, 1, 2):
        talk = begin(temp=2.0, seed=seed, max_tokens=24)
        first = say(talk, "Hi")
        again = "".join(p.text for p in talk.retry())
        said.append((first, again))
        assert first != again
        assert talk.turns == messages("Hi", again)
    assert said[0] == said[1] != said[2]


# What goes through the model -----------------------------------------------------


@pytest.fixture
def passed(monkeypatch) -> list[int]:
    """The number of tokens of each forward pass."""
    seen: list[int] = []
    kind = type(MODEL.transformer)
    forward = kind.__call__

    def counted(self, tokens, *args, **options):
        seen.append(tokens.shape[1])
        return forward(self, tokens, *args, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    return seen


@pytest.mark.parametrize("template", [*TEMPLATES, "raw"])
def test_what_the_model_has_read_does_not_go_through_it_again(
    template, passed, prompts
):
    roomy = build(replace(UNEVEN, max_context_length=2048))
    talk, before = begin(template, max_tokens=24, model=roomy), 0
    for n, message in enumerate(("The wolf wept", "And why?", "Who said that?")):
        passed.clear()
        said = list(talk.reply(message))
        assert said[-1].prompt_tokens == len(prompts[-1])
        assert sum(passed) == len(prompts[-1]) - said[-1].cached_tokens + len(said) - 1
        if n:  # but for what an answer's first piece may change
            assert said[-1].cached_tokens >= before - 8
        before = len(prompts[-1])
    assert before > 100


def test_answers_are_those_of_a_model_that_reads_everything_afresh(monkeypatch):
    def fresh(model, tokenizer, ids, sampling, **options):
        return stream(model, tokenizer, ids, sampling)

    def held(*, template: str) -> tuple[Turn, ...]:
        talk = begin(template, max_tokens=12)
        for n in range(6):
            say(talk, f"{n} said the wolf")
            with closing(talk.reply("And then?")) as pieces:
                for _ in zip(range(n), pieces, strict=False):
                    pass
            if n % 3 == 2:
                list(talk.retry())
                talk.undo()
        return talk.turns

    reused = {template: held(template=template) for template in ("instruct", "raw")}
    monkeypatch.setattr(module, "stream", fresh)
    for template, turns in reused.items():
        assert held(template=template) == turns


def test_after_a_step_that_broke_off_everything_is_read_afresh(monkeypatch):
    talk, expected = begin(), begin()
    for conversation in (talk, expected):
        say(conversation, "Hi")
    layer = MODEL.layers[1]
    forward = type(layer).__call__

    def breaks(self, *args, **options):
        if self is layer:
            raise KeyboardInterrupt
        return forward(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(type(layer), "__call__", breaks)
        with pytest.raises(KeyboardInterrupt):
            say(talk, "Who wept?")
    assert say(talk, "Who wept?") == say(expected, "Who wept?")


# Cut answers ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_stopped_answer_is_kept_as_far_as_it_was_shown(count, prompts):
    talk, shown = begin(), ""
    with closing(talk.reply("Hi")) as pieces:
        for _, got in zip(range(count), pieces, strict=False):
            shown += got.text
    assert talk.turns == (messages("Hi", shown) if shown else ())
    say(talk, "Go on")
    asked = messages(*(("Hi", shown) if shown else ()), "Go on")
    assert prompts[-1] == encode_turns(small_tokenizer(), asked, "instruct")[0]


def test_an_answer_stopped_before_a_word_changes_nothing(monkeypatch):
    talk = begin()
    say(talk, "Hi")
    before = talk.turns
    for pieces in (talk.reply("Who?"), talk.retry()):
        pieces.close()
        assert talk.turns == before

    def fails(*args, **options):
        yield piece("")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "stream", fails)
    for pieces in (talk.reply("Who?"), talk.retry()):
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
        assert talk.turns == before


def test_an_empty_answer_is_an_answer(monkeypatch):
    script = [piece("", "stop", token=2)]
    monkeypatch.setattr(module, "stream", lambda *args, **options: iter(script))
    talk = begin()
    assert say(talk, "Hi") == ""
    assert talk.turns == messages("Hi", "")


def test_undo_and_reset_and_nothing_to_undo():
    talk = begin(system="Be kind.")
    for wrong in (talk.undo, talk.retry):
        with pytest.raises(OpenELMError, match="There is no"):
            wrong()
    say(talk, "Hi")
    kept = talk.turns
    say(talk, "Who?")
    talk.undo()
    assert talk.turns == kept
    talk.reset()
    assert (talk.turns, talk.system) == ((), "Be kind.")


# The context ---------------------------------------------------------------------

lengths = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 60)), max_size=12)


@given(lengths, st.sampled_from(["", "Be kind."]), st.integers(1, 300))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_slides_by_whole_turns_and_no_further_than_it_must(
    monkeypatch, lengths, system, max_tokens
):
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
    talk = begin("instruct", system=system, max_tokens=max_tokens)
    most = 512 - min(max_tokens, 256)
    rng = random.Random(7)

    def fits(left_out: int, turns) -> bool:
        rest = turns[2 * left_out :]
        return len(encode_turns(small_tokenizer(), rest, "instruct", system)[0]) <= most

    for asked, answered in lengths:
        message = " ".join(rng.choices(words, k=asked))
        answer = " ".join(rng.choices(words, k=answered))
        before = talk.turns
        turns = (*before, Turn("user", message))
        pairs = len(before) // 2
        if not fits(pairs, turns):
            forgotten = talk.forgotten
            with pytest.raises(OpenELMError, match=r"The message makes a prompt of \d"):
                talk.reply(message)
            assert (talk.turns, talk.forgotten) == (before, forgotten)
            continue
        list(talk.reply(message))
        expected = next(n for n in range(pairs + 1) if fits(n, turns))
        assert talk.forgotten == expected
        rest = turns[2 * expected :]
        assert seen[-1] == encode_turns(small_tokenizer(), rest, "instruct", system)[0]
        assert talk.turns == (*turns, Turn("assistant", answer))  # nothing is lost


@pytest.mark.parametrize(("more", "forgotten"), [(0, 0), (1, 1)])
def test_a_prompt_may_fill_the_context_to_the_last_token(more, forgotten):
    turns = messages("wolf " * 40, "gold " * 20, "Who?")
    ids, _ = encode_turns(small_tokenizer(), turns, "instruct")
    assert 256 <= len(ids) < 512
    talk = begin(max_tokens=512 - len(ids) + more)
    talk.turns = turns[:2]
    talk.reply("Who?").close()
    assert talk.forgotten == forgotten


def test_the_whole_of_a_long_talk_with_a_real_model_stays_in_the_context(prompts):
    talk = begin("alpaca", max_tokens=32, system="Tell.")
    for n in range(16):
        say(talk, f"Then {n}, said the old woman, the wolf wept")
    assert talk.forgotten > 5
    assert len(talk.turns) == 32
    assert all(len(ids) + 32 <= 512 for ids in prompts)
    first = encode_turns(small_tokenizer(), messages("Hi"), "alpaca", "Tell.")[0][:5]
    assert all(ids[:5] == first for ids in prompts)  # the system turn stays


def test_a_system_text_that_does_not_fit_or_has_no_place_is_refused():
    with pytest.raises(OpenELMError, match="The system text makes a prompt of"):
        begin(system="wolf " * 512)
    with pytest.raises(OpenELMError, match="no place for a system text; choose"):
        begin("raw", system="Be kind.")
    talk = begin(system="Be kind.")
    say(talk, "Hi")
    with pytest.raises(OpenELMError, match="The system text"):
        talk.set_system("wolf " * 512)
    assert talk.system == "Be kind."
    talk.set_system("Be short.")
    assert len(talk.turns) == 2


def test_half_a_character_is_refused_and_nothing_is_lost():
    talk = begin("raw")
    say(talk, "Hi")
    before = talk.turns
    with pytest.raises(OpenELMError, match="not valid UTF-8"):
        talk.reply("\udcff")
    assert talk.turns == before


# The file ------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@given(st.lists(st.tuples(texts, texts), max_size=4), texts)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_saved_is_loaded(tmp_path, pairs, system):
    talk, path = begin(name="demo", adapter="a"), tmp_path / "talk.json"
    path.unlink(missing_ok=True)
    talk.system = system
    talk.turns = messages(*(text for pair in pairs for text in pair))
    talk.save(path)
    other = begin(name="demo", adapter="a")
    assert other.load(path) == []
    assert (other.turns, other.system) == (talk.turns, system)


def test_the_file_is_json_with_messages_model_template_and_settings(tmp_path):
    talk = begin(system="Be kind.", name="demo", temp=0.5, seed=3)
    said = say(talk, "Hi \u2603")
    talk.save(tmp_path / "talk.json")
    found = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert found["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi \u2603"},
        {"role": "assistant", "content": said},
    ]
    assert (found["model"], found["adapter"]) == ("demo", None)
    assert (found["template"], found["settings"]["seed"]) == ("instruct", 3)
    assert found["settings"]["stop"] == []
    assert list(tmp_path.iterdir()) == [tmp_path / "talk.json"]


def test_only_its_own_file_is_replaced(tmp_path):
    talk, path = begin(), tmp_path / "talk.json"
    for there in (b"my diary", b"", json.dumps({"format": "other"}).encode()):
        path.write_bytes(there)
        with pytest.raises(OpenELMError, match="not this conversation's file"):
            talk.save(path)
        assert path.read_bytes() == there
    path.unlink()
    say(talk, "Hi")
    talk.save(path)
    first = path.read_bytes()
    say(talk, "Who?")
    talk.save(path)
    assert path.read_bytes() != first
    second = path.read_bytes()
    stranger = begin()
    with pytest.raises(OpenELMError, match="not this conversation's file"):
        stranger.save(path)
    talk.reset()
    with pytest.raises(OpenELMError, match="not this conversation's file"):
        talk.save(path)
    assert path.read_bytes() == second
    stranger.load(path)
    stranger.undo()
    stranger.save(path)
    assert path.read_bytes() == first
    path.write_text("my diary")  # it has become something else
    with pytest.raises(OpenELMError, match="damaged or is no saved"):
        stranger.save(path)
    assert path.read_text() == "my diary"


@pytest.mark.parametrize(
    "name", ["", "/dev/null", "no/such\0name", "x" * 300, "/dev/full/talk.json"]
)
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, name):
    with pytest.raises(OpenELMError, match=r"\.$"):
        begin().save(tmp_path / name)
    with pytest.raises(OpenELMError, match=r"\.$"):
        begin().load(tmp_path / name)
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
    "found",
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
def test_what_is_no_conversation_is_refused_and_nothing_changes(tmp_path, found):
    talk, path = begin(system="Be kind."), tmp_path / "talk.json"
    say(talk, "Hi")
    before = talk.turns
    path.write_text(json.dumps(found))
    with pytest.raises(OpenELMError, match=r"talk.json is .*\.$"):
        talk.load(path)
    assert (talk.turns, talk.system, talk.file) == (before, "Be kind.", None)


def test_damaged_files_are_never_more_than_refused(tmp_path):
    path, rng = tmp_path / "talk.json", random.Random(3)
    whole = json.dumps(saved()).encode()
    path.write_bytes(whole)
    assert read_saved(path).turns == messages("Hi", "Yes?")
    damaged = [whole[:n] for n in range(len(whole))]
    for _ in range(300):
        spoilt = bytearray(whole)
        spoilt[rng.randrange(len(whole))] = rng.randrange(256)
        damaged.append(bytes(spoilt))
    refused = 0
    for content in (*damaged, b"[" * 100_000, b"\xff\xfe", b"9" * 5000):
        path.write_bytes(content)
        try:
            read_saved(path)
        except OpenELMError:
            refused += 1
    assert refused > len(whole) + 200


def test_what_is_different_here_is_said(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(saved(model="other", adapter="a", template="alpaca")))
    notes = begin(name="demo").load(path)
    assert [note.split(",")[0] for note in notes] == [
        "it was held with the model other",
        "it was held with the adapter a",
        "it was held with the template alpaca",
    ]
    assert all(note.endswith(("demo", "none", "instruct")) for note in notes)


def test_a_system_text_cannot_be_loaded_where_none_has_a_place(tmp_path):
    path = tmp_path / "talk.json"
    system = {"role": "system", "content": "Be kind."}
    path.write_text(json.dumps(saved(messages=[system, *saved()["messages"]])))
    talk = begin("raw")
    with pytest.raises(OpenELMError, match="no place for a system text"):
        talk.load(path)
    assert talk.turns == ()
