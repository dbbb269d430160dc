"""transformers, PEFT and lm-evaluation-harness open the folders of `--to hf`.

What they compute (`transformers_runs.py`) is compared with our own model.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from models import (
    LINEARS,
    TABLE,
    UNEVEN,
    make_factors,
    read_golden,
    small_tokenizer,
    weights_of,
    write_hugging_face,
    write_peft_folder,
)
from places import ROOT, SUPPORT

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from converters.conversion.run import convert
from converters.formats.transformers_code import AUTO_MAP, write_code
from mlx_openelm.bench.selfcheck import made_weight
from mlx_openelm.config import LLAMA_PIECES, OpenELMConfig
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import stream
from mlx_openelm.model.likelihood import log_likelihoods
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.shards import write_json
from mlx_openelm.storage.staging import CODE_FILES
from mlx_openelm.tensor_names import to_folder
from mlx_openelm.text.templates import Turn, encode_turns

pytestmark = [
    pytest.mark.interop,
    pytest.mark.proof,
    # Only searched for: importing PEFT takes 3 s, also where no proof is run.
    pytest.mark.skipif(find_spec("peft") is None, reason="needs PyTorch and PEFT"),
]

EARLY = ROOT / ".venv-transformers" / "bin" / "python"
PROMPT = "Once upon a time there was a king who"
PROMPTS = [PROMPT, "The wolf", "An old woman went into the wood, and there she met a"]
NUM_TOKENS = 24
ROWS = np.random.default_rng(5).integers(3, UNEVEN.vocab_size, size=(2, 33)).tolist()
TURNS = (
    Turn("system", "Be brief."),
    Turn("user", " Who was the king?\n"),
    Turn("assistant", "王, he said."),
    Turn("user", "And his daughters, </s> where were they? "),
)
KEYS = ["qkv_proj", "out_proj", "proj_1", "proj_2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folders in float32: the demo, and small models with uneven layers."""
    work = tmp_path_factory.mktemp("hf")
    convert("demo", work / "demo", to="hf", dtype="float32")
    for name, tied in (("uneven", True), ("untied", False)):
        config = replace(UNEVEN, share_input_output_layers=tied)
        source = write_hugging_face(work / f"{name}-0", config, weights_of(config))
        (source / "tokenizer.model").write_bytes(small_tokenizer().model_proto)
        convert(source, work / name, to="hf")
    for name, bits in (("4bit", 4), ("mixed", "auto:5")):
        convert("demo", work / f"{name}-mlx", bits=bits, receipt=False)
        convert(work / f"{name}-mlx", work / name, to="hf", dtype="float32")
    shutil.copytree(work / "demo", work / "instruct-0")
    config = json.loads((work / "instruct-0/config.json").read_text())
    write_json(
        work / "instruct-0/config.json",
        config | {"mlx_openelm": {"template": "instruct"}},
    )
    convert(work / "instruct-0", work / "instruct", to="hf")
    factors = make_factors(weights_of(UNEVEN), LINEARS[::3])
    write_peft_folder(work / "theirs", factors)
    convert(work / "theirs", work / "ours")
    convert(work / "ours", work / "adapter", to="peft")
    inputs = make_factors(weights_of(UNEVEN), (TABLE, *LINEARS[::3]))
    write_peft_folder(work / "inputs", inputs)  # adapts the embedding, not the head
    convert(work / "inputs", work / "merged", base=str(work / "uneven"), merge=True,
            dtype="float32")  # fmt: skip
    return work


