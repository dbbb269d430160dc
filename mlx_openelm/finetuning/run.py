"""Fine-tuning from a recipe to a finished adapter folder.

`prepare` reads the data and plans the run, `Trainer` is the training loop, and
`run_files` lists the files of a run's folder.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_openelm.finetuning.advice import describe_killed
from mlx_openelm.finetuning.compiled.choice import COMPILED, chooses_compiled
from mlx_openelm.finetuning.further_objectives.distillation import Distillation
from mlx_openelm.finetuning.plan import TrainingPlan
from mlx_openelm.finetuning.preparation import (
    Prepared,
    make_trainable,
    prepare,
)
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.records import OnProgress
from mlx_openelm.finetuning.report.live import LiveReport
from mlx_openelm.finetuning.report.tracking import MetricsTracking
from mlx_openelm.finetuning.result import FinetuneReport, finish_run
from mlx_openelm.finetuning.run_checks import (
    refuse_other_base,
    refuse_other_run,
    refuse_other_settings,
    refuse_present_run,
    refuse_too_large,
)
from mlx_openelm.finetuning.run_context import RunContext
from mlx_openelm.finetuning.run_files import RECIPE, write_start, write_text
from mlx_openelm.finetuning.run_folder import run_folder
from mlx_openelm.finetuning.run_saver import RunSaver
from mlx_openelm.finetuning.trainer import Trainer
from mlx_openelm.finetuning.validation import Validator
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.streaming import generate
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.recipe_loader import find_recipe, load_recipe
from mlx_openelm.reporting.trackers import require_trackers
from mlx_openelm.storage.loading import load_model, stored_dtype
from mlx_openelm.storage.staging import lock_target, refuse_replacing, staged_folder
from mlx_openelm.training.distributed import World, run_on_first_rank
from mlx_openelm.training.events import (
    Event,
    EventLog,
    drop_events_after,
    read_events,
)
from mlx_openelm.training.optimizer import make_optimizer
from mlx_openelm.training.state import TrainingState, running
from mlx_openelm.tuning import DEFAULT, ENVIRONMENT, Tuning, current_environment


def finetune(
    recipe: FinetuneRecipe | str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    fit: bool = False,
    offline: bool = False,
    tuning: Tuning = DEFAULT,
    on_event: Callable[[Event], None] = lambda event: None,
    on_prepared: Callable[[Prepared], None] = lambda prepared: None,
    on_progress: OnProgress = lambda done, total, unit: None,
) -> FinetuneReport:
    """Train an adapter, or all weights, and save the run in `adapter_path`.

    Args:
        recipe: the options, a recipe file, or the name of a bundled recipe.
        resume: continue the run in `adapter_path` from its saved state.
        force: replace an existing run.
        fit: choose smaller settings if the memory would not suffice.
        offline: do not access the network.
        tuning: whether updates are compiled; a resumed run does as it did.
        on_event: receives each event of metrics.jsonl, with the number of steps.
        on_prepared: receives the plan before training.
        on_progress: receives the progress of reading the data; see `prepare`.

    Raises:
        OpenELMError: before training, an error in data, options or folder; later, a
            failed run.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; the run is saved, and a note
            of the exception has the command that resumes it.
    """
    sources = []
    if not isinstance(recipe, FinetuneRecipe):
        sources.append(find_recipe(str(recipe)))
        recipe = load_recipe(FinetuneRecipe, str(recipe), {})
    require_trackers(recipe.report_to)
    world, path = World.join(), run_folder(recipe)
    first = world.rank == 0
    if not resume:
        run_on_first_rank(world, lambda: refuse_present_run(path, force))
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(lock_target(path))
        prepared = prepare(
            recipe, world=world, fit=fit, offline=offline, on_progress=on_progress
        )
        identity = prepared.describe_inputs()
        refuse_other_settings(prepared, identity, world)
        refuse_too_large(prepared.plan)
        sources += [*prepared.data_files, prepared.folder.path / "config.json"]
        if resume:
            run_on_first_rank(
                world, lambda: refuse_other_run(prepared, identity, on_event)
            )
        else:
            run_on_first_rank(world, lambda: refuse_replacing(path, sources))
        _load_teacher(prepared, world, on_progress)
        if first:
            on_prepared(prepared)
        stack.enter_context(_limited_memory(prepared.plan))
        observers = [on_event]
        compiled = chooses_compiled(
            prepared.recipe, tuning, world, path if resume else None
        )
        run = _load_run(prepared, world, compiled, _hand_to(observers))
        path_of_run = {COMPILED: compiled, ENVIRONMENT: current_environment()}
        saver = RunSaver(run, {**identity, **path_of_run})
        validator = Validator(
            run, prepared.valid, saver, _make_generator(prepared, run.model)
        )
        trainer = Trainer(run, prepared.train, saver, validator)
        if resume:
            run_on_first_rank(world, lambda: refuse_other_base(path, run.model))
            saver.restore()
        else:
            run_on_first_rank(world, lambda: _write_start(prepared, run, saver, force))
        if first:
            was_killed = stack.enter_context(running(path))
            if resume:
                _record_resume(run, was_killed=was_killed)
            observers.append(stack.enter_context(LiveReport(prepared, run)))
            observers.append(stack.enter_context(MetricsTracking(run)))
            stack.enter_context(_noting_interruption(run))
        reason = trainer.run()
        return finish_run(prepared, run, validator, reason)


def _load_teacher(prepared: Prepared, world: World, on_progress: OnProgress) -> None:
    """Load the teacher of a distillation, on rank 0 first.

    So that the other ranks find a cache that it has computed, on a shared disk.
    """
    objective, teacher = prepared.objective, prepared.teacher
    if not isinstance(objective, Distillation) or teacher is None:
        return
    run_on_first_rank(world, lambda: objective.load_teacher(teacher, on_progress))
    if world.rank > 0:
        objective.load_teacher(teacher, on_progress)


def _load_run(
    prepared: Prepared,
    world: World,
    compiled: bool,
    on_event: Callable[[Event], None],
) -> RunContext:
    """Load the model and prepare it for the first update."""
    recipe, order = prepared.recipe, prepared.order
    full = recipe.fine_tune_type == "full"
    model = load_model(prepared.folder, mx.float32 if full else None)
    stored = stored_dtype(prepared.folder)
    make_trainable(model, recipe, stored, prepared.folder.packings)
    optimizer = make_optimizer(
        model,
        recipe.optimizer,
        recipe.betas,
        recipe.eps,
        recipe.weight_decay,
        b_ratio=recipe.lora_plus_ratio,
    )
    test = prepared.test if recipe.test else ()
    for samples in (prepared.train, prepared.valid, test):
        prepared.objective.precompute_reference(model, samples)
    state = TrainingState(model, optimizer)
    return RunContext(
        recipe=recipe,
        folder=prepared.path,
        objective=prepared.objective,
        order=order,
        world=world,
        state=state,
        log=EventLog(
            prepared.path, state, steps=order.steps, world=world, on_event=on_event
        ),
        compiled=compiled,
    )


def _make_generator(prepared: Prepared, model: OpenELM) -> Callable[[str], str]:
    """Return a function that continues a prompt with the recipe's template."""
    recipe, tokenizer = prepared.recipe, prepared.tokenizer
    tokenizer.template = recipe.template
    sampling = Sampling.from_defaults(
        prepared.folder.generation_defaults,
        {"max_tokens": recipe.sample_tokens, "seed": recipe.seed},
    )
    return lambda prompt: generate(model, tokenizer, prompt, sampling)


