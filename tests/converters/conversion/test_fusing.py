"""Fusing an adapter into its base, and the check that its effect is kept."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import call, expect_error, make_source
from models import (
    LINEARS,
    SCALED,
    TABLE,
    make_factors,
    small_tokenizer,
    weights_of,
    write_hugging_face,
    write_peft_folder,
)

import mlx_openelm
from converters.conversion import merging
from converters.conversion.fusing import FusionProof, fuse
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.adapter_folder import AdapterConfig, write_adapter
from mlx_openelm.storage.base_check import fingerprint_base
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.storage.tokenizer_finder import write_tokenizer
from mlx_openelm.tensor_names import to_module

UNTIED = replace(SCALED, share_input_output_layers=False)
TOKENS = mx.array([[1, 5, 9, 200, 7, 42, 299, 3]])
SIZE = 0.05  # of lora_b: moves the logits by about one


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """The working directory, with a model folder "base" in float32."""
    monkeypatch.chdir(tmp_path)
    write_base("base")
    return tmp_path


def write_base(name, config=SCALED):
    folder = write_hugging_face(Path(name), config, weights_of(config))
    write_tokenizer(small_tokenizer(), folder)
    return folder


def write_own(name, method="lora", *, size=SIZE, modules=LINEARS, base="base"):
    """Write an adapter as `mlx-openelm lora` does."""
    rng = np.random.default_rng(3)
    model, _ = load(base)
    tensors = {}
    for module in modules:
        path = to_module(f"{module}.weight")
        rows, width = weights_of(SCALED)[f"{module}.weight"].shape
        shapes = {"lora_a": (width, 4), "lora_b": (4, rows)}
        if module == TABLE:
            shapes = {"lora_a": (rows, 4), "lora_b": (4, width)}
        for leaf, shape in shapes.items():
            scale = size if leaf == "lora_b" else 1.0
            tensors[f"{path}.{leaf}"] = scale * rng.standard_normal(shape)
        if method == "dora":
            lengths = np.linalg.norm(weights_of(SCALED)[f"{module}.weight"], axis=1)
            stretch = 1 + size * rng.standard_normal(rows)
            tensors[f"{path}.m"] = lengths * stretch
    if method == "full":
        tensors = {
            to_module(name) + ".weight": w + size * rng.standard_normal(w.shape)
            for name, w in weights_of(SCALED).items()
            if "proj" in name or TABLE in name
        }
    keys = tuple(to_module(f"{module}.weight") for module in modules)
    metadata = {
        "template": "alpaca",
        "base": {"name": base, "sketch": fingerprint_base(model)},
    }
    config = AdapterConfig(method, 3, keys, 4, 2.0, base=base, metadata=metadata)
    Path(name).mkdir(parents=True)
    arrays = {n: mx.array(a.astype(np.float32)) for n, a in tensors.items()}
    write_adapter(Path(name), config, arrays)
    return name


def logits_of(base, adapter=None):
    return np.array(load(str(base), adapter)[0](TOKENS))


KINDS = pytest.mark.parametrize(
    ("method", "modules"),
    [
        ("lora", LINEARS),
        ("dora", LINEARS),
        ("lora", (TABLE, "layers.1.ffn.proj_2")),
        ("full", ()),
    ],
    ids=["lora", "dora", "embedding", "full"],
)


# The same model ------------------------------------------------------------------


@pytest.mark.interop
@KINDS
def test_the_fused_model_equals_base_and_adapter_in_mlx_lm(work, method, modules):
    """And the result of mlx-lm's fuse, tensor by tensor."""
    from mlx_lm import fuse as theirs
    from mlx_lm import load as load_theirs

    write_own("adapter", method, modules=modules)
    report = fuse("adapter", "fused")
    together, _ = load_theirs("base", adapter_path="adapter")
    expected = np.array(together(TOKENS))
    fused, _ = load_theirs("fused")
    np.testing.assert_allclose(np.array(fused(TOKENS)), expected, atol=1e-4)
    np.testing.assert_allclose(logits_of("fused"), expected, atol=1e-4)
    assert np.abs(expected - logits_of("base")).max() > 0.3
    assert report.proof.kl_fused < 1e-6 < 1e-2 < report.proof.kl_adapter
    assert report.proof.top1_agreement == 1.0
    assert (report.method, report.dtype, report.bits) == (method, "float32", None)

    with pytest.MonkeyPatch.context() as patch:
        command = ("fuse", "--model", "base", "--adapter-path", "adapter")
        patch.setattr("sys.argv", [*command, "--save-path", "theirs"])
        theirs.main()
    ours = mx.load("fused/model.safetensors")
    for name, array in mx.load("theirs/model.safetensors").items():
        np.testing.assert_allclose(ours[name], array, atol=1e-5, err_msg=name)


