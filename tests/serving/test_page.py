"""The server's page, shown by a real browser and used as a person uses it."""

import json
import math
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mlx.core as mx
import pytest
from browser import find_browser, started
from models import UNEVEN, build, small_tokenizer

from mlx_openelm.generation.conversation import Conversation
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate
from mlx_openelm.model.openelm import Transformer
from mlx_openelm.serving.access import Access
from mlx_openelm.serving.listener import Listener
from mlx_openelm.serving.page import page_headers, read_page
from mlx_openelm.serving.served import Served, ServedModel
from mlx_openelm.text.templates import TEMPLATE_NAMES

PROMPT = "Once upon a time"
GREEDY = Sampling(max_tokens=24)
CTRL = 2  # DevTools' bit of the key
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["b"]}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def small():
    config = replace(UNEVEN, max_context_length=256)
    return build(config, seed=4), small_tokenizer()


@pytest.fixture(scope="module")
def other(small):
    """Another model of the same shape, served as an adapter."""
    return build(small[0].config, seed=5)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = find_browser()
    if path is None:
        pytest.skip("needs a Chromium")
    with started(path, tmp_path_factory.mktemp("profile")) as it:
        yield it


@dataclass(frozen=True)
class Address:
    """A server's address, with what `Page.open` reads of a path."""

    url: str

    def as_uri(self) -> str:
        return f"{self.url}/"


@contextmanager
def serving(small, *, template="raw", adapters=None, **access) -> Iterator[Address]:
    """Serve in a thread, on a free port unless `access` names one."""
    from mlx_openelm.serving.server import Server, ServerLimits

    model, tokenizer = small
    models = {"tiny": ServedModel("tiny", model, template)}
    for name, adapted in (adapters or {}).items():
        models[name] = ServedModel(name, adapted, "alpaca", parent="tiny")
    served = Served(models, tokenizer, {}, {"max_tokens": GREEDY.max_tokens})
    mx.eval([one.model.parameters() for one in models.values()])
    listener = Listener(Access(**{"port": 0, **access}))
    server = Server(listener, served, ServerLimits())
    ready = threading.Event()

    def run() -> None:
        try:
            server.run(on_ready=lambda url: ready.set())
        finally:
            listener.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(30)
    try:
        yield Address(listener.url)
    finally:
        server.stop()
        thread.join()


@pytest.fixture(scope="module")
def raw(small):
    with serving(small) as it:
        yield it


@pytest.fixture(scope="module")
def chats(small, other):
    with serving(small, template="instruct", adapters={"tales": other}) as it:
        yield it


@pytest.fixture
def slow_model(monkeypatch):
    """Slow the model down; the list has an entry for each of its calls."""
    calls, call = [], Transformer.__call__

    def slowly(self, inputs, *rest):
        calls.append(inputs.shape)
        time.sleep(0.03)
        return call(self, inputs, *rest)

    monkeypatch.setattr(Transformer, "__call__", slowly)
    return calls


# The browser ---------------------------------------------------------------------


@pytest.fixture
def show(browser):
    """Return a function that opens a server's page in a tab of its own."""

    def open_page(address, **options):
        page = browser.new_page()
        page.open(address, **options)
        wait(page, "document.getElementById('about').textContent !== 'connecting…'")
        return page

    return open_page


def wait(page, condition, seconds=15):
    for _ in range(seconds * 20):
        if page.evaluate(condition):
            return
        time.sleep(0.05)
    raise AssertionError((condition, page.evaluate("document.body.innerText")))


def fill(page, **values):
    for id, value in values.items():
        page.evaluate(f"document.getElementById('{id}').value = {json.dumps(value)}")


def choose(page, id, value):
    fill(page, **{id: value})
    page.evaluate(f"document.getElementById('{id}').dispatchEvent(new Event('change'))")


def click(page, id):
    page.evaluate(f"document.getElementById('{id}').click()")


def click_last(page, text):
    """Click the last button of the turns with this text."""
    page.evaluate(
        f"""[...document.querySelectorAll("#turns button")]
        .filter((button) => button.textContent === {json.dumps(text)}).at(-1).click()"""
    )


