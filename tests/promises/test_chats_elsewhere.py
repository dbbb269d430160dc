"""Stock mlx-lm chats with a folder of ours by the ids that it was trained with."""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
from ports import free_ports

from converters.conversion.run import convert
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import stream
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.loading import load
from mlx_openelm.text.templates import Turn, encode_turns

pytestmark = pytest.mark.interop

TURNS = (
    Turn("system", "Be brief."),
    Turn("user", " Who was the king?\n"),
    Turn("assistant", "王, he said."),
    Turn("user", "And his daughters, </s> where were they? "),
)
NUM_TOKENS = 12


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in float32, with the template of instruct models."""
    here = tmp_path_factory.mktemp("chats")
    shutil.copytree(demo_folder(), here / "demo")
    config = json.loads((here / "demo/config.json").read_text())
    config["mlx_openelm"] = {"template": "instruct"}
    (here / "demo/config.json").write_text(json.dumps(config))
    report = convert(here / "demo", here / "chat", dtype="float32", dequantize=True)
    return Path(report.path)


def answer(folder: Path, turns: Sequence[Turn]) -> str:
    """Our greedy answer."""
    model, tokenizer = load(str(folder))
    ids, _ = encode_turns(tokenizer, turns, "instruct")
    chunks = stream(model, tokenizer, ids, Sampling(max_tokens=NUM_TOKENS))
    return "".join(chunk.text for chunk in chunks)


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def test_mlx_lm_gives_the_ids_of_training(folder: Path) -> None:
    import mlx_lm

    _, theirs = mlx_lm.load(str(folder))
    _, ours = load(str(folder))
    for turns in (TURNS, TURNS[1:2], TURNS[1:], TURNS[:2]):
        ids = theirs.apply_chat_template(messages(turns), add_generation_prompt=True)
        assert ids == encode_turns(ours, turns, "instruct")[0]
    _, base = mlx_lm.load(str(demo_folder()))
    assert not base.has_chat_template


@pytest.mark.proof
def test_mlx_lm_chat_answers_with_it(folder: Path) -> None:
    turns = (TURNS[0], Turn("user", TURNS[-1].text))
    command = [*(sys.executable, "-m", "mlx_lm", "chat"), "--model", str(folder)]
    command += ["--system-prompt", TURNS[0].text, "--max-tokens", str(NUM_TOKENS)]
    result = subprocess.run(
        command,
        input=f"{TURNS[-1].text}\nq\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert answer(folder, turns).strip() in result.stdout


@pytest.mark.proof
def test_the_server_of_mlx_lm_answers_with_it(folder: Path) -> None:
    (port,) = free_ports(1)
    command = [*(sys.executable, "-m", "mlx_lm", "server"), "--model", str(folder)]
    body = {"messages": messages(TURNS), "max_tokens": NUM_TOKENS, "temperature": 0}
    with subprocess.Popen([*command, "--port", str(port)]) as server:
        try:
            reply = post(f"http://127.0.0.1:{port}/v1/chat/completions", body, server)
        finally:
            server.terminate()
    _, tokenizer = load(str(folder))
    assert reply["choices"][0]["message"]["content"] == answer(folder, TURNS)
    expected = len(encode_turns(tokenizer, TURNS, "instruct")[0])
    assert reply["usage"]["prompt_tokens"] == expected


def post(url: str, body: dict, server: subprocess.Popen) -> dict:
    """Return the JSON reply of a server, which may still be starting."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.poll() is None:
        try:
            with opener.open(request, timeout=120) as reply:
                return json.load(reply)
        except ConnectionError:
            time.sleep(0.2)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.2)
    raise AssertionError("the server has ended")