def test_an_adapter_of_a_tied_embedding_changes_the_logits_too(work):
    write_own("adapter", modules=(TABLE,))
    fuse("adapter", "fused")
    expected = logits_of("base", "adapter")
    np.testing.assert_allclose(logits_of("fused"), expected, atol=1e-4)
    assert open_folder(work / "fused").config == SCALED  # it stays tied


def test_peft_adapters_and_untied_bases_are_fused(work):
    factors = make_factors(weights_of(SCALED), (TABLE, *LINEARS))
    write_peft_folder(work / "peft", factors)
    assert fuse("peft", "fused", base="base").proof.kl_fused < 1e-6
    assert not open_folder(work / "fused").config.share_input_output_layers
    write_base("untied", UNTIED)
    write_own("adapter", modules=(TABLE, *LINEARS), base="untied")
    assert fuse("adapter", "apart").proof.kl_fused < 1e-6
    np.testing.assert_allclose(
        logits_of("apart"), logits_of("untied", "adapter"), atol=1e-4
    )


# Bits ----------------------------------------------------------------------------


def quantize_base(bits):
    name = f"base{bits}"
    mlx_openelm.convert("base", name, bits=bits, receipt=False)
    return name


@KINDS
def test_a_quantized_base_keeps_its_packings(work, method, modules):
    base = quantize_base(8)
    write_own("adapter", method, modules=modules, base=base)
    report = fuse("adapter", "fused")
    packings = open_folder(work / "fused").packings
    assert packings == open_folder(work / base).packings
    assert len(packings) == 13
    assert report.bits == 8
    assert report.proof.kl_fused < 0.01 * report.proof.kl_adapter


def test_tensors_without_an_adapter_keep_their_bytes(work):
    base = quantize_base(4)
    write_own("adapter", modules=LINEARS[:1], base=base, size=1.0)
    fuse("adapter", "fused")
    before, after = (mx.load(f"{n}/model.safetensors") for n in (base, "fused"))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    path = to_module(f"{LINEARS[0]}.weight")
    assert changed == {f"{path}.{part}" for part in ("weight", "scales", "biases")}


@pytest.mark.parametrize(
    ("flags", "bits", "dtype"),
    [
        (["--dequantize"], None, "bfloat16"),
        (["--q-bits", "8"], 8, "bfloat16"),
        (["--q-bits", "8", "--q-group-size", "32"], 8, "bfloat16"),
    ],
)
def test_bits_that_would_lose_the_adapter_are_refused(work, flags, bits, dtype):
    """mlx-lm writes such a model, which equals the base; the error offers more bits."""
    base = quantize_base(4)
    write_own("adapter", size=0.001, base=base)
    command = ("fuse", "--adapter-path", "adapter", "--save-path", "fused")
    message = ["Weights of 4 bits would lose", "nats", "use --dequantize or a larger"]
    expect_error(work, *command, message=message)
    result = call(*command, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["path"], report["bits"], report["dtype"]) == ("fused", bits, dtype)
    proof = report["proof"]
    assert 0 < proof["kl_fused"] < 0.25 * proof["kl_adapter"]
    packings = open_folder(work / "fused").packings.values()
    sizes = {packing.group_size for packing in packings}
    assert sizes == ({int(flags[-1])} if len(flags) == 4 else {64} if bits else set())


@pytest.mark.parametrize(
    ("packed", "size", "flags", "advice", "helps"),
    [
        (None, 1e-3, ["-q"], "leave out the quantization, or use --q-bits 8.", []),
        (None, 1e-3, ["-q"], "or use --q-bits 8.", ["--q-bits", 8]),
        (None, 1e-5, ["--q-bits", 8], "); leave out the quantization.", []),
        (4, 1e-3, [], "); use --dequantize or a larger --q-bits.", ["--dequantize"]),
        (8, 2e-4, [], "); use --dequantize.", ["--dequantize"]),
        (
            *(4, 1e-3, ["-q"]),
            "leave out the quantization and use --dequantize or a larger --q-bits.",
            ["--dequantize"],
        ),
    ],
)
def test_the_advice_for_a_lost_adapter_helps(work, packed, size, flags, advice, helps):
    base = quantize_base(packed) if packed else "base"
    write_own("adapter", size=size, base=base)
    command = ("fuse", "--adapter-path", "adapter", "--save-path", "fused")
    message = expect_error(work, *command, *flags, message=["would lose", advice])
    assert packed or "--dequantize" not in message  # nothing is quantized
    ran = call(*command, *helps)
    assert ran.exit_code == 0, ran.stderr


