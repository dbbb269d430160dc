"""Samples become an adapter: checked, planned, and trained by the loop in `trainer`.

A run is a folder, an adapter folder from the first save on:

    adapter_config.json, adapters.safetensors    the adapter, as mlx-lm reads it
    best/, average/       the same of the least validation loss; of the last N saves
    recipe.yaml           every option, resolved; runs the same again
    data.json             what was found in the data
    metrics.jsonl         an event a line
    state.safetensors     all that --resume needs
    report.html           the run as a page, at the end
"""

import contextlib
import dataclasses
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_openelm.finetuning.advice import describe_death
from mlx_openelm.finetuning.preparation import (
    Prepared,
    make_trainable,
    prepare,
    run_folder,
    stem,
)
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.report import TrainingRun, render_page
from mlx_openelm.finetuning.run_checks import (
    PAGE,
    RECIPE,
    refuse_other_base,
    refuse_other_run,
    refuse_other_settings,
    refuse_present_run,
    refuse_too_large,
)
from mlx_openelm.finetuning.trainable import trained_tensors
from mlx_openelm.finetuning.trainer import (
    Event,
    Training,
    Validation,
)
from mlx_openelm.generation.options import Sampling
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.recipe_loader import find_recipe, load_recipe
from mlx_openelm.storage.adapter_folder import (
    BEST,
    WEIGHTS,
    AdapterConfig,
    write_config,
)
from mlx_openelm.storage.base_check import fingerprint_base
from mlx_openelm.storage.loading import load_model
from mlx_openelm.storage.shards import write_json
from mlx_openelm.storage.staging import (
    lock_target,
    refuse_replacing,
    replaced_file,
    staged_folder,
)
from mlx_openelm.training.distributed import World, fail_on_all_ranks
from mlx_openelm.training.state import (
    describe_arithmetic,
    drop_events_after,
    read_events,
    running,
)
from mlx_openelm.version import __version__

TABLE = "data.json"


@dataclass(frozen=True, slots=True)
class FinetuneReport:
    """A run that came to its end. Losses are nats per token that counts, or per pair.

    Attributes:
        unit: what losses are of, and `tokens` counts: "token", of preferences "pair".
        reason: why it ended: "done" or "patience".
        first_loss, last_loss, best_loss: of the validation; None where there was none.
        tokens: trained.
        seconds: of training, without validation.
    """

    path: Path
    reason: str
    unit: str
    steps: int
    epochs: float
    trainable: int
    parameters: int
    first_loss: float | None
    last_loss: float | None
    best_loss: float | None
    best_step: int | None
    test_loss: float | None
    tokens: int
    skipped: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int


# The run -------------------------------------------------------------------------


def finetune(
    recipe: FinetuneRecipe | str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    fit: bool = False,
    offline: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    on_prepared: Callable[[Prepared], None] = lambda prepared: None,
) -> FinetuneReport:
    """Train an adapter into the recipe's `adapter_path`.

    Args:
        recipe: the value, a recipe's file, or the name of one that is bundled.
        resume: go on from the state that is saved there, exactly.
        force: replace a run that is there.
        fit: see `prepare`.
        on_event: gets what is written to metrics.jsonl, and notes.
        on_prepared: gets the plan, before anything is trained.

    Raises:
        OpenELMError: what is wrong with data, options or folder, all that can be known
            before the start; later, that the run went wrong.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; the run is saved, and a note
            of the exception tells how to go on.
    """
    sources = []
    if not isinstance(recipe, FinetuneRecipe):
        sources.append(find_recipe(str(recipe)))
        recipe = load_recipe(FinetuneRecipe, str(recipe), {})
    world = World.join()
    path = run_folder(recipe)
    with fail_on_all_ranks(world):
        if world.rank == 0 and not resume:
            refuse_present_run(path, force)
    holding = lock_target(path) if world.rank == 0 else contextlib.nullcontext()
    with holding:
        prepared = prepare(recipe, world=world, fit=fit, offline=offline)
        refuse_other_settings(prepared, world)
        refuse_too_large(prepared.plan)
        sources += [*prepared.data_files, prepared.folder.path / "config.json"]
        run = {"data": prepared.table.digest, "arithmetic": describe_arithmetic()}
        told = _first_only(on_event, world)
        with fail_on_all_ranks(world):
            if world.rank == 0:
                if resume:
                    refuse_other_run(prepared, run, told)
                else:
                    refuse_replacing(path, sources)
        if world.rank == 0:
            on_prepared(prepared)
        with _limited_memory(prepared.plan.limit, prepared.plan.memory.total):
            training = _load(prepared, run, world, told)
            with fail_on_all_ranks(world):
                if world.rank == 0 and resume:
                    refuse_other_base(path, training.model)
                elif world.rank == 0:
                    with staged_folder(path, force=force) as staging:
                        _write_start(staging, prepared, training.model)
                        training.save_start(staging)
            if resume:
                training.restore()
            if world.rank > 0:
                return _finish(prepared, training, training.run())
            with running(path) as died:
                if resume:
                    _note_resume(prepared, training, died=died)
                return _finish(prepared, training, training.run())


