"""Small models, tokenizers and files for tests."""

import functools
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import sentencepiece
from safetensors import safe_open

import mlx_openelm  # noqa: F401 - loads OpenBLAS before mlx.core
from mlx_openelm.bench.selfcheck import made_weight
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.shards import write_json
from mlx_openelm.tensor_names import to_folder
from mlx_openelm.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"

TEXT = (
    "Once upon a time there was a king who had three daughters. The eldest said: "
    "I love you more than gold! The youngest wept, for she had nothing to say.\n\n"
    "Don't go into the wood, said the old woman; the wolf is there -- and 1234 more. "
) * 8

UNEVEN = OpenELMConfig(  # every layer differs, also in its query heads per KV head
    model_dim=64,
    head_dim=16,
    num_query_heads=(2, 4, 6),
    num_kv_heads=(1, 4, 2),
    ffn_dims=(96, 160, 64),
    vocab_size=300,
    max_context_length=64,
)
EVEN = replace(UNEVEN, head_dim=32, ffn_dims=(64, 128, 192))  # groups of 64

SCALED = OpenELMConfig(  # like the published ones; rows are multiples of 64
    model_dim=64,
    head_dim=32,
    num_query_heads=(2, 4, 6),
    num_kv_heads=(1, 2, 3),
    ffn_dims=(64, 128, 192),
    vocab_size=300,
    max_context_length=64,
)
PADDED = replace(SCALED, vocab_size=384)  # as in CoreNet: a padding id, 128 n rows
TABLE = "token_embeddings"
LINEARS = tuple(
    name.removesuffix(".weight")
    for name, shape in SCALED.tensor_shapes().items()
    if len(shape) == 2 and not name.startswith(TABLE)
)


