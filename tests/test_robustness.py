"""Bad input: one sentence, exit code 1, nothing written and nothing lost."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from commands import call, make_source, refuse, spoilt
from models import UNEVEN, small_tokenizer, weights_of, write_pt

from mlx_openelm.checkpoint import INDEX, open_folder

FFN = "layers.1.ffn.proj_1.weight"
WEIGHTS = weights_of(UNEVEN)


# Sources -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("no.pt", None, "There is no file no.pt"),
        ("nowhere", None, "There is no folder nowhere"),
        ("~nobody/x", None, "There is no folder ~nobody/x"),
        ("x" * 3000, None, "name too long"),
        ("empty.pt", b"", "empty.pt is not torch.save's: it is empty"),
        ("text.pt", b"To be or not to be", "text.pt is not torch.save's"),
        ("source/model.safetensors", None, "one file of a model folder"),
    ],
)
def test_a_source_that_is_no_model_is_named(here, name, content, says):
    if content is not None:
        (here / name).write_bytes(content)
    refuse(here, "convert", name, "--mlx-path", "a/b", says=says)


def test_a_pickle_that_wants_to_run_code_does_not(here):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    with zipfile.ZipFile("evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"a": Evil()}, protocol=2))
    refuse(here, "convert", "evil.pt", says=["wants to run", "posix.mkdir"])


def test_a_checkpoint_cut_short_or_of_another_architecture_is_refused(here):
    pytest.importorskip("torch", reason="needs PyTorch to write .pt files")
    whole = write_pt(here / "cut.pt", WEIGHTS).read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 1):
        (here / "cut.pt").write_bytes(whole[:length])
        refuse(here, "convert", "cut.pt", says="cut.pt")
    llama = {f"model.layers.0.mlp.{n}_proj.weight": WEIGHTS[FFN] for n in ("up", "down")}
    write_pt(here / "llama.pt", llama)
    refuse(here, "convert", "llama.pt", says=["not an OpenELM", *llama])
    cut = {name: w for name, w in WEIGHTS.items() if name != "norm.weight"}
    write_pt(here / "cut.pt", {**cut, "layers.0.attn_norm.weight": np.ones(63, "f")})
    says = ["missing: norm.weight", "attn_norm.weight is [63], expected [64]"]
    refuse(here, "convert", "cut.pt", says=says)


@pytest.mark.parametrize("verb", ["convert", "inspect"])
@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model.safetensors", b"", "model.safetensors is damaged"),
        ("model.safetensors", -1, "model.safetensors is damaged"),
        ("model.safetensors", 1000, "model.safetensors is damaged"),
        ("model.safetensors", b"\xff" * 99, "model.safetensors is damaged"),
        ("config.json", b"", "config.json cannot be parsed"),
        ("config.json", 100, "config.json cannot be parsed"),
        ("config.json", b"[" * 9999, "config.json cannot be parsed"),
        ("config.json", b"\xff\xfe", "Cannot read"),
        ("config.json", b"[1, 2]", "config.json holds a list"),
        ("config.json", b"{}", "not an OpenELM's"),
        (INDEX, b"{", "index.json cannot be parsed"),
        (INDEX, b'{"weight_map": [1]}', "has no weight_map"),
        (INDEX, b'{"weight_map": {"a": "b.safetensors"}}', "b.safetensors of its index"),
        (INDEX, b'{"weight_map": {}}', "missing: "),
    ],
)
def test_damaged_files_of_a_folder_are_named(here, verb, file, content, says):
    path = here / "source" / file
    if isinstance(content, int):
        content = path.read_bytes()[:content]
    path.write_bytes(content)
    refuse(here, verb, "source", says=says)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model_type", "llama", "llama"),
        ("head_dim", None, "head_dim = None"),
        ("model_dim", "64", "model_dim = '64'"),
        ("model_dim", 128, "token_embeddings.weight is [300, 64], expected [300, 128]"),
        ("vocab_size", 10, "is [300, 64], expected [10, 64]"),
        ("ffn_dims", [96, 160], "ffn_dims"),
        ("ffn_dims", [96, 160, 32], "layers.2.ffn.proj_2.weight is [64, 64], expected"),
        ("ffn_dim_divisor", 0, "cannot be read"),
        ("num_transformer_layers", 10**9, "1000000000 layers"),
        ("rope_freq_constant", float("nan"), "rope_freq_constant is nan"),
        ("max_context_length", 64.5, "max_context_length is 64.5"),
        ("share_input_output_layers", False, "missing: lm_head.weight"),
        ("share_input_output_layers", "no", "share_input_output_layers is 'no'"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(here, key, value, says):
    path = here / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refuse(here, "convert", "source", says=says)
    refuse(here, "inspect", "source", says=says)


def test_all_tensors_that_do_not_fit_are_named_with_both_shapes(here):
    changes = {
        "layers.0.attn.q_norm.weight": None,
        "layers.2.ffn_norm.weight": None,
        "norm.weight": np.ones(63, "f"),
        "layers.1.ffn.proj_2.weight": np.ones((64, 4), "f"),
        "layers.1.bias": np.ones(3, "f"),
    }
    make_source(here / "odd", changes)
    says = [
        "missing: layers.0.attn.q_norm.weight, layers.2.ffn_norm.weight;",
        "unexpected: layers.1.bias;",
        "norm.weight is [63], expected [64]",
        "layers.1.ffn.proj_2.weight is [64, 4], expected [64, 160]",
    ]
    refuse(here, "convert", "odd", says=says)


def test_tensors_that_are_there_twice_or_of_a_strange_dtype_are_named(here):
    path = here / "source" / "model.safetensors"
    shutil.copy(path, path.with_name("model-00001-of-00002.safetensors"))
    refuse(here, "convert", "source", says=["model-00001-of-00002", "remove one"])
    path.with_name("model-00001-of-00002.safetensors").unlink()
    content = path.read_bytes()
    arrays = mx.load(str(path)) | {"module.norm.weight": mx.ones(64)}
    mx.save_safetensors(str(path), arrays)
    says = ["module.norm.weight", "both stand for norm.weight"]
    refuse(here, "convert", "source", says=says)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["transformer.norm.weight"] |= {"dtype": "I64", "shape": [32]}
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])
    refuse(here, "convert", "source", says="norm.weight is stored as I64")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("packed", [(), ("-q", "--q-group-size", "32")])
def test_weights_that_are_no_numbers_are_refused(here, value, packed):
    make_source(here / "nan", {FFN: spoilt(WEIGHTS[FFN], value)})
    says = [FFN, "NaN or infinity"]
    refuse(here, "convert", "nan", "--mlx-path", "deep/down/out", *packed, says=says)


def test_numbers_beyond_the_range_of_a_dtype_are_refused(here):
    make_source(here / "large", {FFN: spoilt(WEIGHTS[FFN], 1e5)})
    says = [FFN, "beyond float16's range"]
    refuse(here, "convert", "large", "--dtype", "float16", says=says)


def test_float16_for_the_3bs_shape_needs_a_word(here):
    one = {"num_query_heads": (1,), "num_kv_heads": (1,), "ffn_dims": (32,)}
    make_source(here / "wide", config=replace(UNEVEN, model_dim=3072, **one))
    args = ("convert", "wide", "--dtype", "float16")
    refuse(here, *args, says=["3072", "--allow-overflow"])
    assert call(*args, "--allow-overflow").exit_code == 0
    assert open_folder(here / "wide-mlx").raw["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-q"], ["layers.0.ffn.proj_2.weight (96)", "layers.1.ffn.proj_2.weight (160)"]),
        (["-q", "--q-group-size", "7"], "--q-group-size is 7"),
        (["--q-bits", "7"], "--q-bits is 7"),
        (["--q-bits", "0"], "--q-bits is 0"),
        (["-q", "--q-embed-bits", "1"], "--q-embed-bits is 1"),
        (["--dtype", "int8"], "--dtype is int8"),
    ],
)
def test_wrong_options_of_convert_are_named(here, args, says):
    refuse(here, "convert", "source", *args, says=says)


# Tokenizers ----------------------------------------------------------------------


def test_no_tokenizer_says_where_to_get_one_or_none_is_said(here):
    (here / "source" / "tokenizer.model").unlink()
    says = ["--tokenizer NousResearch/Llama-2-7b-hf", "--tokenizer none"]
    refuse(here, "convert", "source", says=says)
    assert call("convert", "source", "--tokenizer", "none").exit_code == 0
    for verb in (["generate", "Hi"], ["evaluate", "--text", "source/config.json"]):
        says = ["source-mlx holds no tokenizer.model", "--tokenizer"]
        refuse(here, *verb, "--model", "source-mlx", says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a SentencePiece model"),
        (b"rubbish", "not a SentencePiece model"),
        (small_tokenizer().model_proto[:2000], "not a SentencePiece model"),
        (small_tokenizer(310).model_proto, "310 pieces and the model's embedding 300"),
        (small_tokenizer().model_proto[:-1] + b"\1", "loses text"),  # double spaces
    ],
)
def test_a_tokenizer_that_is_not_this_models_is_refused(here, content, says):
    (here / "other.model").write_bytes(content)
    args = ("convert", "source", "--tokenizer", "other.model")
    refuse(here, *args, says=["other.model", says])


def test_a_tokenizer_that_is_nowhere_is_named(here):
    args = ("convert", "source", "--offline", "--tokenizer")
    refuse(here, *args, "nowhere.model", says="no file or folder nowhere.model")
    refuse(here, *args, "no-such/repo-here", says="no-such/repo-here")


# Models, prompts and texts --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "There is no folder nowhere"),
        ("a/b/c", "There is no folder a/b/c"),
        ("no-such/model", "no model of that name in the local cache"),
        ("..", "holds no config.json"),
        ("model/config.json", "is a file, not a model folder"),
        ("~nobody", "There is no folder ~nobody"),
        ("x" * 3000, "name too long"),
    ],
)
def test_a_model_that_is_none_is_named(here, name, says):
    refuse(here, "generate", "Hi", "--offline", "--model", name, says=says)
    refuse(here, "inspect", "--offline", name, says=says)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--max-tokens", "-1"], "--max-tokens is -1"),
        (["--temp", "nan"], "--temp is nan"),
        (["--temp", "-1"], "--temp is -1"),
        (["--temp", "inf"], "--temp is inf"),
        (["--top-p", "1.5"], "--top-p is 1.5"),
        (["--min-p", "nan"], "--min-p is nan"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0"),
        (["--repetition-context", "0"], "--repetition-context is 0"),
        (["--seed", str(2**70)], "--seed is 1180591620717411303424"),
        (["--seed", "-1"], "--seed is -1"),
        (["--stop", ""], "--stop is empty"),
        (["--stop", "\udcff"], "UTF-8"),
        (["--template", "poem"], ["'poem'", "instruct"]),
        (["--system", "Be kind."], "no place for --system"),
        (["--adapter-path", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_of_generate_are_named(here, args, says):
    refuse(here, "generate", "Hi", "--quiet", "--model", "model", *args, says=says)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a king " * 64, ["tokens, and the model's context is 64"]),
        ("word " * 10**5, "context is 64"),
        ("half \udcff", "UTF-8"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(here, prompt, says):
    refuse(here, "generate", prompt, "--quiet", "--model", "model", says=says)


def test_a_prompt_on_stdin_must_be_text(here):
    args = ("generate", "-", "--model", "model")
    refuse(here, *args, input=b"\xff\xfe\0", says="not UTF-8 text")


@pytest.mark.parametrize("prompt", ["   ", "", "\U0001f642日本", "a\0b", "\n\n", "</s>"])
def test_odd_prompts_are_continued(here, prompt):
    options = ("--quiet", "--model", "model", "-m", "2", "--json")
    ran = call("generate", "--prompt", prompt, *options)
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["generation_tokens"] == 2


@pytest.mark.parametrize(
    "args",
    [
        ["--top-k", "100000"],
        ["--top-k", str(2**70)],
        ["--temp", "1e-300"],
        ["--top-p", "1e-300"],
        ["--min-p", "1e-300"],
        ["--seed", str(2**64 - 1)],
        ["--repetition-context", str(2**70), "--repetition-penalty", "1.5"],
        ["--stop", "\0"],
    ],
)
def test_extreme_options_are_obeyed(here, args):
    drawn = ("--temp", "1", "--seed", "1", *args)
    ran = call("generate", "Hi", "--quiet", "--model", "model", "-m", "3", *drawn)
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert ran.stdout


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be parsed"),
        ("[]", "holds a list"),
        ('{"do_sample": true, "temperature": "hot"}', "temp is 'hot'"),
        ('{"do_sample": true, "top_k": 3.5}', "top-k is 3.5"),
        ('{"max_new_tokens": 0}', "max-tokens is 0"),
    ],
)
def test_damaged_defaults_of_a_model_are_named(here, content, says):
    (here / "model" / "generation_config.json").write_text(content)
    says = ["generation_config.json", says]
    refuse(here, "generate", "Hi", "--quiet", "--model", "model", says=says)


@pytest.mark.parametrize(
    ("content", "args", "says"),
    [
        (None, [], "No such file"),
        (b"", [], "text.txt is empty"),
        (b"\xff\xfe\0", [], "Cannot read text.txt as UTF-8"),
        (b"A king", ["--window", "0"], "--window is 0"),
        (b"A king", ["--window", "65"], "--window is 65"),
        (b"A king", ["--text", "."], "Cannot read . as UTF-8"),
        (b"A king", ["--adapter-path", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_scored_is_named(here, content, args, says):
    if content is not None:
        (here / "text.txt").write_bytes(content)
    start = ("evaluate", "--quiet", "--model", "model", "--text", "text.txt")
    refuse(here, *start, *args, says=says)


# Recipes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No recipe file 'own.yaml'"),
        ("stepz: 3", "unknown key stepz (did you mean steps?)"),
        ("model: {head_dims: 64}", "unknown key model.head_dims (did you mean"),
        ("steps: many", "steps is 'many', expected int"),
        ("{model: {}, data: {}, steps: 0}", "steps is 0"),
        ("{model: {}, data: {}, seed: -1}", "seed is -1"),
        ("model: 270M", "model is '270M', expected a group"),
        ("- 1", "own.yaml holds a list"),
        ("a: [", "own.yaml cannot be parsed"),
        ("steps: 3", "model is missing"),
        ("{model: {name: 270M}, data: {}}", "names no text"),
    ],
)
def test_mistakes_in_a_recipe_are_named(here, content, says):
    pytest.importorskip("torch", reason="pretrain needs PyTorch")
    if content is not None:
        (here / "own.yaml").write_text(content)
    refuse(here, "pretrain", "--quiet", "-c", "own.yaml", says=says)


def test_a_run_is_neither_overwritten_nor_resumed_from_nothing(here):
    pytest.importorskip("torch", reason="pretrain needs PyTorch")
    (here / "text.txt").write_text("A king had three daughters.")
    (here / "run").mkdir()
    (here / "run" / "metrics.jsonl").write_text("{}\n")
    start = ("pretrain", "--quiet", "-c", "pretrain/stories", "--data", "*.txt")
    says = ["run holds a run already", "--resume"]
    refuse(here, *start, "--output", "run", says=says)
    says = ["nothing to resume", "training_checkpoint_last.pt"]
    refuse(here, *start, "--output", "other", "--resume", says=says)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["show", "pretrain/storys"], "did you mean pretrain/stories?"),
        (["show", "model"], "No recipe file 'model'"),
        (["show", "model/model.safetensors"], "Cannot read"),
        (["copy", "pretrain/stories", "model/config.json"], "exists already"),
        (["copy", "pretrain/stories", "no/such/folder.yaml"], "Cannot write"),
        (["copy", "nothing"], "No recipe file 'nothing'"),
    ],
)
def test_recipes_that_cannot_be_shown_or_copied_are_named(here, args, says):
    refuse(here, "recipes", *args, says=says)
