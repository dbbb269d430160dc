"""A source becomes a model folder, one tensor at a time."""

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.sources import Source, open_source
from mlx_openelm.checkpoint import (
    METADATA_KEY,
    ShardWriter,
    expected_shapes,
    open_folder,
    write_json,
)
from mlx_openelm.config import BOS_ID, EOS_ID, OpenELMConfig, read_mapping
from mlx_openelm.errors import OpenELMError
from mlx_openelm.names import EMBEDDING, HEAD, to_folder
from mlx_openelm.quantize import Packing, Quantization
from mlx_openelm.staging import refuse_existing, staged_folder
from mlx_openelm.tokenizer_finder import FoundTokenizer, find_tokenizer, write_tokenizer
from mlx_openelm.version import __version__

CORENET_ROWS, LLAMA_PIECES = 32128, 32000
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True, slots=True)
class Progress:
    """Tensors written so far, and the one that was written last."""

    done: int
    total: int
    name: str


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What was written, and from what.

    Attributes:
        bits: of the linears, or None where nothing was quantized.
        bits_per_weight: bytes of all tensors x 8 over the number of parameters.
        tokenizer: where it came from, or None.
    """

    path: Path
    source: str
    kind: str
    size: str
    num_parameters: int
    dtype: str
    bits: int | None
    bits_per_weight: float
    num_bytes: int
    tokenizer: str | None
    notes: tuple[str, ...]
    seconds: float


def convert(
    source: str | Path,
    mlx_path: str | Path | None = None,
    *,
    dtype: str | None = None,
    bits: int | None = None,
    group_size: int = 64,
    embed_bits: int = 8,
    tokenizer: str | None = None,
    allow_overflow: bool = False,
    force: bool = False,
    offline: bool = False,
    revision: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> ConversionReport:
    """Write a model folder that mlx-openelm and mlx-lm read.

    Args:
        source: a CoreNet .pt file, a folder in Hugging Face's layout, a Hub id or demo.
        mlx_path: default ./<source name>-mlx, with -4bit (say) where quantized.
        dtype: float32, float16 or bfloat16; default bfloat16 for float32, else as is.
        bits: quantize the linears to this many bits (affine); `embed_bits` is for the
            embedding and `group_size` weights share a scale.
        tokenizer: a file, a folder or a Hub id; "none" converts without one.
        allow_overflow: float16 even for the 3B, whose activations overflow in it.

    Raises:
        OpenELMError: whatever is wrong; nothing was written then.
    """
    started = time.perf_counter()
    if dtype is not None and dtype not in DTYPES:
        raise OpenELMError(f"--dtype is {dtype}; it must be {', '.join(DTYPES)}.")
    quantization = None if bits is None else Quantization(bits, group_size, embed_bits)
    opened = open_source(str(source), offline=offline, revision=revision)
    target = Path(mlx_path) if mlx_path else Path(_default_name(opened, bits))
    refuse_existing(target, force=force)
    _refuse_losing_the_source(opened, target)
    found = None
    if tokenizer != "none":
        found = find_tokenizer(
            opened.folder, tokenizer, opened.config.vocab_size, offline=offline
        )
    config = _cut_vocabulary(opened.config, found)
    chosen = _choose_dtype(opened, config, dtype, allow_overflow)
    packings = quantization.packings(config) if quantization else {}
    num_bytes = _count_bytes(config, packings, chosen)
    _refuse_small_disk(target, num_bytes)
    notes = list(opened.notes)
    if config.vocab_size < opened.config.vocab_size:
        notes.append(
            f"Cut the embedding from {opened.config.vocab_size} to "
            f"{config.vocab_size} rows: the rest is padding."
        )
    if found is None:
        notes.append("No tokenizer was written: generate needs one in the folder.")
    with staged_folder(target, force=force) as staging:
        _write_weights(staging, opened, config, chosen, packings, on_progress)
        entry = quantization.to_dict(packings) if quantization else None
        _write_config(staging, opened, config, chosen, entry)
        if found is not None:
            write_tokenizer(found.tokenizer, staging)
        _write_card(staging, opened, config, entry)
        written = open_folder(staging)
    total = sum(tensor.num_bytes for tensor in written.tensors.values())
    return ConversionReport(
        path=target,
        source=str(source),
        kind=opened.kind,
        size=config.size_name,
        num_parameters=config.num_parameters,
        dtype=_spell(chosen),
        bits=bits,
        bits_per_weight=8 * total / config.num_parameters,
        num_bytes=total,
        tokenizer=None if found is None else str(found.path),
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
    )


# Decisions -----------------------------------------------------------------------


def _cut_vocabulary(
    config: OpenELMConfig, found: FoundTokenizer | None
) -> OpenELMConfig:
    """Drop the rows behind the tokenizer's pieces, which CoreNet pads with."""
    pieces = config.vocab_size
    if found is not None:
        pieces = found.tokenizer.vocab_size
    elif config.vocab_size == CORENET_ROWS:
        pieces = LLAMA_PIECES
    return replace(config, vocab_size=pieces)