def press(page, key, modifiers=0, text=""):
    code = {"Tab": 9, "Enter": 13, "Escape": 27}.get(key, 0)
    text = text or ("\r" if key == "Enter" else "")
    for kind in ("keyDown", "keyUp"):
        page.call(
            "Input.dispatchKeyEvent",
            type=kind,
            key=key,
            modifiers=modifiers,
            windowsVirtualKeyCode=code,
            **({"text": text} if text and kind == "keyDown" else {}),
        )


def write(page, text):
    page.call("Input.insertText", text=text)


def text_of(page, id):
    return page.evaluate(f"document.getElementById('{id}').textContent")


def turns(page):
    return page.evaluate(
        """[...document.querySelectorAll("#turns .body")].map((b) => b.textContent)"""
    )


def figures(page):
    """The figures of the last answer."""
    return page.evaluate(
        """[...document.querySelectorAll("#turns .figures")].at(-1).textContent"""
    )


def finish(page):
    wait(page, "!document.getElementById('go').disabled")


def ask(page, text=None):
    if text is not None:
        fill(page, prompt=text)
    click(page, "go")
    finish(page)


def focused(page):
    return page.evaluate(
        "document.activeElement.id || document.activeElement.textContent"
    )


def spy(page):
    """Keep the bodies of the page's requests; `sent` returns them."""
    page.evaluate(
        """window.bodies = []; window.fetch = ((fetch) => (path, options) => {
        if (options?.body) bodies.push(JSON.parse(options.body));
        return fetch(path, options); })(window.fetch); 0"""
    )


def sent(page):
    return page.evaluate("window.bodies")


def completed(address, prompt, **fields):
    body = {"prompt": prompt, **fields}
    return post(address, "/v1/completions", body)["choices"][0]["text"]


def post(address, path, body):
    request = urllib.request.Request(
        address.url + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def complete(small, prompt, sampling=GREEDY):
    return generate(*small, prompt, sampling, template="raw")


def reply(conversation, message):
    return "".join(piece.text for piece in conversation.reply(message))


# The page as a file --------------------------------------------------------------


def test_the_page_is_one_file_that_loads_nothing(raw):
    with urllib.request.urlopen(raw.as_uri()) as response:
        body, headers = response.read(), response.headers
    assert body == read_page()
    policy = page_headers()["Content-Security-Policy"]
    assert headers["content-security-policy"] == policy
    assert "unsafe" not in policy
    for word in (b"http:", b"https:", b"innerHTML", b"eval(", b"@import", b" src="):
        assert word not in body


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1200, "light"),
        (360, "dark"),
        pytest.param(1200, "dark", marks=pytest.mark.proof),
        pytest.param(360, "light", marks=pytest.mark.proof),
    ],
)
def test_it_fits_without_errors(show, raw, width, scheme):
    page = show(raw, width=width, scheme=scheme)
    fill(page, max_tokens="40")
    ask(page, "long" * 40)
    click_last(page, "Edit")
    page.evaluate("document.getElementById('settings').open = true")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert (
        page.evaluate("document.getElementById('prompt').offsetWidth / innerWidth")
        > 0.6
    )
    assert page.errors == []
    paths = {url.removeprefix(raw.url) for url in page.requests}
    assert paths - {"/health"} == {"/", "/v1/models", "/v1/completions"}
    unnamed = """[...document.querySelectorAll("input, textarea, select")]
        .filter((field) => !field.labels.length && !field.ariaLabel)
        .map((field) => field.id)"""
    assert page.evaluate(unnamed) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 23, 27)") == (scheme == "dark")


def test_text_cannot_become_html(show, raw):
    page = show(raw)
    ask(page, "<img src=x><b>bold</b>")
    assert turns(page)[0] == "<img src=x><b>bold</b>"
    assert page.evaluate("document.querySelectorAll('#turns :is(img, b)').length") == 0
    # The policy itself holds it, whatever the script does.
    attempt = "try { document.body.innerHTML = '<b>x</b>'; 1 } catch { 0 }"
    assert page.evaluate(attempt) == 0


# Answers -------------------------------------------------------------------------


