"""A real llama.cpp runs our GGUF files: `make llama-cpp` installs one."""

import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from llama_cpp import PYTHON, Post, greedy, serving_gguf
from models import made_weight, read_golden
from safetensors.numpy import save_file
from sentencepieces import LLAMA
from tool_matrix import BITS, make_adapter, make_demo

import mlx_openelm
from converters.conversion.run import convert
from converters.formats.gguf_writer import write_gguf
from converters.formats.pt_writer import TensorToWrite
from mlx_openelm.config import LLAMA_PIECES, OpenELMConfig
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import stream
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.storage.shards import write_json
from mlx_openelm.storage.tokenizer_finder import (
    LLAMA_VECTORS,
    PROBES,
    read_tokenizer,
)
from mlx_openelm.text.chat_templates import chat_template
from mlx_openelm.text.templates import LAYOUTS, Turn, encode_turns
from mlx_openelm.text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs `make llama-cpp`"),
]

NUM_TOKENS = 40
PROMPTS = (
    "Once upon a time there was",
    "The king said to his three daughters:",
    "\u201cWho is there?\u201d cried the wolf",
    "\n",
)
PARTS = (
    *("Once", "upon", "king", "'s", "1234", "def f(x):\n\treturn x", "</s>", "<s>"),
    *(" ", "  ", "\n", "\n\n", "\t", "\u00a0", ".", "--", "\u201c"),
    *("é", "日本語", "👩‍👩‍👧", "مرحبا", "e\u0301", "\u200b", "ß", "\U0001d4b3"),
)


def random_texts(count: int) -> list[str]:
    rng = random.Random(7)
    return ["".join(rng.choices(PARTS, k=rng.randint(0, 12))) for _ in range(count)]


@pytest.fixture(name="here", scope="module")
def _here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama_cpp")


@pytest.fixture(name="demo", scope="module")
def _demo(here: Path) -> Path:
    """The demo as a folder in float32, with the template of instruct models."""
    shutil.copytree(demo_folder(), here / "demo")
    raw = read_mapping(here / "demo/config.json")
    write_json(
        here / "demo/config.json", raw | {"mlx_openelm": {"template": "instruct"}}
    )
    report = convert(here / "demo", here / "base", dtype="float32", dequantize=True)
    return Path(report.path)


@pytest.fixture(name="gguf", scope="module")
def _gguf(here: Path, demo: Path) -> Path:
    return Path(convert(demo, here / "demo.gguf", to="gguf").path)


@pytest.fixture(name="post", scope="module")
def _post(gguf: Path) -> Iterator[Post]:
    with serving_gguf(gguf) as post:
        yield post


def check_answers(
    post: Post, base: Path, adapter: Path | None = None, tolerance: float = 1e-4
) -> np.ndarray:
    """Compare greedy answers, and the best log-probabilities at each step.

    Returns:
        Our log-probabilities after each prompt.
    """
    model, tokenizer = mlx_openelm.load(str(base), adapter and str(adapter))
    first = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        chunks = stream(model, tokenizer, ids, Sampling(max_tokens=NUM_TOKENS))
        ours = [chunk.token for chunk in chunks]
        theirs, probabilities = greedy(post, ids, NUM_TOKENS, num_probs=50)
        assert theirs == ours
        logits = model(mx.array([[*ids, *ours]]))[0, len(ids) - 1 : -1]
        expected = np.array(nn.log_softmax(logits))
        for row, step in zip(expected, probabilities, strict=True):
            assert len(step) == 50
            ours = row[list(step)]
            np.testing.assert_allclose(list(step.values()), ours, atol=tolerance)
        first.append(expected[0])
    return np.stack(first)


def test_the_demo_has_our_log_probabilities(post: Post, demo: Path) -> None:
    check_answers(post, demo)


@pytest.mark.parametrize("bits", ["4 bits", "mixed bits"])
def test_a_quantized_folder_is_unpacked(tmp_path: Path, bits: str) -> None:
    folder = make_demo(tmp_path, "base", **BITS[bits])
    gguf = convert(folder, tmp_path / "demo.gguf", to="gguf", dtype="float32").path
    with serving_gguf(Path(gguf)) as post:
        check_answers(post, folder)