def _write_start(
    prepared: Prepared, run: RunContext, saver: RunSaver, force: bool
) -> None:
    with staged_folder(run.folder, force=force) as staging:
        write_start(staging, prepared, run.model)
        saver.save_start(staging)


def _record_resume(run: RunContext, *, was_killed: bool) -> None:
    """Adapt recipe and events to the restored state."""
    drop_events_after(run.folder, run.progress)
    write_text(run.folder / RECIPE, run.recipe.to_yaml())
    run.log.emit("resume")
    if was_killed:
        run.log.note(describe_killed(run.folder, run.progress.step, run.recipe))


@contextlib.contextmanager
def _noting_interruption(run: RunContext) -> Iterator[None]:
    """Record that a run stopped after its last step, but before its result."""
    try:
        yield
    except BaseException:
        ends = [e for e in read_events(run.folder) if e["event"] == "end"]
        if ends and ends[-1].get("reason") != "interrupted":
            run.log.emit("end", reason="interrupted")
        raise


def _hand_to(observers: Sequence[Callable[[Event], None]]) -> Callable[[Event], None]:
    """Return a function that passes an event to all observers, including later ones."""

    def hand_on(event: Event) -> None:
        for observer in observers:
            observer(event)

    return hand_on


@contextlib.contextmanager
def _limited_memory(plan: TrainingPlan) -> Iterator[None]:
    """Set MLX's memory limit, and limit its cache to the planned memory."""
    before = mx.set_memory_limit(plan.limit), mx.set_cache_limit(plan.memory.total)
    mx.reset_peak_memory()
    try:
        yield
    finally:
        mx.set_memory_limit(before[0])
        mx.set_cache_limit(before[1])