def _note_resume(prepared: Prepared, training: Training, *, died: bool) -> None:
    path, step = prepared.path, training.progress.step
    drop_events_after(path, training.progress)
    _write_text(path / RECIPE, prepared.recipe.to_yaml())
    training.emit({"event": "resume", "step": step})
    if died:
        training.note(describe_death(step, prepared.recipe))


def _load(
    prepared: Prepared,
    run: Mapping[str, Any],
    world: World,
    on_event: Callable[[Event], None],
) -> Training:
    recipe, folder = prepared.recipe, prepared.folder
    full = recipe.fine_tune_type == "full"
    model = load_model(folder, mx.float32 if full else None)
    make_trainable(model, recipe)
    said = {"max_tokens": recipe.sample_tokens, "seed": recipe.seed}
    prepared.tokenizer.template = recipe.template
    return Training(
        model,
        prepared.tokenizer,
        recipe,
        prepared.order,
        prepared.train,
        prepared.valid,
        prepared.test if recipe.test else (),
        prepared.path,
        run,
        world=world,
        sampling=Sampling.from_defaults(folder.generation_defaults, said),
        on_event=on_event,
    )


def _finish(prepared: Prepared, training: Training, reason: str) -> FinetuneReport:
    """Score the test set, draw the page, and sum the run up."""
    test: Validation | None = None
    progress, plan = training.progress, prepared.plan
    if prepared.recipe.test:
        test = training.evaluate(prepared.test)
        training.emit({"event": "test", "step": progress.step, "loss": test.loss})
    evals = [e for e in read_events(prepared.path) if e["event"] == "eval"]
    losses = [event.get("loss") for event in evals]
    found = math.isfinite(progress.best_loss)
    report = FinetuneReport(
        path=prepared.path,
        reason=reason,
        unit=training.objective.unit,
        steps=progress.step,
        epochs=round(prepared.order.epoch_after(progress.step), 4),
        trainable=plan.trainable,
        parameters=plan.parameters,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        best_loss=progress.best_loss if found else None,
        best_step=progress.best_step if found else None,
        test_loss=test.loss if test else None,
        tokens=progress.tokens,
        skipped=progress.skipped,
        seconds=round(progress.seconds, 3),
        tokens_per_second=round(progress.tokens / max(progress.seconds, 1e-9), 2),
        peak_memory_bytes=progress.peak_memory,
    )
    if training.world.rank == 0:
        try:
            _write_text(prepared.path / PAGE, _draw(prepared, report))
        except OSError as error:
            training.note(f"The report could not be written: {error}.")
    return report


# What is written -----------------------------------------------------------------