def _choose_dtype(
    source: Source, config: OpenELMConfig, said: str | None, allow_overflow: bool
) -> mx.Dtype:
    default = mx.bfloat16 if source.dtype == mx.float32 else source.dtype
    chosen = DTYPES[said] if said else default
    shaped_like_3b = config.model_dim >= OpenELMConfig.preset("3B").model_dim
    if chosen == mx.float16 and shaped_like_3b and not allow_overflow:
        raise OpenELMError(
            f"A model of the 3B's shape (model_dim {config.model_dim}) overflows in "
            "float16 and prints rubbish; choose --dtype bfloat16, or say "
            "--allow-overflow."
        )
    return chosen


def _default_name(source: Source, bits: int | None) -> str:
    return f"{source.name}-mlx" + (f"-{bits}bit" if bits else "")


def _refuse_losing_the_source(source: Source, target: Path) -> None:
    resolved = target.resolve()
    for path in (*source.files, source.folder):  # a Hub cache's files are links
        if path.resolve().is_relative_to(resolved):
            raise OpenELMError(
                f"{target} holds the source itself, and replacing it would lose it; "
                "choose another --mlx-path."
            )


def _refuse_small_disk(target: Path, num_bytes: int) -> None:
    place = next(
        p for p in (target.absolute(), *target.absolute().parents) if p.exists()
    )
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise OpenELMError(
            f"{target} needs {num_bytes / 1e6:.0f} MB and its disk has "
            f"{free / 1e6:.0f} MB left; make room or choose another place."
        )


def _count_bytes(
    config: OpenELMConfig, packings: Mapping[str, Packing], dtype: mx.Dtype
) -> int:
    """Return the bytes of the result's tensors."""
    packed = {f"{to_folder(name).removesuffix('.weight')}.weight" for name in packings}
    return sum(
        math.prod(shape) * (4 if name in packed else dtype.size)
        for name, shape in expected_shapes(config, packings).items()
    )


# Writing -------------------------------------------------------------------------


def _write_weights(
    staging: Path,
    source: Source,
    config: OpenELMConfig,
    dtype: mx.Dtype,
    packings: Mapping[str, Packing],
    on_progress: Callable[[Progress], None],
) -> None:
    writer = ShardWriter(staging)
    shapes = config.tensor_shapes()
    for done, name in enumerate(shapes, start=1):
        weight = _read_checked(source, name, shapes[name], dtype)
        path = to_folder(name)
        if name in packings:
            module = path.removesuffix(".weight")
            for suffix, part in packings[name].pack(weight).items():
                mx.eval(part)
                if suffix != "weight" and not mx.isfinite(part).all():
                    raise OpenELMError(
                        f"{name} has values too far apart to share a scale; convert "
                        "it without -q."
                    )
                writer.add(f"{module}.{suffix}", part)
        else:
            writer.add(path, weight)
        on_progress(Progress(done, len(shapes), name))
    writer.close(config.num_parameters)


def _read_checked(
    source: Source, name: str, shape: tuple[int, ...], dtype: mx.Dtype
) -> mx.array:
    weight = source.tensors[name].read()
    if name in (EMBEDDING, HEAD):
        weight = weight[: shape[0]]
    cast = weight.astype(dtype)
    mx.eval(cast)
    if not mx.isfinite(cast).all():
        if mx.isfinite(weight).all():
            raise OpenELMError(
                f"{name} has values beyond {_spell(dtype)}'s range; choose --dtype "
                "bfloat16."
            )
        raise OpenELMError(
            f"{name} holds NaN or infinity, so the checkpoint is damaged or its "
            "training failed; get it again."
        )
    return cast


def _write_config(
    staging: Path,
    source: Source,
    config: OpenELMConfig,
    dtype: mx.Dtype,
    quantization: Mapping[str, Any] | None,
) -> None:
    raw = config.to_dict() | {"torch_dtype": _spell(dtype)}
    if quantization is not None:
        raw |= {"quantization": quantization, "quantization_config": quantization}
    metadata: dict[str, Any] = {
        "version": __version__,
        "source": {
            "name": source.name,
            "kind": source.kind,
            "files": {file.name: _hash_file(file) for file in source.files},
        },
    }
    if "instruct" in source.name.lower():
        metadata["template"] = "instruct"
    write_json(staging / "config.json", raw | {METADATA_KEY: metadata})
    defaults = source.folder / "generation_config.json"
    if defaults.is_file():
        read_mapping(defaults)  # what is damaged is not handed on
        shutil.copyfile(defaults, staging / defaults.name)
    else:
        ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
        write_json(staging / defaults.name, ids)


def _write_card(
    staging: Path,
    source: Source,
    config: OpenELMConfig,
    quantization: Mapping[str, Any] | None,
) -> None:
    stored = f"{quantization['bits']} bits a weight" if quantization else "unquantized"
    (staging / "README.md").write_text(
        f"""---
library_name: mlx
tags:
- mlx
- openelm
pipeline_tag: text-generation
---

# {source.name}

{config.size_name}, {config.num_parameters:,} parameters, {stored}. Converted by
mlx-openelm {__version__} from {source.name} ({source.kind}); hashes of the source files
are in `config.json`. The licence is the source's.

    mlx-openelm generate --model PATH --prompt "Once upon a time"
    mlx_lm.generate --model PATH --prompt "Once upon a time" --ignore-chat-template
""",
        encoding="utf-8",
        errors="replace",  # a file's name may be no UTF-8
    )


def _hash_file(path: Path) -> str:
    with path.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def _spell(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
