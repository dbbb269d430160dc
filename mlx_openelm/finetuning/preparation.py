"""A run before its start: data read and checked, steps and memory reckoned."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_openelm.device import compute_dtype, describe_machine
from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.data_table import DataTable, SplitTable, tabulate
from mlx_openelm.finetuning.objectives import FinetuneObjective, make_objective
from mlx_openelm.finetuning.plan import (
    MemoryPlan,
    Order,
    TrainingPlan,
    largest_batch,
    plan_memory,
    propose_smaller,
)
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.record_formats import TemplateChoice, choose_template
from mlx_openelm.finetuning.records import Data, read_data
from mlx_openelm.finetuning.samples import Samples, lengths_of, targets_of
from mlx_openelm.finetuning.trainable import (
    Method,
    adapt,
    choose_modules,
    choose_ranks,
    unfreeze,
)
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.hub import DEMO, find_model
from mlx_openelm.storage.loading import load_tokenizer, make_quantized, stored_dtype
from mlx_openelm.storage.model_folder import ModelFolder, open_folder
from mlx_openelm.text.templates import encode_prompt
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.arrays import trained_tensors
from mlx_openelm.training.distributed import World
from mlx_openelm.training.state import describe_arithmetic

FOLDERS = Path("adapters")  # where a run goes that is told no folder


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run whose every record was read and whose memory was reckoned."""

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

    @property
    def path(self) -> Path:
        return run_folder(self.recipe)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when the run is resumed."""
        return {"data": self.table.digest, "arithmetic": describe_arithmetic()}


def prepare(
    recipe: FinetuneRecipe,
    *,
    world: World | None = None,
    fit: bool = False,
    offline: bool = False,
) -> Prepared:
    """Read all data and plan the run; no weight is loaded.

    Args:
        fit: take the mildest of the smaller settings that fits this machine.

    Raises:
        OpenELMError: the model, the data (every problem of it) or an option is wrong.
    """
    world = world or World.join()
    objective = make_objective(recipe)
    data = read_data(Path(recipe.data).expanduser(), objective.formats())
    model_path = find_model(recipe.model, offline=offline)
    folder = open_folder(model_path)
    tokenizer = load_tokenizer(folder)
    choice = choose_template(recipe.template, tokenizer.template, data.train.format)
    resolved = recipe.resolve(
        context_length=folder.config.max_context_length,
        template=choice.name,
        model=_spell_model(recipe.model),
        data=str(Path(recipe.data).expanduser().absolute()),
        default_length=objective.default_length,
        default_rate=objective.default_rate,
    )
    resolved = dataclasses.replace(resolved, adapter_path=str(run_folder(recipe)))
    candidates = [resolved, *(smaller for _, smaller in propose_smaller(resolved))]
    for candidate in candidates if fit else candidates[:1]:
        prepared = _prepare(candidate, folder, tokenizer, data, choice, world)
        if prepared.plan.fits:
            break
    return prepared


def _prepare(
    recipe: FinetuneRecipe,
    folder: ModelFolder,
    tokenizer: Tokenizer,
    data: Data,
    choice: TemplateChoice,
    world: World,
) -> Prepared:
    objective = make_objective(recipe)
    splits: dict[str, Samples] = {}
    tables: dict[str, SplitTable] = {}
    for split, dataset in data.splits.items():
        splits[split], tables[split] = objective.make_samples(
            dataset, tokenizer, choice.name
        )
    table = tabulate(data, choice, tables)
    for prompt in recipe.sample_prompt:
        encode_prompt(tokenizer, prompt, template=choice.name)  # names a wrong one
    if recipe.test and not splits.get("test"):
        raise OpenELMError(
            f"`test` needs a test file; {recipe.data} has none. Give a folder with a "
            "test.jsonl, or leave out `test`."
        )
    order = Order(lengths_of(splits["train"]), recipe)
    plan = _plan(recipe, folder, splits["train"], order, world)
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
    )


def _plan(
    recipe: FinetuneRecipe,
    folder: ModelFolder,
    train: Samples,
    order: Order,
    world: World,
) -> TrainingPlan:
    lengths, targets = lengths_of(train), targets_of(train)
    if world.size > recipe.step_size:
        raise OpenELMError(
            f"{world.size} processes share a step of {recipe.step_size} samples; raise "
            "`batch_size` to give each of them one."
        )
    model = _outline(folder, recipe)  # lazy: nothing is computed
    make_trainable(model, recipe)
    limit = describe_machine().memory_bytes
    if recipe.memory_limit is not None:
        limit = int(recipe.memory_limit * 1e9)

    def reckon(recipe: FinetuneRecipe) -> MemoryPlan:
        longest = recipe.max_seq_length or 0
        short = [min(length, longest) for length in lengths]
        parts = recipe.grad_accumulation_steps * world.size
        return plan_memory(model, recipe, largest_batch(order, short, targets, parts))

    trainable = sum(array.size for array in trained_tensors(model).values())
    return TrainingPlan(
        steps=order.steps,
        epochs=order.epochs,
        trainable=trainable,
        parameters=folder.config.num_parameters,
        tokens=round(sum(lengths) * order.epochs),
        targets=round(sum(targets) * order.epochs),
        memory=reckon(recipe),
        limit=limit,
        smaller=tuple(
            (flags, reckon(smaller).total) for flags, smaller in propose_smaller(recipe)
        ),
    )


def _outline(folder: ModelFolder, recipe: FinetuneRecipe) -> OpenELM:
    """Return a model of the folder's shapes and dtypes, whose weights are not made."""
    stored = stored_dtype(folder)
    chosen = training_dtype(folder, recipe)
    model = OpenELM(folder.config)
    model.set_dtype(chosen)
    if folder.packings and chosen == stored:
        make_quantized(model, folder.packings)
    return model


def training_dtype(folder: ModelFolder, recipe: FinetuneRecipe) -> mx.Dtype:
    """Full fine-tuning is done in float32: small updates would be rounded away."""
    stored = stored_dtype(folder)
    return mx.float32 if recipe.fine_tune_type == "full" else compute_dtype(stored)


def make_trainable(model: OpenELM, recipe: FinetuneRecipe) -> None:
    """Freeze the model and put the recipe's adapter on it, or unfreeze what it says.

    Raises:
        OpenELMError: the recipe's layers, keys or ranks do not fit the model.
    """
    model.transformer.checkpointed = recipe.grad_checkpoint
    if recipe.fine_tune_type == "full":
        unfreeze(model, num_layers=recipe.num_layers)
        return
    method: Method = "dora" if recipe.fine_tune_type == "dora" else "lora"
    modules = choose_modules(model, num_layers=recipe.num_layers, keys=recipe.keys)
    ranks = choose_ranks(modules, recipe.mean_rank, by_width=recipe.rank_by_width)
    adapt(
        model,
        method,
        ranks,
        scale=recipe.scale,
        dropout=recipe.dropout,
        seed=recipe.seed,
    )


def run_folder(recipe: FinetuneRecipe) -> Path:
    """Return where the run goes: by default a folder with the data's name."""
    path = Path(recipe.adapter_path or FOLDERS / stem(Path(recipe.data))).expanduser()
    return path if path.name not in ("", "..") else path.resolve()


def stem(path: Path) -> str:
    """Return a file's or a folder's name without .jsonl, .json and .gz."""
    name = path.expanduser().absolute().resolve().name
    return name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")


def _spell_model(name: str) -> str:
    """Return a name that means the same model from another working folder."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name != DEMO and path.is_dir() else name
