"""The server's page, as a real browser shows it and a person works it."""

import json
import math
import time
from dataclasses import replace

import pytest
from browser import find_browser, started
from models import UNEVEN, build, small_tokenizer
from servers import GREEDY, post, request, send, serving

from mlx_openelm.generation.conversation import Conversation
from mlx_openelm.generation.streaming import generate
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.serving.page import page_headers, read_page

pytestmark = pytest.mark.interop

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def small():
    config = replace(UNEVEN, max_context_length=256)
    return build(config, seed=4), small_tokenizer()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = find_browser()
    if path is None:
        pytest.skip("needs a Chromium")
    with started(path, tmp_path_factory.mktemp("profile")) as it:
        yield it


@pytest.fixture(scope="module")
def server(small):
    with serving(*small) as it:
        yield it


class Address:
    """What Page.open wants."""

    def __init__(self, url: str) -> None:
        self.as_uri = lambda: f"{url}/"


def show(browser, server, **options):
    page = browser.new_page()
    page.open(Address(server.url), **options)
    wait(page, "document.getElementById('about').textContent !== 'connecting…'")
    return page


def wait(page, condition):
    for _ in range(200):
        if page.evaluate(condition):
            return
        time.sleep(0.05)
    raise AssertionError(condition)


def fill(page, **values):
    for id, value in values.items():
        page.evaluate(f"document.getElementById('{id}').value = {json.dumps(value)}")


def click(page, id):
    page.evaluate(f"document.getElementById('{id}').click()")


def press(page, key, modifiers=0):
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers)


def text_of(page, id):
    return page.evaluate(f"document.getElementById('{id}').textContent")


def ask(page):
    click(page, "go")
    wait(page, "!document.getElementById('go').disabled")


def test_the_page_is_whole_and_names_no_other_place(server):
    status, headers, body = send(server.url, request(server.url, "/", method="GET"))
    assert (status, body) == (200, read_page())
    assert (
        headers["content-security-policy"] == page_headers()["Content-Security-Policy"]
    )
    for word in (b"http:", b"https:", b"innerHTML", b"eval(", b"@import", b" src="):
        assert word not in body


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_nothing_is_complained_of(browser, server, width, scheme):
    page = show(browser, server, width=width, scheme=scheme)
    fill(page, prompt="long" * 40, max_tokens="40")
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.errors == []
    assert {url.removeprefix(server.url) for url in page.requests} == {
        *("/", "/v1/models", "/v1/completions"),
    }
    unnamed = """[...document.querySelectorAll("input, textarea")]
        .filter((field) => !field.labels.length).map((field) => field.id)"""
    assert page.evaluate(unnamed) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(20, 23, 27)") == (scheme == "dark")


def test_the_answer_streams_in_shaded_by_probability(browser, server, small):
    page = show(browser, server)
    fill(page, prompt=PROMPT)
    ask(page)
    assert text_of(page, "answer") == PROMPT + generate(
        *small, PROMPT, GREEDY, template="raw"
    )
    assert "24 tokens · " in text_of(page, "figures")
    assert "tokens/s" in text_of(page, "figures")
    assert text_of(page, "error") == ""
    body = {"prompt": PROMPT, "logprobs": 5}
    told = post(server.url, body)[1]["choices"][0]["logprobs"]
    shown = page.evaluate(
        """[...document.querySelectorAll("#answer .token")].map((token) => [
            token.tokens.map((t) => t.logprob), token.style.getPropertyValue("--alpha"),
            getComputedStyle(token).backgroundColor])"""
    )
    found = [logprob for logprobs, _, _ in shown for logprob in logprobs]
    assert found == pytest.approx(told["token_logprobs"], abs=1e-4)
    for logprobs, alpha, colour in shown:
        bits = -sum(logprobs) / math.log(2)
        assert float(alpha) == pytest.approx(0.75 * min(bits / 10, 1), abs=2e-3)
        assert colour != "rgba(0, 0, 0, 0)"
    click(page, "shade")
    plain = "getComputedStyle(document.querySelector('.token')).backgroundColor"
    assert page.evaluate(plain) == "rgba(0, 0, 0, 0)"


