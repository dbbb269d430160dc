"""Convert a source to a model folder or a single file, one tensor at a time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.conversion.adapters import (
    AdapterReport,
    convert_adapter,
)
from converters.conversion.exports import (
    FILE_SUFFIXES,
    corenet_tensors,
    count_tensors,
    refuse_other_suffix,
    write_gguf_file,
)
from converters.conversion.merging import open_sources
from converters.conversion.model_folder import (
    Job,
    find_template,
    refuse_small_disk,
    write_folder,
)
from converters.conversion.options import ConversionOptions, Progress
from converters.conversion.plan import ConversionPlan
from converters.formats.pt_writer import write_pt
from converters.formats.sources import ModelSource, locate, shown_name
from converters.quantization.learning import LearningRecord
from converters.quantization.receipt import Receipt
from mlx_openelm.compatibility import describe_closed
from mlx_openelm.config import (
    CORENET_ROWS,
    LLAMA_PIECES,
    OpenELMConfig,
)
from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import count_of
from mlx_openelm.model.quantization import Packing, describe_packings
from mlx_openelm.paths import user_path
from mlx_openelm.storage.address_download import origin_of
from mlx_openelm.storage.model_folder import spell_dtype
from mlx_openelm.storage.staging import (
    refuse_existing,
    refuse_existing_file,
    refuse_nested,
    refuse_replacing,
    staged_file,
)
from mlx_openelm.storage.tokenizer_finder import FoundTokenizer, find_tokenizer
from mlx_openelm.storage.weight_files import is_adapter


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """Summary of a converted model.

    Attributes:
        to: mlx, hf, corenet or gguf.
        bits: of the linears, as requested; None if nothing is quantized.
        bits_per_weight: 8 x bytes of all tensors / number of parameters.
        tokenizer: path of the tokenizer's source, or None.
        adapter_path: the folder of a separated adapter, or None.
        receipt: the measured quantization error, or None.
        learned: what training scales and biases did, or None.
    """

    path: Path
    to: str
    source: str
    kind: str
    size: str
    num_parameters: int
    dtype: str
    bits: float | None
    bits_per_weight: float
    num_bytes: int
    tokenizer: str | None
    adapter_path: Path | None
    receipt: Receipt | None
    learned: LearningRecord | None
    notes: tuple[str, ...]
    seconds: float


def convert(
    source: str | Path | Sequence[str | Path],
    mlx_path: str | Path | None = None,
    *,
    adapter_out: str | Path | None = None,
    revision: str | None = None,
    force: bool = False,
    offline: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **options: Any,
) -> ConversionReport | AdapterReport:
    """Convert an OpenELM to the format of mlx-lm, Hugging Face, CoreNet or llama.cpp.

    Args:
        source: a CoreNet .pt file, a model folder (Hugging Face's, mlx-lm's, Apple's
            MLX), an adapter folder (mlx-lm's, PEFT's), a Hub id or "demo"; a list of
            .pt files for `average`.
        mlx_path: the output; default ./<source name>-mlx, with a suffix such as -4bit
            if quantized.
        adapter_out: write the adapter that the source contains to this folder.
        revision: of a source on the Hub.
        force: replace existing output.
        options: the fields of `converters.conversion.options.ConversionOptions`, by
            name: `to`, `dtype`, `bits`, `group_size`, `merge` and so on.

    Raises:
        OpenELMError: an input is wrong. Nothing is written then.
    """
    started = time.perf_counter()
    names = [source] if isinstance(source, str | Path) else list(source)
    chosen = ConversionOptions(apart=adapter_out is not None, **options)
    if len(names) != 1 and not chosen.average:
        raise OpenELMError(
            f"Expected one source, got {len(names)}; use `average` to average the "
            "weights of two or more."
        )

    def show_download(done: int, total: int) -> None:
        on_progress(Progress(done // 10**6, total // 10**6, "MB downloaded"))

    paths = [
        locate(str(name), offline=offline, revision=revision, on_progress=show_download)
        for name in names
    ]
    shown = " ".join(shown_name(str(name)) for name in names)
    target = None if mlx_path is None else Path(mlx_path)
    if chosen.average and any(map(is_adapter, paths)):
        raise OpenELMError(
            "`average` requires models, but one of the sources is an adapter."
        )
    if is_adapter(paths[0]) and not chosen.merge:
        return convert_adapter(
            paths[0],
            target,
            chosen,
            force=force,
            offline=offline,
            on_progress=on_progress,
        )
    opened, adapter = open_sources(paths, chosen, offline=offline)
    if chosen.to == "peft":
        raise OpenELMError(
            f"{shown} is a model, but `to` peft writes an adapter; pass an adapter "
            "folder, or extract the model's adapter with `adapter_out` first."
        )
    target = target or Path(_default_name(opened, chosen))
    job = Job(
        options=chosen,
        source=opened,
        adapter=adapter,
        target=target,
        adapter_out=None if adapter_out is None else Path(adapter_out),
        force=force,
        offline=offline,
        on_progress=on_progress,
    )
    report = convert_model(job)
    closed = "" if chosen.to in FILE_SUFFIXES else describe_closed(opened.config)
    return replace(
        report,
        notes=(*report.notes, *filter(None, [closed])),
        source=shown,
        seconds=time.perf_counter() - started,
    )


def convert_model(job: Job) -> ConversionReport:
    """Write the model of a job; the report's `seconds` are 0.

    Raises:
        OpenELMError: an input is wrong. Nothing is written then.
    """
    options, source, target = job.options, job.source, job.target
    _check_targets(job)
    found_tokenizer = None
    if options.tokenizer != "none" and options.to != "corenet":
        found_tokenizer = find_tokenizer(
            source.folder,
            options.tokenizer,
            source.config.vocab_size,
            offline=job.offline,
        )
    needs = "`to` gguf" if options.to == "gguf" else "`bits` auto"
    needs = "`learn`" if options.learn else needs
    if found_tokenizer is None and (
        options.to == "gguf" or options.auto_bits or options.learn
    ):
        raise OpenELMError(
            f"{needs} needs a tokenizer; pass `tokenizer` with a path or a Hub id."
        )
    config = source.config
    if options.to != "corenet":
        config = _cut_vocabulary(config, found_tokenizer)
    plan = ConversionPlan(
        source,
        config,
        _choose_dtype(source, config, options),
        _choose_packings(source, config, options),
    )
    if options.learn and not (plan.packings or options.auto_bits):
        raise OpenELMError("`learn` trains a quantization; add `bits`.")
    notes = [
        *_note_address(source),
        *source.notes,
        *(found_tokenizer.notes if found_tokenizer else ()),
    ]
    if ignored := options.ignored():
        notes.append(f"Not quantized: {', '.join(ignored)} needs `bits`.")
    if config.vocab_size < source.config.vocab_size:
        notes.append(
            f"Cut the embedding from {source.config.vocab_size} to {config.vocab_size} "
            "rows: the others are padding, without a token."
        )
    packed = {**source.tensors, **source.before_merging}.items()
    unpacked = [n for n, tensor in packed if tensor.packing and n not in plan.packings]
    if unpacked:
        again = "; use `bits` to quantize again" if options.to == "mlx" else ""
        notes.append(f"Dequantized {count_of(len(unpacked), 'tensor')}{again}.")
    receipt, learned, template = None, None, None
    if options.to != "corenet":
        template, about_template = find_template(source)
        notes += about_template
    if options.to in FILE_SUFFIXES:
        notes += _write_file(job, plan, found_tokenizer, template)
        num_bytes = target.stat().st_size
    else:
        written = write_folder(job, plan, found_tokenizer, template)
        plan, receipt, learned = written.plan, written.receipt, written.learned
        notes += written.notes
        num_bytes = plan.num_bytes
        notes += _describe_learning(job, learned)
        if found_tokenizer is None:
            notes.append("No tokenizer was written; generate needs one in the folder.")
            if options.quantization is not None and options.receipt:
                notes.append("No receipt: measuring it needs a tokenizer.")
    return ConversionReport(
        path=target,
        to=options.to,
        source=source.name,
        kind=source.kind,
        size=config.size_name,
        num_parameters=config.num_parameters,
        dtype=spell_dtype(plan.dtype),
        bits=_count_bits(plan, options),
        bits_per_weight=8 * num_bytes / config.num_parameters,
        num_bytes=num_bytes,
        tokenizer=None if found_tokenizer is None else str(found_tokenizer.path),
        adapter_path=job.adapter_out,
        receipt=receipt,
        learned=learned,
        notes=tuple(notes),
        seconds=0.0,
    )


def _note_address(source: ModelSource) -> list[str]:
    origin = origin_of(source.folder)
    return [f"From {origin.url}, sha256:{origin.sha256}."] if origin else []


# Decisions -----------------------------------------------------------------------


def _check_targets(job: Job) -> None:
    refuse_other_suffix(job.target, job.options.to)
    if job.options.to in FILE_SUFFIXES:
        refuse_existing_file(job.target, force=job.force)
    else:
        refuse_existing(job.target, force=job.force)
    refuse_replacing(job.target, job.source.files)
    if job.options.teacher_cache is not None:
        cache = user_path(job.options.teacher_cache)
        refuse_nested("model", job.target, "cache of the teacher", cache)
    if job.adapter_out is not None:
        refuse_existing(job.adapter_out, force=job.force)
        refuse_replacing(job.adapter_out, job.source.files)
        refuse_nested("model", job.target, "adapter", job.adapter_out)


def _cut_vocabulary(
    config: OpenELMConfig, found_tokenizer: FoundTokenizer | None
) -> OpenELMConfig:
    """Drop padding rows, which follow those of the tokenizer's tokens."""
    pieces = config.vocab_size
    if found_tokenizer is not None:
        pieces = found_tokenizer.tokenizer.num_ids
    elif config.vocab_size == CORENET_ROWS:
        pieces = LLAMA_PIECES
    return replace(config, vocab_size=pieces)


