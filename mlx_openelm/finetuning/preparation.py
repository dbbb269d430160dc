"""Preparation of a run: reads and checks the data, plans steps and memory."""

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_openelm.device import compute_dtype, describe_machine
from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.data_table import DataTable, SplitTable, tabulate
from mlx_openelm.finetuning.further_objectives.choice import make_objective
from mlx_openelm.finetuning.further_objectives.distillation import Distillation
from mlx_openelm.finetuning.further_objectives.teacher import (
    TeacherFolder,
    open_teacher,
)
from mlx_openelm.finetuning.objectives import FinetuneObjective
from mlx_openelm.finetuning.plan import (
    MemoryPlan,
    Order,
    TrainingPlan,
    count_bytes,
    largest_batch,
    plan_memory,
    propose_smaller,
)
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.record_formats import TemplateChoice, choose_template
from mlx_openelm.finetuning.records import (
    Data,
    OnProgress,
    Record,
    read_data,
)
from mlx_openelm.finetuning.refinements.noise import EmbeddingNoise
from mlx_openelm.finetuning.refinements.quantization_aware import round_layers
from mlx_openelm.finetuning.run_folder import run_folder
from mlx_openelm.finetuning.samples import Samples, lengths_of, targets_of
from mlx_openelm.finetuning.trainable import (
    Method,
    adapt,
    choose_modules,
    choose_ranks,
    unfreeze,
)
from mlx_openelm.message_parts import count_of
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.quantization import Packing
from mlx_openelm.paths import user_path
from mlx_openelm.storage.hub import DEMO, find_model
from mlx_openelm.storage.loading import load_tokenizer, make_quantized, stored_dtype
from mlx_openelm.storage.model_folder import ModelFolder, open_folder
from mlx_openelm.text.templates import encode_prompt
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.arrays import trained_tensors
from mlx_openelm.training.distributed import World
from mlx_openelm.training.state import describe_arithmetic


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked run: resolved recipe, model folder, tokenized data and plan.

    Attributes:
        example: a prompt of the training data, shortened; empty if it has none.
        teacher: the model to learn from; None without distillation.
    """

    recipe: FinetuneRecipe
    objective: FinetuneObjective
    folder: ModelFolder
    tokenizer: Tokenizer
    table: DataTable
    data_files: tuple[Path, ...]
    train: Samples
    valid: Samples
    test: Samples
    order: Order
    plan: TrainingPlan
    example: str
    teacher: TeacherFolder | None

    @property
    def path(self) -> Path:
        return run_folder(self.recipe)

    def describe_inputs(self) -> dict[str, Any]:
        """Return what is compared when the run is resumed.

        The teacher is read for its fingerprint; the cache of one has its own.
        """
        teacher = None if self.recipe.teacher_cache else self.teacher
        return {
            "data": self.table.digest,
            "teacher": teacher and teacher.fingerprint(),
            "arithmetic": describe_arithmetic(),
        }


def prepare(
    recipe: FinetuneRecipe,
    *,
    world: World | None = None,
    fit: bool = False,
    offline: bool = False,
    on_progress: OnProgress = lambda done, total, unit: None,
) -> Prepared:
    """Read all data and plan the run, without loading weights.

    Args:
        fit: use the first of `propose_smaller`'s recipes that fits into memory.
        on_progress: receives the megabytes that are read, then the records that are
            tokenized, of each file.

    Raises:
        OpenELMError: an error in model, options or data; all data errors are listed.
    """
    with _without_collector():
        return _read_and_plan(recipe, world or World.join(), fit, offline, on_progress)


def _read_and_plan(
    recipe: FinetuneRecipe,
    world: World,
    fit: bool,
    offline: bool,
    on_progress: OnProgress,
) -> Prepared:
    objective = make_objective(recipe)
    data = read_data(user_path(recipe.data), objective.formats(), on_progress)
    model_path = find_model(recipe.model, offline=offline)
    folder = open_folder(model_path)
    tokenizer = load_tokenizer(folder)
    choice = choose_template(recipe.template, tokenizer.template, data.train.format)
    resolved = recipe.resolve(
        context_length=folder.config.max_context_length,
        template=choice.name,
        model=_absolute_model(recipe.model),
        data=str(user_path(recipe.data).absolute()),
        default_length=objective.default_length,
        default_rate=objective.default_rate,
    )
    resolved = dataclasses.replace(
        resolved,
        adapter_path=str(run_folder(recipe)),
        teacher=recipe.teacher and _absolute_model(recipe.teacher),
        teacher_cache=recipe.teacher_cache
        and str(user_path(recipe.teacher_cache).absolute()),
    )
    teacher = None
    if resolved.teacher is not None:
        teacher = open_teacher(
            resolved.teacher,
            folder,
            tokenizer,
            resolved.max_seq_length or 0,
            offline=offline,
        )
    notes = (*folder.notes, *(teacher.notes if teacher else ()), *data.notes)
    data = dataclasses.replace(data, notes=notes)
    candidates = [resolved, *(smaller for _, smaller in propose_smaller(resolved))]
    for candidate in candidates if fit else candidates[:1]:
        prepared = _prepare(
            candidate, folder, teacher, tokenizer, data, choice, world, on_progress
        )
        if prepared.plan.fits:
            break
    if isinstance(prepared.objective, Distillation) and teacher is not None:
        test = prepared.test if resolved.test else ()
        prepared.objective.open_cache(teacher, (prepared.train, prepared.valid, test))
    return prepared


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the garbage collector, which would visit all records again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _prepare(
    recipe: FinetuneRecipe,
    folder: ModelFolder,
    teacher: TeacherFolder | None,
    tokenizer: Tokenizer,
    data: Data,
    choice: TemplateChoice,
    world: World,
    on_progress: OnProgress,
) -> Prepared:
    def report(total: int, done: int) -> None:
        on_progress(done, total, "records")

    objective = make_objective(recipe)
    splits: dict[str, Samples] = {}
    tables: dict[str, SplitTable] = {}
    for split, dataset in data.splits.items():
        splits[split], tables[split] = objective.make_samples(
            dataset,
            tokenizer,
            choice.name,
            functools.partial(report, len(dataset.records)),
        )
    table = tabulate(data, choice, tables)
    for prompt in recipe.sample_prompt:
        encode_prompt(tokenizer, prompt, template=choice.name)  # checks the prompt
    if recipe.test and not splits.get("test"):
        raise OpenELMError(
            f"`test` needs a test file, but {recipe.data} has none. Pass a folder with "
            "test.jsonl as `data`, or leave out `test`."
        )
    order = Order(lengths_of(splits["train"]), recipe)
    if note := describe_warmup(recipe, order.steps):
        table = dataclasses.replace(table, warnings=(*table.warnings, note))
    plan = _plan(recipe, folder, teacher, splits["train"], order, world)
    return Prepared(
        recipe,
        objective,
        folder,
        tokenizer,
        table,
        data_files=tuple(dataset.path for dataset in data.splits.values()),
        train=splits["train"],
        valid=splits.get("valid", ()),
        test=splits.get("test", ()),
        order=order,
        plan=plan,
        example=shorten_prompt(data.train.records),
        teacher=teacher,
    )


def describe_warmup(recipe: FinetuneRecipe, steps: int) -> str:
    """Return a note if a run ends before its learning rate has reached the peak."""
    warmup = recipe.warmup_steps or 0
    if warmup < steps:
        return ""
    share = recipe.rate_at(steps - 1, steps) / (recipe.learning_rate or 1.0)
    return (
        f"`warmup_steps` is {warmup}, but the run has {count_of(steps, 'step')}: its "
        f"learning rate reaches {share:.1%} of {recipe.learning_rate:g}; set it to a "
        "tenth of the steps."
    )


def shorten_prompt(records: Sequence[Record]) -> str:
    """Return the first prompt of the records on one line, without its end if long.

    A plain text has no prompt: then its first words.
    """
    for record in records:
        prompts = [turn.text for turn in record.turns if turn.role == "user"]
        text, most = (prompts or [record.turns[0].text])[0], 100 if prompts else 40
        line = " ".join(text.split())
        if len(line) > most:
            line = line[:most].rpartition(" ")[0] or line[:most]
        if line:
            return line
    return ""


def _plan(
    recipe: FinetuneRecipe,
    folder: ModelFolder,
    teacher: TeacherFolder | None,
    train: Samples,
    order: Order,
    world: World,
) -> TrainingPlan:
    lengths, targets = lengths_of(train), targets_of(train)
    if world.size > recipe.step_size:
        raise OpenELMError(
            f"A step has {count_of(recipe.step_size, 'sample')} for {world.size} "
            "processes; raise "
            f"`batch_size` or `grad_accumulation_steps`."
        )
    model = _build_lazy_model(folder, training_dtype(folder, recipe))
    make_trainable(model, recipe, stored_dtype(folder), folder.packings)
    teacher_bytes = 0
    if teacher is not None and recipe.teacher_cache is None:
        dtype = compute_dtype(stored_dtype(teacher.folder))
        teacher_bytes = count_bytes(_build_lazy_model(teacher.folder, dtype))
    limit = describe_machine().memory_bytes
    if recipe.memory_limit is not None:
        limit = int(recipe.memory_limit * 1e9)

    def estimate_memory(recipe: FinetuneRecipe) -> MemoryPlan:
        longest = recipe.max_seq_length or 0
        truncated = [min(length, longest) for length in lengths]
        parts = recipe.grad_accumulation_steps * world.size
        batch = largest_batch(order, truncated, targets, parts)
        memory = plan_memory(model, recipe, batch)
        return dataclasses.replace(memory, teacher=teacher_bytes)

    trainable = sum(array.size for array in trained_tensors(model).values())
    return TrainingPlan(
        steps=order.steps,
        epochs=order.epochs,
        trainable=trainable,
        parameters=folder.config.num_parameters,
        tokens=round(sum(lengths) * order.epochs),
        targets=round(sum(targets) * order.epochs),
        memory=estimate_memory(recipe),
        limit=limit,
        smaller=tuple(
            (settings, estimate_memory(smaller).total)
            for settings, smaller in propose_smaller(recipe)
        ),
    )


def _build_lazy_model(folder: ModelFolder, dtype: mx.Dtype) -> OpenELM:
    """Return a model with the folder's shapes in a dtype; no weight is computed."""
    model = OpenELM(folder.config)
    model.set_dtype(dtype)
    if folder.packings and dtype == stored_dtype(folder):
        make_quantized(model, folder.packings)
    return model