@pytest.mark.parametrize("adapted", [False, True])
def test_8_bits_of_llama_cpp_are_close(
    tmp_path: Path, demo: Path, adapted: bool
) -> None:
    path = convert(demo, tmp_path / "8.gguf", to="gguf", bits=8).path
    lora, adapter = None, None
    if adapted:
        config = open_folder(demo).config
        lora = make_adapter(tmp_path / "lora", config, demo)
        adapter = Path(convert(lora, tmp_path / "lora.gguf", to="gguf").path)
    model, tokenizer = mlx_openelm.load(str(demo), lora and str(lora))
    ids = tokenizer.encode(PROMPTS[0])
    expected = np.array(nn.log_softmax(model(mx.array([ids]))[0, -1]))
    with serving_gguf(Path(path), adapter) as post:
        _, (step,) = greedy(post, ids, 1, num_probs=50)
        check_chats(post, "instruct")
    np.testing.assert_allclose(list(step.values()), expected[list(step)], atol=0.1)


def test_texts_have_our_ids(post: Post) -> None:
    check_ids(post, read_tokenizer(demo_folder()))


def check_ids(post: Post, tokenizer: Tokenizer) -> None:
    for text in (*PROBES, *LLAMA_VECTORS, *random_texts(200)):
        body = {"content": text, "add_special": True, "parse_special": False}
        assert post("/tokenize", body)["tokens"] == tokenizer.encode(text), text


# Chats ---------------------------------------------------------------------------

TURNS = (
    Turn("system", "Be brief."),
    Turn("user", " Who was the king?\n"),
    Turn("assistant", "王, he said. "),
    Turn("user", "And his daughters, </s> where were they? "),
)


def random_chats() -> list[list[Turn]]:
    rng = random.Random(3)
    texts = [text for text in random_texts(99) if "<s>" not in text]  # special there
    return [
        [Turn(("user", "assistant")[i % 2], rng.choice(texts)) for i in range(length)]
        for length in [rng.choice((1, 3, 5)) for _ in range(40)]
    ]


@pytest.mark.parametrize("template", LAYOUTS)
def test_alpaca_chats_are_rendered_as_trained(
    tmp_path: Path, demo: Path, template: str
) -> None:
    raw = read_mapping(demo / "config.json")
    folder = shutil.copytree(demo, tmp_path / "demo")
    write_json(folder / "config.json", raw | {"mlx_openelm": {"template": template}})
    path = convert(folder, tmp_path / "demo.gguf", to="gguf").path
    with serving_gguf(Path(path)) as post:
        check_chats(post, template)


def test_instruct_chats_are_rendered_as_trained(post: Post) -> None:
    check_chats(post, "instruct")


def check_chats(post: Post, template: str) -> None:
    tokenizer = read_tokenizer(demo_folder())
    for turns in [TURNS, TURNS[1:2], TURNS[:2], TURNS[1:], *random_chats()]:
        messages = [{"role": t.role, "content": t.text} for t in turns]
        text = post("/apply-template", {"messages": messages})["prompt"]
        body = {"content": text, "add_special": True, "parse_special": True}
        ids, _ = encode_turns(tokenizer, turns, template)
        assert post("/tokenize", body)["tokens"] == ids, turns


def test_the_chat_endpoint_answers_with_the_template(post: Post, demo: Path) -> None:
    model, tokenizer = mlx_openelm.load(str(demo))
    ids, _ = encode_turns(tokenizer, TURNS, "instruct")
    chunks = stream(model, tokenizer, ids, Sampling(max_tokens=12))
    messages = [{"role": t.role, "content": t.text} for t in TURNS]
    body = {"messages": messages, "max_tokens": 12, "temperature": 0}
    reply = post("/v1/chat/completions", body)
    assert reply["usage"]["prompt_tokens"] == len(ids)
    answer = reply["choices"][0]["message"]["content"]
    assert answer.strip() == "".join(chunk.text for chunk in chunks).strip()


# Adapters ------------------------------------------------------------------------