def run_calls(python, work, calls):
    """Run functions of transformers_runs.py in one process; return their answers."""
    name = f"calls-{Path(python).parents[1].name}-{len(calls)}"
    written, answers = work / f"{name}.json", work / f"{name}-answers.json"
    written.write_text(json.dumps(calls))
    script = SUPPORT / "transformers_runs.py"
    ran = subprocess.run(
        [python, script, written, answers], capture_output=True, text=True, cwd=work
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(answers.read_text())


@pytest.fixture(scope="module", params=["newest", "early"])
def answers(work, request):
    python = sys.executable
    if request.param == "early":
        python = EARLY
        if not EARLY.exists():
            pytest.skip(f"needs an early transformers 5 in {EARLY} (make transformers)")

    def out(name):
        return str(work / f"{request.param}-{name}")

    demo, uneven, rows = str(work / "demo"), str(work / "uneven"), {"rows": ROWS}
    ids = load("demo")[1].encode(PROMPT)
    return out, run_calls(
        python,
        work,
        {
            "version": ("version", {}),
            **{
                name: ("logits", {"folder": str(work / name), **rows})
                for name in ("uneven", "untied", "4bit", "mixed")
            },
            "read": (
                "read",
                {"folder": demo, "prompt": PROMPT, "num_tokens": NUM_TOKENS},
            ),
            "chat": (
                "chat",
                {
                    "folder": str(work / "instruct"),
                    "messages": [
                        {"role": turn.role, "content": turn.text} for turn in TURNS
                    ],
                    "num_tokens": NUM_TOKENS,
                },
            ),
            "pad": (
                "pad",
                {"folder": demo, "prompts": PROMPTS, "num_tokens": NUM_TOKENS},
            ),
            "search": ("search", {"folder": demo, "ids": ids, "num_tokens": 12}),
            "save": ("save", {"folder": uneven, "target": out("saved")}),
            "resize": ("save", {"folder": uneven, "target": out("more"), "rows": 320}),
            "train": ("train", {"folder": uneven, "target": out("trained"), **rows}),
            "checkpointing": (
                "train",
                {
                    "folder": uneven,
                    "target": out("again"),
                    **rows,
                    "gradient_checkpointing": True,
                },
            ),
            "adapt": (
                "adapt",
                {"folder": uneven, "adapter": str(work / "adapter"), **rows},
            ),
            "inputs": (
                "adapt",
                {"folder": uneven, "adapter": str(work / "inputs"), **rows},
            ),
            **{
                name: (
                    "train_adapter",
                    {
                        "folder": uneven,
                        "target": out(name),
                        **rows,
                        "keys": KEYS,
                        "checkpointing": checkpointing,
                    },
                )
                for name, checkpointing in (("lora", False), ("lora-again", True))
            },
        },
    )


def logits_of(folder, adapter=None):
    model, _ = load(str(folder), adapter_path=adapter)
    return np.array(model(mx.array(ROWS)))


def is_close(actual, expected):
    np.testing.assert_allclose(np.array(actual), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["4bit", "mixed"])
def test_logits_of_an_unpacked_quantization_are_ours(work, answers, name):
    expected = logits_of(work / f"{name}-mlx")
    is_close(answers[1][name], expected)
    assert np.abs(expected - logits_of(work / "demo")).max() > 0.1


def test_the_chat_template_gives_our_ids_and_answer(work, answers):
    found = answers[1]["chat"]
    model, tokenizer = load(str(work / "instruct"))
    ids, _ = encode_turns(tokenizer, TURNS, "instruct")
    assert found["ids"] == ids
    made = stream(model, tokenizer, ids, Sampling(max_tokens=NUM_TOKENS))
    assert found["answer"] == [piece.token for piece in made]


def continue_greedily(prompt):
    model, tokenizer = load("demo")
    made = stream(model, tokenizer, prompt, Sampling(max_tokens=NUM_TOKENS))
    return [piece.token for piece in made]


def test_the_environments_differ(work, answers):
    out, found = answers
    newest = "newest" in out("")
    assert (tuple(map(int, found["version"].split(".")[:2])) >= (5, 20)) == newest


@pytest.mark.parametrize("name", ["uneven", "untied"])
def test_logits_are_ours(work, answers, name):
    is_close(answers[1][name], logits_of(work / name))


def test_every_cache_gives_our_greedy_tokens(answers):
    found, expected = answers[1]["read"], continue_greedily(PROMPT)
    assert found["ids"] == load("demo")[1].encode(PROMPT)
    assert len(set(expected)) > 10
    for cache in ("cached", "uncached", "static"):
        assert found[cache] == expected, cache


def test_forward_keeps_the_contract_of_transformers(answers):
    found = answers[1]["read"]
    assert (found["dtype"], found["tied"], found["tuple"]) == (
        "torch.float32",
        True,
        True,
    )
    assert found["states"] == 1 + load("demo")[0].config.num_transformer_layers
    for name in ("in parts", "eager", "embeddings", "last"):
        assert found[name] < 1e-4, name


def test_padding_on_the_left_changes_no_continuation(answers):
    found = answers[1]["pad"]
    assert sorted(found["padding"])[0] == 0
    assert len(set(found["padding"])) == 3
    assert found["written"] == [continue_greedily(prompt) for prompt in PROMPTS]


def test_the_best_beam_has_our_log_probability(answers):
    found = answers[1]["search"]
    assert found["cache True"] == found["cache False"]
    model, tokenizer = load("demo")
    tokens, start = mx.array([found["cache True"]]), len(tokenizer.encode(PROMPT))
    scores = log_likelihoods(model, tokens[:, :-1], tokens[:, 1:])[0, start - 1 :]
    assert found["score True"] == pytest.approx(scores.sum().item(), abs=1e-3)


def test_a_saved_folder_comes_back_unchanged(work, answers):
    out, found = answers
    assert set(CODE_FILES) <= set(found["save"])
    back = convert(out("saved"), out("back"), dtype="float32").path
    np.testing.assert_array_equal(logits_of(back), logits_of(work / "uneven"))


def test_an_embedding_of_another_size_comes_back(work, answers):
    back = convert(answers[0]("more"), answers[0]("more-back"), dtype="float32").path
    np.testing.assert_array_equal(logits_of(back), logits_of(work / "uneven"))


def test_the_trainer_trains_and_saves(work, answers):
    out, found = answers
    tokens, model = mx.array(ROWS), load(str(work / "uneven"))[0]
    expected = -log_likelihoods(model, tokens[:, :-1], tokens[:, 1:]).mean().item()
    losses = found["train"]["losses"]
    assert losses[0] == pytest.approx(expected, abs=1e-3)
    assert losses[1] < losses[0] - 0.01
    back = convert(out("trained"), out("trained-back"), dtype="float32").path
    assert np.abs(logits_of(back) - logits_of(work / "uneven")).max() > 0.01


def test_activation_checkpointing_changes_no_result(answers):
    _, found = answers
    plain, checkpointing = found["train"], found["checkpointing"]
    assert (plain["checkpointed"], checkpointing["checkpointed"]) == (False, True)
    assert checkpointing["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    is_close(found["lora-again"], found["lora"])  # with dropout


def test_peft_adds_and_merges_our_adapter(work, answers):
    expected = logits_of(work / "uneven", work / "ours")
    assert np.abs(expected - logits_of(work / "uneven")).max() > 0.1
    is_close(answers[1]["adapt"]["added"], expected)
    is_close(answers[1]["adapt"]["merged"], expected)


def test_peft_adapts_the_inputs_of_a_tied_embedding_alone(work, answers):
    expected = logits_of(work / "merged")
    assert np.abs(expected - logits_of(work / "uneven", work / "ours")).max() > 0.1
    is_close(answers[1]["inputs"]["added"], expected)


def test_an_adapter_trained_with_peft_comes_back(work, answers):
    out, found = answers
    ours = convert(out("lora"), out("lora-ours")).path
    assert np.abs(np.array(found["lora"]) - logits_of(work / "uneven")).max() > 0.1
    is_close(found["lora"], logits_of(work / "uneven", ours))


def test_apples_logits_and_the_released_shapes(tmp_path):
    metadata, golden, tokens, positions, logits = read_golden("OpenELM-270M")
    seed = int(metadata["seed"])
    weights = {name: made_weight(name, s, seed) for name, s in golden.items()}
    config = OpenELMConfig.from_shapes(golden)
    source = write_hugging_face(tmp_path / "source", config, weights)
    convert(source, tmp_path / "270M", to="hf", tokenizer="none")
    options = {
        "folder": "270M",
        "rows": tokens.tolist(),
        "positions": positions.tolist(),
    }
    calls = {"logits": ("logits", options)}
    for size in ("270M", "450M", "1.1B", "3B"):
        folder = tmp_path / f"shape-{size}"
        folder.mkdir()
        write_code(folder)
        write_json(
            folder / "config.json",
            OpenELMConfig.preset(size).to_dict() | AUTO_MAP,
        )
        calls[size] = ("shapes", {"folder": folder.name})
    found = run_calls(sys.executable, tmp_path, calls)
    is_close(found.pop("logits"), logits[..., :LLAMA_PIECES])
    for size, shapes in found.items():
        expected = OpenELMConfig.preset(size).tensor_shapes()
        assert shapes == {to_folder(n): list(s) for n, s in expected.items()}


def test_lm_evaluation_harness_scores_as_we_do(work):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")
    from types import SimpleNamespace

    from mlx_openelm.evaluation.harness_model import wrap_model
    from mlx_openelm.evaluation.scorer import OpenELMScorer

    pairs = [
        (PROMPT, " had a daughter"),
        ("The wolf", " is there, said the king"),
        ("", "It"),
    ]
    calls = {"scores": ("score", {"folder": str(work / "demo"), "pairs": pairs})}
    theirs = run_calls(sys.executable, work, calls)["scores"]
    model = wrap_model(OpenELMScorer(*load("demo")))
    ours = model.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    for (a, greedy), (b, also_greedy) in zip(theirs, ours, strict=True):
        assert a == pytest.approx(b, abs=1e-3)
        assert greedy == also_greedy