def _write_start(staging: Path, prepared: Prepared, model: OpenELM) -> None:
    """Write what does not change in the run."""
    recipe = prepared.recipe
    ranks = {
        name.removesuffix(".lora_a"): array.shape[-1]
        for name, array in trained_tensors(model).items()
        if name.endswith(".lora_a")
    }
    L = len(model.layers)
    write_config(
        staging,
        AdapterConfig(
            method=recipe.fine_tune_type,  # type: ignore[arg-type] # the recipe checked it
            num_layers=L if recipe.num_layers == -1 else recipe.num_layers,
            keys=_spell_keys(ranks),
            rank=max(ranks.values(), default=0),
            scale=recipe.scale,
            dropout=recipe.dropout,
            base=recipe.model,
            metadata={
                "version": __version__,
                "template": recipe.template,
                "base": {"name": recipe.model, "sketch": fingerprint_base(model)},
                "data": {"digest": prepared.table.digest},
            },
        ),
    )
    _write_text(staging / RECIPE, recipe.to_yaml())
    write_json(staging / TABLE, dataclasses.asdict(prepared.table))


def _spell_keys(paths: Iterable[str]) -> tuple[str, ...]:
    """Return mlx-lm's keys: paths in a block where the last blocks all have them."""
    keys: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        inside = ".".join(parts[3:]) if ".layers." in path else path
        keys[inside] = None
    return tuple(keys)


def _write_text(path: Path, text: str) -> None:
    with replaced_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _draw(prepared: Prepared, report: FinetuneReport) -> str:
    recipe, plan, path = prepared.recipe, prepared.plan, prepared.path
    method = recipe.fine_tune_type.replace("lora", "LoRA").replace("dora", "DoRA")
    if recipe.fine_tune_type != "full":
        method += f", rank {recipe.rank}, scale {recipe.scale:g}"
    facts = {
        "method": method
        + (f", {recipe.objective}" if recipe.objective != "sft" else ""),
        "trainable": f"{plan.trainable:,} of {plan.parameters:,} weights "
        f"({plan.trainable / plan.parameters:.2%})",
        "steps": f"{report.steps:,} of {plan.steps:,} ({report.epochs:.2f} epochs)",
        f"trained {report.unit}s": f"{report.tokens:,}",
        "time": f"{report.seconds:,.0f} s, {report.tokens_per_second:,.0f} "
        f"{report.unit}s/s",
        "peak memory": f"{report.peak_memory_bytes / 1e9:.2f} GB, planned "
        f"{plan.memory.total / 1e9:.2f} GB",
        "ended": "out of patience" if report.reason == "patience" else "as planned",
    }
    if report.test_loss is not None:
        facts["test loss"] = f"{report.test_loss:.4f} nats per {report.unit}"
    best = path / BEST
    use = shlex.quote(str(best if (best / WEIGHTS).is_file() else path))
    fused = shlex.quote(f"{path}-fused")
    again = shlex.quote(str(path / RECIPE))
    return render_page(
        TrainingRun(
            name=stem(Path(recipe.data)),
            model=recipe.model,
            facts=facts,
            events=read_events(path),
            data=dataclasses.asdict(prepared.table),
            recipe=recipe.to_yaml(),
            commands=[
                ("Write with it", f'mlx-openelm generate --adapter-path {use} "..."'),
                (
                    "Make it part of the model",
                    f"mlx-openelm fuse --adapter-path {use} --save-path {fused}",
                ),
                ("Run the same again", f"mlx-openelm lora -c {again} --force"),
            ],
        )
    )


@contextlib.contextmanager
def _limited_memory(limit: int, needed: int) -> Iterator[None]:
    """Tell MLX what to stay below, and to keep no more freed memory than is needed."""
    before = mx.set_memory_limit(limit), mx.set_cache_limit(needed)
    mx.reset_peak_memory()
    try:
        yield
    finally:
        mx.set_memory_limit(before[0])
        mx.set_cache_limit(before[1])


def _first_only(
    on_event: Callable[[Event], None], world: World
) -> Callable[[Event], None]:
    return on_event if world.rank == 0 else lambda event: None
