"""Merge an adapter into its base, and check that its effect survives quantization.

Rounding to few bits can undo an adapter: the weights quantize to those of the base. So
before the folder gets its final name, three models are run on a sample text: the base,
the base with adapter layers (those of `generate`, not merged weights), and the written
folder. The folder must be much closer to the second than the base is.

`merging.refuse_lost_adapter` only checks whether rounding changes the weights more than
the adapter does: it needs no tokenizer, but accepts the loss of half of the adapter.
(Demo model, rank 16, 40 steps: KL of the adapter 0.16 nats, of 4 bits 0.024, of 3 bits
0.1, which it accepts for a 3-bit base. It rejected nothing that this check accepts.)
`fuse` therefore runs only this check.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from converters.conversion.merging import merge_adapter, open_pair
from converters.conversion.model_folder import Job
from converters.conversion.options import ConversionOptions, Progress
from converters.conversion.run import convert_model
from converters.formats.adapter_reader import Adapter, with_rows
from converters.formats.adapter_tensors import TABLE, AdapterModule
from converters.formats.sources import ModelSource, SourceTensor, open_path
from converters.quantization.calibration import calibration_windows, read_calibration
from converters.quantization.learning import LearningRecord
from converters.quantization.receipt import (
    CHUNK,
    LayerwiseModel,
    Read,
    run_side_by_side,
)
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.openelm import Block
from mlx_openelm.model.quantization import AFFINE_BITS, Quantization
from mlx_openelm.storage.adapter_folder import find_adapter, wrap
from mlx_openelm.storage.loading import load_tokenizer
from mlx_openelm.storage.model_folder import open_folder, spell_dtype
from mlx_openelm.tensor_names import EMBEDDING, HEAD

NUM_TOKENS, WINDOW = 256, 64  # of the sample; the 270M takes 10 s on two cores
MAX_LOSS = 0.25  # fraction of the adapter's effect (KL) that may be lost
NOISE = 1e-6  # nats; a smaller KL is rounding error

METADATA = "fusion"  # key of the proof in the mlx-openelm entry of config.json


@dataclass(frozen=True, slots=True)
class FusionProof:
    """Divergence of the fused model from the base with its adapter.

    Attributes:
        text: name of the sample text.
        tokens: number of positions whose next-token distributions were compared.
        kl_fused: mean KL(base with adapter || fused), nats per token.
        kl_adapter: mean KL(base with adapter || base), the effect of the adapter.
        top1_agreement: fraction of positions where base with adapter and fused model
            have the same most likely token.
        loss_fused, loss_adapter, loss_base: nats per token of the sample text, of the
            fused model, of the base with its adapter, and of the base.
    """

    text: str
    tokens: int
    kl_fused: float
    kl_adapter: float
    top1_agreement: float
    loss_fused: float = math.nan
    loss_adapter: float = math.nan
    loss_base: float = math.nan

    @property
    def lost(self) -> bool:
        """Whether too much of the adapter's effect is lost; NaN counts as lost."""
        return not self.kl_fused <= max(MAX_LOSS * self.kl_adapter, NOISE)


@dataclass(frozen=True, slots=True)
class FusionReport:
    """Summary of a fused model.

    Attributes:
        method: lora, dora or full.
        bits: of the linear layers; None if nothing is quantized.
        template: the prompt template of the written folder.
        learned: what training scales and biases did, or None.
    """

    path: Path
    adapter: str
    base: str
    method: str
    size: str
    num_parameters: int
    dtype: str
    bits: float | None
    bits_per_weight: float
    num_bytes: int
    template: str | None
    proof: FusionProof
    learned: LearningRecord | None
    notes: tuple[str, ...]
    seconds: float


