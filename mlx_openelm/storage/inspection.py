"""A summary of a model folder, without loading the weights."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_openelm.compatibility import Opening, check_tools
from mlx_openelm.device import compute_dtype
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.loading import stored_dtype
from mlx_openelm.storage.model_folder import (
    BEFORE,
    ModelFolder,
    open_folder,
    spell_dtype,
)
from mlx_openelm.storage.tokenizer_finder import (
    MODEL_FILE,
    find_tokenizer_file,
    read_tokenizer,
)
from mlx_openelm.tensor_names import EMBEDDING, HEAD
from mlx_openelm.tuning import Tuning, read_tuning


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """One layer of the layer-wise scaling."""

    query_heads: int
    kv_heads: int
    ffn_dim: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A summary of a model folder.

    Attributes:
        storage: dtype or bits, by tensor group (embedding, linears, norms), with the
            number of tensors if a group has more than one.
        weight_bytes: the size of the weights on disk.
        memory_bytes: the size of weights and KV cache when running on this machine with
            `context` tokens.
        tokenizer: its number of pieces and added tokens, or None.
        source: origin of the weights, as recorded by the converter.
        options: options of the conversion that differ from the defaults.
        receipt: the measured errors of the quantization.
        opens_in: other tools, and whether they open the folder.
        rewritten: another tool has written other weights since, which options and
            receipt do not describe.
        notes: notes for the user on the files.
        tuning: the settings that `selfcheck --tune` stored for this machine.
    """

    path: Path
    size: str
    num_parameters: int
    model_dim: int
    head_dim: int
    context_length: int
    vocab_size: int
    tied: bool
    layers: tuple[LayerSizes, ...]
    storage: Mapping[str, str]
    bits_per_weight: float
    weight_bytes: int
    kv_bytes_per_token: int
    memory_bytes: int
    tokenizer: int | None
    template: str
    source: Mapping[str, Any]
    options: Mapping[str, Any]
    receipt: Mapping[str, Any] | None
    opens_in: Mapping[str, Opening]
    rewritten: bool = False
    notes: tuple[str, ...] = ()
    tuning: Tuning | None = None


def inspect(path: Path, *, context: int | None = None) -> Inspection:
    """Read a model folder's headers and config.

    Args:
        context: tokens in the KV cache; default the model's context length.

    Raises:
        OpenELMError: the folder is not a model folder, or damaged.
    """
    folder = open_folder(path)
    config, metadata = folder.config, folder.metadata
    before = _read_mapping(metadata, BEFORE)
    weight_bytes = sum(tensor.num_bytes for tensor in folder.tensors.values())
    dtype = compute_dtype(stored_dtype(folder))
    widened = dtype != stored_dtype(folder)
    working_bytes = config.num_parameters * dtype.size if widened else weight_bytes
    kv_bytes = config.kv_bytes_per_token(dtype.size)
    tokens = context or config.max_context_length
    return Inspection(
        path=path,
        size=config.size_name,
        num_parameters=config.num_parameters,
        model_dim=config.model_dim,
        head_dim=config.head_dim,
        context_length=config.max_context_length,
        vocab_size=config.vocab_size,
        tied=config.share_input_output_layers,
        layers=tuple(
            LayerSizes(*sizes)
            for sizes in zip(
                config.num_query_heads,
                config.num_kv_heads,
                config.ffn_dims,
                strict=True,
            )
        ),
        storage=_storage(folder),
        bits_per_weight=8 * weight_bytes / config.num_parameters,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes,
        memory_bytes=working_bytes + tokens * kv_bytes,
        tokenizer=_count_pieces(folder),
        template=folder.template or "raw",
        source=_read_mapping(before or metadata, "source") or {},
        options=_read_mapping(metadata, "options") or {},
        receipt=_read_mapping(metadata, "receipt"),
        opens_in=check_tools(
            config,
            folder.raw,
            has_tokenizer=find_tokenizer_file(path) is not None,
        ),
        rewritten=before is not None,
        notes=folder.notes,
        tuning=read_tuning(),
    )


def _read_mapping(metadata: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    value = metadata.get(key)
    return value if isinstance(value, dict) else None


def _storage(folder: ModelFolder) -> dict[str, str]:
    groups: dict[str, Counter[str]] = {}
    for name, shape in folder.config.tensor_shapes().items():
        if name in (EMBEDDING, HEAD):
            group = "embedding"
        else:
            group = "linears" if len(shape) == 2 else "norms"
        packing = folder.packings.get(name)
        if packing is None:
            spelled = spell_dtype(folder.dtype_of(name))
        else:
            spelled = (
                f"{packing.bits} bits ({packing.mode}, group {packing.group_size})"
            )
        groups.setdefault(group, Counter())[spelled] += 1
    return {
        group: ", ".join(
            f"{count} x {spelled}" if len(counts) > 1 else spelled
            for spelled, count in sorted(counts.items())
        )
        for group, counts in groups.items()
    }


def _count_pieces(folder: ModelFolder) -> int | None:
    try:
        rows = folder.config.vocab_size
        return read_tokenizer(folder.path, num_rows=rows).num_ids
    except OpenELMError:
        if (folder.path / MODEL_FILE).is_file():  # SentencePiece's, and damaged
            raise
        return None  # missing, or of another kind