def _choose_dtype(
    source: ModelSource, config: OpenELMConfig, options: ConversionOptions
) -> mx.Dtype:
    chosen = getattr(mx, options.dtype) if options.dtype else source.dtype
    taken_over = any(t.packing for t in source.tensors.values()) and not (
        options.quantizes or options.dequantize
    )
    narrow = options.to == "mlx" and not taken_over and not options.repack
    if not options.dtype and narrow and chosen == mx.float32:
        chosen = mx.bfloat16
    shaped_like_3b = config.model_dim >= OpenELMConfig.preset("3B").model_dim
    if chosen == mx.float16 and shaped_like_3b and not options.allow_overflow:
        raise OpenELMError(
            f"A model as large as the 3B (model_dim {config.model_dim}) overflows in "
            "float16 and generates nonsense; use `dtype` bfloat16, or pass "
            "`allow_overflow`."
        )
    return chosen


def _choose_packings(
    source: ModelSource, config: OpenELMConfig, options: ConversionOptions
) -> dict[str, Packing]:
    """Return the packings that the options request, else those of the source."""
    if options.dequantize or options.to not in ("mlx", "hf"):
        return {}
    tensors = dict(source.tensors)
    if options.repack:
        tensors |= source.before_merging
    packed = {n: t.packing for n, t in tensors.items() if t.packing is not None}
    uniform = options.quantization
    if uniform is None:
        return packed if options.to == "mlx" else {}
    kept = {name: packing for name, packing in packed.items() if uniform.keeps(name)}
    return uniform.packings(config) | kept