def training_dtype(folder: ModelFolder, recipe: FinetuneRecipe) -> mx.Dtype:
    """Return the compute dtype; full fine-tuning needs float32 for small updates."""
    stored = stored_dtype(folder)
    return mx.float32 if recipe.fine_tune_type == "full" else compute_dtype(stored)


def make_trainable(
    model: OpenELM,
    recipe: FinetuneRecipe,
    stored: mx.Dtype = mx.bfloat16,
    packed: Mapping[str, Packing] | None = None,
) -> None:
    """Make the recipe's weights trainable: those of a new adapter, or the model's own.

    Args:
        stored: dtype of the model's files.
        packed: the packings in them, by CoreNet name; None: nothing is packed.

    Raises:
        OpenELMError: the recipe's layers, keys or ranks do not fit the model.
    """
    model.transformer.checkpointed = recipe.grad_checkpoint
    if recipe.neftune_noise:
        model.transformer.noise = EmbeddingNoise(recipe.neftune_noise)
    if recipe.fine_tune_type == "full":
        unfreeze(model, num_layers=recipe.num_layers)
        return
    method: Method = "dora" if recipe.fine_tune_type == "dora" else "lora"
    modules = choose_modules(
        model,
        num_layers=recipe.num_layers,
        keys=recipe.keys,
        embedding=recipe.adapt_embedding,
    )
    ranks = choose_ranks(modules, recipe.mean_rank, by_width=recipe.rank_by_width)
    adapt(
        model,
        method,
        ranks,
        scale=recipe.adapter_scale,
        dropout=recipe.dropout,
        seed=recipe.seed,
        inputs_only=recipe.adapt_embedding,
    )
    if recipe.quantize_aware is not None:
        narrow = mx.bfloat16 if stored == mx.float32 else stored  # as `fuse` writes it
        round_layers(model, recipe.quantize_aware, narrow, packed or {})


def _absolute_model(name: str) -> str:
    """Return a model name that does not depend on the working directory."""
    path = user_path(name)
    return str(path.absolute()) if name != DEMO and path.is_dir() else name