def test_a_completion_has_its_probabilities(show, raw, small):
    page = show(raw)
    assert page.evaluate("mode()") == "text"
    ask(page, PROMPT)
    assert turns(page) == [PROMPT, complete(small, PROMPT)]
    assert text_of(page, "error") == ""
    shown = page.evaluate(
        """[...document.querySelectorAll("#turns .token")].map((token) => [
            token.tokens.map((t) => t.logprob), token.style.getPropertyValue("--share"),
            getComputedStyle(token).backgroundColor])"""
    )
    body = {"prompt": PROMPT, "logprobs": 5}
    from_server = post(raw, "/v1/completions", body)["choices"][0]["logprobs"]
    found = [logprob for logprobs, _, _ in shown for logprob in logprobs]
    assert found == pytest.approx(from_server["token_logprobs"], abs=1e-4)
    for logprobs, share, colour in shown:
        bits = -sum(logprobs) / math.log(2)
        expected = 75 * min(bits / 10, 1)
        assert float(share.rstrip("%")) == pytest.approx(expected, abs=0.1)
        assert colour.startswith("color(srgb")
    click(page, "shade")
    colour = "getComputedStyle(document.querySelector('.token')).backgroundColor"
    assert page.evaluate(colour) == "rgba(0, 0, 0, 0)"


def test_the_figures_are_tokens_a_second_and_the_reason(show, raw, slow_model):
    page = show(raw)
    ask(page, PROMPT)
    count, rate, first, reason = figures(page).split(" · ")
    assert (count, reason) == ("24 tokens", "reached max tokens")
    assert 1 < float(rate.removesuffix(" tokens/s")) < 1 / 0.03
    assert float(first.removeprefix("first after ").removesuffix(" s")) >= 0.03


def test_the_answer_grows_while_it_is_generated(show, raw, slow_model):
    page = show(raw)
    fill(page, prompt=PROMPT)
    click(page, "go")
    lengths = set()
    while page.evaluate("document.getElementById('go').disabled"):
        lengths.add(len(turns(page)[-1]))
        time.sleep(0.02)
    assert len(lengths) > 5


def test_the_settings_are_applied_and_a_text_is_continued(show, raw):
    page = show(raw)
    placeholder = "document.getElementById('{}').placeholder"
    assert page.evaluate(placeholder.format("max_tokens")) == "24"
    assert page.evaluate(placeholder.format("temperature")) == "0"
    fields = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.8, "top_k": 50}
    fields |= {"min_p": 0.01, "seed": 7}
    fill(page, **{id: str(value) for id, value in fields.items()})
    fill(page, stops="never\\n\nsaid")
    spy(page)
    ask(page, PROMPT)
    assert sent(page)[0]["stop"] == ["never\n", "said"]
    first = completed(raw, PROMPT, **fields)
    assert turns(page) == [PROMPT, first]
    click_last(page, "Continue")
    finish(page)
    assert turns(page) == [PROMPT, first + completed(raw, PROMPT + first, **fields)]
    assert text_of(page, "error") == ""
    # Each setting is one of the request, and an empty one is none.
    fill(page, **dict.fromkeys(fields, ""), stops="", repetition_penalty="1.3")
    ask(page, PROMPT)
    assert sent(page)[0].items() >= fields.items()
    assert sent(page)[-1]["repetition_penalty"] == 1.3
    assert not sent(page)[-1].keys() & {*fields, "stop"}
    assert turns(page)[1] == completed(raw, PROMPT, repetition_penalty=1.3)


def test_wrong_requests_are_explained_and_nothing_is_lost(show, raw, small):
    page = show(raw)
    ask(page, PROMPT)
    before = turns(page)
    ask(page, "x" * 3000)
    assert "context is 256" in text_of(page, "error")
    assert turns(page) == before
    assert page.evaluate("document.getElementById('prompt').value.length") == 3000
    fill(page, top_p="7")
    ask(page, PROMPT)
    assert text_of(page, "error").startswith("Top-p: ")


