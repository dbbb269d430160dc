"""The command that evaluates models: `evaluate`."""

import gc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.evaluation.checkpoints import (
    check_checkpoint_options,
    list_checkpoints,
    score_checkpoints,
)
from mlx_openelm.cli.evaluation.plan import (
    Entrant,
    EvaluationPlan,
    list_entrants,
    named,
    plan_evaluation,
)
from mlx_openelm.cli.evaluation.reports import report_checkpoints, report_scores
from mlx_openelm.cli.options import (
    Adapter,
    Force,
    Json,
    Model,
    Offline,
    Quiet,
    check_report_file,
    open_model,
)
from mlx_openelm.errors import OpenELMError
from mlx_openelm.options import MODEL_PANEL, OUTPUT_PANEL

if TYPE_CHECKING:
    from mlx_openelm.evaluation.results import ModelScores, TaskResult
    from mlx_openelm.evaluation.scorer import Scorer

SCORING = "Texts and tasks"  # a heading in --help


def evaluate_command(
    text: Annotated[
        list[Path] | None, typer.Option(help="Text file to score; repeatable.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Multiple-choice questions (.json or .jsonl), or the name of a task "
            "of lm-evaluation-harness; repeatable."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Tasks and settings of published scores, shown beside them: "
            "zero-shot, openllm, llm360 or peft.",
            rich_help_panel=SCORING,
        ),
    ] = None,
    model: Model = None,
    adapter_path: Adapter = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Another model to compare with: an OpenELM, an adapter folder (of "
            "--model, else of its own base), a model that mlx-lm opens, or hf:NAME; "
            "repeatable.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH...",
            help="Score checkpoints of a training run instead: model folders or .pt "
            "files, converted one by one; a table and --picture over the iterations.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer of --checkpoints: a file, a folder, or a Hub repository.",
            show_default="the one beside the checkpoint",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Window length for --text in tokens.",
            show_default="the context length",
            rich_help_panel=SCORING,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Use only the first N questions after a fixed shuffle of a task file, "
            "and the first N of a task of the harness.",
            rich_help_panel=SCORING,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            help="Number of solved examples before each question, for tasks of the "
            "harness.",
            show_default="the task's",
            rich_help_panel=SCORING,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            help="Number of answers generated at once, for generative tasks.",
            rich_help_panel=SCORING,
        ),
    ] = 16,
    include_path: Annotated[
        Path | None,
        typer.Option(
            help="Folder of your own harness tasks (YAML).", rich_help_panel=SCORING
        ),
    ] = None,
    tasks_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the task files of --suite peft.", rich_help_panel=SCORING
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which answers are saved; a stopped run resumes from it.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Write the scores to a .csv file.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw a chart (.svg).", rich_help_panel=OUTPUT_PANEL),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Evaluate a model on texts and tasks, beside published scores or other models.

    Texts give bits per byte and perplexity, tasks the accuracy with its standard error.
    Differences between models are paired: all models answer the same questions.
    """
    console = Console(quiet=quiet)
    if not text and not tasks and suite is None:
        raise typer.BadParameter(
            "give texts, tasks, or a suite to score",
            param_hint="--text, --tasks, --suite",
        )
    if tasks and suite is not None:
        raise typer.BadParameter(
            "cannot be used with --tasks; it has its own", param_hint="--suite"
        )
    if not tasks and suite is None:
        task_options = {
            "--limit": limit,
            "--num-fewshot": num_fewshot,
            "--output": None if checkpoints else output,
            "--picture": None if checkpoints else picture,
        }
        for flag, value in task_options.items():
            if value is not None:
                raise typer.BadParameter("needs --tasks or --suite", param_hint=flag)
    if window is not None and not text:
        raise typer.BadParameter("needs --text", param_hint="--window")
    check_checkpoint_options(checkpoints, tokenizer, (model, adapter_path, compare))
    for flag, value in {"--batch-size": batch_size, "--window": window}.items():
        if value is not None and value < 1:
            raise OpenELMError(f"{flag} is {value}; it must be at least 1.")
    check_report_file(csv, "--csv", ".csv", force=force)
    check_report_file(picture, "--picture", ".svg", force=force)
    if text:
        from mlx_openelm.evaluation.texts import check_texts

        check_texts(text)
    found = list_checkpoints(checkpoints or [], tokenizer, offline=offline)
    entrants = []
    if not found:
        entrants = list_entrants(model, adapter_path, compare or [], offline)
    _check_folders(output, [one.label for one in found or entrants])
    plan = plan_evaluation(
        console,
        tasks or [],
        suite,
        limit=limit,
        num_fewshot=num_fewshot,
        include_path=include_path,
        tasks_dir=tasks_dir,
        offline=offline,
    )

    def score(entrant: Entrant) -> "ModelScores":
        with named(entrant.label if len(entrants) > 1 else ""):
            scored = _evaluate_one(
                console,
                entrant,
                plan,
                text or [],
                window,
                batch_size=batch_size,
                output=output,
                force=force,
                offline=offline,
            )
        gc.collect()  # never two models in memory
        return scored

    if found:
        scored = score_checkpoints(
            console,
            found,
            plan,
            score,
            texts=text or [],
            window=window,
            make_folder=lambda label: _make_folder(output, label),
            tokenizer=tokenizer,
            force=force,
            offline=offline,
        )
    else:
        scored = map(score, entrants)
    finished = list["ModelScores"]()
    try:
        for scores_of_one in scored:
            finished.append(scores_of_one)
    finally:  # after an error or Ctrl-C, the scores until then
        if output is not None and len(finished) < len(found or entrants):
            csv = picture = None  # else the same command could not resume
        if finished and found:
            report_checkpoints(
                console, found, finished, plan.suite, csv, picture, as_json=as_json
            )
        elif finished:
            report_scores(console, finished, plan.suite, csv, picture, as_json=as_json)


# The run -------------------------------------------------------------------------


def _evaluate_one(
    console: Console,
    entrant: Entrant,
    plan: EvaluationPlan,
    text: Sequence[Path],
    window: int | None,
    *,
    batch_size: int,
    output: Path | None,
    force: bool,
    offline: bool,
) -> "ModelScores":
    """Load one model and score it on all texts and tasks."""
    from mlx_openelm.evaluation.other_models import open_scorer
    from mlx_openelm.evaluation.results import (
        ModelScores,
        describe_model,
        describe_other_model,
    )
    from mlx_openelm.evaluation.scorer import OpenELMScorer, Scorer
    from mlx_openelm.evaluation.texts import evaluate, score_text_of

    where = _make_folder(output, entrant.label)
    score = None
    scorer: Scorer
    if entrant.is_other:
        assert entrant.name is not None
        console.note(f"[loading {entrant.name}, which is not an OpenELM]")
        scorer = open_scorer(entrant.name, offline=offline)
        card = describe_other_model(entrant.label)
    else:
        folder, model, tokenizer = open_model(
            console, entrant.name, entrant.adapter, offline
        )
        scorer = OpenELMScorer(model, tokenizer, batch_size=batch_size)
        card = describe_model(entrant.label, folder, entrant.method)
    if text:
        with console.progress("Scoring") as progress:
            if entrant.is_other:
                score = score_text_of(
                    scorer,
                    text,
                    lambda done, total: progress.update(done, total, "files"),
                )
            else:
                score = evaluate(
                    model,
                    tokenizer,
                    text=text,
                    window=window,
                    on_progress=lambda done, total: progress.update(
                        done, total, "windows"
                    ),
                )
    results = _run_local(console, scorer, plan, where, force)
    if plan.named:
        results += _run_named(console, scorer, plan, where, force)
    return ModelScores(card, score, tuple(results))


def _run_local(
    console: Console,
    scorer: "Scorer",
    plan: EvaluationPlan,
    where: Path | None,
    force: bool,
) -> list["TaskResult"]:
    from mlx_openelm.evaluation.multiple_choice import score_task
    from mlx_openelm.evaluation.results import from_local

    results = []
    for task in plan.local:
        with console.progress(task.name) as progress:
            scored = score_task(
                scorer,
                task,
                limit=plan.limit,
                output=where / f"{task.name}.jsonl" if where else None,
                force=force,
                on_progress=lambda done, total: progress.update(
                    done, total, "questions"
                ),
            )
        results.append(from_local(scored, len(task.questions)))
    return results


def _run_named(
    console: Console,
    scorer: "Scorer",
    plan: EvaluationPlan,
    where: Path | None,
    force: bool,
) -> list["TaskResult"]:
    from mlx_openelm.evaluation.harness import run_resumable_task, run_task
    from mlx_openelm.evaluation.harness_model import wrap_model

    results: list[TaskResult] = []
    for task in plan.named:
        with console.progress(task.name) as progress:

            def show_progress(done: int, total: int) -> None:
                progress.update(done, total, "requests")

            if where is None:
                lm = wrap_model(scorer, on_progress=show_progress)
                results += run_task(lm, task, limit=plan.limit)
            else:
                results += run_resumable_task(
                    scorer,
                    task,
                    where,
                    limit=plan.limit,
                    force=force,
                    on_progress=show_progress,
                )
    return results


# Files ---------------------------------------------------------------------------


def _check_folders(output: Path | None, labels: Sequence[str]) -> None:
    """Raise OpenELMError if the answers of two models would be in the same folder."""
    if output is None:
        return
    owners: dict[Path, str] = {}
    for label in labels:
        folder = _folder_of(output, label)
        if folder in owners:
            raise OpenELMError(
                f"The answers of {owners[folder]} and {label} would both be in "
                f"{folder}; evaluate one of them with another --output."
            )
        owners[folder] = label


def _folder_of(output: Path, label: str) -> Path:
    return output / re.sub(r"[^\w.-]+", "_", label.strip("/.~"))


def _make_folder(output: Path | None, label: str) -> Path | None:
    """Make and return the folder for one model's answers."""
    if output is None:
        return None
    folder = _folder_of(output, label)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpenELMError(
            f"Cannot make the folder {folder}: {error.strerror or error}; give another "
            "path with --output."
        ) from error
    return folder
