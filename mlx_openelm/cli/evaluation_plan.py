"""The models and the tasks of an evaluation, read before the first model is loaded."""

import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import expand_path
from mlx_openelm.errors import OpenELMError

if TYPE_CHECKING:
    from mlx_openelm.evaluation.harness import HarnessTask
    from mlx_openelm.evaluation.suites import Suite
    from mlx_openelm.evaluation.task_files import Task


# What takes part -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entrant:
    """One model of the comparison.

    Attributes:
        label: unique among the entrants.
        name: what `--model` would say; None: the demo, or the adapter's base.
    """

    label: str
    name: str | None
    adapter: str | None = None
    method: str | None = None


def list_entrants(
    model: str | None, adapter_path: str | None, compare: Sequence[str], offline: bool
) -> list[Entrant]:
    """Name all models, and find each before the first one is run.

    Raises:
        OpenELMError: one of them is not to be had.
    """
    from mlx_openelm.storage.hub import ADAPTER_CONFIG, CONFIG
    from mlx_openelm.storage.loading import choose_model

    said = [(model, adapter_path)]
    for name in compare:
        path = expand_path(name)
        is_adapter = (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file()
        said.append((model, name) if is_adapter else (name, None))
    entrants: list[Entrant] = []
    for base, adapter in said:
        choice = choose_model(base, expand_path(adapter), offline=offline)
        label = adapter or choice.name
        method = choice.adapter.method if choice.adapter else None
        if label in (entrant.label for entrant in entrants):
            raise OpenELMError(f"{label} takes part twice; leave one out.")
        entrants.append(Entrant(label, base, adapter, method))
    return entrants


# What is asked -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """The questions of all tasks, read before a model is.

    Attributes:
        local: tasks of files, each with the number of questions in its file.
    """

    local: tuple[tuple["Task", int], ...]
    named: tuple["HarnessTask", ...]
    suite: "Suite | None"
    limit: int | None


def plan_evaluation(
    console: Console,
    tasks: Sequence[str],
    suite_name: str | None,
    *,
    limit: int | None,
    num_fewshot: int | None,
    include_path: Path | None,
    tasks_dir: Path | None,
    offline: bool,
) -> EvaluationPlan:
    """Read all questions.

    Raises:
        OpenELMError: options do not go together, or questions are not to be had.
    """
    from mlx_openelm.evaluation.task_files import read_task

    _check_numbers(limit, num_fewshot)
    suite = _find_suite(suite_name, num_fewshot, tasks_dir)
    files: list[Path] = []
    named: list[tuple[str, int | None]] = []
    if suite is None:
        for task in dict.fromkeys(tasks):
            path = expand_path(task)
            if path.is_file() or path.suffix in (".json", ".jsonl"):
                files.append(path)
            else:
                named.append((task, num_fewshot))
        if files and num_fewshot:
            raise OpenELMError(
                f"--num-fewshot is of the harness's tasks, and {files[0]} is a file, "
                "whose questions stand alone; leave it out."
            )
    elif suite.local:
        assert tasks_dir is not None
        files = _find_files(console, suite, tasks_dir)
    else:
        named = [(task.task, task.num_fewshot) for task in suite.tasks]
    local = []
    for path in files:
        whole = read_task(path)
        local.append((read_task(path, limit=limit), len(whole.questions)))
    names = [task.name for task, _ in local] + [name for name, _ in named]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise OpenELMError(f"Two tasks have the name {twice[0]}; rename a file.")
    opened: tuple[HarnessTask, ...] = ()
    if named:
        from mlx_openelm.evaluation.harness import open_tasks
        from mlx_openelm.evaluation.harness_model import require_harness

        require_harness()
        console.note("[lm-evaluation-harness reads its tasks]")
        shown = io.StringIO() if console.quiet else sys.stderr  # of downloads
        with contextlib.redirect_stderr(shown):
            opened = open_tasks(named, include_path=include_path, offline=offline)
    elif include_path is not None:
        raise OpenELMError(
            "--include-path is of tasks by name; say one with --tasks, or leave it out."
        )
    return EvaluationPlan(tuple(local), opened, suite, limit)


def _check_numbers(limit: int | None, num_fewshot: int | None) -> None:
    if limit is not None and limit < 1:
        raise OpenELMError(f"--limit is {limit}; it must be at least 1.")
    if num_fewshot is not None and num_fewshot < 0:
        raise OpenELMError(f"--num-fewshot is {num_fewshot}; it must be 0 or more.")


def _find_suite(
    name: str | None, num_fewshot: int | None, tasks_dir: Path | None
) -> "Suite | None":
    from mlx_openelm.evaluation.suites import SUITES

    if name is not None and name not in SUITES:
        raise OpenELMError(
            f"There is no suite {name}; it must be one of {', '.join(SUITES)}."
        )
    if name is not None and num_fewshot is not None:
        raise OpenELMError(
            f"--suite {name} says the solved examples of each task; leave "
            "--num-fewshot out."
        )
    suite = SUITES[name] if name is not None else None
    is_local = suite is not None and suite.local
    if is_local and tasks_dir is None:
        raise OpenELMError(
            f"--suite {name} reads files that are not published with it; say their "
            "folder with --tasks-dir."
        )
    if tasks_dir is not None and not is_local:
        raise OpenELMError("--tasks-dir is of --suite peft; leave it out.")
    return suite


def _find_files(console: Console, suite: "Suite", folder: Path) -> list[Path]:
    from mlx_openelm.evaluation.suites import find_suite_file

    found = [(task, find_suite_file(folder, task)) for task in suite.tasks]
    missing = [f"{task.task}.json" for task, path in found if path is None]
    if len(missing) == len(found):
        raise OpenELMError(
            f"{folder} holds none of the files of --suite {suite.name}: "
            f"{', '.join(missing)}."
        )
    if missing:
        console.note(f"note: {folder} lacks {', '.join(missing)}; they are left out")
    return [path for _, path in found if path is not None]