def fuse(
    adapter_path: str | Path,
    save_path: str | Path,
    *,
    base: str | None = None,
    dequantize: bool = False,
    bits: int | None = None,
    group_size: int | None = None,
    learn: str | None = None,
    teacher_cache: str | None = None,
    force: bool = False,
    offline: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> FusionReport:
    """Merge an adapter into its base and write the result as a model folder.

    By default, tensors that are quantized in the base are quantized in the same way. An
    adapter that was trained for `bits` (`quantize_aware`) is not compared with itself
    before rounding: its training included it.

    Args:
        adapter_path: a folder of the methods lora, dora or full.
        base: default: the base that the adapter's files name.
        dequantize: write all weights in 16 bits.
        bits: quantize the linear layers to this number, in groups of `group_size`.
        learn: then train scales and biases to match the base with its adapter, so many
            minutes ("10") or steps ("200steps").
        teacher_cache: folder in which the outputs of base and adapter are kept for
            `learn`, so that they are not in memory meanwhile.
        force: replace an existing model.

    Raises:
        OpenELMError: an input is wrong, or rounding would lose the adapter. Nothing is
            written then.
    """
    started = time.perf_counter()
    path = find_adapter(str(adapter_path), offline=offline)
    target = Path(save_path)
    if target.resolve().is_relative_to(path.resolve()):
        raise OpenELMError(
            f"{target} is in the adapter's own folder; choose another `save_path`."
        )
    options = ConversionOptions(
        bits=None if bits is None else str(bits),
        group_size=group_size,
        learn=learn,
        teacher_cache=teacher_cache,
        dequantize=dequantize,
        receipt=False,  # the proof replaces it
        merge=True,
        base=base,
        allow_overflow=True,  # only if the base is float16 already
        repack=bits is None and not dequantize,
    )
    base_model, adapter = open_pair(path, base, offline=offline)
    merged = merge_adapter(base_model, adapter)
    proofs: list[FusionProof] = []
    aware = adapter.metadata.get("quantize_aware")
    aware = aware if aware in AFFINE_BITS else None
    trained_for = aware is not None and _rounds_alike(aware, options, base_model)

    def prove(staging: Path) -> Mapping[str, Any]:
        tensors = {**merged.tensors, **merged.before_merging}
        proof = prove_fused(staging, tensors, adapter, merged.config, on_progress)
        if proof.lost and not (trained_for and math.isfinite(proof.kl_fused)):
            remedy = _advise_storage(base_model.tensors.values(), options)
            if aware is not None and not trained_for:
                remedy = (
                    f"it was trained for `bits` {aware} without `group_size`, so use "
                    f"these, or {remedy}"
                )
            raise OpenELMError(_describe_loss(proof, staging, remedy))
        proofs.append(proof)
        entry = {"base": base_model.name, "method": adapter.method, **asdict(proof)}
        return {METADATA: entry}

    job = Job(
        options=options,
        source=merged,
        adapter=None,
        target=target,
        adapter_out=None,
        force=force,
        offline=offline,
        on_progress=on_progress,
        prove=prove,
    )
    written, (proof,) = convert_model(job), proofs
    return FusionReport(
        path=target,
        adapter=str(adapter_path),
        base=base or adapter.base or base_model.name,
        method=adapter.method,
        size=written.size,
        num_parameters=written.num_parameters,
        dtype=written.dtype,
        bits=written.bits,
        bits_per_weight=written.bits_per_weight,
        num_bytes=written.num_bytes,
        template=open_folder(target).template,
        proof=proof,
        learned=written.learned,
        notes=(
            *adapter.notes,
            *written.notes,
            *([] if aware is None or trained_for else [_advise_bits(aware)]),
        ),
        seconds=time.perf_counter() - started,
    )


def _describe_loss(proof: FusionProof, staging: Path, remedy: str) -> str:
    source = open_path(staging)
    packed = [t.packing.bits for t in source.tensors.values() if t.packing]
    stored = f"{min(packed)} bits" if packed else spell_dtype(source.dtype)
    return (
        f"Weights of {stored} would lose the adapter: the mean KL from base with "
        f"adapter is {proof.kl_fused:.3g} nats for the fused model and "
        f"{proof.kl_adapter:.3g} for the base alone ({proof.tokens} tokens of "
        f"{proof.text}); {remedy}."
    )


def _rounds_alike(aware: int, options: ConversionOptions, base: ModelSource) -> bool:
    """Whether training with `quantize_aware` included the rounding of these options."""
    chosen = options.quantization
    if chosen is not None:
        packings = chosen.packings(base.config)
    elif options.dequantize:
        return False
    else:
        tensors = base.tensors.items()
        packings = {name: t.packing for name, t in tensors if t.packing is not None}
    return packings == Quantization(aware).packings(base.config)


def _advise_bits(aware: int) -> str:
    return (
        f"The adapter was trained with `quantize_aware` {aware}, for a model fused "
        f"with `bits` {aware} without `group_size`."
    )


def _advise_storage(base: Iterable[SourceTensor], options: ConversionOptions) -> str:
    """Return how to store the fused weights with a smaller rounding error."""
    packed = [tensor.packing.bits for tensor in base if tensor.packing]
    bits = options.requested_bits
    if options.dequantize or not (packed or bits):
        return "leave the adapter unmerged and use it with `adapter_path`"
    exact = "leave out the quantization" if bits else "use `dequantize`"
    if bits and packed:
        exact += " and use `dequantize`"
    if (bits or min(packed)) == 8:  # the largest number
        return exact
    return f"{exact} or a larger `bits`" if packed else f"{exact}, or use `bits` 8"


# The proof -----------------------------------------------------------------------


def prove_fused(
    folder: Path,
    base: Mapping[str, SourceTensor],
    adapter: Adapter,
    config: OpenELMConfig,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> FusionProof:
    """Compare a fused folder with base and adapter in float32, using its tokenizer.

    At most one layer and the head of each model are in memory.

    Args:
        base: the tensors of `config`, without the adapter.
        adapter: fits that base.
    """
    opened = open_folder(folder)
    rows = opened.config.vocab_size  # the base may have more (padding)
    name, text = read_calibration(None)
    tokenizer = load_tokenizer(opened)
    windows = calibration_windows(
        tokenizer, text, opened.config, num_tokens=NUM_TOKENS, window=WINDOW
    )
    inputs, targets = windows[:, :-1], windows[:, 1:].reshape(-1)
    adapter = with_rows(adapter, rows) if TABLE in adapter.modules else adapter
    read = _cut(lambda name: base[name].read(), rows)
    tuned = _cut(lambda name: (adapter.weights.get(name) or base[name]).read(), rows)
    fused = open_path(folder).tensors
    models = (
        _AdaptedModel(config, tuned, adapter.modules),
        LayerwiseModel(config, lambda name: fused[name].read()),
        LayerwiseModel(config, read),
    )
    finals = run_side_by_side(
        models,
        inputs,
        lambda done, total: on_progress(Progress(done, total, "layers checked")),
    )
    heads = [model.head() for model in models]
    figures = []
    for start in range(0, targets.size, CHUNK):
        chunk = slice(start, start + CHUNK)
        p, q, b = (
            nn.log_softmax(head(x[chunk]))
            for head, x in zip(heads, finals, strict=True)
        )
        agrees = (p.argmax(axis=-1) == q.argmax(axis=-1)).astype(mx.float32)
        losses = [
            -mx.take_along_axis(x, targets[chunk, None], axis=-1)[:, 0]
            for x in (q, p, b)
        ]
        figures.append(np.array(mx.stack([_kl(p, q), _kl(p, b), agrees, *losses])))
    means = np.concatenate(figures, axis=1).mean(axis=1).tolist()
    kl_fused, kl_adapter, agreement, *losses_of_models = means
    return FusionProof(
        text=name,
        tokens=targets.size,
        kl_fused=kl_fused,
        kl_adapter=kl_adapter,
        loss_fused=losses_of_models[0],
        loss_adapter=losses_of_models[1],
        loss_base=losses_of_models[2],
        top1_agreement=agreement,
    )


def _kl(p: mx.array, q: mx.array) -> mx.array:
    """KL (C,) in nats of log-probabilities (C, V), not negative despite rounding."""
    return mx.maximum((mx.exp(p) * (p - q)).sum(axis=-1), 0.0)


def _cut(read: Read, rows: int) -> Read:
    return lambda name: read(name)[:rows] if name in (EMBEDDING, HEAD) else read(name)


@dataclass(frozen=True)
class _AdaptedModel(LayerwiseModel):
    """A model with unmerged adapter layers, the same that `generate` uses."""

    adapters: Mapping[str, AdapterModule]

    def embed(self, tokens: mx.array) -> mx.array:
        x: mx.array = self._table()(tokens)  # (N, T, D)
        mx.eval(x)
        return x

    def block(self, layer: int) -> Block:
        block = super().block(layer)
        modules, prefix = dict(block.named_modules()), f"layers.{layer}."
        wrapped = [
            (path, _wrap(modules[path], part))
            for name, part in self.adapters.items()
            if name.startswith(prefix) and (path := name.removeprefix(prefix))
        ]
        block.update_modules(tree_unflatten(wrapped))
        return block

    def head(self) -> Callable[[mx.array], mx.array]:
        if self.config.share_input_output_layers:
            tied: Callable[[mx.array], mx.array] = self._table().as_linear
            return tied
        return super().head()

    def _table(self) -> nn.Module:
        table = nn.Embedding(1, 1)
        table.weight = self.read(EMBEDDING).astype(mx.float32)
        part = self.adapters.get(TABLE)
        return _wrap(table, part) if part else table


def _wrap(module: nn.Module, part: AdapterModule) -> nn.Module:
    names = {"a": "lora_a", "b": "lora_b", "m": "m"}
    parts = {names[name]: array for name, array in part.read().items()}
    return wrap(module, parts, part.scale)
