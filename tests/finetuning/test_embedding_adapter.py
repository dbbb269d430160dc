"""The adapter of the embedding that changes inputs alone, as in CoreNet and PEFT."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from commands import call
from models import SCALED, UNEVEN, build, small_tokenizer, weights_of
from models import write_hugging_face as write_model
from trainings import UNTIED, make_model, make_recipe, make_samples, make_training, step

import mlx_openelm
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.preparation import make_trainable
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.run import finetune
from mlx_openelm.model.lora import adapted_weight
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.recipe_loader import load_recipe
from mlx_openelm.storage.adapter_folder import attach
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.storage.tokenizer_finder import write_tokenizer
from mlx_openelm.training.arrays import trained_tensors

TABLE = "transformer.token_embeddings"
TOKENS = mx.array([[1, 5, 9, 200, 7]])
LONG = replace(SCALED, max_context_length=128)


def write_base(folder, config=LONG):
    write_model(folder, config, weights_of(config))
    write_tokenizer(small_tokenizer(), folder)
    return folder


def run_lora(tmp_path, *options, config=LONG):
    """Train for a few steps; return the base and the adapter folder."""
    base = write_base(tmp_path / "base", config)
    records = [
        {"text": f"The king had {n} daughters and {n} wolves."} for n in range(8)
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    adapter = tmp_path / "adapter"
    call(
        *("lora", "--model", base, "--data", data, "--adapter-path", adapter),
        *("--adapt-embedding", "--rank", "4", "--iters", "4"),
        *("--learning-rate", "1e-2", *options),
    )
    return base, adapter


def logits(base, adapter=None):
    return np.array(load(str(base), adapter)[0](TOKENS))


# The layer -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_new_adapter_starts_as_corenets(method):
    """A is zero and B normal (CoreNet, PEFT); linears are as without the option."""
    recipe = make_recipe(fine_tune_type=method, adapt_embedding=True)
    model = make_model(recipe, perturb=False)
    trained = trained_tensors(model)
    a, b = (trained.pop(f"{TABLE}.lora_embedding_{part}") for part in "ab")
    assert a.shape == (300, 4)
    assert b.shape == (4, 64)
    assert not a.any()
    assert 0.8 < float(mx.sqrt(mx.square(b).mean()).item()) < 1.2
    without = make_model(make_recipe(fine_tune_type=method), perturb=False)
    assert trained.keys() == trained_tensors(without).keys()
    np.testing.assert_allclose(model(TOKENS), build(UNEVEN)(TOKENS), atol=1e-5)


def test_it_changes_the_inputs_and_not_the_tied_head():
    model = make_model(make_recipe(adapt_embedding=True), perturb=False)
    table = model.transformer.token_embeddings
    table.lora_embedding_a = mx.random.normal((300, 4))
    hidden = mx.random.normal((3, 64))
    expected = build(UNEVEN)
    assert mx.array_equal(model.head(hidden), expected.head(hidden))
    assert mx.array_equal(
        adapted_weight(model.head_module), expected.transformer.token_embeddings.weight
    )
    assert not mx.allclose(table(TOKENS), expected.transformer.token_embeddings(TOKENS))


def test_the_gradient_comes_from_the_inputs_alone():
    """That of PyTorch's autograd through embedding, adapter and detached head."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from converters.reference import ReferenceOpenELM

    recipe = make_recipe(adapt_embedding=True, clip_norm=0.0, keys=("ffn.proj_2",))
    model, samples = make_model(recipe, perturb=False), make_samples()
    training = make_training(recipe, samples, model)
    chosen = [samples[i] for i in training.order.batch(0)]
    ours = step(training)[f"{TABLE}.lora_embedding_a"]

    theirs = ReferenceOpenELM(UNEVEN)
    weights = {n: torch.from_numpy(w) for n, w in weights_of(UNEVEN).items()}
    theirs.load_state_dict(weights)
    a = torch.zeros(300, 4, requires_grad=True)
    again = make_model(recipe, perturb=False)
    b = torch.from_numpy(np.array(trained_tensors(again)[f"{TABLE}.lora_embedding_b"]))
    theirs.token_embeddings.register_forward_hook(
        lambda module, inputs, rows: rows + recipe.scale * (a[inputs[0]] @ b)
    )
    total, count = torch.zeros(()), 0
    for sample in chosen:
        tokens = torch.from_numpy(np.array(sample.tokens)).long()
        losses = torch.nn.functional.cross_entropy(
            theirs(tokens[None])[0, :-1], tokens[1:], reduction="none"
        )
        kept = torch.from_numpy(np.array(sample.loss_mask[1:]))
        total, count = total + losses[kept].sum(), count + int(kept.sum())
    (total / count).backward()
    expected = a.grad.numpy()
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def test_an_untied_base_has_mlx_lms_adapter():
    names = set(trained_tensors(make_model(make_recipe(adapt_embedding=True), UNTIED)))
    assert {f"{TABLE}.lora_a", f"{TABLE}.lora_b"} <= names


