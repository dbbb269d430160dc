"""Bad input gives one sentence and exit code 1; no file is written or changed."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from commands import call, expect_error, make_source, replace_last
from models import UNEVEN, small_tokenizer, weights_of, write_pt

from mlx_openelm.storage.model_folder import open_folder

FFN = "layers.1.ffn.proj_1.weight"
WEIGHTS = weights_of(UNEVEN)
PACK = ("-q", "--q-group-size", "32", "--no-receipt")


# Weights -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("packed", [(), PACK])
def test_nan_and_infinity_in_weights_are_refused(here, value, packed):
    make_source(here / "nan", {FFN: replace_last(WEIGHTS[FFN], value)})
    message = [FFN, "NaN or infinity"]
    expect_error(
        here, "convert", "nan", "--mlx-path", "deep/down/out", *packed, message=message
    )


def test_numbers_beyond_the_range_of_a_dtype_are_refused(here):
    make_source(here / "large", {FFN: replace_last(WEIGHTS[FFN], 1e5)})
    message = [FFN, "beyond float16's range"]
    expect_error(here, "convert", "large", "--dtype", "float16", message=message)
    far = WEIGHTS[FFN].copy()
    far[0, :2] = 3e38, -3e38
    make_source(here / "far", {FFN: far})
    message = [FFN, "too far apart to share a scale"]
    expect_error(here, "convert", "far", *PACK, message=message)


def test_float16_for_the_shape_of_the_3b_needs_allow_overflow(here):
    one = {"num_query_heads": (1,), "num_kv_heads": (1,), "ffn_dims": (32,)}
    make_source(here / "wide", config=replace(UNEVEN, model_dim=3072, **one))
    args = ("convert", "wide", "--dtype", "float16")
    expect_error(here, *args, message=["3072", "--allow-overflow"])
    assert call(*args, "--allow-overflow").exit_code == 0
    assert open_folder(here / "wide-mlx").raw["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-q"], ["0.ffn.proj_2.weight (96)", "layers.1.ffn.proj_2.weight (160)"]),
        (["-q", "--q-group-size", "7"], "--q-group-size is 7"),
        (["--q-bits", "7"], "--q-bits is 7"),
        (["--q-bits", "0"], "--q-bits is 0"),
        (["-q", "--q-embed-bits", "1"], "--q-embed-bits is 1"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
    ],
)
def test_errors_name_the_wrong_option_of_convert(here, args, message):
    expect_error(here, "convert", "source", *args, message=message)


# Tokenizers ----------------------------------------------------------------------


def test_a_missing_tokenizer_needs_one_or_the_option_none(here):
    (here / "source" / "tokenizer.model").unlink()
    shutil.rmtree(here / "model")  # its tokenizer would be used
    message = ["--tokenizer NousResearch/Llama-2-7b-hf", "--tokenizer none"]
    expect_error(here, "convert", "source", message=message)
    assert call("convert", "source", "--tokenizer", "none").exit_code == 0
    for command in (["generate", "Hi"], ["evaluate", "--text", "source/config.json"]):
        message = ["source-mlx holds no tokenizer.model", "--tokenizer"]
        expect_error(here, *command, "--model", "source-mlx", message=message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a SentencePiece model"),
        (b"rubbish", "not a SentencePiece model"),
        (small_tokenizer().model_proto[:2000], "not a SentencePiece model"),
        (small_tokenizer(310).model_proto, "310 pieces and the model's embedding 300"),
        (small_tokenizer().model_proto[:-1] + b"\1", "loses text"),  # double spaces
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(here, content, message):
    (here / "other.model").write_bytes(content)
    args = ("convert", "source", "--tokenizer", "other.model")
    expect_error(here, *args, message=["other.model", message])


def test_the_error_for_a_missing_tokenizer_names_it(here):
    args = ("convert", "source", "--offline", "--tokenizer")
    expect_error(
        here, *args, "nowhere.model", message="no file or folder nowhere.model"
    )
    expect_error(here, *args, "no-such/repo-here", message="no-such/repo-here")


# Models, prompts and texts -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "There is no folder nowhere"),
        ("a/b/c", "There is no folder a/b/c"),
        ("no-such/model", "cache has no model of that name"),
        ("..", "holds no config.json"),
        ("model/config.json", "is one file of a model folder; pass the folder, model"),
        ("~nobody", "There is no folder ~nobody"),
        ("x" * 3000, "name too long"),
    ],
)
def test_the_error_for_a_missing_or_invalid_model_names_it(here, name, message):
    expect_error(here, "generate", "Hi", "--offline", "--model", name, message=message)
    expect_error(here, "inspect", "--offline", name, message=message)


@pytest.mark.parametrize(
    ("args", "message"),
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
        (["--system", "Be kind."], "not support --system"),
        (["--adapter-path", "nowhere"], "nowhere"),
    ],
)
def test_errors_name_the_wrong_option_of_generate(here, args, message):
    expect_error(
        here, "generate", "Hi", "--quiet", "--model", "model", *args, message=message
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a king " * 64, ["tokens, and the model's context is 64"]),
        ("word " * 10**5, "context is 64"),
        ("half \udcff", "UTF-8"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(here, prompt, message):
    expect_error(
        here, "generate", prompt, "--quiet", "--model", "model", message=message
    )


def test_a_prompt_on_stdin_must_be_text(here):
    args = ("generate", "-", "--model", "model")
    expect_error(here, *args, input=b"\xff\xfe\0", message="not UTF-8 but UTF-16")
    expect_error(here, *args, input=b"\xfa\xfb", message="not UTF-8")


@pytest.mark.parametrize("prompt", ["  ", "\U0001f642日", "a\0b", "\n\n", "</s>"])
def test_odd_prompts_are_continued(here, prompt):
    options = ("--quiet", "--model", "model", "-m", "2", "--json")
    result = call("generate", "--prompt", prompt, *options)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["generation_tokens"] == 2


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
def test_extreme_options_are_accepted(here, args):
    drawn = ("--temp", "1", "--seed", "1", *args)
    result = call("generate", "Hi", "--quiet", "--model", "model", "-m", "3", *drawn)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be parsed"),
        ("[]", "holds a list"),
        ('{"do_sample": true, "temperature": "hot"}', "temp is 'hot'"),
        ('{"do_sample": true, "top_k": 3.5}', "top-k is 3.5"),
        ('{"max_new_tokens": 0}', "max-tokens is 0"),
    ],
)
def test_errors_name_the_damaged_generation_config(here, content, message):
    (here / "model" / "generation_config.json").write_text(content)
    message = ["generation_config.json", message]
    expect_error(here, "generate", "Hi", "--quiet", "--model", "model", message=message)


def test_a_score_that_is_nan_is_an_error(here):
    make_source(here / "nan", {"norm.weight": np.full(64, np.nan, "f")})
    args = ("evaluate", "--quiet", "--model", "nan", "--text", "nan/config.json")
    expect_error(here, *args, message="log-likelihood of this text is nan")


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        (None, [], "no such file"),
        (b"", [], "text.txt is empty"),
        (b"\xff\xfe\0", [], "Cannot read text.txt as UTF-8"),
        (b"A king", ["--window", "0"], "--window is 0"),
        (b"A king", ["--window", "65"], "--window is 65"),
        (b"A king", ["--text", "."], "Cannot read . as UTF-8"),
        (b"A king", ["--adapter-path", "nowhere"], "nowhere"),
    ],
)
def test_errors_name_what_cannot_be_scored(here, content, args, message):
    if content is not None:
        (here / "text.txt").write_bytes(content)
    start = ("evaluate", "--quiet", "--model", "model", "--text", "text.txt")
    expect_error(here, *start, *args, message=message)


# Packed weights ------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        *([1], 5, {}, {"bits": 4}, {"bits": "four", "group_size": 32}),
        *({"bits": 0, "group_size": 32}, {"bits": 4, "group_size": 0}),
        {"bits": float("inf"), "group_size": 32},
        {"bits": 4, "group_size": 32, "mode": "morse"},
    ],
)
def test_the_error_for_a_damaged_quantization_names_the_module(here, entry):
    assert call("convert", "source", *PACK).exit_code == 0
    path = here / "source-mlx-4bit" / "config.json"
    config = json.loads(path.read_text()) | {"quantization": entry}
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    expect_error(here, "inspect", path.parent, message="quantization of transformer.")


@pytest.mark.parametrize(
    ("args", "part", "value"),
    [
        (PACK, "biases", float("nan")),
        ((*PACK, "--dtype", "float16"), "scales", 60000.0),  # x 15 is beyond float16
        (("--q-mode", "mxfp4"), "scales", 255),  # the encoding of NaN in E8M0
        (("--q-mode", "mxfp8"), "weight", 0x7F7F7F7F),
        (("--q-mode", "nvfp4"), "scales", 127),
    ],
)
def test_packed_weights_that_decode_to_nan_are_refused(here, args, part, value):
    out = ("--mlx-path", "packed", "--no-receipt")
    assert call("convert", "source", *args, *out).exit_code == 0
    path, name = here / "packed/model.safetensors", FFN.removesuffix(".weight")
    arrays = mx.load(str(path))
    mx.eval(arrays)
    arrays[f"transformer.{name}.{part}"][3, 1] = value
    mx.save_safetensors(str(path), arrays)
    expect_error(here, "convert", "packed", message=f"{FFN} holds NaN or infinity")
    result = call("verify", "packed")
    assert (result.exit_code, f"{FFN} holds NaN" in result.stdout) == (1, True)


def test_integers_without_scales_are_refused(here):
    path = here / "model" / "model.safetensors"
    arrays = mx.load(str(path))
    name = f"transformer.{FFN}"
    mx.save_safetensors(str(path), arrays | {name: arrays[name].astype(mx.uint32)})
    message = [f"{name} is stored as uint32", "without scales"]
    expect_error(here, "generate", "Hi", "--model", "model", message=message)


def test_floats_with_scales_are_refused(here):
    assert call("convert", "source", *PACK, "--mlx-path", "packed").exit_code == 0
    path, name = here / "packed/model.safetensors", f"transformer.{FFN}"
    arrays = mx.load(str(path))
    mx.save_safetensors(str(path), arrays | {name: arrays[name].view(mx.float32)})
    message = [f"{name} is stored as float32", "expected uint32 as packed"]
    expect_error(here, "convert", "packed", message=message)


def test_the_error_for_a_checkpoint_lists_all_missing_files(here):
    pytest.importorskip("torch", reason="needs PyTorch to write .pt files")
    lost = ["layers.1.attn.out_proj.weight", "layers.2.ffn.proj_2.weight"]
    write_pt(here / "torn.pt", {n: w for n, w in WEIGHTS.items() if n not in lost})
    expect_error(here, "convert", "torn.pt", message=lost)
    (here / "config.json").write_text(json.dumps(UNEVEN.to_dict()))
    expect_error(here, "convert", "torn.pt", message=["missing: ", *lost])
