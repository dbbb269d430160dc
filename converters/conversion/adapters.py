"""Convert an adapter folder to the format of mlx-lm, PEFT, CoreNet or llama.cpp."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.conversion.exports import (
    corenet_tensors,
    count_tensors,
    refuse_other_suffix,
)
from converters.conversion.merging import fit_rows, open_base
from converters.conversion.options import ConversionOptions, Progress
from converters.conversion.plan import ConversionPlan
from converters.conversion.provenance import describe_source, hashing
from converters.formats.adapter_reader import (
    Adapter,
    check_fits,
    open_adapter,
    with_rows,
)
from converters.formats.adapter_writer import (
    write_mlx_adapter,
    write_peft_adapter,
)
from converters.formats.gguf_adapter import write_gguf_adapter
from converters.formats.pt_writer import write_pt
from converters.formats.sources import ModelSource, name_folder
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.staging import (
    refuse_existing,
    refuse_existing_file,
    refuse_replacing,
    staged_file,
    staged_folder,
)
from mlx_openelm.version import __version__

_SUFFIXES = {  # of the default output, by format
    "mlx": "-mlx",
    "peft": "-peft",
    "corenet": "-corenet.pt",
    "gguf": ".gguf",
}


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """Summary of a converted adapter.

    Attributes:
        to: mlx, peft, corenet or gguf.
        base: the base from the option `model`, else from the adapter's files.
    """

    path: Path
    to: str
    source: str
    kind: str
    method: str
    rank: int
    num_modules: int
    num_parameters: int
    base: str | None
    notes: tuple[str, ...]
    seconds: float


def convert_adapter(
    path: Path,
    target: Path | None,
    options: ConversionOptions,
    *,
    force: bool = False,
    offline: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> AdapterReport:
    """Convert an adapter to the format `options.to`; CoreNet's file includes the base.

    Raises:
        OpenELMError: it is damaged, does not fit its base, or `options.to` cannot hold
            it.
    """
    started = time.perf_counter()
    adapter = replace(open_adapter(path), name=name_folder(path))
    needs_model = (
        options.quantizes or options.dequantize or options.apart or options.weights
    )
    if options.to not in _SUFFIXES or needs_model:
        raise OpenELMError(
            f"{path} is an adapter; use `merge` to write it and its base as one model, "
            "or convert it with `to` mlx, peft, corenet or gguf and without `bits`, "
            "`dequantize`, `adapter_out` and `weights`."
        )
    base = None
    if options.base is not None or options.to == "corenet":
        base = open_base(adapter, options.base, offline=offline)
        adapter = fit_rows(adapter, base.config)
        check_fits(adapter, base.config)
    target = target or Path(f"{adapter.name}{_SUFFIXES[options.to]}")
    refuse_other_suffix(target, options.to)
    refuse_replacing(target, (*adapter.files, *(base.files if base else ())))
    name = options.base or adapter.base
    config = base.config if base else None
    if options.to == "corenet":
        assert base is not None
        notes = _write_corenet(adapter, base, target, options, force, on_progress)
    elif options.to == "gguf":
        refuse_existing_file(target, force=force)
        with staged_file(target, force=force) as staging:
            notes = write_gguf_adapter(staging, adapter)
    else:
        notes = _write_folder(adapter, target, options.to, config, name, force)
    ranks = {module.rank for module in adapter.modules.values()}
    return AdapterReport(
        path=target,
        to=options.to,
        source=str(path),
        kind=adapter.kind,
        method=adapter.method,
        rank=max(ranks),
        num_modules=len(adapter.modules),
        num_parameters=sum(m.num_parameters for m in adapter.modules.values()),
        base=name,
        notes=(*adapter.notes, *notes, *_note_ignored(options)),
        seconds=time.perf_counter() - started,
    )


def _note_ignored(options: ConversionOptions) -> list[str]:
    ignored = options.ignored()
    if options.dtype and options.to != "corenet":
        ignored.append("`dtype`")
    return [f"Ignored for an adapter: {', '.join(ignored)}."] if ignored else []


def stage_adapter(
    adapter: Adapter, target: Path, base: Path, config: OpenELMConfig, *, force: bool
) -> None:
    """Write an adapter that was separated from its base."""
    fitted = with_rows(adapter, config.vocab_size)
    _write_folder(fitted, target, "mlx", config, str(base), force)


def _write_folder(
    adapter: Adapter,
    target: Path,
    to: str,
    config: OpenELMConfig | None,
    base: str | None,
    force: bool,
) -> tuple[str, ...]:
    refuse_existing(target, force=force)
    with (
        staged_folder(target, force=force) as staging,
        hashing(adapter.files) as hashes,
    ):
        if to == "peft":
            return write_peft_adapter(staging, adapter, config=config, base=base)
        source = describe_source(
            adapter.name, adapter.kind, adapter.files[0].parent, hashes()
        )
        metadata: dict[str, Any] = dict(adapter.metadata)
        metadata |= {"version": __version__, "source": source}
        return write_mlx_adapter(
            staging, adapter, config=config, base=base, metadata=metadata
        )


def _write_corenet(
    adapter: Adapter,
    base: ModelSource,
    target: Path,
    options: ConversionOptions,
    force: bool,
    on_progress: Callable[[Progress], None],
) -> tuple[str, ...]:
    """Write base and adapter unmerged into one .pt, as CoreNet stores them."""
    refuse_existing_file(target, force=force)
    dtype = getattr(mx, options.dtype) if options.dtype else base.dtype
    plan = ConversionPlan(base, base.config, dtype, {})
    tensors, notes = corenet_tensors(plan, adapter)
    with staged_file(target, force=force) as staging:
        write_pt(staging, tensors, on_written=count_tensors(on_progress, len(tensors)))
    return notes