def test_settings_are_asked_for_and_the_text_goes_on(browser, server, small):
    page = show(browser, server)
    asked = replace(
        GREEDY, max_tokens=12, temp=0.9, top_p=0.8, top_k=50, min_p=0.01, seed=7
    )
    fill(page, prompt=PROMPT, max_tokens="12", temperature="0.9", top_p="0.8")
    fill(page, top_k="50", min_p="0.01", seed="7", stops="never\\n\nsaid")
    ask(page)
    first = generate(*small, PROMPT, asked, template="raw")
    assert text_of(page, "answer") == PROMPT + first
    click(page, "on")
    wait(page, "!document.getElementById('go').disabled")
    then = generate(*small, PROMPT + first, asked, template="raw")
    assert text_of(page, "answer") == PROMPT + first + then
    fill(page, temperature="0", seed="", stops=first[4:7], max_tokens="24")
    ask(page)
    expected = generate(
        *small, PROMPT, replace(GREEDY, stop=(first[4:7],)), template="raw"
    )
    assert text_of(page, "answer") == PROMPT + expected
    fill(page, prompt="x" * 3000)
    ask(page)
    assert "context is 256" in text_of(page, "error")
    fill(page, top_p="7")
    click(page, "go")
    assert text_of(page, "error") == "a setting is out of its range"


def test_stop_ends_the_generation_in_the_server(browser, server, monkeypatch):
    steps, call = [0], OpenELM.__call__

    def slowly(self, inputs, cache=None):
        steps[0] += 1
        time.sleep(0.02)
        return call(self, inputs, cache)

    monkeypatch.setattr(OpenELM, "__call__", slowly)
    page = show(browser, server)
    fill(page, prompt="a", max_tokens="250", temperature="1", seed="1")
    for end in (lambda: click(page, "stop"), lambda: press(page, "Escape")):
        steps[0] = 0
        page.evaluate("document.getElementById('prompt').focus()")
        press(page, "Enter", modifiers=2)
        wait(page, "document.querySelectorAll('#answer .token').length > 3")
        assert page.evaluate("document.getElementById('go').disabled")
        end()
        wait(page, "!document.getElementById('go').disabled")
        assert "stopped here" in text_of(page, "figures")
        time.sleep(1.2)
        seen = steps[0]
        time.sleep(0.3)
        assert (seen, server.under_way) == (steps[0], 0)
        assert 0 < seen < 200


def test_tokens_are_read_with_the_arrow_keys(browser, server):
    page = show(browser, server)
    ask(page)
    page.evaluate("document.getElementById('answer').focus()")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        press(page, key)
        seen.append(text_of(page, "token"))
    assert seen[0] == seen[2] != seen[1]
    assert " %; else " in seen[0]
    assert page.evaluate("document.querySelectorAll('.token.read').length") == 1


def test_a_model_with_a_template_chats(browser, small):
    conversation = Conversation(*small, GREEDY, template="instruct", system="Be kind.")
    with serving(*small, template="instruct") as server:
        page = show(browser, server)
        fill(page, system="Be kind.")
        for message in ("Hi", "<b>And</b>?"):
            fill(page, prompt=message)
            ask(page)
            expected = "".join(piece.text for piece in conversation.reply(message))
            assert text_of(page, "answer").endswith(f"{message}tiny{expected}")
            assert text_of(page, "error") == ""
        assert page.evaluate("turns.length") == 4
        click(page, "clear")
        assert text_of(page, "answer") == ""
        page.evaluate("document.querySelector('[value=text]').click()")
        fill(page, prompt=PROMPT)
        ask(page)
        expected = generate(*small, PROMPT, GREEDY, template="raw")
        assert text_of(page, "answer") == PROMPT + expected


def test_a_key_is_asked_for(browser, small):
    with serving(*small, api_key="open sesame") as server:
        page = show(browser, server)
        visible = "!document.getElementById('key').hidden"
        assert page.evaluate(visible)
        assert page.evaluate("document.activeElement.id") == "secret"
        fill(page, secret="wrong")
        page.evaluate("document.getElementById('key').requestSubmit()")
        wait(page, "document.getElementById('error').textContent.includes('API key')")
        fill(page, secret="open sesame")
        page.evaluate("document.getElementById('key').requestSubmit()")
        wait(page, "!document.getElementById('go').disabled")
        assert not page.evaluate(visible)
        ask(page)
        assert "24 tokens" in text_of(page, "figures")


def test_a_server_that_ends_is_told_of(browser, small):
    with serving(*small) as server:
        page = show(browser, server)
    ask(page)
    assert text_of(page, "error") != ""
    assert not page.evaluate("document.getElementById('go').disabled")
