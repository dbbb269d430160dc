"""A model becomes a larger one that computes the same: HyperCloning, for OpenELM.

After Samragh et al., "Scaling Smart" (arXiv 2409.12903). Every hidden vector of the
large model is `width` copies of the small one's, every vector inside an FFN `ffn`
copies. So a linear is tiled over rows and columns and divided by how often its input is
repeated; norms are tiled, and heads are repeated as they are: query head j of Q reads
key-value head j // (Q / K) in each copy as before. Training then starts where the small
model stands. But copies that are alike have like gradients and learn alike, for ever,
as a model without dropout has nothing that parts them: so noise may be added, to one
column block what is taken from its neighbour, which equal inputs cancel.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from converters.conversion.exports import count_tensors
from converters.conversion.model_folder import copy_generation_config, refuse_small_disk
from converters.conversion.options import Progress
from converters.conversion.plan import ConversionPlan
from converters.formats.pt_writer import TensorToWrite, to_numpy, write_pt
from converters.formats.sources import ModelSource, is_adapter, locate, open_path
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.model_folder import METADATA_KEY
from mlx_openelm.storage.shards import write_json
from mlx_openelm.storage.staging import refuse_existing, refuse_replacing, staged_folder
from mlx_openelm.storage.tokenizer_finder import (
    MODEL_FILE,
    FoundTokenizer,
    find_tokenizer,
)
from mlx_openelm.tensor_names import EMBEDDING, HEAD
from mlx_openelm.version import __version__

CHECKPOINT = "checkpoint.pt"

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Growth:
    """How a model grows.

    Attributes:
        width: how often a hidden vector is repeated: of model_dim and of the heads.
        ffn: the same of the vectors inside the FFNs.
        noise_db: mean square of the weights over that of the noise, in decibel.
        seed: of the noise.
    """

    width: int
    ffn: int
    noise_db: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("`width`", self.width), ("`ffn`", self.ffn)):
            if value < 1:
                raise OpenELMError(f"{name} is {value}; it must be at least 1.")
        if self.width == self.ffn == 1:
            raise OpenELMError(
                "`width` 1 and `ffn` 1 leave the model as it is; raise one of them."
            )
        if self.noise_db is not None and not 0 <= self.noise_db <= 100:
            raise OpenELMError(
                f"`noise_db` is {self.noise_db:g}; it must be 0 (as strong as the "
                "weights) to 100 (float32 hardly holds it); 10 is usual."
            )
        if not 0 <= self.seed < 2**63:
            raise OpenELMError(f"`seed` is {self.seed}; it must be 0 to 2**63 - 1.")


@dataclass(frozen=True, slots=True)
class GrowthReport:
    """What was written, and from what.

    Attributes:
        path: the checkpoint; config.json and the tokenizer lie beside it.
        before: parameters of the source.
        tokenizer: where it came from, or None.
    """

    path: Path
    source: str
    kind: str
    width: int
    ffn: int
    noise_db: float | None
    before: int
    num_parameters: int
    num_bytes: int
    tokenizer: str | None
    notes: tuple[str, ...]
    seconds: float


def grow(
    source: str | Path,
    output: str | Path | None = None,
    *,
    width: int,
    ffn: int | None = None,
    noise_db: float | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
    force: bool = False,
    offline: bool = False,
    revision: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> GrowthReport:
    """Write a larger model with the same logits, to go on training from.

    The folder is like a pre-training run's: checkpoint.pt (CoreNet's names, float32),
    config.json with the sizes of each layer, which follow no formula any more, and the
    tokenizer. Tensors are written one by one; no more than one is in memory.

    Args:
        source: what `convert` takes, without an adapter; packed weights are unpacked.
        output: the folder; default ./<source name>-grown.
        ffn: default as `width`.
        tokenizer: a file, a folder or a Hub id; "none" goes without one.
        force: replace what is there, where `staged_folder` does.

    Raises:
        OpenELMError: whatever is wrong; nothing was written then.
    """
    started = time.perf_counter()
    growth = Growth(width, width if ffn is None else ffn, noise_db, seed)
    opened = _open_plain(str(source), offline=offline, revision=revision)
    target = Path(f"{opened.name}-grown" if output is None else output)
    if target.suffix == ".pt":
        raise OpenELMError(
            f"`output` is {target}, but a folder is written; leave out the .pt."
        )
    refuse_existing(target, force=force)
    refuse_replacing(target, opened.files)
    config = grow_config(opened.config, growth)
    found = None
    if tokenizer != "none":
        found = find_tokenizer(
            opened.folder, tokenizer, opened.config.vocab_size, offline=offline
        )
    tensors = grown_tensors(opened, growth)
    num_bytes = 4 * config.num_parameters
    with staged_folder(target, force=force) as staging:
        refuse_small_disk(target, num_bytes)
        count = count_tensors(on_progress, len(tensors))
        write_pt(staging / CHECKPOINT, tensors, on_written=count)
        described = {
            "version": __version__,
            "source": {"name": opened.name, "kind": opened.kind},
            "growth": asdict(growth),
        }
        write_json(
            staging / "config.json", config.to_dict() | {METADATA_KEY: described}
        )
        copy_generation_config(opened.folder, staging)
        if found is not None:
            (staging / MODEL_FILE).write_bytes(found.tokenizer.model_proto)
    return GrowthReport(
        path=target / CHECKPOINT,
        source=str(source),
        kind=opened.kind,
        width=growth.width,
        ffn=growth.ffn,
        noise_db=growth.noise_db,
        before=opened.config.num_parameters,
        num_parameters=config.num_parameters,
        num_bytes=num_bytes,
        tokenizer=None if found is None else str(found.path),
        notes=_notes(opened, config, growth, found),
        seconds=time.perf_counter() - started,
    )


def _open_plain(name: str, *, offline: bool, revision: str | None) -> ModelSource:
    path = locate(name, offline=offline, revision=revision)
    source = None if is_adapter(path) else open_path(path)
    if source is None or source.adapter is not None:
        what = "is" if source is None else "carries"
        raise OpenELMError(
            f"{name} {what} an adapter, which would not fit the larger model; merge it "
            f"first: mlx-openelm convert {name} --merge --to corenet."
        )
    return source


def _notes(
    source: ModelSource,
    config: OpenELMConfig,
    growth: Growth,
    found: FoundTokenizer | None,
) -> tuple[str, ...]:
    notes = [*source.notes, *(found.notes if found else ())]
    packed = sum(tensor.packing is not None for tensor in source.tensors.values())
    if packed:
        notes.append(f"Unpacked {packed} quantized tensors.")
    if config.share_input_output_layers != source.config.share_input_output_layers:
        notes.append(
            f"Untied the output head: it is the embedding over {growth.width}."
        )
    if growth.noise_db is None:
        notes.append(
            "Without noise the copies are alike and will learn alike; `noise_db` 10 "
            "lets them part."
        )
    elif growth.width == 1:
        notes.append(
            "`width` 1 leaves most inputs single, where noise has no pair to cancel "
            "in: only the FFNs' second linear got some."
        )
    if found is None:
        notes.append("No tokenizer was written: pretrain `init` needs one to be said.")
    return tuple(notes)


# The rules -----------------------------------------------------------------------


def grow_config(config: OpenELMConfig, growth: Growth) -> OpenELMConfig:
    """Return the larger model's sizes.

    A single key-value head stays single, and a tied head is untied: the embedding is
    repeated as it is, while the head has to be divided.
    """
    n, m = growth.width, growth.ffn
    return replace(
        config,
        model_dim=n * config.model_dim,
        num_query_heads=tuple(n * heads for heads in config.num_query_heads),
        num_kv_heads=tuple(_kv_copies(K, n) * K for K in config.num_kv_heads),
        ffn_dims=tuple(m * dim for dim in config.ffn_dims),
        share_input_output_layers=config.share_input_output_layers and n == 1,
    )


def grown_tensors(source: ModelSource, growth: Growth) -> dict[str, TensorToWrite]:
    """Return the larger model's tensors, by CoreNet name, each made when it is read."""
    shapes = grow_config(source.config, growth).tensor_shapes()
    plan = ConversionPlan(source, source.config, mx.float32, {})
    return {
        name: TensorToWrite(shape, mx.float32, _reader(plan, name, number, growth))
        for number, (name, shape) in enumerate(shapes.items())
    }


