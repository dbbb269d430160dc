"""Clients as people use them, each in a process of its own.

They are in an environment of their own (`make clients`), as they depend on much.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from places import ROOT
from servers import USER, events, get, healthy, post, serving

pytestmark = pytest.mark.proof

CHATS = "/v1/chat/completions"
CLIENTS = Path(os.environ.get("MLX_OPENELM_CLIENTS", ROOT / ".venv-clients"))
SCHEMA = {
    "title": "Person",
    "description": "A person.",
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a program and returns what it prints."""

    def run(*command, timeout=300, **options):
        environment = {
            name: value
            for name, value in os.environ.items()
            if "proxy" not in name.lower() and not name.startswith("PYTHON")
        }
        environment |= {"HOME": str(tmp_path), "LLM_USER_PATH": str(tmp_path / "llm")}
        environment |= options.pop("env", {})
        result = subprocess.run(
            list(map(str, command)),
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            timeout=timeout,
            **options,
        )
        assert result.returncode == 0, (result.stdout + result.stderr).decode()[-6000:]
        return result.stdout.decode()

    return run


def installed(program):
    path = CLIENTS / "bin" / program
    if not path.exists():
        pytest.skip(f"needs `make clients`: {path} is not there")
    return path


def chat(server, *messages, **options):
    """Return the text of the server's answer."""
    body = {"messages": list(messages), "temperature": 0, "max_tokens": 20} | options
    status, answer = post(server.url, body, CHATS)
    assert status == 200
    return answer["choices"][0]["message"]["content"]


OPENAI = """
import asyncio, json, sys
import openai
url, schema = sys.argv[1], json.loads(sys.argv[2])
options = {"model": "tiny", "temperature": 0, "max_tokens": 20}
messages = [{"role": "user", "content": "Hi"}]
form = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}
texts = []
for base in (url, url + "/", url + "/v1", url + "/v1/"):
    client = openai.OpenAI(base_url=base, api_key="x", max_retries=0)
    create = client.chat.completions.create
    texts.append(create(messages=messages, **options).choices[0].message.content)
    chunks = create(messages=messages, stream=True, **options)
    texts.append("".join(c.choices[0].delta.content or "" for c in chunks))
    assert [model.id for model in client.models.list()] == ["tiny"]
    options["max_tokens"] = 200
    answer = create(messages=messages, response_format=form, **options)
    json.loads(answer.choices[0].message.content)
    options["max_tokens"] = 20

async def ask():
    client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="x", max_retries=0)
    create = client.chat.completions.create
    requests = [create(messages=messages, **options) for _ in range(9)]
    answers = await asyncio.gather(*requests)
    return [answer.choices[0].message.content for answer in answers]

print(json.dumps(texts + asyncio.run(ask())))
"""


def test_openai(server, run):
    code = [installed("python"), "-c", OPENAI, server.url, json.dumps(SCHEMA)]
    texts = json.loads(run(*code))
    assert texts == [chat(server, USER)] * 17


LANGCHAIN = """
import json, sys
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
url, schema = sys.argv[1] + "/v1", json.loads(sys.argv[2])
options = {"base_url": url, "api_key": "x", "model": "tiny", "temperature": 0}
model = ChatOpenAI(max_tokens=20, **options)
longer = ChatOpenAI(max_tokens=200, **options)
turns = [SystemMessage("Be brief."), HumanMessage("Hi")]
turns += [AIMessage("Yes?"), HumanMessage("A")]
structured = longer.with_structured_output(schema, method="json_schema")
by_object = longer.bind(response_format={"type": "json_object"})
print(json.dumps({
    "whole": model.invoke("Hi").content,
    "streamed": "".join(chunk.content for chunk in model.stream("Hi")),
    "batch": [answer.content for answer in model.batch(["Hi", "Hi", "Hi"])],
    "turns": model.invoke(turns).content,
    "structured": structured.invoke("Hi"),
    "object": by_object.invoke("Hi").content,
    "completion": OpenAI(max_tokens=9, **options).invoke("The king"),
}))
"""


