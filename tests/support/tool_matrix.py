"""Folders for the table of docs/interop.md: shapes, bits and kinds of models."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from converters.conversion.run import convert
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.model.quantization import Quantization, describe_packings
from mlx_openelm.storage.adapter_folder import AdapterConfig, write_adapter
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.model_folder import expected_shapes
from mlx_openelm.storage.shards import TensorLayout, plan_shards, write_json

BITS: dict[str, dict[str, Any]] = {  # options of `convert`
    "16 bits": {},
    "4 bits": {"bits": 4, "embed_bits": 4},
    "mixed bits": {"bits": 4, "embed_bits": 8, "keep": "out_proj"},
}
KINDS = ("base", "instruct", "adapter")
KEYS = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")
RELEASED = ("270M", "450M", "1.1B", "3B")


def make_demo(folder: Path, kind: str, **options: Any) -> Path:
    """Convert the demo; with a template if it is instruct."""
    source = folder / "source"
    shutil.copytree(demo_folder(), source)
    if kind == "instruct":
        raw = read_mapping(source / "config.json")
        described = raw | {"mlx_openelm": {"template": "instruct"}}
        write_json(source / "config.json", described)
    return Path(convert(source, folder / "made", receipt=False, **options).path)


def make_adapter(folder: Path, config: OpenELMConfig, base: Path) -> Path:
    """Write a LoRA adapter of all linears, with an effect on the logits."""
    rng = np.random.default_rng(5)
    tensors = {}
    for name, (rows, *columns) in config.tensor_shapes().items():
        if "proj" in name:
            module = f"transformer.{name.removesuffix('.weight')}"
            a = rng.standard_normal((*columns, 4), np.float32) / columns[0] ** 0.5
            b = rng.standard_normal((4, rows), np.float32)
            tensors |= {f"{module}.lora_a": mx.array(a)}
            tensors |= {f"{module}.lora_b": mx.array(0.1 * b)}
    layers = config.num_transformer_layers
    described = AdapterConfig("lora", layers, KEYS, 4, 2.0, base=str(base))
    folder.mkdir()
    write_adapter(folder, described, tensors)
    return folder


def make_zeros(folder: Path, config: OpenELMConfig, bits: str) -> Path:
    """Write a folder as `convert` does, whose weights are holes of sparse files."""
    packings = {}
    if bits != "16 bits":
        packings = Quantization(**BITS[bits]).packings(config)
    layout = {
        name: TensorLayout(
            mx.uint32 if _is_packed(name, packings) else mx.bfloat16, shape
        )
        for name, shape in expected_shapes(config, packings).items()
    }
    folder.mkdir()
    for shard in plan_shards(layout):
        with (folder / shard.name).open("wb") as opened:
            opened.write(header := shard.header("mlx"))
            opened.truncate(len(header) + shard.num_bytes)
    raw = config.to_dict()
    if packings:
        entry = describe_packings(packings, config)
        raw |= {"quantization": entry, "quantization_config": entry}
    write_json(folder / "config.json", raw)
    return folder


def _is_packed(name: str, packings: dict[str, Any]) -> bool:
    return name.removeprefix("transformer.") in packings
