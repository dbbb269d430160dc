"""Write a model folder by a plan: weights, receipt, tokenizer, provenance."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.conversion.adapters import stage_adapter
from converters.conversion.learning import LearningOptions, learn_scales
from converters.conversion.merging import refuse_lost_adapter
from converters.conversion.options import ConversionOptions, Progress
from converters.conversion.plan import ConversionPlan
from converters.conversion.provenance import (
    describe_source,
    hash_file,
    hashing,
    identify,
)
from converters.formats.adapter_reader import Adapter
from converters.formats.sources import ModelSource, open_path
from converters.formats.transformers_code import AUTO_MAP, write_code
from converters.quantization.allocation import allocate, count_tokens, list_choices
from converters.quantization.calibration import (
    LEARNING_CHARACTERS,
    MAX_CHARACTERS,
    LearningWindows,
    calibration_windows,
    learning_windows,
    read_calibration,
)
from converters.quantization.learning import LearningRecord
from converters.quantization.receipt import NUM_TOKENS as RECEIPT_TOKENS
from converters.quantization.receipt import Receipt, measure_quantization
from mlx_openelm.compatibility import check_tools
from mlx_openelm.config import BOS_ID, OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import count_of
from mlx_openelm.model.quantization import Packing, describe_packings
from mlx_openelm.paths import user_path
from mlx_openelm.storage.chat_template_file import (
    read_chat_template,
    write_chat_template,
)
from mlx_openelm.storage.hub import CHAT_TEMPLATE_FILE
from mlx_openelm.storage.model_card import CARD, model_card
from mlx_openelm.storage.model_folder import METADATA_KEY, open_folder, spell_dtype
from mlx_openelm.storage.shards import ShardWriter, write_json
from mlx_openelm.storage.staging import SAVED_STATE, staged_folder
from mlx_openelm.storage.tokenizer_finder import FoundTokenizer, write_tokenizer
from mlx_openelm.text.chat_templates import chat_template, recognize
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.version import __version__

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Job:
    """A model to write, with all that writing it needs.

    Attributes:
        prove: checks the written folder before it gets its final name. Returns entries
            for config.json, or raises to discard the folder.
    """

    options: ConversionOptions
    source: ModelSource
    adapter: Adapter | None
    target: Path
    adapter_out: Path | None
    force: bool
    offline: bool
    on_progress: Callable[[Progress], None]
    prove: Callable[[Path], Mapping[str, Any]] | None = None

    def identity(
        self, config: OpenELMConfig, found_tokenizer: FoundTokenizer | None
    ) -> dict[str, Any]:
        """Return what must be equal for a run to resume a killed one."""
        calibration = self.options.calibration
        texts = [Path(calibration)] if calibration else []
        texts = [path for path in texts if path.is_file()]  # else reported later
        if found_tokenizer is not None:
            texts.append(found_tokenizer.path)
        return {
            "version": __version__,
            "options": dict(self.options.changed()),
            "config": config.to_dict(),
            "files": identify([*self.source.files, *texts]),
        }


@dataclass(frozen=True, slots=True)
class Written:
    """The written folder: its plan with the bits chosen, and what was measured.

    Attributes:
        notes: for the user.
    """

    plan: ConversionPlan
    receipt: Receipt | None
    learned: LearningRecord | None
    notes: tuple[str, ...]


def write_folder(
    job: Job,
    plan: ConversionPlan,
    found_tokenizer: FoundTokenizer | None,
    template: str | None,
) -> "Written":
    """Write a model folder.

    Args:
        template: its prompt template.
    """
    source, options = plan.source, job.options
    calibration = _Calibration.read(job, plan, found_tokenizer)
    windows, learning, record = None, None, None
    if calibration and options.learn:
        learning = calibration.learning_windows()
        windows = learning.report if options.receipt else None
    elif calibration and options.receipt:  # reports a short text before the work
        windows = calibration.windows(RECEIPT_TOKENS)
    if options.auto_bits and calibration:
        refuse_small_disk(job.target, plan.estimate_bytes(options.auto_bits))
        plan = replace(plan, packings=_allocate_bits(job, plan, calibration))
    if options.learn:
        options.check_learned_modes(plan.packings.values())
    if source.before_merging and plan.packings and job.prove is None:
        refuse_lost_adapter(plan)
    with (
        staged_folder(
            job.target,
            force=job.force,
            job=job.identity(plan.config, found_tokenizer),
        ) as staging,
        hashing(source.files) as source_hashes,
    ):
        written_before = sum(file.stat().st_size for file in staging.iterdir())
        refuse_small_disk(job.target, plan.num_bytes - written_before)
        if learning and calibration:
            plan, record = _learn(job, plan, learning, calibration.name, staging)
        written = ShardWriter(
            staging, plan.layout(), format="pt" if options.to == "hf" else "mlx"
        )
        with written:
            _write_weights(written, plan, job.on_progress)
        raw = plan.config.to_dict() | {"torch_dtype": spell_dtype(plan.dtype)}
        if found_tokenizer is not None:
            raw["eos_token_id"] = found_tokenizer.tokenizer.eos_id
        if options.to == "hf":
            raw |= AUTO_MAP
            write_code(staging)
        if plan.packings:
            entry = describe_packings(plan.packings, plan.config)
            raw |= {"quantization": entry, "quantization_config": entry}
        write_json(staging / "config.json", raw)
        open_folder(staging)  # checks that it can be read
        receipt = None
        if calibration and windows is not None:
            receipt = _measure(job, plan, staging, windows, calibration.name)
            if record is not None:
                receipt = replace(
                    receipt,
                    mean_kl_rounded=record.mean_kl_before,
                    top1_agreement_rounded=record.top1_before,
                )
        if not copy_generation_config(source.folder, staging):
            ids = {"bos_token_id": BOS_ID, "eos_token_id": raw["eos_token_id"]}
            write_json(staging / GENERATION_CONFIG, ids)
        tokenizer = found_tokenizer.tokenizer if found_tokenizer else None
        if tokenizer is not None:
            write_tokenizer(tokenizer, staging)
        notes = write_chat_template(staging, template, tokenizer)
        proved = job.prove(staging) if job.prove else {}
        metadata = _build_metadata(job, receipt, source_hashes(), template)
        metadata |= proved
        if record is not None:
            metadata["learned"] = asdict(record)
        text_files = [
            file
            for pattern in ("tokenizer*", CHAT_TEMPLATE_FILE, "*.py")
            for file in staging.glob(pattern)
        ]
        metadata["files"] = written.hashes | {
            file.name: hash_file(file) for file in text_files
        }
        write_json(staging / "config.json", raw | {METADATA_KEY: metadata})
        card = model_card(
            metadata,
            _summarize(plan, receipt, record),
            library="transformers" if options.to == "hf" else "mlx",
            template=(staging / CHAT_TEMPLATE_FILE).is_file(),
            tools=check_tools(
                plan.config, raw, has_tokenizer=found_tokenizer is not None
            ),
        )
        # A file name may not be UTF-8.
        (staging / CARD).write_bytes(card.encode(errors="replace"))
        if job.adapter is not None and job.adapter_out is not None:
            stage_adapter(
                job.adapter,
                job.adapter_out,
                job.target.absolute(),
                plan.config,
                force=job.force,
            )
    return Written(plan, receipt, record, notes)


def _build_metadata(
    job: Job,
    receipt: Receipt | None,
    source_hashes: dict[str, str],
    template: str | None,
) -> dict[str, Any]:
    """Return the mlx-openelm entry of config.json."""
    source = job.source
    described = describe_source(source.name, source.kind, source.folder, source_hashes)
    if source.metadata:  # of a source that mlx-openelm wrote
        described["was"] = source.metadata
    metadata: dict[str, Any] = {
        "version": __version__,
        "source": described,
        "options": job.options.changed(),
    }
    if template:
        metadata["template"] = template
    if receipt is not None:
        metadata["receipt"] = asdict(receipt)
    return metadata


def refuse_small_disk(target: Path, num_bytes: int) -> None:
    """Raise OpenELMError if the disk of `target` has less than `num_bytes` free."""
    existing = next(
        p for p in (target.absolute(), *target.absolute().parents) if p.exists()
    )
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OpenELMError(
            f"{target} needs {num_bytes / 1e6:.0f} MB, but its disk has only "
            f"{free / 1e6:.0f} MB free; free some space or choose another disk."
        )


def copy_generation_config(source: Path, target: Path) -> bool:
    """Copy a folder's generation_config.json; return whether it has one.

    Raises:
        OpenELMError: it is damaged.
    """
    defaults = source / GENERATION_CONFIG
    if not defaults.is_file():
        return False
    read_mapping(defaults)
    shutil.copyfile(defaults, target / GENERATION_CONFIG)
    return True


@dataclass(frozen=True, slots=True)
class _Calibration:
    """Text on which sensitivities and receipt are measured, with its tokenizer."""

    name: str
    text: str
    tokenizer: Tokenizer
    config: OpenELMConfig

    @classmethod
    def read(
        cls, job: Job, plan: ConversionPlan, found_tokenizer: FoundTokenizer | None
    ) -> "_Calibration | None":
        """Return the calibration, or None if it is not needed or has no tokenizer."""
        options, tensors = job.options, plan.source.tensors
        rounded = any(tensors[n].packing != p for n, p in plan.packings.items())
        if found_tokenizer is None or not (
            options.auto_bits or ((options.receipt or options.learn) and rounded)
        ):
            return None
        path = Path(options.calibration) if options.calibration else None
        longest = LEARNING_CHARACTERS if options.learn else MAX_CHARACTERS
        read = read_calibration(path, longest)
        return cls(*read, found_tokenizer.tokenizer, plan.config)

    def windows(self, num_tokens: int) -> mx.array:
        """Return token ids (N, 1 + T)."""
        return calibration_windows(
            self.tokenizer, self.text, self.config, num_tokens=num_tokens
        )

    def learning_windows(self) -> LearningWindows:
        return learning_windows(self.tokenizer, self.text, self.config)


def _write_weights(
    writer: ShardWriter, plan: ConversionPlan, on_progress: Callable[[Progress], None]
) -> None:
    names = plan.config.tensor_shapes()
    for done, name in enumerate(names, start=1):
        if not writer.whole.issuperset(plan.part_names(name)):
            for part_name, part in plan.parts(name).items():
                if part_name not in writer.whole:
                    writer.add(part_name, part)
        on_progress(Progress(done, len(names), "tensors"))
    writer.close(plan.config.num_parameters)


def _allocate_bits(
    job: Job, plan: ConversionPlan, calibration: _Calibration
) -> dict[str, Packing]:
    options = job.options
    assert options.auto_bits is not None
    options.check_keep(plan.config)
    choices = list_choices(
        plan.config,
        keeps=options.keeps,
        group_size=options.group_size,
        embed_bits=options.embed_bits,
    )
    return allocate(
        plan.config,
        plan.read_whole,
        calibration.windows(count_tokens(plan.config)),
        options.auto_bits,
        choices,
        dtype=plan.dtype,
        on_progress=_progress(job, "layers measured"),
    )


def _learn(
    job: Job,
    plan: ConversionPlan,
    windows: LearningWindows,
    text: str,
    staging: Path,
) -> tuple[ConversionPlan, LearningRecord]:
    options, amount = job.options, job.options.learning_amount
    assert amount is not None
    cache = options.teacher_cache
    folder = None if cache is None else user_path(cache)
    return learn_scales(
        plan,
        windows,
        LearningOptions(amount, options.seed, options.teacher_bits, folder),
        text=text,
        folder=staging / SAVED_STATE,
        on_step=lambda done, total, kl: job.on_progress(
            Progress(done, total, f"steps, KL {kl:.4f}")
        ),
        on_cached=_progress(job, "windows read by the teacher"),
    )


def _measure(
    job: Job, plan: ConversionPlan, staging: Path, windows: mx.array, text: str
) -> Receipt:
    written = open_path(staging)
    return measure_quantization(
        plan.config,
        plan.read_whole,
        lambda name: written.tensors[name].read(),
        windows,
        text=text,
        bits_per_weight=8 * plan.num_bytes / plan.config.num_parameters,
        on_progress=_progress(job, "layers compared"),
    )


def _progress(job: Job, units: str) -> Callable[[int, int], None]:
    return lambda done, total: job.on_progress(Progress(done, total, units))


def find_template(source: ModelSource) -> tuple[str | None, tuple[str, ...]]:
    """Return the prompt template of a source, and notes for the user.

    Raises:
        OpenELMError: other tools cannot render it.
    """
    template = source.metadata.get("template")
    if isinstance(template, str):
        chat_template(template)
        return template, ()
    if text := read_chat_template(source.folder):
        if template := recognize(text):
            return template, ()
        return None, (
            "Left out the chat template of the source, which is none of those of "
            "mlx-openelm.",
        )
    return "instruct" if "instruct" in source.name.lower() else None, ()


def _summarize(
    plan: ConversionPlan, receipt: Receipt | None, learned: LearningRecord | None
) -> list[str]:
    """Return sentences about the model for its model card."""
    config = plan.config
    facts = [f"{config.size_name}, {config.num_parameters:,} parameters."]
    if plan.packings:
        facts.append(
            f"Quantized: {8 * plan.num_bytes / config.num_parameters:.2f} bits per "
            "weight, including scales."
        )
    else:
        facts.append(f"Unquantized, {spell_dtype(plan.dtype)}.")
    if receipt is not None:
        packed = any(tensor.packing for tensor in plan.source.tensors.values())
        before = "the source, itself quantized," if packed else "the unquantized model"
        facts.append(
            f"Compared with {before} on {receipt.tokens} tokens "
            f"({receipt.text}): mean KL {receipt.mean_kl:.4f} nats, top-1 agreement "
            f"{receipt.top1_agreement:.1%}, perplexity "
            f"{receipt.perplexity_after:.2f} instead of "
            f"{receipt.perplexity_before:.2f}."
        )
    if learned is not None and learned.best_step:
        facts.append(
            f"Scales and biases trained for {count_of(learned.best_step, 'step')}: "
            f"mean KL "
            f"{learned.mean_kl_before:.4f} nats before, {learned.mean_kl_after:.4f} "
            f"after, on {learned.tokens} tokens that were not learned from."
        )
    return facts