def test_langchain(server, run):
    code = [installed("python"), "-c", LANGCHAIN, server.url, json.dumps(SCHEMA)]
    found = json.loads(run(*code))
    expected = chat(server, USER)
    assert found["whole"] == found["streamed"] == expected
    assert found["batch"] == [expected] * 3
    assert set(found["structured"]) == {"name", "age"}
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Yes?"),
        ("user", "A"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert found["turns"] == chat(server, *messages)
    body = {"prompt": "The king", "temperature": 0, "max_tokens": 9}
    assert found["completion"] == post(server.url, body)[1]["choices"][0]["text"]


def test_llm(server, run, tmp_path):
    llm = installed("llm")
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: tiny\n  api_base: {server.url}/v1\n"
        "  supports_schema: true\n"
    )
    options = ("-m", "tiny", "--key", "x", "-o", "temperature", 0, "-o", "max_tokens")
    expected = chat(server, USER)
    for more in ((), ("--no-stream",)):
        printed = run(llm, *options, 20, *more, "Hi", stdin=subprocess.DEVNULL)
        assert printed == f"{expected}\n"
    printed = run(llm, "-c", *options, 20, "A", stdin=subprocess.DEVNULL)
    answer = {"role": "assistant", "content": expected}
    assert (
        printed == f"{chat(server, USER, answer, {'role': 'user', 'content': 'A'})}\n"
    )
    schema = ("--schema", json.dumps(SCHEMA))
    printed = run(llm, *options, 200, *schema, "Hi", stdin=subprocess.DEVNULL)
    assert set(json.loads(printed)) == {"name", "age"}


def test_curl(server, run):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    body = {"messages": [USER], "temperature": 0, "max_tokens": 20}
    expected = chat(server, USER)
    url = server.url + CHATS
    kind = ("-H", "Content-Type: application/json")
    for options in (
        ("-d", json.dumps(body)),
        (*kind, "-d", json.dumps(body)),
        ("--http1.0", "-d", json.dumps(body)),
        ("-H", "Expect: 100-continue", "-d", json.dumps(body)),
        ("-H", "Connection: keep-alive", "-d", json.dumps(body)),
    ):
        answer = json.loads(run(curl, "-sSf", url, *options))
        assert answer["choices"][0]["message"]["content"] == expected
    sent = json.dumps(body).encode()
    chunked = run(curl, "-sSf", "-T", "-", "-X", "POST", url, input=sent)
    assert json.loads(chunked)["choices"][0]["message"]["content"] == expected
    streamed = run(curl, "-sSfN", url, "-d", json.dumps(body | {"stream": True}))
    *chunks, done = events(streamed.encode())
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert ("".join(deltas), done) == (expected, "[DONE]")
    assert run(curl, "-sSf", "-I", f"{server.url}/health").startswith("HTTP/1.1 200")


# Generated requests --------------------------------------------------------------


def fuzz(run, url, seconds):
    """Send requests made from /openapi.json; any status but 5xx is right.

    One worker: hypothesis calls `ast.parse`, which in Python 3.11 can fail when several
    threads call it ("recursion depth mismatch", CPython issue 106905).
    """
    run(
        *(installed("schemathesis"), "run", f"{url}/openapi.json"),
        *("--checks", "not_a_server_error,status_code_conformance"),
        *("--checks", "content_type_conformance,response_schema_conformance"),
        *("--checks", "unsupported_method,allow_header_conformance"),
        *("--max-time", seconds, "--phases", "coverage,fuzzing"),
        *("--request-timeout", 60, "--suppress-health-check", "all"),
        *("--workers", 1, "--no-color"),
        timeout=seconds + 600,
    )


@pytest.fixture
def brief(small):
    """A server whose answers are short, where requests do not ask for long ones."""
    with serving(*small, template="instruct", timeout_s=600) as started:
        yield started


def test_generated_requests_are_never_a_failure_of_ours(brief, run):
    fuzz(run, brief.url, 60)
    healthy(brief.url)


@pytest.mark.soak
def test_generated_requests_for_ten_minutes(brief, run):
    fuzz(run, brief.url, 600)
    healthy(brief.url)


def test_the_description_is_valid(server):
    text = get(server.url, "/openapi.json")[2].decode()
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in json.loads(text)["components"]["schemas"]