def weights_of(config: OpenELMConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Non-trivial weights by CoreNet name."""
    return {
        name: made_weight(name, shape, seed)
        for name, shape in config.tensor_shapes().items()
    }


def build(config: OpenELMConfig, seed: int = 0) -> OpenELM:
    model = OpenELM(config)
    model.load_weights(
        [(to_folder(n), mx.array(w)) for n, w in weights_of(config, seed).items()]
    )
    return model


@functools.cache
def small_tokenizer(vocab_size: int = 300) -> Tokenizer:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=written,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return Tokenizer(written.getvalue())


def as_torch(weights: Mapping[str, np.ndarray], dtype: str = "float32") -> dict:
    import torch

    kind = getattr(torch, dtype)
    return {name: torch.from_numpy(w).to(kind) for name, w in weights.items()}


def rounded(weights: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The weights rounded to this dtype, as float32."""
    return {n: t.float().numpy() for n, t in as_torch(weights, dtype).items()}


def write_pt(
    path: Path,
    weights: Mapping[str, np.ndarray],
    wrap: str | None = None,
    dtype: str = "float32",
) -> Path:
    import torch

    state = as_torch(weights, dtype)
    torch.save({wrap: state, "iterations": 1} if wrap else state, path)
    return path


def write_hugging_face(
    folder: Path, config: OpenELMConfig, weights: dict[str, np.ndarray]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {to_folder(name): mx.array(w) for name, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    write_json(folder / "config.json", config.to_dict())
    return folder


# Other tools' files --------------------------------------------------------------


def published_config(config: OpenELMConfig) -> dict:
    """config.json as on the Hub, which has no key for the FFN widths."""
    return {
        "model_type": "openelm",
        "architectures": ["OpenELMForCausalLM"],
        "activation_fn_name": "swish",
        "ffn_dim_divisor": 64,
        "ffn_multipliers": [width / config.model_dim for width in config.ffn_dims],
        "ffn_with_glu": True,
        "head_dim": config.head_dim,
        "initializer_range": 0.02,
        "max_context_length": config.max_context_length,
        "model_dim": config.model_dim,
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True,
        "num_gqa_groups": config.num_query_heads[0] // config.num_kv_heads[0],
        "num_kv_heads": list(config.num_kv_heads),
        "num_query_heads": list(config.num_query_heads),
        "num_transformer_layers": config.num_transformer_layers,
        "qkv_multipliers": [0.5, 1.0],
        "rope_freq_constant": 10000,
        "rope_max_length": 2 * config.max_context_length,
        "share_input_output_layers": config.share_input_output_layers,
        "torch_dtype": "float32",
        "transformers_version": "4.39.3",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def write_hub_folder(
    folder: Path,
    config: Mapping,
    weights: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    suffix: str = "safetensors",
    shards: int = 1,
) -> Path:
    """Write tensors with their names on the Hub, in one file or more."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dict(config))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    tensors, weight_map = as_torch(weights, dtype), {}
    for i in range(shards):
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        number = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = folder / f"{stem}{number}.{suffix}"
        if suffix == "safetensors":
            save_file(part, file, metadata={"format": "pt"})
        else:
            torch.save(part, file)
        weight_map |= dict.fromkeys(part, file.name)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        write_json(folder / f"{stem}.{suffix}.index.json", index)
    return folder


def on_the_hub(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"transformer.{name}": weight for name, weight in weights.items()}


def write_apple_folder(
    folder: Path, weights: Mapping[str, np.ndarray], bits: int | None = None
) -> dict[str, np.ndarray]:
    """Write CoreNet's "gpt-test" as Apple's MLX script did; return its weights.

    With `bits`, the linears are packed in groups of 64. All other tensors are float16.
    """
    from safetensors.numpy import save_file

    config = {
        "model_name": "gpt-test",
        "vocab_size": len(weights[f"{TABLE}.weight"]),
        "max_context_length": 2048,
    }
    stored, decoded = {}, {}
    for name, weight in weights.items():
        half = weight.astype(np.float16)
        if bits and half.ndim == 2 and not name.startswith(TABLE):
            parts, decoded[name] = pack_as_apple(half, bits)
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
        else:
            stored[name], decoded[name] = half, half.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    quantization = {"group_size": 64, "bits": bits}
    write_json(
        folder / "config.json",
        config | ({"quantization": quantization} if bits else {}),
    )
    save_file(stored, folder / "weights.safetensors")
    return decoded


def pack_as_apple(
    weight: np.ndarray, bits: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Pack as mlx 0.10 did, in groups of 64; return the parts and the decoded weight.

    The bias of a group is its minimum, its range gives the scale. The first number of a
    word is in the lowest bits.
    """
    groups = weight.astype(np.float32).reshape(len(weight), -1, 64)
    bias = groups.min(-1, keepdims=True)
    scale = (groups.max(-1, keepdims=True) - bias) / (2**bits - 1)
    numbers = np.rint((groups - bias) / scale).astype(np.uint32)
    in_word = 32 // bits
    words = numbers.reshape(len(weight), -1, in_word) << (bits * np.arange(in_word))
    scale, bias = scale.astype(np.float16), bias.astype(np.float16)
    decoded = numbers * scale.astype(np.float32) + bias.astype(np.float32)
    parts = {
        "weight": words.sum(-1).astype(np.uint32),
        "scales": scale[..., 0],
        "biases": bias[..., 0],
    }
    return parts, decoded.reshape(weight.shape).astype(np.float32)


# Other tools' adapters -----------------------------------------------------------


def make_factors(
    weights: Mapping[str, np.ndarray], modules: tuple[str, ...], *, dora: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """A (rank, in), B (out, rank) and, with `dora`, the linears' magnitudes m."""
    rng = np.random.default_rng(7)
    factors = {}
    for name in modules:
        out, width = weights[f"{name}.weight"].shape
        if name == TABLE:
            out, width = width, out
        factors[name] = {
            "A": 0.3 * rng.standard_normal((4, width), dtype=np.float32),
            "B": 0.1 * rng.standard_normal((out, 4), dtype=np.float32),
        }
        if dora and name != TABLE:
            lengths = np.linalg.norm(weights[f"{name}.weight"], axis=1)
            stretch = 1 + 0.2 * rng.standard_normal(out, dtype=np.float32)
            factors[name]["m"] = lengths * stretch
    return factors


def in_corenet(
    weights: Mapping[str, np.ndarray], factors: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Base and adapter with the names of CoreNet's openelm_lora_*.pt."""
    named = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        named[f"{module}.base_layer.weight" if module in factors else name] = weight
        for part, array in factors.get(module, {}).items():
            kind, end = ("embedding_", "") if module == TABLE else ("", ".weight")
            named[
                f"{module}.lora_magnitude_vector.lora"
                if part == "m"
                else f"{module}.lora_{kind}{part}.lora{end}"
            ] = array
    return named


def write_peft_folder(
    folder: Path, factors: Mapping[str, Mapping[str, np.ndarray]], alpha: int = 8
) -> Path:
    """Write an adapter of rank 4 as PEFT's save_pretrained does."""
    from safetensors.numpy import save_file

    named = {}
    for module, parts in factors.items():
        for part, array in parts.items():
            kind, end = ("embedding_", "") if module == TABLE else ("", ".weight")
            leaf = "lora_magnitude_vector" if part == "m" else f"lora_{kind}{part}{end}"
            named[f"base_model.model.transformer.{module}.{leaf}"] = array
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "apple/OpenELM-270M",
        "r": 4,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "use_dora": any("m" in parts for parts in factors.values()),
        "bias": "none",
        "target_modules": sorted({module.split(".")[-1] for module in factors}),
    }
    write_json(folder / "adapter_config.json", config)
    return folder


def write_mlx_lm_adapter(
    folder: Path, factors: Mapping[str, Mapping[str, np.ndarray]], scale: float = 2.0
) -> Path:
    """Write an adapter of rank 4 as mlx_lm.lora does."""
    leaves = {"A": "lora_a", "B": "lora_b", "m": "m"}
    arrays = {
        f"transformer.{module}.{leaves[part]}": mx.array(np.ascontiguousarray(array.T))
        for module, parts in factors.items()
        for part, array in parts.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    parameters = {"rank": 4, "dropout": 0.0, "scale": scale}
    dora = any("m" in parts for parts in factors.values())
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": -1,
        "lora_parameters": parameters,
        "model": "mlx-community/OpenELM-270M",
    }
    write_json(folder / "adapter_config.json", config)
    return folder


def raw_tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    """The dtype and bytes of every tensor in a folder."""
    return {
        name: (str(array.dtype), bytes(memoryview(array.view(mx.uint8))))
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in mx.load(str(file)).items()
    }


# Golden answers ------------------------------------------------------------------


def read_golden(case: str) -> tuple[dict, dict, np.ndarray, np.ndarray, np.ndarray]:
    """Return metadata, shapes, tokens, positions and Apple's logits of a case."""
    with safe_open(GOLDEN / f"corenet-{case}.safetensors", framework="numpy") as stored:
        arrays = [stored.get_tensor(n) for n in ("tokens", "positions", "logits")]
        metadata = stored.metadata()
    shapes = json.loads((GOLDEN / f"corenet-{case}.shapes.json").read_text())
    return metadata, {n: tuple(s) for n, s in shapes.items()}, *arrays
