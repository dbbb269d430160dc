"""Write a LoRA adapter as a GGUF file, which llama.cpp applies to its base's GGUF.

Per module llama.cpp adds alpha / rank * B A to the weight, with one alpha for all. So
the ranks may differ, and other alphas are folded into B. The gate and the up projection
are two tensors there: they share A, and each has its rows of B.
"""

import contextlib
from pathlib import Path

import mlx.core as mx
import numpy as np

from converters.formats.adapter_reader import Adapter
from converters.formats.adapter_tensors import TABLE
from converters.formats.adapter_writer import most_common
from converters.formats.gguf_writer import (
    ARCHITECTURE,
    append_tensor,
    as_utf8,
    begin_data,
    import_gguf,
    names_in_gguf,
)
from converters.formats.pt_writer import to_numpy
from mlx_openelm.errors import OpenELMError
from mlx_openelm.tensor_names import HEAD, to_module


def write_gguf_adapter(path: Path, adapter: Adapter) -> tuple[str, ...]:
    """Write an adapter for llama.cpp, in float32.

    Returns:
        Notes for the user.

    Raises:
        OpenELMError: llama.cpp does not support such an adapter, or the package gguf is
            not installed.
        OSError: the file cannot be written.
    """
    gguf = import_gguf()
    check_supported(adapter)
    modules = {f"{name}.weight": module for name, module in adapter.modules.items()}
    layers = [int(n.split(".")[1]) for n in modules if n.startswith("layers.")]
    parts = names_in_gguf(modules, max(layers, default=0) + 1)
    alphas = {n: float(np.float32(m.scale * m.rank)) for n, m in modules.items()}
    # llama.cpp takes an alpha of 0 as a scale of 1
    alpha = most_common([a for a in alphas.values() if a] or [1.0])
    with contextlib.closing(gguf.GGUFWriter(path, ARCHITECTURE)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(as_utf8(adapter.name))
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, module in modules.items():
            outputs, inputs = module.shape
            for part in parts[name]:
                rows = outputs // len(parts[name])
                for suffix, shape in (
                    ("lora_a", (module.rank, inputs)),
                    ("lora_b", (rows, module.rank)),
                ):
                    writer.add_tensor_info(
                        f"{part}.{suffix}",
                        shape,
                        np.dtype(np.float32),
                        4 * shape[0] * shape[1],
                    )
        file = begin_data(writer)
        for name, module in modules.items():
            factors = module.read()
            a, b = factors["a"].T, factors["b"].T  # (R, I), (O, R)
            if alphas[name] != alpha:
                b = b * (alphas[name] / alpha)
            for rows_of_b in mx.split(b, len(parts[name])):
                append_tensor(writer, file, to_numpy(a))
                append_tensor(writer, file, to_numpy(rows_of_b))
    notes = []
    if {*alphas.values()} != {alpha}:
        notes.append(
            f"Folded alphas other than {alpha:g} into lora_b: llama.cpp has one alpha."
        )
    if adapter.metadata.get("template"):
        notes.append(
            f"It was trained with the template {adapter.metadata['template']}; "
            "llama.cpp uses the one in the base's file."
        )
    return tuple(notes)


def check_supported(adapter: Adapter) -> None:
    """Raise OpenELMError if llama.cpp does not support the adapter."""
    reason = ""
    if adapter.method == "dora":
        reason = "is DoRA"
    elif TABLE in adapter.modules or not adapter.modules:
        reason = "adapts the embedding"
    elif HEAD.removesuffix(".weight") in adapter.modules:
        reason = f"adapts an untied output head ({to_module(HEAD)})"
    if reason:
        raise OpenELMError(
            f"{adapter.name} {reason}, which llama.cpp does not support; merge it into "
            "its base with `merge`."
        )
