"""Grow a model into a larger one with the same logits: HyperCloning, for OpenELM.

After Samragh et al., "Scaling Smart" (arXiv 2409.12903). Every hidden vector of the
large model is `width` copies of the small one's, every vector inside an FFN `ffn`
copies. So a linear is tiled over rows and columns and divided by the number of copies
of its input; norms are tiled, and heads are repeated: query head j of Q reads key-value
head j // (Q / K) in each copy. Training then continues from the small model's loss. But
identical copies receive identical gradients, so without dropout or noise they never
diverge. Optional noise breaks the symmetry: it is added to one column block and
subtracted from its neighbour, so that it cancels for equal inputs. Its level follows
the weights of each block; of queries, keys and values, those of each head.
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
from converters.formats.sources import ModelSource, locate, open_without_adapter
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import count_of
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
    """Growth factors, and the noise that is added.

    Attributes:
        width: factor of model_dim and of the number of heads.
        ffn: factor of the FFN widths.
        noise_db: signal-to-noise ratio: mean square of the weights over that of the
            noise, in decibels. None: no noise.
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
                "`width` 1 and `ffn` 1 leave the model unchanged; raise one of them."
            )
        if self.noise_db is not None and not 0 <= self.noise_db <= 100:
            raise OpenELMError(
                f"`noise_db` is {self.noise_db:g}; it must be 0 (noise as strong as "
                "the weights) to 100 (near float32's precision); 10 is usual."
            )
        if not 0 <= self.seed < 2**63:
            raise OpenELMError(f"`seed` is {self.seed}; it must be 0 to 2**63 - 1.")


@dataclass(frozen=True, slots=True)
class GrowthReport:
    """Summary of a grown model.

    Attributes:
        path: the checkpoint; config.json and the tokenizer are in the same folder.
        before: number of parameters of the source.
        tokenizer: path of the tokenizer's source, or None.
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
    """Write a larger model with the same logits, to continue training from.

    The folder has the layout of a pre-training run: checkpoint.pt (CoreNet's names,
    float32), config.json with the sizes of each layer, which no formula describes, and
    the tokenizer. One tensor is in memory at a time.

    Args:
        source: as for `convert`, without an adapter. Quantized weights are dequantized.
        output: the folder; default ./<source name>-grown.
        ffn: default: `width`.
        tokenizer: a file, a folder, a Hub id, or "none".
        force: replace an existing folder, as `staged_folder` does.

    Raises:
        OpenELMError: an input is wrong. Nothing is written then.
    """
    started = time.perf_counter()
    growth = Growth(width, width if ffn is None else ffn, noise_db, seed)
    path = locate(str(source), offline=offline, revision=revision)
    opened = open_without_adapter(path)
    target = Path(f"{opened.name}-grown" if output is None else output)
    if target.suffix == ".pt":
        raise OpenELMError(
            f"`output` is {target}, but it must name a folder; leave out the .pt."
        )
    refuse_existing(target, force=force)
    refuse_replacing(target, opened.files)
    config = grow_config(opened.config, growth)
    found_tokenizer = None
    if tokenizer != "none":
        found_tokenizer = find_tokenizer(
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
        if found_tokenizer is not None:
            (staging / MODEL_FILE).write_bytes(found_tokenizer.tokenizer.model_proto)
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
        tokenizer=None if found_tokenizer is None else str(found_tokenizer.path),
        notes=_notes(opened, config, growth, found_tokenizer),
        seconds=time.perf_counter() - started,
    )


def _notes(
    source: ModelSource,
    config: OpenELMConfig,
    growth: Growth,
    found_tokenizer: FoundTokenizer | None,
) -> tuple[str, ...]:
    notes = [*source.notes, *(found_tokenizer.notes if found_tokenizer else ())]
    packed = sum(tensor.packing is not None for tensor in source.tensors.values())
    if packed:
        notes.append(f"Dequantized {count_of(packed, 'tensor')}.")
    if config.share_input_output_layers != source.config.share_input_output_layers:
        notes.append(
            f"Untied the output head: it is the embedding divided by {growth.width}."
        )
    if growth.noise_db is None:
        notes.append(
            "Without noise the copies stay identical in training; use `noise_db` 10 to "
            "let them diverge."
        )
    elif growth.width == 1:
        notes.append(
            "With `width` 1 only the second linear of each FFN got noise: the inputs "
            "of the others have no copies in which it would cancel."
        )
    if found_tokenizer is None:
        notes.append(
            "No tokenizer was written: set tokenizer.path in the recipe of "
            "`mlx-openelm pretrain --init`."
        )
    return tuple(notes)


# Growth of the sizes and tensors -------------------------------------------------


def grow_config(config: OpenELMConfig, growth: Growth) -> OpenELMConfig:
    """Return the larger model's sizes.

    A single key-value head stays single, and a tied head is untied: the head must be
    divided by `width`, the embedding must not.
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
    """Return the larger model's tensors by CoreNet name, computed on read."""
    shapes = grow_config(source.config, growth).tensor_shapes()
    plan = ConversionPlan(source, source.config, mx.float32, {})
    return {
        name: TensorToWrite(shape, mx.float32, _reader(plan, name, number, growth))
        for number, (name, shape) in enumerate(shapes.items())
    }