def test_the_number_of_weights_of_the_270m_is_apples():
    """9,453,568 with CoreNet's 128 padding rows of the vocabulary (facts, 4.3)."""
    config = OpenELMConfig.preset("270M", vocab_size=32128)
    model = OpenELM(config)
    make_trainable(model, make_recipe(rank=32, adapt_embedding=True))
    assert sum(a.size for a in trained_tensors(model).values()) == 9_453_568


def test_both_adapters_of_the_embedding_are_refused():
    with pytest.raises(OpenELMError, match=r"`adapt_embedding` .* `keys`"):
        make_model(make_recipe(adapt_embedding=True, keys=(TABLE,)))


# Files ---------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_stock_mlx_lm_refuses_the_folder_and_opens_the_fused_one(tmp_path, method):
    import mlx_lm

    base, adapter = run_lora(tmp_path, "--fine-tune-type", method)
    expected = logits(base, adapter)
    assert np.abs(expected - logits(base)).max() > 1e-2
    with pytest.raises(ValueError, match="lora_embedding_a: not an adapter parameter"):
        mlx_lm.load(str(base), adapter_path=str(adapter))
    call("fuse", "--adapter-path", adapter, "--save-path", tmp_path / "fused")
    assert not open_folder(tmp_path / "fused").config.share_input_output_layers
    theirs, _ = mlx_lm.load(str(tmp_path / "fused"))
    np.testing.assert_allclose(np.array(theirs(TOKENS)), expected, atol=1e-4)
    np.testing.assert_allclose(logits(tmp_path / "fused"), expected, atol=1e-4)


def test_the_embedding_is_trained_and_named(tmp_path):
    _, adapter = run_lora(tmp_path, "--rank", "auto:4")
    written = mx.load(str(adapter / "adapters.safetensors"))
    a, b = (written[f"{TABLE}.lora_embedding_{part}"] for part in "ab")
    assert mx.abs(a).max().item() > 1e-3
    ranks = {t.shape[1] for n, t in written.items() if n.endswith("_a")}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert ranks == {b.shape[0]} == {config["lora_parameters"]["rank"]}
    assert TABLE in config["lora_parameters"]["keys"]


def test_a_killed_run_resumes_with_the_same_weights(tmp_path):
    base, whole = run_lora(tmp_path, "--save-every", "2", "--dropout", "0.1")
    recipe = load_recipe(
        FinetuneRecipe,
        str(whole / "recipe.yaml"),
        {"adapter_path": str(tmp_path / "killed"), "model": str(base)},
    )

    def kill(event):
        if event["event"] == "save":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, on_event=kill)
    resumed = finetune(recipe, resume=True).path
    name = "adapters.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_a_quantized_base_is_adapted(tmp_path):
    base, adapter = run_lora(tmp_path)
    mlx_openelm.convert(base, tmp_path / "packed", bits=8, receipt=False)
    packed, _ = load(str(tmp_path / "packed"))
    attach(packed, adapter)
    expected = logits(base, adapter)
    assert np.abs(np.array(packed(TOKENS)) - expected).max() < 0.2


@pytest.mark.parametrize("to", ["corenet", "peft"])
def test_the_adapter_goes_to_another_format_and_back(tmp_path, to):
    base, adapter = run_lora(tmp_path, "--dropout", "0.1", "--scale", "1.0")
    there = tmp_path / ("a.pt" if to == "corenet" else "peft")
    call("convert", adapter, "--model", base, "--to", to, "--mlx-path", there)
    back = tmp_path / "back"
    if to == "corenet":
        call(
            *("convert", there, "--mlx-path", tmp_path / "base2", "--tokenizer"),
            *(base, "--dtype", "float32", "--adapter-out", back),
        )
        assert np.array_equal(logits(tmp_path / "base2"), logits(base))
    else:
        call("convert", there, "--model", base, "--mlx-path", back)
    old, new = (mx.load(str(f / "adapters.safetensors")) for f in (adapter, back))
    assert old.keys() == new.keys()
    assert all(mx.array_equal(old[name], new[name]) for name in old)
    np.testing.assert_array_equal(logits(base, back), logits(base, adapter))


def test_damaged_names_are_refused(tmp_path):
    base, adapter = run_lora(tmp_path)
    path = str(adapter / "adapters.safetensors")
    tensors = mx.load(path)
    tensors["transformer.layers.0.ffn.proj_1.lora_embedding_a"] = tensors.pop(
        "transformer.layers.0.ffn.proj_1.lora_a"
    )
    mx.save_safetensors(path, tensors)
    with pytest.raises(OpenELMError, match=r"proj_1"):
        load(str(base), adapter)
    with pytest.raises(OpenELMError, match=r"proj_1"):
        mlx_openelm.convert(adapter, tmp_path / "x", to="peft", base=str(base))


@pytest.mark.parametrize("option", [{"adapt_embedding": True}, {"keys": ("qkv_proj",)}])
def test_a_full_run_refuses_the_choice_of_adapted_modules(option):
    with pytest.raises(OpenELMError, match=f"`{next(iter(option))}` .* full"):
        make_recipe(fine_tune_type="full", **option)