@pytest.mark.proof
@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_ends_the_generation_in_the_server(show, raw, slow_model, way):
    page = show(raw)
    fill(page, max_tokens="200", temperature="1", seed="1", prompt="a")
    page.evaluate("document.getElementById('prompt').focus()")
    press(page, "Enter", CTRL)
    wait(page, "document.querySelectorAll('#turns .token').length > 3")
    assert page.evaluate("document.getElementById('go').disabled")
    press(page, "Escape") if way == "key" else click(page, "stop")
    finish(page)
    assert figures(page).endswith(" · stopped")
    assert turns(page)[1]
    time.sleep(1.5)
    count = len(slow_model)
    time.sleep(0.5)
    assert len(slow_model) == count < 150


# Chats ---------------------------------------------------------------------------


def test_a_chat_has_turns_and_a_system_message(show, chats, small):
    conversation = Conversation(*small, GREEDY, template="instruct", system="Be kind.")
    page = show(chats)
    fill(page, system="Be kind.")
    expected = []
    for message in ("Hi", "<b>And</b>?"):
        ask(page, message)
        expected += [message, reply(conversation, message)]
        assert turns(page) == expected
        assert text_of(page, "error") == ""
        assert page.evaluate("document.getElementById('prompt').value") == ""
    page.evaluate("document.querySelector('[value=text]').click()")
    assert turns(page) == []
    ask(page, PROMPT)
    assert turns(page) == [PROMPT, complete(small, PROMPT)]
    page.evaluate("document.querySelector('[value=chat]').click()")
    assert turns(page) == expected
    click(page, "clear")
    assert turns(page) == []


def test_retry_replaces_the_last_answer(show, chats):
    page = show(chats)
    fill(page, temperature="1.5", seed="1")
    ask(page, "One")
    ask(page, "Two")
    before = turns(page)
    assert (
        page.evaluate(
            """[...document.querySelectorAll("#turns button")]
        .filter((b) => b.textContent === "Retry").length"""
        )
        == 1
    )
    fill(page, seed="2")
    spy(page)
    click_last(page, "Retry")
    finish(page)
    after = turns(page)
    assert (after[:3], len(after)) == (before[:3], 4)
    assert after[3] != before[3]
    contents = [message["content"] for message in sent(page)[0]["messages"]]
    assert contents == before[:3]


def test_an_edited_message_is_answered_again(show, chats, small):
    page = show(chats)
    ask(page, "One")
    ask(page, "Two")
    edit(page, 0, "Three")
    press(page, "Enter")
    finish(page)
    conversation = Conversation(*small, GREEDY, template="instruct")
    assert turns(page) == ["Three", reply(conversation, "Three")]


def test_an_edited_answer_is_part_of_the_next_request(show, chats):
    page = show(chats)
    ask(page, "One")
    first = turns(page)[1]
    edit(page, 1, "Never mind")
    press(page, "Escape")
    assert turns(page) == ["One", first]
    edit(page, 1, "My answer")
    press(page, "Enter", CTRL)
    assert turns(page) == ["One", "My answer"]
    spy(page)
    ask(page, "Two")
    contents = [message["content"] for message in sent(page)[0]["messages"]]
    assert contents == ["One", "My answer", "Two"]


def edit(page, index, text):
    page.evaluate(
        f"""[...document.querySelectorAll("#turns button")]
        .filter((b) => b.textContent === "Edit")[{index}].click()"""
    )
    page.evaluate("document.activeElement.select()")
    write(page, text)


def test_the_model_and_the_template_are_chosen(show, chats, small, other):
    page = show(chats)
    options = """[...document.getElementById('{}').options].map((o) => o.textContent)"""
    assert page.evaluate(options.format("model")) == [
        "tiny",
        "tales (adapter of tiny)",
    ]
    listed = page.evaluate(options.format("template"))
    assert listed == ["auto (instruct)", *TEMPLATE_NAMES[1:]]
    choose(page, "model", "tales")
    assert page.evaluate(options.format("template"))[0] == "auto (alpaca)"
    ask(page, "Hi")
    tokenizer = small[1]
    expected = Conversation(other, tokenizer, GREEDY, template="alpaca")
    assert turns(page) == ["Hi", reply(expected, "Hi")]
    choose(page, "template", "openelm-peft")
    click_last(page, "Retry")
    finish(page)
    expected = Conversation(other, tokenizer, GREEDY, template="openelm-peft")
    assert turns(page) == ["Hi", reply(expected, "Hi")]
    hidden = "document.getElementById('raw-hint').hidden"
    assert page.evaluate(hidden)
    choose(page, "template", "raw")
    assert not page.evaluate(hidden)


