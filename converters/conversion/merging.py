"""Combine sources into one model: average checkpoints, merge an adapter and a base."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from converters.conversion.options import ConversionOptions
from converters.conversion.plan import ConversionPlan
from converters.formats.adapter_reader import (
    Adapter,
    AdapterModule,
    check_fits,
    merge,
    open_adapter,
    open_full,
    with_rows,
)
from converters.formats.adapter_tensors import TABLE
from converters.formats.sources import (
    ModelSource,
    SourceTensor,
    locate,
    name_folder,
    open_path,
    open_without_adapter,
)
from mlx_openelm.config import OpenELMConfig, pad_vocabulary
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.packed_weights import pack_weight, unpack_weight
from mlx_openelm.storage.adapter_folder import read_base_fingerprint
from mlx_openelm.storage.base_check import BaseWeight, check_base
from mlx_openelm.storage.model_folder import check_shapes
from mlx_openelm.storage.weight_files import ADAPTER_CONFIG, is_adapter
from mlx_openelm.tensor_names import EMBEDDING, HEAD, to_module

_ROWS = 4096  # of a tensor, compared at a time


def open_sources(
    paths: Sequence[Path], options: ConversionOptions, *, offline: bool = False
) -> tuple[ModelSource, Adapter | None]:
    """Return the model to convert, and the adapter to write to its own folder.

    Raises:
        OpenELMError: a source is not an OpenELM, or the options do not fit it.
    """
    if is_adapter(paths[0]):
        if options.weights is not None:
            raise OpenELMError(
                f"`weights` applies to a .pt file with EMA weights, but {paths[0]} is "
                "an adapter; leave it out."
            )
        base, adapter = open_pair(paths[0], options.base, offline=offline)
        return replace(merge_adapter(base, adapter), name=adapter.name), None
    if options.base is not None:
        raise OpenELMError(
            f"{paths[0]} is a model, not an adapter folder; leave out `model` "
            f"{options.base}, which names the base of an adapter."
        )
    sources = [open_path(path, options.weights) for path in paths]
    source = average(sources) if options.average else sources[0]
    if source.adapter is None:
        if options.merge or options.apart:
            if (paths[0] / ADAPTER_CONFIG).is_file():
                raise OpenELMError(
                    f"{paths[0]} holds a model beside its adapter, of which convert "
                    "reads the model; `mlx-openelm fuse --adapter-path "
                    f"{shlex.quote(str(paths[0]))} --save-path DIR` merges both."
                )
            option = "`merge`" if options.merge else "`adapter_out`"
            raise OpenELMError(f"{paths[0]} contains no adapter; leave out {option}.")
        return source, None
    if options.merge:
        return merge_adapter(source, source.adapter), None
    if options.apart:
        return replace(source, adapter=None), source.adapter
    if options.to == "corenet":  # holds both
        return source, None
    raise OpenELMError(
        f"{paths[0]} contains an adapter ({source.adapter.method}); use `merge` to "
        "merge it into the weights, or `adapter_out` DIR to write it to its own folder."
    )


def open_pair(
    path: Path, base_name: str | None, *, offline: bool = False
) -> tuple[ModelSource, Adapter]:
    """Open an adapter folder and its base.

    Args:
        base_name: default: the base that the adapter's files name.

    Raises:
        OpenELMError: either is damaged or missing, or the base is a different one.
    """
    adapter = open_full(path) or open_adapter(path)
    adapter = replace(adapter, name=name_folder(path))
    base = open_base(adapter, base_name, offline=offline)
    notes: tuple[str, ...] = ()
    if fingerprint := read_base_fingerprint(adapter.metadata):
        check_fits(
            fit_rows(adapter, base.config), base.config
        )  # its error has more detail
        weights = {
            to_module(name): BaseWeight(
                (rows, width[0]), _row_reader(base.tensors[name])
            )
            for name, (rows, *width) in base.config.tensor_shapes().items()
            if width
        }
        notes = check_base(fingerprint, weights, path, adapter.base)
    return replace(base, notes=(*base.notes, *notes)), adapter


def _row_reader(tensor: SourceTensor) -> Callable[[mx.array], mx.array]:
    return lambda rows: tensor.read()[rows].astype(mx.float32)


def open_base(adapter: Adapter, base_name: str | None, *, offline: bool) -> ModelSource:
    """Return an adapter's base: `base_name`, else the one that its files name.

    Raises:
        OpenELMError: it is missing, not an OpenELM, or contains an adapter itself.
    """
    return open_without_adapter(_locate_base(adapter, base_name, offline=offline))


def _locate_base(adapter: Adapter, base_name: str | None, *, offline: bool) -> Path:
    name = base_name or adapter.base
    if name is None:
        raise OpenELMError(
            f"{adapter.files[0].parent} does not name its base; pass `model` BASE."
        )
    try:
        return locate(name, offline=offline)
    except OpenELMError as error:
        if base_name is not None:
            raise
        raise OpenELMError(
            f"The base that {adapter.files[0].parent} names cannot be opened: "
            f"{str(error).rstrip('.')}; pass another with `model` BASE."
        ) from error


def average(sources: Sequence[ModelSource]) -> ModelSource:
    """Return the element-wise mean of checkpoints of one model.

    The sum is float64; the mean has the dtype of the first. Apple's release weights are
    the mean of the last five checkpoints.

    Raises:
        OpenELMError: there is only one source, or their shapes differ.
    """
    first, *others = sources
    if not others:
        raise OpenELMError("`average` needs two or more sources, not one.")
    with_adapter = next((source for source in sources if source.adapter), None)
    if with_adapter is not None:
        raise OpenELMError(
            f"{with_adapter.files[0]} contains an adapter, whose factors cannot be "
            "averaged; convert each source with `merge` first."
        )
    for other in others:
        check_shapes(
            {name: tensor.shape for name, tensor in first.tensors.items()},
            {name: tensor.shape for name, tensor in other.tensors.items()},
            where=str(other.files[0]),
        )

    def reader(name: str) -> Callable[[], mx.array]:
        def read() -> mx.array:
            total = np.zeros(first.tensors[name].shape, np.float64)
            for source in sources:
                total += np.asarray(source.tensors[name].read().astype(mx.float32))
            total /= len(sources)
            with np.errstate(over="ignore"):  # infinity is reported later
                mean = mx.array(total.astype(np.float32))
            return mean.astype(first.tensors[name].dtype)

        return read

    return replace(
        first,
        kind=f"average of {len(sources)}: {first.kind}",
        tensors={
            name: SourceTensor(tensor.shape, tensor.dtype, reader(name))
            for name, tensor in first.tensors.items()
        },
        files=tuple(file for source in sources for file in source.files),
        notes=tuple(dict.fromkeys(note for s in sources for note in s.notes)),
    )


def merge_adapter(base: ModelSource, adapter: Adapter) -> ModelSource:
    """Return the base with the adapter merged into its weights.

    The result has the prompt template of the adapter's training. In CoreNet and PEFT an
    adapter of the embedding changes only the inputs: the output head keeps the base's
    embedding, so the result is untied. In mlx-lm it changes a tied head as well.

    Raises:
        OpenELMError: the adapter does not fit this base.
    """
    adapter = fit_rows(adapter, base.config)
    check_fits(adapter, base.config)
    tensors = dict(base.tensors)
    config = base.config
    only_inputs = TABLE in adapter.modules and not adapter.adapts_tied_head
    if only_inputs and config.share_input_output_layers:
        tensors[HEAD] = tensors[EMBEDDING]
        config = replace(config, share_input_output_layers=False)
    for module, part in adapter.modules.items():
        name = f"{module}.weight"
        tensors[name] = _merged(tensors[name], part)
    for name, weight in adapter.weights.items():
        tensors[name] = SourceTensor(weight.shape, tensors[name].dtype, weight.read)
    changed = [*(f"{module}.weight" for module in adapter.modules), *adapter.weights]
    template = adapter.metadata.get("template")
    new_files = (file for file in adapter.files if file not in base.files)
    return replace(
        base,
        kind=f"{base.kind}, merged",
        config=config,
        tensors={name: tensors[name] for name in config.tensor_shapes()},
        files=(*base.files, *new_files),
        metadata={**base.metadata, **({"template": template} if template else {})},
        adapter=None,
        before_merging={name: base.tensors[name] for name in changed},
    )


def fit_rows(adapter: Adapter, base: OpenELMConfig) -> Adapter:
    """Fit an adapter of the embedding to the base, if they differ only by padding."""
    table, rows = adapter.modules.get(TABLE), base.vocab_size
    if table is None or table.shape[0] == rows:
        return adapter
    fewer, more = sorted((table.shape[0], rows))
    return with_rows(adapter, rows) if pad_vocabulary(fewer) == more else adapter


def _merged(tensor: SourceTensor, part: AdapterModule) -> SourceTensor:
    def read() -> mx.array:
        return merge(tensor.read(), part)

    return SourceTensor(tensor.shape, tensor.dtype, read)


def refuse_lost_adapter(plan: ConversionPlan) -> None:
    """Raise OpenELMError if rounding changes the weights more than the adapter did.

    Compares the Frobenius norms of both changes over all merged and quantized tensors.
    """
    adapted = rounded = 0.0
    for name, before in plan.source.before_merging.items():
        packing = plan.packings.get(name)
        if packing is None:
            continue
        merged, base = plan.read(name), before.read()
        packed = pack_weight(packing, merged)
        for start in range(0, merged.shape[0], _ROWS):  # bounds the four copies
            rows = slice(start, start + _ROWS)
            exact = merged[rows].astype(mx.float32)
            parts = {suffix: part[rows] for suffix, part in packed.items()}
            adapted += _square(exact - base[rows].astype(mx.float32))
            rounded += _square(unpack_weight(packing, parts, mx.float32) - exact)
    if rounded > adapted > 0:
        raise OpenELMError(
            f"Quantizing would lose the adapter: it changes the weights by "
            f"{adapted**0.5:.3g} (Frobenius norm), rounding by {rounded**0.5:.3g}; use "
            "a larger `bits`, or leave it out."
        )


def _square(array: mx.array) -> float:
    return float(mx.square(array).sum().item())  # type: ignore[arg-type] # it is real
