"""Adapters written by mlx-lm, on our model."""

import json

import mlx.core as mx
import numpy as np
import pytest
from commands import call
from mlx.utils import tree_flatten
from models import EVEN, build, small_tokenizer, weights_of, write_hugging_face

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.adapter_folder import AdapterConfig, write_adapter
from mlx_openelm.storage.base_check import fingerprint_base
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.loading import choose_model, load
from mlx_openelm.storage.tokenizer_finder import write_tokenizer

TOKENS = mx.array([[1, 5, 9, 200, 7]])


@pytest.fixture
def base(tmp_path):
    folder = write_hugging_face(tmp_path / "base", EVEN, weights_of(EVEN))
    write_tokenizer(small_tokenizer(), folder)
    return folder


def make_adapter(folder, base, kind, keys=None):
    """Make an adapter with mlx-lm's layers, without zeros; return its logits."""
    from mlx_lm import load as load_theirs
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = load_theirs(str(base))
    parameters = {"rank": 4, "scale": 2.5, "dropout": 0.0}
    if keys:
        parameters["keys"] = keys
    model.freeze()
    linear_to_lora_layers(model, 3, parameters, use_dora=kind == "dora")
    rng = np.random.default_rng(1)
    tensors = {
        name: array + mx.array(0.1 * rng.standard_normal(array.shape, dtype=np.float32))
        for name, array in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(tensors.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": kind, "num_layers": 3, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return np.array(model(TOKENS))


@pytest.mark.interop
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("lora", None),
        ("dora", None),
        ("lora", ["attn.qkv_proj"]),
        ("dora", ["attn.qkv_proj"]),
        ("lora", ["transformer.token_embeddings", "ffn.proj_2"]),
    ],
)
def test_an_adapter_of_mlx_lm_gives_mlx_lms_logits(tmp_path, base, kind, keys):
    expected = make_adapter(tmp_path / "adapter", base, kind, keys)
    model, _ = load(str(base), adapter_path=tmp_path / "adapter")
    logits = np.array(model(TOKENS))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(logits - np.array(build(EVEN)(TOKENS))).max() > 0.1


@pytest.mark.interop
def test_an_adapter_of_another_model_is_refused_with_its_shapes(tmp_path, base):
    make_adapter(tmp_path / "adapter", base, "lora")
    path = tmp_path / "adapter" / "adapters.safetensors"
    tensors = dict(mx.load(str(path)))
    name = "transformer.layers.0.attn.out_proj.lora_a"
    tensors[name] = mx.zeros((7, 4))
    tensors["transformer.layers.9.attn.out_proj.lora_a"] = mx.zeros((64, 4))
    mx.save_safetensors(str(path), tensors)
    with pytest.raises(OpenELMError, match=r"unexpected: .*layers\.9.*\[7, 4\]"):
        load(str(base), adapter_path=tmp_path / "adapter")


def test_a_full_fine_tune_replaces_the_weights(tmp_path, base):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = weights_of(EVEN, seed=5)
    named = {f"transformer.{name}": mx.array(w) for name, w in weights.items()}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), named)
    (adapter / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    model, _ = load(str(base), adapter_path=adapter)
    assert mx.allclose(model(TOKENS), build(EVEN, seed=5)(TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no adapter_config.json"),
        ('{"peft_type": "LORA"}', "is a PEFT adapter; `mlx-openelm convert"),
        ('{"fine_tune_type": "ia3", "lora_parameters": {"scale": 1}}', "ia3"),
        ('{"fine_tune_type": "lora"}', r"lora_parameters\.scale"),
    ],
)
def test_a_folder_that_is_not_an_adapter_is_refused(tmp_path, base, config, message):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"x": mx.zeros((2,))})
    if config:
        (adapter / "adapter_config.json").write_text(config)
    with pytest.raises(OpenELMError, match=message):
        load(str(base), adapter_path=adapter)


# Metadata of our training --------------------------------------------------------


def write_own(
    folder, base="base", *, fingerprint=None, template="alpaca", method="lora"
):
    """Write an adapter as `mlx-openelm lora` does."""
    rng = np.random.default_rng(3)
    path = "transformer.layers.1.ffn.proj_2"
    rows, width = EVEN.tensor_shapes()["layers.1.ffn.proj_2.weight"]
    shapes = {"lora_a": (width, 4), "lora_b": (4, rows)}
    if method == "full":
        shapes = {"weight": (rows, width)}
    tensors = {
        f"{path}.{name}": mx.array(0.2 * rng.standard_normal(shape, dtype=np.float32))
        for name, shape in shapes.items()
    }
    metadata = {"template": template}
    if fingerprint:
        metadata["base"] = {"name": base, "sketch": fingerprint}
    folder.mkdir(parents=True, exist_ok=True)
    config = AdapterConfig(
        method, -1, ("ffn.proj_2",), 4, 2.0, base=base, metadata=metadata
    )
    write_adapter(folder, config, tensors)
    return folder