def test_a_long_chat_slides_by_pairs_of_turns(show, chats):
    page = show(chats)
    fill(page, max_tokens="30")
    spy(page)
    for number in range(5):
        ask(page, f"Message {number} " + "and more " * 6)
        assert text_of(page, "error") == ""
    check_dropped(page)
    # Editing the first turn begins the conversation again; none is dropped.
    edit(page, 0, "Again")
    press(page, "Enter")
    finish(page)
    assert text_of(page, "dropped") == ""
    # A message that is too long alone is refused, and stays in the field.
    ask(page, "word " * 200)
    assert "context is 256" in text_of(page, "error")
    assert len(turns(page)) == 2
    assert text_of(page, "dropped") == ""
    fill(page, max_tokens="250")
    ask(page, "Long")
    assert figures(page).endswith(" · reached the end of the context")


def test_turns_are_dropped_when_the_server_refuses_their_length(show, chats):
    page = show(chats)
    ask(page, "One")
    ask(page, "Two")
    spy(page)
    page.evaluate("conversation().tokensPerCharacter = 0")  # an estimate that is wrong
    ask(page, "word " * 40)
    assert text_of(page, "error") == ""
    assert len(sent(page)) > 1
    check_dropped(page)


def test_turns_are_dropped_for_the_room_of_an_answer(show, chats):
    page = show(chats)
    answer = "there was a king who had three daughters"
    fill(page, max_tokens="100", schema=json.dumps({"const": answer}))
    spy(page)
    for number in range(5):
        ask(page, f"Message {number}")
        assert json.loads(turns(page)[-1]) == answer
    assert len(sent(page)) == 5  # none was refused
    check_dropped(page)


def check_dropped(page):
    """Check that some pairs are not sent, and that the page shows which."""
    dropped = page.evaluate("document.querySelectorAll('.turn.dropped').length")
    assert dropped >= 2
    assert dropped % 2 == 0
    assert text_of(page, "dropped").startswith(f"The oldest {dropped} turns are not")
    assert "context of 256 tokens" in text_of(page, "dropped")
    contents = [message["content"] for message in sent(page)[-1]["messages"]]
    assert contents == turns(page)[dropped:-1]


# Structured output ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["chat", "text"])
def test_an_answer_follows_the_json_schema(show, chats, mode):
    page = show(chats)
    page.evaluate(f"document.querySelector('[value={mode}]').click()")
    fill(page, schema=json.dumps(SCHEMA))
    ask(page, "Give me JSON")
    assert json.loads(turns(page)[1]) == {"a": "b"}
    assert figures(page).endswith(" · complete")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "it is not JSON"),
        ("[1]", "schema"),
        ('{"type": "no such type"}', "no such type"),
    ],
)
def test_a_refused_schema_is_reported_beside_its_field(show, chats, schema, reason):
    page = show(chats, width=360)
    fill(page, schema=schema)
    ask(page, "Hi")
    message = text_of(page, "error")
    assert message.startswith("The JSON schema is refused: ")
    assert reason in message
    invalid = "document.getElementById('schema').ariaInvalid"
    assert page.evaluate(invalid) == "true"
    assert page.evaluate("document.getElementById('settings').open")
    assert turns(page) == []
    assert page.evaluate("document.getElementById('prompt').value") == "Hi"
    fill(page, schema="")
    ask(page)
    assert page.evaluate(invalid) == "false"
    assert len(turns(page)) == 2


# Keyboard and pointer ------------------------------------------------------------