def write_peft(folder: Path, base: Path) -> Path:
    """Write a strong adapter of all linears, with differing ranks and alphas."""
    config = mlx_openelm.load(str(base))[0].config
    rng = np.random.default_rng(5)
    tensors, ranks, alphas = {}, {}, {}
    for i, (name, shape) in enumerate(config.tensor_shapes().items()):
        if "proj" not in name:
            continue
        module = f"transformer.{name.removesuffix('.weight')}"
        ranks[module], alphas[module] = rank, _ = 2 + i % 3, (4, 8, 12, 20)[i % 4]
        a = rng.standard_normal((rank, shape[1]), np.float32)
        b = rng.standard_normal((shape[0], rank), np.float32)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.02 * b
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 8,
        "lora_alpha": 8,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": ["qkv_proj", "out_proj", "proj_1", "proj_2"],
    }
    write_json(folder / "adapter_config.json", described)
    return folder


def test_an_adapter_has_its_effect(here: Path, demo: Path, gguf: Path) -> None:
    source = write_peft(here / "peft", demo)
    lora = convert(source, here / "lora").path
    report = convert(source, here / "lora.gguf", to="gguf")
    assert any("Folded alphas" in note for note in report.notes)
    model, tokenizer = mlx_openelm.load(str(demo))
    with serving_gguf(gguf, report.path) as post:
        adapted = check_answers(post, demo, lora)
    ids = mx.array([tokenizer.encode(PROMPTS[0])])
    plain = np.array(nn.log_softmax(model(ids))[0, -1])
    assert np.abs(adapted[0] - plain).max() > 1


# Apple's model -------------------------------------------------------------------


def test_apples_logits_of_the_270m(here: Path) -> None:
    """Its GGUF in float32 gives the log-probabilities of CoreNet itself."""
    if not LLAMA.is_file():
        pytest.skip(f"needs {LLAMA}")
    metadata, shapes, tokens, positions, logits = read_golden("OpenELM-270M")
    config = OpenELMConfig.preset("270M", vocab_size=LLAMA_PIECES)
    seed = int(metadata["seed"])

    def read(name: str, rows: int) -> mx.array:
        return mx.array(made_weight(name, shapes[name], seed)[:rows])

    tensors = {
        name: TensorToWrite(shape, mx.float32, partial(read, name, shape[0]))
        for name, shape in config.tensor_shapes().items()
    }
    tokenizer = Tokenizer.from_file(LLAMA)
    path = here / "270m.gguf"
    write_gguf(
        path,
        name="270M",
        config=config,
        tensors=tensors,
        file_type="F32",
        tokenizer=tokenizer,
    )
    with serving_gguf(path) as post:
        check_ids(post, tokenizer)  # of 32,000 pieces
        for row, expected in zip(tokens.tolist(), logits, strict=True):
            for position, theirs in zip(positions, expected, strict=True):
                prompt = row[: position + 1]
                _, (step,) = greedy(post, prompt, 1, num_probs=1000)
                wanted = np.array(nn.log_softmax(mx.array(theirs[:LLAMA_PIECES])))
                np.testing.assert_allclose(
                    list(step.values()), wanted[list(step)], atol=1e-4
                )
                assert int(wanted.argmax()) == max(step, key=lambda i: step[i])
    path.unlink()


@pytest.mark.soak
@pytest.mark.parametrize("name", ["270M", "450M", "1.1B", "3B"])
def test_the_released_shapes_open(tmp_path: Path, name: str) -> None:
    """With a template, an adapter, and weights of zeros: all tokens equally likely."""
    tokenizer = read_tokenizer(demo_folder())
    config = OpenELMConfig.preset(name, vocab_size=tokenizer.num_ids)
    tensors = {
        name: TensorToWrite(shape, mx.float16, partial(mx.zeros, shape, mx.float16))
        for name, shape in config.tensor_shapes().items()
    }
    path, lora = tmp_path / "zeros.gguf", tmp_path / "lora.gguf"
    write_gguf(
        path,
        name=name,
        config=config,
        tensors=tensors,
        file_type="F16",
        tokenizer=tokenizer,
        chat_template=chat_template("instruct"),
    )
    convert(make_adapter(tmp_path / "lora", config, tmp_path), lora, to="gguf")
    with serving_gguf(path, lora) as post:
        _, (step,) = greedy(post, [1, 5, 9], 1, num_probs=10)
        messages = [{"role": "user", "content": "Hi"}]
        reply = post("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    path.unlink()
    expected = [-np.log(config.vocab_size)] * 10
    np.testing.assert_allclose(list(step.values()), expected, atol=1e-4)
    ids, _ = encode_turns(tokenizer, [Turn("user", "Hi")], "instruct")
    assert reply["usage"]["prompt_tokens"] == len(ids)