def _reader(
    plan: ConversionPlan, name: str, number: int, growth: Growth
) -> Callable[[], mx.array]:
    stored = EMBEDDING if name not in plan.source.tensors else name  # an untied head

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
    """Return a tensor of the larger model.

    Args:
        name: CoreNet name.
        weight: (out, in) or (dim,), float32, of the small model.
        config: of the small model.
        rng: for the noise.
    """
    n, m = growth.width, growth.ffn
    linear = _Linear(growth.noise_db, rng)
    if name == EMBEDDING:
        return np.tile(weight, (1, n))
    if name == HEAD:
        return np.tile(weight / np.float32(n), (1, n))
    layer, part = name.split(".")[1], name.split(".")[-2]
    match part:
        case "q_norm" | "k_norm":  # per head: (head_dim,)
            return weight
        case "qkv_proj":
            H, K = config.head_dim, config.num_kv_heads[int(layer)]
            Q = config.num_query_heads[int(layer)]
            query, key, value = np.split(weight, [Q * H, (Q + K) * H])
            kv = _kv_copies(K, n)
            return np.concatenate(
                [
                    linear.clone(query, n, n, level_rows=H),
                    linear.clone(key, kv, n, level_rows=H),
                    linear.clone(value, kv, n, level_rows=H),
                ]
            )
        case "out_proj":
            return linear.clone(weight, n, n)
        case "proj_1":  # separately, as SwiGLU multiplies one half by the other
            gate, up = np.split(weight, 2)
            return np.concatenate([linear.clone(gate, m, n), linear.clone(up, m, n)])
        case "proj_2":
            return linear.clone(weight, n, m)
    return np.tile(weight, n)  # a norm: copies leave the mean square unchanged


@dataclass(frozen=True, slots=True)
class _Linear:
    """Clones the weights of linears, with noise."""

    noise_db: float | None
    rng: np.random.Generator

    def clone(
        self, weight: Array, rows: int, columns: int, *, level_rows: int | None = None
    ) -> Array:
        """Return a weight (out, in) tiled to (out * rows, in * columns).

        Each row block and each pair of neighbouring column blocks gets its own noise;
        of an odd number of column blocks the last gets none.

        Args:
            level_rows: number of rows that share a noise level, those of a head;
                default: all of a block.
        """
        block = weight / np.float32(columns)
        grown = np.tile(block, (rows, columns))
        if self.noise_db is not None:
            out, into = weight.shape
            blocks = grown.reshape(rows, out, columns, into)  # a view
            for row, left in product(range(rows), range(0, columns - 1, 2)):
                noise = self._noise(block, level_rows or out)
                blocks[row, :, left] += noise
                blocks[row, :, left + 1] -= noise
        return grown

    def _noise(self, block: Array, level_rows: int) -> Array:
        assert self.noise_db is not None
        out, into = block.shape
        noise = self.rng.standard_normal((out, into), dtype=np.float32)
        ratio = _rms(block, level_rows) / _rms(noise, level_rows)  # (out, 1)
        return noise * (10 ** (-self.noise_db / 20) * ratio).astype(np.float32)


def _rms(values: Array, rows: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the root mean square of each `rows` rows, for each of them: (out, 1)."""
    groups = values.reshape(-1, rows * values.shape[1])
    means = np.mean(np.square(groups), axis=1, dtype=np.float64)
    return np.repeat(np.sqrt(means), rows)[:, None]


def _kv_copies(heads: int, width: int) -> int:
    return 1 if heads == 1 else width