def test_the_keyboard_suffices(show, chats):
    """Send, read the tokens, edit, retry and return, without a pointer."""
    page = show(chats)
    wait(page, "document.activeElement.id === 'prompt'")
    write(page, "One")
    press(page, "Enter", modifiers=8)  # Shift: a line break
    write(page, "line")
    press(page, "Enter")
    wait(page, "document.querySelectorAll('#turns .token').length > 3")
    finish(page)
    first, answer = turns(page)
    assert first == "One\nline"
    # The answer comes before the field: the arrow keys move through its tokens.
    press(page, "Tab", modifiers=8)
    assert focused(page) == answer
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
        press(page, key)
        seen.append(text_of(page, "token"))
    assert seen[0] == seen[2] == seen[4]
    assert len(set(seen)) == 3
    assert seen[0].count("%") >= 5
    assert page.evaluate("document.querySelectorAll('.token.shown').length") == 1
    press(page, "Escape")
    assert text_of(page, "token") == ""
    press(page, "Tab", modifiers=8)
    assert focused(page) == "Retry"
    press(page, "Enter")
    wait(page, "running === null && document.activeElement.matches('.body')")
    press(page, "Tab", modifiers=8)
    press(page, "Tab", modifiers=8)
    assert focused(page) == "Edit"
    press(page, "Enter")
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    press(page, "Escape")
    assert focused(page) == "Edit"
    reached = set()
    for _ in range(40):
        press(page, "Tab")
        reached.add(focused(page))
    # Every control of the page is reached.
    expected = {"model", "template", "system", "schema", "shade", "prompt", "go"}
    assert expected <= reached


def test_the_pointer_shows_alternatives(show, raw):
    page = show(raw)
    ask(page, PROMPT)
    x, y, tokens = page.evaluate(
        """(() => { const token = document.querySelectorAll(".token")[3];
        const box = token.getClientRects()[0];
        return [box.x + box.width / 2, box.y + box.height / 2, token.tokens]; })()"""
    )
    page.move_pointer(x, y)
    rows = page.evaluate(
        """[...document.querySelectorAll("#token tr")].map((row) => [row.className,
        row.cells[0].textContent, row.cells[1].textContent])"""
    )
    expected = [
        (
            "chosen" if other["token"] == token["token"] else "",
            other["token"].replace("\n", "↵").replace(" ", "·"),
            f"{100 * math.exp(other['logprob']):.1f} %",
        )
        for token in tokens
        for other in token["top_logprobs"]
    ]
    assert [tuple(row) for row in rows][: len(expected)] == expected
    assert [row[0] for row in rows].count("chosen") == len(tokens)
    page.move_pointer(1, 1)
    assert text_of(page, "token") == ""


# The server ----------------------------------------------------------------------


def test_the_api_key_is_requested(show, small):
    with serving(small, api_key="open sesame") as address:
        page = show(address)
        visible = "!document.getElementById('key').hidden"
        assert page.evaluate(visible)
        assert focused(page) == "secret"
        assert text_of(page, "error") == ""
        enter_key(page, "wrong")
        wait(page, "document.getElementById('error').textContent.includes('API key')")
        enter_key(page, "open sesame")
        finish(page)
        assert not page.evaluate(visible)
        ask(page, PROMPT)
        assert "24 tokens" in figures(page)


def enter_key(page, key):
    fill(page, secret=key)
    page.evaluate("document.getElementById('key').requestSubmit()")


def test_a_server_that_has_ended_is_reported(show, small):
    with serving(small) as address:
        page = show(address)
        ask(page, PROMPT)
        before = turns(page)
    ask(page, "Other")
    assert text_of(page, "error").startswith("The server does not respond")
    assert turns(page) == before
    assert not page.evaluate("document.getElementById('go').disabled")


@pytest.mark.proof
def test_the_page_notices_the_end_and_the_return_of_the_server(show, small):
    error = "document.getElementById('error').textContent"
    with serving(small) as address:
        page = show(address)
        ask(page, PROMPT)
        before = turns(page)
    wait(page, f"{error}.startsWith('The server does not respond')")
    with serving(small, port=int(address.url.rpartition(":")[2])):
        wait(page, f"{error} === ''")
        assert turns(page) == before
        ask(page, "Other")
        assert turns(page) == ["Other", complete(small, "Other")]


@pytest.mark.proof
def test_an_answer_that_breaks_off_is_kept(show, small, slow_model):
    with serving(small) as address:
        page = show(address)
        fill(page, max_tokens="240", temperature="1", seed="1", prompt=PROMPT)
        click(page, "go")
        wait(page, "document.querySelectorAll('#turns .token').length > 3")
    finish(page)
    assert "server" in text_of(page, "error")
    assert figures(page).endswith(" · failed")
    assert turns(page)[1]
