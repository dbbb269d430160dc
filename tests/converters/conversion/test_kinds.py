"""Every kind of source converts to the same model as in PyTorch.

The expected weights never come from the readers under test: the tests make them, and
quantize and adapt them with torch or numpy.
"""

import hashlib
import importlib.util
import itertools
import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from commands import call, expect_error, snapshot
from models import (
    LINEARS,
    PADDED,
    SCALED,
    TABLE,
    as_torch,
    in_corenet,
    make_factors,
    on_the_hub,
    published_config,
    raw_tensors,
    rounded,
    small_tokenizer,
    weights_of,
    write_apple_folder,
    write_hub_folder,
    write_mlx_lm_adapter,
    write_peft_folder,
    write_pt,
)
from safetensors import safe_open

import mlx_openelm
from converters.conversion.run import convert
from converters.conversion.verification import verify
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.adapter_folder import attach
from mlx_openelm.storage.loading import load_model
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.storage.shards import write_json
from mlx_openelm.storage.weight_files import INDEX

torch = pytest.importorskip("torch", reason="PyTorch computes the expected logits")

from converters.reference import ReferenceOpenELM  # noqa: E402 - it imports torch

TOKENS = np.array([[1, 5, 9, 200, 7, 299], [1, 250, 3, 3, 8, 77]])
WEIGHTS = weights_of(PADDED)  # CoreNet's, with rows that pad the vocabulary
CUT = WEIGHTS | {f"{TABLE}.weight": WEIGHTS[f"{TABLE}.weight"][:300]}
TINY = OpenELMConfig.preset("gpt-test", vocab_size=32128)
UNTIED = replace(SCALED, share_input_output_layers=False)
EVERYWHERE = (TABLE, *LINEARS)
DTYPES = ["float32", "float16", "bfloat16"]