@pytest.mark.interop
def test_a_full_fine_tune_of_ours_gives_mlx_lms_logits(tmp_path, base):
    from mlx_lm import load as load_theirs

    adapter = write_own(tmp_path / "adapter", method="full")
    assert "rank" not in (adapter / "adapter_config.json").read_text()
    theirs, _ = load_theirs(str(base), adapter_path=str(adapter))
    ours, _ = load(str(base), adapter)
    np.testing.assert_allclose(ours(TOKENS), theirs(TOKENS), atol=1e-4)
    assert not mx.allclose(ours(TOKENS), build(EVEN)(TOKENS), atol=0.01)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_another_base_is_refused_and_another_version_warns(tmp_path, base, method):
    folder = tmp_path / "adapter"
    write_own(folder, fingerprint=fingerprint_base(build(EVEN)), method=method)
    load(str(base), folder)  # without a warning
    rounded = build(EVEN)
    rounded.set_dtype(mx.bfloat16)
    write_own(folder, fingerprint=fingerprint_base(rounded), method=method)
    with pytest.warns(UserWarning, match="another version of this base, base"):
        load(str(base), folder)
    write_own(folder, fingerprint=fingerprint_base(build(EVEN, seed=5)), method=method)
    with pytest.raises(OpenELMError, match="trained on another base than this one"):
        load(str(base), folder)


def test_base_and_template_of_an_adapter_are_the_default(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = write_own(tmp_path / "adapter", "base")
    model, tokenizer = load(adapter_path=adapter)
    assert tokenizer.template == "alpaca"
    assert model.config == EVEN
    write_own(adapter, template=None)
    assert load(adapter_path=adapter)[1].template is None


def test_a_base_relative_to_the_adapter_is_found_from_elsewhere(tmp_path, base):
    adapter = write_own(tmp_path / "adapter", "../base")
    assert load(adapter_path=adapter)[0].config == EVEN


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone/away/base", "is not available: .*pass `model`"),
        (None, "pass `model` BASE"),
    ],
)
def test_a_missing_base_is_reported(tmp_path, name, message):
    adapter = write_own(tmp_path / "adapter", name)
    with pytest.raises(OpenELMError, match=message):
        load(adapter_path=adapter)


def test_the_model_is_the_named_one_else_the_base_else_the_demo(tmp_path, base):
    adapter = write_own(tmp_path / "adapter", "../base")
    chosen = [
        choose_model(name, path, offline=True)
        for name, path in ((str(base), adapter), (None, adapter), (None, None))
    ]
    demo = demo_folder()
    relative = f"{adapter}/../base"
    assert [c.name for c in chosen] == [str(base), relative, "demo"]
    assert [c.folder.path.resolve() for c in chosen] == [base, base, demo.resolve()]
    assert [c.is_base for c in chosen] == [False, True, False]
    assert [c.is_demo for c in chosen] == [False, False, True]
    assert not choose_model("demo", adapter, offline=True).is_demo  # it has an adapter
    assert choose_model("demo", None, offline=True).is_demo


def test_generate_takes_base_and_template_from_the_adapter(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fingerprint = fingerprint_base(build(EVEN))
    write_own(
        tmp_path / "adapter", "base", fingerprint=fingerprint, template="openelm-peft"
    )

    def count_prompt_tokens(*args):
        command = ("generate", "-p", "Go", "-m", "1", "--json")
        result = call(*command, "--adapter-path", "adapter", *args)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["prompt_tokens"], result.stderr

    count, stderr = count_prompt_tokens("--template", "raw")
    assert count == len(small_tokenizer().encode("Go"))
    assert "the adapter's base, base" in stderr
    with pytest.raises(AssertionError, match="the model's context is 64"):
        count_prompt_tokens()  # Apple's template is longer than this model's context
    result = call("generate", "Go", "--adapter-path", "adapter", "--model", "demo")
    assert "The tensors of" in result.stderr  # --model overrides the adapter's base
    monkeypatch.setenv("MLX_OPENELM_MODEL", "demo")
    assert call("generate", "Go", "--adapter-path", "adapter").stderr == result.stderr


def test_a_training_run_is_used_at_its_last_best_or_mean_adapter(tmp_path, base):
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "recipe.yaml").write_text("seed: 0\n")
    (run / "state.safetensors").write_bytes(b"no adapter")
    for config in (None, '{"fine_tune_type": "lora"}'):
        if config:
            (run / "adapter_config.json").write_text(config)
        with pytest.raises(OpenELMError, match=r"not saved yet, .* wait until it has"):
            load(str(base), run)
    write_own(run / "best")
    with pytest.raises(OpenELMError, match=r"has not saved yet, .* use .*best\.$"):
        load(str(base), run)
    write_own(run)
    logits = [load(str(base), f)[0](TOKENS) for f in (run, run / "best")]
    assert mx.array_equal(*logits)
