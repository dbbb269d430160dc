"""An adapter and its base become one model, with a proof that the adapter survived.

Weights of few bits swallow what an adapter adds: packed again, they are the base's. So
before the folder takes its name, three models read some text: the base, the base with
the adapter on it (by the layers that `generate` uses, not by the merged weights), and
what lies in the folder. The folder must be far nearer to the second than the first is.

`merging.refuse_losing` asks less, whether rounding moves the weights more than the
adapter does: it needs no tokenizer, and lets pass what loses half of the adapter. (The
demo model, an adapter of rank 16 after 40 steps: KL 0.16 nats of the adapter, 0.024 of
4 bits, 0.1 of 3 bits, which it lets pass on a base of 3 bits. It refused nothing that
the proof lets pass.) So `fuse` has the proof alone.
"""

import time
from collections.abc import Callable, Mapping
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
from converters.formats.sources import SourceTensor, locate, open_path
from converters.quantization.calibration import calibration_windows, read_calibration
from converters.quantization.receipt import (
    CHUNK,
    LayerwiseModel,
    Read,
    run_side_by_side,
)
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.openelm import Block
from mlx_openelm.storage.adapter_folder import wrap
from mlx_openelm.storage.loading import load_tokenizer
from mlx_openelm.storage.model_folder import open_folder, spell_dtype
from mlx_openelm.tensor_names import EMBEDDING, HEAD

NUM_TOKENS, WINDOW = 256, 64  # of text in the proof; the 270M takes 10 s on two cores
MOST_LOST = 0.25  # of the adapter's effect, in KL
NOISE = 1e-6  # nats; below it two models are the same

METADATA = "fusion"  # the proof's place in our own entry of config.json


@dataclass(frozen=True, slots=True)
class FusionProof:
    """How the fused model differs from the base with its adapter.

    Attributes:
        text: what it was measured on.
        tokens: after which the next one's distributions were compared.
        kl_fused: mean KL(base with adapter || fused), nats a token.
        kl_adapter: mean KL(base with adapter || base): what the adapter does.
        top1_agreement: how often base with adapter and the fused model think the same
            token likeliest, 0 to 1.
    """

    text: str
    tokens: int
    kl_fused: float
    kl_adapter: float
    top1_agreement: float

    @property
    def lost(self) -> bool:
        """Whether too little of the adapter is left; not a number is lost, too."""
        return not self.kl_fused <= max(MOST_LOST * self.kl_adapter, NOISE)


@dataclass(frozen=True, slots=True)
class FusionReport:
    """What was written, and from what.

    Attributes:
        method: lora, dora or full.
        bits: of the linears, or None where nothing is packed.
        template: the prompt template that the folder has now.
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
    force: bool = False,
    offline: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> FusionReport:
    """Write base and adapter as one model folder.

    What the base has packed is packed again, in the same way.

    Args:
        adapter_path: a folder of lora, dora or full; its own base is taken unless
            `base` says one.
        dequantize: write all of it in 16 bits.
        bits: quantize the linears to so many, in groups of `group_size`.
        force: replace a model that is there.

    Raises:
        OpenELMError: whatever is wrong, and that the weights' bits would lose the
            adapter; nothing was written then.
    """
    started = time.perf_counter()
    path, target = locate(str(adapter_path), offline=offline), Path(save_path)
    if target.resolve().is_relative_to(path.resolve()):
        raise OpenELMError(
            f"{target} is in the adapter's own folder; choose another `save_path`."
        )
    options = ConversionOptions(
        bits=None if bits is None else str(bits),
        group_size=group_size,
        dequantize=dequantize,
        receipt=False,  # the proof says what matters here
        merge=True,
        base=base,
        allow_overflow=True,  # the base does already, if it is float16
        repack=bits is None and not dequantize,
    )
    found, adapter = open_pair(path, base, offline=offline)
    merged = merge_adapter(found, adapter)
    proofs: list[FusionProof] = []

    def prove(staging: Path) -> Mapping[str, Any]:
        tensors = {**merged.tensors, **merged.before_merging}
        proof = prove_fused(staging, tensors, adapter, merged.config, on_progress)
        if proof.lost:
            raise OpenELMError(_describe_loss(proof, staging))
        proofs.append(proof)
        return {
            METADATA: {"base": found.name, "method": adapter.method, **asdict(proof)}
        }

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
        base=base or adapter.base or found.name,
        method=adapter.method,
        size=written.size,
        num_parameters=written.num_parameters,
        dtype=written.dtype,
        bits=written.bits,
        bits_per_weight=written.bits_per_weight,
        num_bytes=written.num_bytes,
        template=open_folder(target).template,
        proof=proof,
        notes=(*adapter.notes, *written.notes),
        seconds=time.perf_counter() - started,
    )


def _describe_loss(proof: FusionProof, staging: Path) -> str:
    source = open_path(staging)
    bits = [t.packing.bits for t in source.tensors.values() if t.packing]
    stored = f"{min(bits)} bits" if bits else spell_dtype(source.dtype)
    instead = (
        "say `dequantize`, or more bits with `bits`"
        if bits
        else "use the base with `adapter_path` as it is"
    )
    return (
        f"Weights of {stored} would lose the adapter: the fused model is "
        f"{proof.kl_fused:.3g} nats (mean KL) from base with adapter, and the base "
        f"alone {proof.kl_adapter:.3g}, on {proof.tokens} tokens of {proof.text}; "
        f"{instead}."
    )


# The proof -----------------------------------------------------------------------


def prove_fused(
    folder: Path,
    base: Mapping[str, SourceTensor],
    adapter: Adapter,
    config: OpenELMConfig,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> FusionProof:
    """Compare a fused folder, tokenizer included, with base and adapter, in float32.

    Of the weights there are never more in memory than one layer of each, and the heads.

    Args:
        base: the tensors of `config`, the adapter not merged into them.
        adapter: for that base.
    """
    opened = open_folder(folder)
    rows = opened.config.vocab_size  # the base may have more, for padding
    name, text = read_calibration(None)
    tokenizer = load_tokenizer(opened)
    windows = calibration_windows(
        tokenizer, text, opened.config, num_tokens=NUM_TOKENS, window=WINDOW
    )[:, :-1]
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
        windows,
        lambda done, total: on_progress(Progress(done, total, "layers of the proof")),
    )
    heads = [model.head() for model in models]
    figures = []
    for start in range(0, windows.size, CHUNK):
        chunk = slice(start, start + CHUNK)
        p, q, b = (
            nn.log_softmax(head(x[chunk]))
            for head, x in zip(heads, finals, strict=True)
        )
        agrees = (p.argmax(axis=-1) == q.argmax(axis=-1)).astype(mx.float32)
        figures.append(np.array(mx.stack([_kl(p, q), _kl(p, b), agrees])))
    kl_fused, kl_adapter, agreement = np.concatenate(figures, axis=1).mean(axis=1)
    return FusionProof(
        text=name,
        tokens=windows.size,
        kl_fused=float(kl_fused),
        kl_adapter=float(kl_adapter),
        top1_agreement=float(agreement),
    )


def _kl(p: mx.array, q: mx.array) -> mx.array:
    """KL (C,) in nats of log-probabilities (C, V); rounding alone makes it negative."""
    return mx.maximum((mx.exp(p) * (p - q)).sum(axis=-1), 0.0)


def _cut(read: Read, rows: int) -> Read:
    return lambda name: read(name)[:rows] if name in (EMBEDDING, HEAD) else read(name)


@dataclass(frozen=True)
class _AdaptedModel(LayerwiseModel):
    """A model with adapters on its layers, as `generate` has it."""

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