def _count_bits(plan: ConversionPlan, options: ConversionOptions) -> float | None:
    """Return the requested bits, or those of the source's linears."""
    if options.quantizes or not plan.packings:
        return options.requested_bits
    return float(describe_packings(plan.packings, plan.config)["bits"])


def _default_name(source: ModelSource, options: ConversionOptions) -> str:
    match options.to:
        case "corenet":
            return f"{source.name}-corenet.pt"
        case "gguf":
            return f"{source.name}{options.suffix}.gguf"
    return f"{source.name}-{options.to}{options.suffix}"


def _describe_learning(job: Job, learned: LearningRecord | None) -> list[str]:
    """Return notes on what `learn` did not do."""
    if job.options.learn and learned is None:
        return ["Nothing was learned: the source already has these packed weights."]
    notes = []
    # `fuse`, which has a proof, takes no text.
    advice = "" if job.prove else "; a longer `calibration` text may help"
    if learned is not None and not learned.best_step:
        notes.append(
            "Learning did not lower the error on held-out text, so the scales of "
            f"plain rounding were kept{advice}."
        )
    if learned is not None and learned.skipped:
        numbers = ", ".join(str(i + 1) for i in learned.skipped)
        notes.append(
            "Skipped batches whose loss or gradient was not finite, with windows "
            f"{numbers} of {learned.text}."
        )
    return notes


# Writing -------------------------------------------------------------------------


def _write_file(
    job: Job,
    plan: ConversionPlan,
    found_tokenizer: FoundTokenizer | None,
    template: str | None,
) -> tuple[str, ...]:
    """Write a .pt or GGUF file; return notes for the user."""
    with staged_file(job.target, force=job.force) as staging:
        refuse_small_disk(job.target, plan.num_bytes)
        if job.options.to == "corenet":
            tensors, notes = corenet_tensors(plan, plan.source.adapter)
            write_pt(
                staging,
                tensors,
                on_written=count_tensors(job.on_progress, len(tensors)),
            )
            return notes
        assert found_tokenizer is not None
        write_gguf_file(
            staging,
            plan,
            found_tokenizer.tokenizer,
            template=template,
            bits=job.options.requested_bits,
            on_written=count_tensors(job.on_progress, len(plan.config.tensor_shapes())),
        )
        return ()