@pytest.mark.parametrize(
    ("fused", "adapter", "lost"),
    [
        (0.02, 0.1, False),
        (0.03, 0.1, True),
        (1e-9, 0.0, False),  # an adapter without effect
        (float("nan"), 0.1, True),
    ],
)
def test_a_quarter_of_the_adapter_may_be_lost(fused, adapter, lost):
    assert FusionProof("", 1, fused, adapter, 1.0).lost is lost


def test_the_check_is_independent_of_the_merge(work, monkeypatch):
    """It detects a wrong merge, even if it is stored exactly."""
    write_own("adapter")
    right = merging.merge

    def wrong(weight, module):
        return right(weight, replace(module, scale=-module.scale))

    monkeypatch.setattr(merging, "merge", wrong)
    with pytest.raises(OpenELMError, match=r"would lose .* use it with `adapter_path`"):
        fuse("adapter", "fused")
    assert not (work / "fused").exists()


# Metadata and errors -------------------------------------------------------------


def test_the_folder_stores_the_check_and_the_template(work):
    write_own("run/best")
    result = call("fuse", "--adapter-path", "run/best", "--save-path", "fused")
    assert (result.exit_code, result.stdout) == (0, "fused\n")
    assert "The adapter's effect is preserved" in result.stderr
    folder = open_folder(work / "fused")
    assert folder.template == "alpaca"
    assert load("fused")[1].template == "alpaca"
    entry = folder.metadata["fusion"]
    assert (entry["base"], entry["method"], entry["tokens"]) == ("base", "lora", 256)
    assert entry["kl_fused"] < 0.25 * entry["kl_adapter"]
    assert "run/best/adapters.safetensors" in folder.metadata["source"]["files"]
    verified = call("verify", "fused", "--against", "run/best", "--json")
    assert json.loads(verified.stdout)["passed"], verified.stdout
    generated = call("generate", "Go", "--model", "fused", "-m", "1", "--template=raw")
    assert generated.exit_code == 0, generated.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["adapter", "--model", "other"], "was trained on another base than this one"),
        (["adapter", "--model", "gone/by"], "gone/by"),
        (
            ["adapter", "-q", "--dequantize"],
            "either --dequantize or quantization, not both",
        ),
        (["adapter", "--q-bits", "7"], "--q-bits is 7"),
        (["base"], "base is not an adapter folder: it has no adapter_config.json"),
        (["run"], ["not saved yet", "wait until it has"]),
        (["adapter", "--save-path", "base"], "base exists already"),
        (["adapter", "--save-path", "base", "--force"], "holds the source itself"),
        (["nan"], "holds NaN or infinity"),
        (["wide"], ["does not fit", "proj_2 adapts shape [64, 65]"]),
    ],
)
def test_errors_are_reported_and_nothing_is_written(work, args, message):
    write_own("adapter")
    write_own("nan", "full")
    path = work / "nan/adapters.safetensors"
    tensors = dict(mx.load(str(path)))
    name = "transformer.layers.1.ffn.proj_2.weight"
    mx.save_safetensors(str(path), tensors | {name: tensors[name] * float("nan")})
    write_own("wide", "full")
    tensors[name] = mx.zeros((64, 65))
    mx.save_safetensors(str(work / "wide/adapters.safetensors"), tensors)
    write_hugging_face(work / "other", SCALED, weights_of(SCALED, seed=5))
    (work / "run").mkdir()
    (work / "run/recipe.yaml").write_text("seed: 0\n")
    (work / "run/adapter_config.json").write_text('{"fine_tune_type": "full"}')
    if "--save-path" not in args:
        args = [*args, "--save-path", "out"]
    expect_error(work, "fuse", "--offline", "--adapter-path", *args, message=message)


def test_a_training_run_is_converted_for_peft_and_corenet(work):
    make_source(work / "plain", config=SCALED)
    write_own("run", base="plain")
    write_own("run/best", base="plain")
    for name in ("recipe.yaml", "metrics.jsonl", "state.safetensors", "data.json"):
        (work / "run" / name).write_text("{}\n")
    for flags, path in ((("--to", "peft"), "peft"), (("--to", "corenet"), "all.pt")):
        result = call("convert", "run", *flags, "--mlx-path", path)
        assert (result.exit_code, result.stdout) == (0, f"{path}\n"), result.stderr
    expected = logits_of("plain", "run")
    together = fuse("peft", "a", base="plain")
    assert together.proof.kl_fused < 1e-6
    np.testing.assert_allclose(logits_of("a"), expected, atol=1e-4)
    options = {"merge": True, "dtype": "float32", "tokenizer": "plain"}
    mlx_openelm.convert("all.pt", "b", **options)
    np.testing.assert_allclose(logits_of("b"), expected, atol=1e-4)