def each_with_a_dtype(*values):
    """All combinations, each with one dtype, in turn."""
    dtypes = itertools.cycle(DTYPES)
    return [(*chosen, next(dtypes)) for chosen in itertools.product(*values)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(small_tokenizer().model_proto)
    return str(path)


def adapting(factors, scale):
    """Return a hook that adds s B A x (DoRA: and scales by m / |W + s B A|)."""
    A, B = torch.from_numpy(factors["A"]), torch.from_numpy(factors["B"])

    def hook(module, inputs, output):
        (x,) = inputs
        if x.dtype == torch.long:  # an embedding; a tied head is not adapted
            return output + scale * (B @ A[:, x.flatten()]).T.view(output.shape)
        output = output + scale * (x @ A.T) @ B.T
        if "m" in factors:
            lengths = (module.weight + scale * B @ A).norm(dim=1)
            output = output * torch.from_numpy(factors["m"]) / lengths
        return output

    return hook


@torch.no_grad()
def reference(config, weights, factors=None, *, scale=1.0, tokens=TOKENS):
    """Return PyTorch's logits of the tokenizer's pieces."""
    model = ReferenceOpenELM(config).eval()
    model.load_state_dict(as_torch(weights))
    for name, parts in (factors or {}).items():
        model.get_submodule(name).register_forward_hook(adapting(parts, scale))
    rows = min(config.vocab_size, 32000) if config.model_dim == 128 else 300
    return model(torch.from_numpy(tokens)).numpy()[..., :rows]


def compute_logits(path, adapter=None):
    model = load_model(open_folder(path), mx.float32)
    if adapter is not None:
        attach(model, adapter)
    return np.array(model(mx.array(TOKENS)))


def assert_logits(path, expected, adapter=None):
    actual = compute_logits(path, adapter)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-4
    assert np.abs(expected).max() > 0.5


# CoreNet -------------------------------------------------------------------------


WRAPS = (None, "model_state_dict", "ema_state_dict")


@pytest.mark.parametrize(
    ("wrap", "prefix", "dtype"), each_with_a_dtype(WRAPS, ("", "module."))
)
def test_a_corenet_checkpoint(tmp_path, tokenizer, wrap, prefix, dtype):
    named = {prefix + name: weight for name, weight in WEIGHTS.items()}
    source = write_pt(tmp_path / "a.pt", named, wrap, dtype)
    report = convert(source, tmp_path / "out", dtype="float32", tokenizer=tokenizer)
    assert report.kind == "CoreNet checkpoint"
    assert_logits(report.path, reference(PADDED, rounded(WEIGHTS, dtype)))


@pytest.mark.parametrize("yaml", ["config.yaml", "a.yaml"])
def test_a_corenet_checkpoint_with_its_yaml(tmp_path, yaml):
    weights = weights_of(TINY)
    source = write_pt(tmp_path / "a.pt", weights, "model_state_dict")
    (tmp_path / yaml).write_text(
        "taskname: train\nmodel:\n  language_modeling:\n    name: general_gpt\n"
        "    general_gpt:\n      model_name: gpt-test\n      vocab_size: 32000\n"
        "      max_context_length: 512\n      padding_index: 32000\n"
    )
    report = convert(source, tmp_path / "out", dtype="float32", tokenizer="none")
    assert f"Sizes from {yaml}." in report.notes
    assert open_folder(report.path).config.max_context_length == 512
    assert_logits(report.path, reference(TINY, weights))


@pytest.mark.parametrize("how", ["merged", "apart"])
@pytest.mark.parametrize("modules", [LINEARS, EVERYWHERE], ids=["linears", "all"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_corenet_adapter(tmp_path, tokenizer, dora, modules, how):
    factors = make_factors(WEIGHTS, modules, dora=dora)
    source = write_pt(tmp_path / "a.pt", in_corenet(WEIGHTS, factors))
    adapter = tmp_path / "adapter" if how == "apart" else None
    report = convert(
        source,
        tmp_path / "out",
        dtype="float32",
        tokenizer=tokenizer,
        merge=adapter is None,
        adapter_out=adapter,
    )
    assert report.adapter_path == adapter
    expected = reference(PADDED, WEIGHTS, factors)
    assert_logits(report.path, expected, adapter)
    assert np.abs(expected - reference(PADDED, WEIGHTS)).max() > 0.1
    # Merged, an adapter of the inputs alone unties the head.
    untied = TABLE in factors and how == "merged"
    assert open_folder(report.path).config.share_input_output_layers != untied
    assert verify(report.path, against=[str(source)]).passed


def test_the_mean_of_checkpoints_is_taken_in_float64(tmp_path, tokenizer):
    parts = [weights_of(PADDED, seed) for seed in range(3)]
    for dtype in DTYPES:
        sources = [
            write_pt(tmp_path / f"{dtype}-{i}.pt", part, dtype=dtype)
            for i, part in enumerate(parts)
        ]
        report = convert(
            sources,
            tmp_path / dtype,
            average=True,
            dtype=dtype,
            tokenizer=tokenizer,
        )
        stored = [as_torch(part, dtype) for part in parts]
        mean = {
            name: torch.stack([part[name].double() for part in stored]).mean(0)
            for name in WEIGHTS
        }
        mean = {n: m.to(getattr(torch, dtype)).float().numpy() for n, m in mean.items()}
        expected = reference(PADDED, mean)
        assert_logits(report.path, expected)
        for name, array in open_folder(report.path).read().items():
            weight = mean[name.removeprefix("transformer.")][: len(array)]
            assert np.array_equal(np.array(array.astype(mx.float32)), weight), name
        again = convert(
            sources[::-1],
            tmp_path / f"{dtype}-reversed",
            average=True,
            dtype=dtype,
            tokenizer=tokenizer,
        )
        assert raw_tensors(again.path) == raw_tensors(report.path)
        assert verify(report.path, against=list(map(str, sources))).passed


# Hugging Face --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "suffix", "shards", "dtype"),
    each_with_a_dtype(("tied", "copied", "untied"), ("safetensors", "bin"), (1, 3)),
)
def test_a_hugging_face_folder(tmp_path, tokenizer, suffix, shards, head, dtype):
    config, weights = SCALED, dict(CUT)
    named = on_the_hub(weights)
    if head == "copied":  # as saved by some tools
        named["lm_head.weight"] = named[f"transformer.{TABLE}.weight"].copy()
    if head == "untied":
        config = UNTIED
        weights["lm_head.weight"] = weights_of(UNTIED)["lm_head.weight"]
        named["transformer.classifier.weight"] = weights["lm_head.weight"]
    source = write_hub_folder(
        tmp_path / "source",
        published_config(config),
        named,
        dtype=dtype,
        suffix=suffix,
        shards=shards,
    )
    report = convert(source, tmp_path / "out", dtype="float32", tokenizer=tokenizer)
    assert report.kind == "Hugging Face folder"
    assert_logits(report.path, reference(config, rounded(weights, dtype)))
    assert any("copy of the tied" in n for n in report.notes) == (head == "copied")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_tied_head_that_differs_from_the_embedding_is_refused(
    tmp_path, tokenizer, suffix
):
    other = weights_of(UNTIED)["lm_head.weight"]
    named = on_the_hub(CUT) | {"lm_head.weight": other}
    source = write_hub_folder(
        tmp_path / "source", published_config(SCALED), named, suffix=suffix
    )
    with pytest.raises(OpenELMError, match=r"lm_head\.weight differs from it"):
        convert(source, tmp_path / "out", tokenizer=tokenizer)


# Apple's MLX ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
def test_apples_mlx_folder_keeps_its_tensors(tmp_path, bits):
    source = tmp_path / "source"
    expected_weights = write_apple_folder(source, weights_of(TINY), bits)
    report = convert(source, tmp_path / "out", tokenizer="none")
    assert report.kind == "Apple's MLX folder" + (", quantized" if bits else "")
    assert_logits(report.path, reference(TINY, expected_weights))
    expected = {f"transformer.{n}": t for n, t in raw_tensors(source).items()}
    table = f"transformer.{TABLE}.weight"
    dtype, content = expected[table]
    expected[table] = dtype, content[: 32000 * 128 * 2]
    assert raw_tensors(report.path) == expected
    entry = json.loads((report.path / "config.json").read_text()).get("quantization")
    if bits:
        assert (entry["bits"], entry["group_size"]) == (4, 64)
        assert entry[f"transformer.{TABLE}"] is False
        unpacked = convert(
            source,
            tmp_path / "wide",
            dequantize=True,
            dtype="float32",
            tokenizer="none",
        )
        assert_logits(unpacked.path, reference(TINY, expected_weights))
    else:
        assert entry is None


def test_apples_mlx_folder_keeps_its_rows_as_a_checkpoint(tmp_path):
    expected_weights = write_apple_folder(
        tmp_path / "source", weights_of(replace(TINY, vocab_size=384))
    )
    report = convert(tmp_path / "source", tmp_path / "a.pt", to="corenet")
    state = torch.load(report.path, weights_only=True)
    assert state.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        assert np.array_equal(state[name].float().numpy(), weight), name


# mlx-lm --------------------------------------------------------------------------


def test_a_plain_mlx_lm_folder(tmp_path, tokenizer):
    source = tmp_path / "source"
    source.mkdir()
    arrays = {n: mx.array(w) for n, w in on_the_hub(CUT).items()}
    mx.save_safetensors(str(source / "model.safetensors"), arrays, {"format": "mlx"})
    write_json(source / "config.json", published_config(SCALED))
    index = {"weight_map": dict.fromkeys(arrays, "model.safetensors")}
    write_json(source / INDEX, index)
    report = convert(source, tmp_path / "out", dtype="float32", tokenizer=tokenizer)
    assert_logits(report.path, reference(SCALED, CUT))


def mixed(path, module):
    """Different bits per module; one stays unquantized."""
    if "proj_2" in path:
        return {"bits": 8, "group_size": 32, "mode": "affine"}
    return "layers.1.attn.out_proj" not in path


@pytest.mark.interop
@pytest.mark.parametrize(
    ("mode", "group_size", "bits", "predicate"),
    [
        ("affine", 64, 4, None),
        ("affine", 32, 3, mixed),
        ("mxfp4", 32, 4, None),
        ("nvfp4", 16, 4, None),
        ("mxfp8", 32, 8, mixed),
    ],
)
def test_a_folder_quantized_by_stock_mlx_lm_keeps_its_tensors(
    tmp_path, tokenizer, mode, group_size, bits, predicate
):
    from mlx_lm import utils

    plain = write_hub_folder(
        tmp_path / "plain", published_config(SCALED), on_the_hub(CUT), dtype="bfloat16"
    )
    model, config = utils.quantize_model(
        *utils.load_model(plain),
        group_size=group_size,
        bits=bits,
        mode=mode,
        quant_predicate=predicate,
    )
    source = tmp_path / "source"
    utils.save_model(source, model)
    utils.save_config(config, source / "config.json")
    expected_weights = {
        n.removeprefix("transformer."): w for n, w in unpacked(model).items()
    }
    expected = reference(SCALED, expected_weights)

    taken = convert(source, tmp_path / "taken", tokenizer=tokenizer)
    assert taken.kind == "mlx-lm folder, quantized"
    assert raw_tensors(taken.path) == raw_tensors(source)
    assert_logits(taken.path, expected)
    theirs, _ = utils.load_model(taken.path)
    assert raw_parameters(theirs) == raw_parameters(model)

    wide = convert(
        source, tmp_path / "wide", dequantize=True, dtype="float32", tokenizer=tokenizer
    )
    assert not open_folder(wide.path).packings
    for name, array in open_folder(wide.path).read().items():
        assert np.array_equal(
            np.array(array), expected_weights[name.removeprefix("transformer.")]
        )

    other = convert(
        source, tmp_path / "other", bits=6, receipt=False, tokenizer=tokenizer
    )
    entry = open_folder(other.path).raw["quantization"]
    assert (entry["bits"], entry["mode"]) == (6, "affine")
    assert np.abs(compute_logits(other.path) - expected).max() < 1
    for report in (taken, wide, other):
        assert verify(report.path, against=[str(source)]).passed


def unpacked(model):
    """Return a stock model's weights, unpacked in float32."""
    weights = {}
    for name, module in model.named_modules():
        if "weight" not in module:
            continue
        weight = module.weight
        if "scales" in module:
            scales, biases = module.scales, module.get("biases")
            if biases is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            how = (module.group_size, module.bits, module.mode)
            weight = mx.dequantize(weight, scales, biases, *how, dtype=mx.float32)
        weights[f"{name}.weight"] = np.array(weight.astype(mx.float32))
    return weights


def raw_parameters(model):
    from mlx.utils import tree_flatten

    return {
        name: (str(array.dtype), bytes(memoryview(array.view(mx.uint8))))
        for name, array in tree_flatten(model.parameters())
    }


# Adapter folders -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["peft", "mlx-lm"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_folder_is_merged_into_its_base(tmp_path, tokenizer, kind, dora):
    base = write_hub_folder(
        tmp_path / "base", published_config(SCALED), on_the_hub(CUT)
    )
    modules = EVERYWHERE if kind == "peft" and not dora else LINEARS
    factors = make_factors(CUT, modules, dora=dora)
    write = write_peft_folder if kind == "peft" else write_mlx_lm_adapter
    source = write(tmp_path / "adapter", factors)
    out = tmp_path / "out"
    options = {"dtype": "float32", "tokenizer": tokenizer, "base": str(base)}
    report = convert(source, out, merge=True, **options)
    assert report.kind == "Hugging Face folder, merged"
    assert_logits(out, reference(SCALED, CUT, factors, scale=2.0))
    assert verify(out, against=[str(source)]).passed


# Round trips ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlx_to_hf_to_mlx_is_the_same_bit_for_bit(tmp_path, tokenizer, dtype):
    source = write_pt(tmp_path / "a.pt", WEIGHTS, dtype=dtype)
    first = convert(source, tmp_path / "a", dtype=dtype, tokenizer=tokenizer).path
    there = convert(first, tmp_path / "hf", to="hf").path
    assert raw_tensors(there) == raw_tensors(first)
    with safe_open(there / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers requires it
    back = convert(there, tmp_path / "back", dtype=dtype).path
    assert raw_tensors(back) == raw_tensors(first)
    assert open_folder(back).config == open_folder(first).config


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [SCALED, UNTIED], ids=["tied", "untied"])
def test_mlx_to_corenet_to_mlx_is_the_same_bit_for_bit(
    tmp_path, tokenizer, dtype, config
):
    weights = weights_of(config)
    source = write_hub_folder(
        tmp_path / "hf",
        published_config(config),
        {
            n if n.startswith("lm_head") else f"transformer.{n}": weights[n]
            for n in weights
        },
        dtype=dtype,
    )
    first = convert(source, tmp_path / "a", dtype=dtype, tokenizer=tokenizer).path
    report = convert(first, tmp_path / "a.pt", to="corenet")
    assert any("84 rows of zeros to 384" in note for note in report.notes)
    state = torch.load(report.path, weights_only=True)
    expected = replace(config, vocab_size=384).tensor_shapes()
    if not config.share_input_output_layers:
        expected["classifier.weight"] = expected.pop("lm_head.weight")
    assert {n: tuple(t.shape) for n, t in state.items()} == expected
    assert list(state) == list(expected)
    for name, tensor in as_torch(weights, dtype).items():
        stored_name = "classifier.weight" if name == "lm_head.weight" else name
        assert torch.equal(state[stored_name][: len(tensor)], tensor), name
        assert not state[stored_name][len(tensor) :].any()
    (tmp_path / "config.json").write_text((first / "config.json").read_text())
    back = convert(report.path, tmp_path / "b", dtype=dtype, tokenizer=tokenizer).path
    assert raw_tensors(back) == raw_tensors(first)
    assert open_folder(back).config == open_folder(first).config


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rewritten_checkpoint_keeps_all_its_rows(tmp_path, dtype):
    source = write_pt(tmp_path / "a.pt", WEIGHTS, "model_state_dict", dtype)
    report = convert(source, tmp_path / "b.pt", to="corenet")
    state = torch.load(report.path, weights_only=True)
    expected = as_torch(WEIGHTS, dtype)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hf_to_corenet_to_hf_is_the_same_bit_for_bit(tmp_path, tokenizer, dtype):
    named = on_the_hub(CUT)
    config = published_config(SCALED)
    source = write_hub_folder(tmp_path / "hf", config, named, dtype=dtype)
    there = convert(source, tmp_path / "a.pt", to="corenet").path
    options = {"to": "hf", "tokenizer": tokenizer}
    back = convert(there, tmp_path / "back", **options).path
    assert raw_tensors(back) == raw_tensors(source)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_mlx_lm_to_peft_to_mlx_lm_is_the_same_adapter(tmp_path, dora):
    factors = make_factors(CUT, LINEARS, dora=dora)
    source = write_mlx_lm_adapter(tmp_path / "a", factors)
    base = write_hub_folder(
        tmp_path / "base", published_config(SCALED), on_the_hub(CUT)
    )
    there = convert(source, tmp_path / "p", to="peft", base=str(base))
    back = convert(there.path, tmp_path / "b", base=str(base))
    assert (there.to, back.to, back.method) == (
        "peft",
        "mlx",
        "dora" if dora else "lora",
    )
    assert raw_tensors(back.path) == raw_tensors(source)
    config = json.loads((back.path / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 2.0


@pytest.mark.parametrize("modules", [LINEARS, EVERYWHERE], ids=["linears", "all"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_separated_corenet_adapter_can_be_merged_again(
    tmp_path, tokenizer, dora, modules
):
    factors = make_factors(WEIGHTS, modules, dora=dora)
    named = in_corenet(WEIGHTS, factors)
    source = write_pt(tmp_path / "a.pt", named)
    adapter = tmp_path / "adapter"
    base = convert(
        source,
        tmp_path / "base",
        dtype="float32",
        tokenizer=tokenizer,
        adapter_out=adapter,
    ).path
    together = convert(adapter, tmp_path / "b.pt", to="corenet", base=str(base)).path
    state = torch.load(together, weights_only=True)
    expected = as_torch(named)
    for name, tensor in expected.items():  # padding rows were removed
        if name.endswith("lora_embedding_A.lora"):
            tensor[:, 300:] = 0
        elif TABLE in name and "lora_embedding_B" not in name:
            tensor[300:] = 0
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    again = convert(
        together, tmp_path / "again", dtype="float32", tokenizer=tokenizer, merge=True
    )
    assert_logits(again.path, reference(PADDED, WEIGHTS, factors))


# Stock mlx-lm --------------------------------------------------------------------


@pytest.mark.parametrize("modules", [LINEARS, EVERYWHERE], ids=["linears", "all"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_checkpoint_with_an_adapter_is_written_unchanged(tmp_path, dora, modules):
    factors = make_factors(WEIGHTS, modules, dora=dora)
    named = in_corenet(WEIGHTS, factors)
    source = write_pt(tmp_path / "a.pt", named)
    written = convert(source, tmp_path / "b.pt", to="corenet").path
    state, expected = torch.load(written, weights_only=True), as_torch(named)
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.interop
@pytest.mark.parametrize("how", ["hf", "merged", "apart"])
def test_stock_mlx_lm_gives_the_same_logits(tmp_path, tokenizer, how):
    from mlx_lm.utils import load_adapters, load_model

    factors = make_factors(WEIGHTS, LINEARS if how == "apart" else EVERYWHERE)
    source = write_pt(tmp_path / "a.pt", in_corenet(WEIGHTS, factors))
    adapter = tmp_path / "adapter" if how == "apart" else None
    report = convert(
        source,
        tmp_path / "out",
        to="hf" if how == "hf" else "mlx",
        dtype="float32",
        tokenizer=tokenizer,
        merge=adapter is None,
        adapter_out=adapter,
    )
    model, _ = load_model(report.path)
    if adapter is not None:
        model = load_adapters(model, str(adapter)).eval()
    actual = np.array(model(mx.array(TOKENS)))
    assert np.abs(actual - reference(PADDED, WEIGHTS, factors)).max() <= 1e-4


# Apple's logits ------------------------------------------------------------------


@pytest.mark.proof
@pytest.mark.parametrize("how", ["merged", "apart"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_apples_logits_with_an_adapter(tmp_path, shared, method, how):
    golden = shared / "golden"
    spec = importlib.util.spec_from_file_location(
        "seeded", golden / "seeded_weights.py"
    )
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    case = f"corenet-OpenELM-270M-{method}"
    shapes = json.loads((golden / f"{case}.shapes.json").read_text())
    with safe_open(golden / f"{case}.safetensors", "numpy") as stored:
        seed = int(stored.metadata()["seed"])
        tokens, positions, logits = (
            stored.get_tensor(name) for name in ("tokens", "positions", "logits")
        )
    weights = {
        name: seeded.seeded_array(name.replace(".base_layer", ""), tuple(shape), seed)
        for name, shape in shapes.items()
    }
    for name, factor in weights.items():
        if "magnitude" in name:  # relative to the row lengths of the base
            base = name.replace(".lora_magnitude_vector.lora", ".base_layer.weight")
            lengths = np.linalg.norm(weights[base], axis=1)
            weights[name] = (factor * lengths).astype(np.float32)
    source = write_pt(tmp_path / "a.pt", weights)
    adapter = tmp_path / "adapter" if how == "apart" else None
    if adapter is None:
        copy = convert(source, tmp_path / "b.pt", to="corenet").path
        assert_stored(copy, weights, rows=32128)
        copy.unlink()
        del weights
    report = convert(
        source,
        tmp_path / "out",
        dtype="float32",
        tokenizer="none",
        merge=adapter is None,
        adapter_out=adapter,
    )
    source.unlink()
    if adapter is not None:
        base = str(report.path)
        copy = convert(adapter, tmp_path / "b.pt", to="corenet", base=base).path
        assert_stored(copy, weights, rows=32000)  # the others were cut as padding
        copy.unlink()
        del weights
    model = load_model(open_folder(report.path), mx.float32)
    if adapter is not None:
        attach(model, adapter)
    actual = np.array(model(mx.array(tokens)))[:, positions]
    assert np.abs(actual - logits[..., :32000]).max() <= 1e-4
    shutil.rmtree(report.path)  # gigabytes


def assert_stored(path, weights, *, rows):
    """The .pt holds these tensors; of the vocabulary, the first `rows` count."""
    state = torch.load(path, weights_only=True, mmap=True)
    assert list(state) == list(weights)
    for name, weight in weights.items():
        kept = [slice(rows if n == 32128 else None) for n in weight.shape]
        assert np.array_equal(state[name].numpy()[*kept], weight[*kept]), name


# verify --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tokenizer):
    """Checkpoints "a.pt" and "other.pt"; "model" is a folder converted from "a.pt"."""
    folder = tmp_path_factory.mktemp("converted")
    write_pt(folder / "a.pt", WEIGHTS)
    write_pt(folder / "other.pt", weights_of(PADDED, seed=1))
    convert(folder / "a.pt", folder / "model", dtype="float32", tokenizer=tokenizer)
    return folder


@pytest.fixture
def work(converted, tmp_path, monkeypatch):
    shutil.copytree(converted, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


NAME = "transformer.layers.1.ffn.proj_2.weight"


def assert_problems(work, *words, against=("a.pt",)):
    """Assert that verify fails and reports all of `words`."""
    flags = [flag for source in against for flag in ("--against", source)]
    before = snapshot(work)
    result = call("verify", "model", *flags)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert "error: model failed verification: " in result.stderr
    for word in words:
        assert word in " ".join(result.stdout.split()), result.stdout
    assert snapshot(work) == before


def test_verify_passes_for_a_converted_model(work):
    result = call("verify", "model", "--against", "a.pt")
    assert (result.exit_code, result.stderr) == (0, "")
    checks = ["index and shapes", "weights are numbers", "hashes", "tokenizer"]
    rows = result.stdout.rstrip().splitlines()[1:]
    assert [row.split()[-1] for row in rows] == ["ok"] * 5
    assert all(check in result.stdout for check in checks)


def rewrite(work, change):
    """Apply `change` to the weights and write them again."""
    path = work / "model" / "model.safetensors"
    arrays = mx.load(str(path))
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})


def test_verify_detects_a_flipped_bit(work):
    path = work / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start, _ = header[NAME]["data_offsets"]
    content[8 + int.from_bytes(content[:8], "little") + start + 5] ^= 1
    path.write_bytes(content)
    differs = f"{NAME} differs"
    assert_problems(
        work, "model.safetensors has changed since it was converted", differs
    )
    assert_problems(
        work, "model.safetensors has changed since it was converted", against=()
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_verify_detects_nan_and_infinity(work, value):
    def overwrite(arrays):
        arrays[NAME][3, 5] = value

    rewrite(work, overwrite)
    assert_problems(work, f"{NAME} holds NaN or infinity", f"{NAME} differs")


def test_verify_detects_another_source(work):
    assert_problems(work, f"{NAME} differs", against=["other.pt"])
    expect_error(
        work,
        "verify",
        "model",
        "--against",
        "gone.pt",
        message="gone.pt does not exist",
    )
    config = json.loads((work / "model/config.json").read_text())
    write_json(work / "model/config.json", config | {"rope_freq_constant": 5000})
    assert_problems(work, "rope_freq_constant is 5000.0, in the source 10000.0")


def test_verify_detects_additional_and_missing_files(work):
    index = work / "model" / INDEX
    content = json.loads(index.read_text())
    weight_map = dict(content["weight_map"])
    content["weight_map"] = weight_map | {"transformer.more": "model.safetensors"}
    write_json(index, content)
    assert_problems(work, "the index names transformer.more, which is in no file")
    shutil.copy(work / "model/model.safetensors", work / "model/model-old.safetensors")
    content["weight_map"] = weight_map
    write_json(index, content)
    assert_problems(work, "model-old.safetensors is not in the index, but mlx-lm")
    content["weight_map"] = weight_map | {NAME: "model-old.safetensors"}
    write_json(index, content)
    assert_problems(work, "model-old.safetensors is not used, but mlx-lm loads it")
    (work / "model/model-old.safetensors").unlink()
    assert call("verify", "model").exit_code == 0  # as in transformers
    shutil.move(work / "model/model.safetensors", work / "model/model-a.safetensors")
    content["weight_map"] = dict.fromkeys(weight_map, "model-a.safetensors")
    content["weight_map"][NAME] = "model-b.safetensors"
    write_json(index, content)
    expect_error(
        work, "verify", "model", message="model-b.safetensors of its index is missing"
    )
    (work / "model/model-a.safetensors").unlink()
    index.unlink()
    expect_error(work, "verify", "model", message="holds no model*.safetensors")


def test_verify_detects_another_tokenizer(work):
    path = work / "model/tokenizer.model"
    path.write_bytes(small_tokenizer(310).model_proto)
    assert_problems(work, "310 pieces")
    other = small_tokenizer().model_proto.replace(b"\x02re", b"\x02or")  # a piece
    path.write_bytes(other)
    assert_problems(work, "tokenizer.model has changed since it was converted")
    path.write_bytes(b"nonsense")
    assert_problems(work, "not a SentencePiece model")
    for name in ("tokenizer.model", "tokenizer.json"):
        (work / "model" / name).unlink()
    assert_problems(work, "holds no tokenizer.model")


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 3, "group_size": 32, "embed_bits": 6, "keep": "layers.0|out_proj"},
        {"mode": "mxfp4"},
        {"to": "hf"},
    ],
    ids=str,
)
def test_verify_compares_with_a_new_conversion(work, tokenizer, options):
    convert("a.pt", "made", receipt=False, tokenizer=tokenizer, **options)
    assert verify(work / "made", against=["a.pt"]).passed
    assert not verify(work / "made", against=["other.pt"]).passed
    if options["to"] == "hf" if "to" in options else False:
        return
    convert("made", "again", bits=8, receipt=False)
    assert verify(work / "again", against=["made"]).passed
    assert not verify(work / "again", against=["a.pt"]).passed


# The command line ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["a.pt", "--to", "onnx"],
            "--to is 'onnx'; choose mlx, hf, corenet, peft, gguf",
        ),
        (
            ["a.pt", "-q", "--dequantize"],
            "either --dequantize or quantization, not both",
        ),
        (["a.pt", "--q-bits", "4", "--dequantize"], "not both"),
        (["a.pt", "--to", "hf", "-q"], "--to hf does not support quantized weights"),
        (["a.pt", "--to", "corenet", "--q-mode", "mxfp4"], "not support quantized"),
        (
            ["a.pt", "--to", "gguf", "--q-bits", "4"],
            "--to gguf supports only 8 bits (Q8_0), not 4; use --q-bits 8",
        ),
        (["a.pt", "--to", "peft"], "is a model, but --to peft writes an adapter"),
        (["a.pt", "--q-bits", "auto:x"], "--q-bits is auto:x; expected auto:N"),
        (["a.pt", "--q-bits", "auto:0"], "--q-bits is auto:0"),
        (["a.pt", "--q-bits", "auto:nan"], "--q-bits is auto:nan"),
        (["a.pt", "--q-bits", "auto:4", "--to", "gguf"], "auto requires --to mlx"),
        (["a.pt", "--q-bits", "auto:4", "--q-mode", "nvfp4"], "leave out --q-mode"),
        (["a.pt", "--q-bits", "many"], "--q-bits is many; give a number of bits"),
        (
            ["a.pt", "--q-bits", "8", "--q-mode", "mxfp4"],
            "--q-bits is 8; --q-mode mxfp4",
        ),
        (["a.pt", "--q-mode", "int4"], "--q-mode is 'int4'; choose affine"),
        (["a.pt", "-q", "--q-keep", "lm_head"], "--q-keep 'lm_head' matches no module"),
        (["a.pt", "-q", "--q-keep", "("], "--q-keep '(' is not a regular expression"),
        (["a.pt", "--merge", "--adapter-out", "x"], "either --merge or --adapter-out"),
        (["a.pt", "--merge"], "a.pt contains no adapter; leave out --merge"),
        (["a.pt", "--adapter-out", "x"], "no adapter; leave out --adapter-out"),
        (["a.pt", "--average"], "--average needs two or more sources"),
        (["a.pt", "other.pt"], "Expected one source, got 2"),
        (["a.pt", "--model", "model"], "leave out --model model, which names the base"),
        (["lora.pt"], ["contains an adapter (lora)", "--merge", "--adapter-out DIR"]),
        (["lora.pt", "a.pt", "--average"], "lora.pt contains an adapter, whose"),
        (["a.pt", "wide.pt", "--average"], ["wide.pt", "proj_1.weight is [256, 64]"]),
        (["lora.pt", "--adapter-out", "x", "--to", "gguf"], "--to mlx or hf, not gguf"),
        (["lora.pt", "--adapter-out", "model"], "model exists already"),
        (["lora.pt", "--adapter-out", "x", "--mlx-path", "x"], "need separate folders"),
        (
            ["lora.pt", "--adapter-out", "x/y", "--mlx-path", "x"],
            "neither inside the other",
        ),
        (["lora.pt", "--adapter-out", "x", "--mlx-path", "x/y"], "neither inside"),
        (
            ["lora.pt", "--merge", "--q-bits", "2", "--no-receipt"],
            "Quantizing would lose the adapter",
        ),
        (["adapter", "--to", "hf"], "convert it with --to mlx, peft, corenet or gguf"),
        (["adapter", "-q"], "convert it with --to mlx, peft, corenet or gguf and"),
        (["adapter", "--to", "corenet", "--model", "wide"], "does not fit this"),
        (["adapter", "--merge", "--model", "wide"], "does not fit this"),
        (["adapter", "adapter", "--average"], "--average requires models"),
        (["adapter", "--average"], "--average requires models"),
        (["adapter", "--mlx-path", "adapter", "--force"], "holds the source itself"),
        (
            ["adapter", "--merge", "--to", "peft"],
            "either --merge, which writes a model, or --to peft",
        ),
        (["a.gguf"], "a.gguf is a GGUF file"),
    ],
)
def test_conflicting_arguments_are_refused(work, args, message):
    factors = make_factors(WEIGHTS, LINEARS)
    if "lora.pt" in args:
        small = {
            name: {part: array * 1e-2 for part, array in parts.items()}
            for name, parts in factors.items()
        }
        write_pt(work / "lora.pt", in_corenet(WEIGHTS, small))
    if "wide.pt" in args or "wide" in args:
        wide = replace(PADDED, ffn_dims=(128, 128, 192))
        write_pt(work / "wide.pt", weights_of(wide))
    if "wide" in args:
        convert("wide.pt", "wide", tokenizer=str(work / "model"))
    if "adapter" in args:
        write_mlx_lm_adapter(work / "adapter", factors)
    (work / "a.gguf").write_bytes(b"GGUF")
    expect_error(
        work, "convert", *args, "--tokenizer", "model", "--offline", message=message
    )


def test_all_flags_reach_the_conversion(work):
    def run(*args):
        result = call(
            "convert", *args, "--tokenizer", "model", "--no-receipt", "--json"
        )
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    assert run("a.pt", "--q-mode", "mxfp8")["path"] == "a-mlx-mxfp8"
    assert run("a.pt", "--q-bits", "6", "--q-keep", "layers.0")["path"] == "a-mlx-6bit"
    kept = open_folder(work / "a-mlx-6bit").packings
    assert kept
    assert not any(name.startswith("layers.0") for name in kept)
    assert run("a-mlx-6bit", "--dequantize")["bits"] is None
    assert run("a.pt", "--to", "hf")["path"] == "a-hf"
    assert run("a.pt", "--to", "corenet")["path"] == "a-corenet.pt"
    assert run("a.pt", "--to", "gguf", "--q-bits", "8")["path"] == "a-8bit.gguf"
    other = str(work / "other.pt")
    averaged = run("a.pt", other, "--average", "--mlx-path", "mean")
    assert averaged["source"] == f"a.pt {other}"
    write_pt(work / "lora.pt", in_corenet(WEIGHTS, make_factors(WEIGHTS, LINEARS)))
    assert run("lora.pt", "--merge")["kind"] == "CoreNet LoRA checkpoint, merged"
    taken = run("lora.pt", "--adapter-out", "apart", "--mlx-path", "base")
    assert taken["adapter_path"] == "apart"
    peft = run("apart", "--to", "peft", "--model", "base")
    assert (peft["to"], peft["method"], peft["num_modules"]) == ("peft", "lora", 12)
    whole = run("apart", "--merge", "--model", "base", "--mlx-path", "whole")
    assert raw_tensors(work / "whole").keys() == raw_tensors(work / "base").keys()
    assert whole["to"] == "mlx"


def test_the_provenance_is_stored_and_shown(work, tokenizer):
    report = call(
        *("convert", "a.pt", "other.pt", "--average", "--q-bits", "4", "--no-receipt"),
        *("--tokenizer", tokenizer, "--mlx-path", "mean"),
    )
    assert report.exit_code == 0, report.stderr
    metadata = json.loads((work / "mean/config.json").read_text())["mlx_openelm"]
    hashes = {
        name: f"sha256:{hashlib.sha256((work / name).read_bytes()).hexdigest()}"
        for name in ("a.pt", "other.pt")
    }
    assert metadata["source"]["files"] == hashes
    assert metadata["source"]["kind"] == "average of 2: CoreNet checkpoint"
    assert metadata["options"] == {
        "average": True,
        "bits": "4",
        "receipt": False,
        "tokenizer": tokenizer,
    }
    assert metadata["version"] == mlx_openelm.__version__
    weights = (work / "mean/model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    assert metadata["files"]["model.safetensors"] == f"sha256:{digest}"
    shown = json.loads(call("inspect", "mean", "--json").stdout)
    assert shown["source"] == metadata["source"]
    assert shown["options"] == metadata["options"]
    table = call("inspect", "mean").stdout
    assert "average of 2: CoreNet checkpoint" in table
    assert "average True, bits 4" in table
    again = call("convert", "mean", "--dequantize", "--mlx-path", "again")
    assert again.exit_code == 0, again.stderr
    origin = json.loads((work / "again/config.json").read_text())["mlx_openelm"]
    assert origin["source"]["was"] == metadata