def _reader(
    plan: ConversionPlan, name: str, number: int, growth: Growth
) -> Callable[[], mx.array]:
    stored = EMBEDDING if name not in plan.source.tensors else name  # a head untied

    def read() -> mx.array:
        rng = np.random.default_rng([growth.seed, number])
        weight = to_numpy(plan.read(stored))
        return mx.array(grow_tensor(name, weight, plan.config, growth, rng))

    return read


def grow_tensor(
    name: str,
    weight: Array,
    config: OpenELMConfig,
    growth: Growth,
    rng: np.random.Generator,
) -> Array:
    """Return the larger model's tensor.

    Args:
        name: CoreNet's.
        weight: (out, in) or (dim,), float32, of the model that grows.
        config: that model's.
        rng: of the noise.
    """
    n, m = growth.width, growth.ffn
    linear = _Linear(growth.noise_db, rng)
    if name == EMBEDDING:
        return np.tile(weight, (1, n))
    if name == HEAD:
        return np.tile(weight / np.float32(n), (1, n))
    layer, part = name.split(".")[1], name.split(".")[-2]
    match part:
        case "q_norm" | "k_norm":  # of one head
            return weight
        case "qkv_proj":
            H, K = config.head_dim, config.num_kv_heads[int(layer)]
            Q = config.num_query_heads[int(layer)]
            query, key, value = np.split(weight, [Q * H, (Q + K) * H])
            kv = _kv_copies(K, n)
            return np.concatenate(
                [
                    linear.clone(query, n, n),
                    linear.clone(key, kv, n),
                    linear.clone(value, kv, n),
                ]
            )
        case "out_proj":
            return linear.clone(weight, n, n)
        case "proj_1":  # apart, for SwiGLU pairs the upper half with the lower
            gate, up = np.split(weight, 2)
            return np.concatenate([linear.clone(gate, m, n), linear.clone(up, m, n)])
        case "proj_2":
            return linear.clone(weight, n, m)
    return np.tile(weight, n)  # a norm: copies do not change the mean square


@dataclass(frozen=True, slots=True)
class _Linear:
    """How linears are cloned."""

    noise_db: float | None
    rng: np.random.Generator

    def clone(self, weight: Array, rows: int, columns: int) -> Array:
        """Return (out * rows, in * columns) of a weight (out, in).

        Noise differs from row block to row block and from pair to pair of neighbouring
        column blocks; of an odd number the last has none.
        """
        block = weight / np.float32(columns)
        grown = np.tile(block, (rows, columns))
        if self.noise_db is not None:
            out, into = weight.shape
            blocks = grown.reshape(rows, out, columns, into)  # the same memory
            for row, left in product(range(rows), range(0, columns - 1, 2)):
                noise = self._noise(block)
                blocks[row, :, left] += noise
                blocks[row, :, left + 1] -= noise
        return grown

    def _noise(self, block: Array) -> Array:
        assert self.noise_db is not None
        out, into = block.shape
        noise = self.rng.standard_normal((out, into), dtype=np.float32)
        strength = 10 ** (-self.noise_db / 20) * _rms(block) / _rms(noise)
        return noise * np.float32(strength)


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values), dtype=np.float64)))


def _kv_copies(heads: int, width: int) -> int:
    return 1 if heads == 1 else width
