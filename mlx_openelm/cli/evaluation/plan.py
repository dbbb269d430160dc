"""The models and tasks of an evaluation, opened before the first model is loaded."""

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import optional_path
from mlx_openelm.errors import OpenELMError
from mlx_openelm.paths import user_path
from mlx_openelm.text.record_files import is_record_file

if TYPE_CHECKING:
    from mlx_openelm.evaluation.harness import HarnessTask
    from mlx_openelm.evaluation.suites import Suite
    from mlx_openelm.evaluation.task_files import Task


# Models --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entrant:
    """One model of the comparison.

    Attributes:
        label: unique among the entrants.
        name: as for `--model`; None is the adapter's base, or the demo.
        is_other: not an OpenELM: stock mlx-lm or the harness loads it.
    """

    label: str
    name: str | None
    adapter: str | None = None
    method: str | None = None
    is_other: bool = False


def list_entrants(
    model: str | None, adapter_path: str | None, compare: Sequence[str], offline: bool
) -> list[Entrant]:
    """Return all models of the comparison, after finding each of them.

    Raises:
        OpenELMError: a model was not found, or is named twice.
    """
    from mlx_openelm.evaluation.other_models import check_other_model, is_other_model
    from mlx_openelm.storage.loading import choose_model
    from mlx_openelm.storage.weight_files import is_adapter

    pairs = [(model, adapter_path)]
    for name in compare:
        pairs.append((model, name) if is_adapter(user_path(name)) else (name, None))
    entrants: list[Entrant] = []
    for base, adapter in pairs:
        if base and adapter is None and is_other_model(base, offline=offline):
            check_other_model(base)
            _add(entrants, Entrant(base, base, is_other=True))
            continue
        choice = choose_model(base, optional_path(adapter), offline=offline)
        label = adapter or choice.name
        method = choice.adapter.method if choice.adapter else None
        _add(entrants, Entrant(label, base, adapter, method))
    return entrants


def _add(entrants: list[Entrant], entrant: Entrant) -> None:
    if entrant.label in (other.label for other in entrants):
        raise OpenELMError(f"{entrant.label} is named twice; leave one out.")
    entrants.append(entrant)


@contextlib.contextmanager
def named(label: str) -> Iterator[None]:
    """Begin errors with the name of the model, unless they contain it or it is ""."""
    try:
        yield
    except OpenELMError as error:
        if label in str(error):
            raise
        raise OpenELMError(f"{label}: {error}") from error


# Tasks ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """The questions of all tasks.

    Attributes:
        local: tasks from files, with all questions.
        named: tasks of lm-evaluation-harness.
    """

    local: tuple["Task", ...]
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
        OpenELMError: the options contradict each other, or a task cannot be read.
    """
    from mlx_openelm.evaluation.task_files import read_task

    _check_numbers(limit, num_fewshot)
    suite = _find_suite(suite_name, num_fewshot, tasks_dir)
    files: list[tuple[Path, str]] = []  # with the name of the task, if given
    named: list[tuple[str, int | None]] = []
    if suite is None:
        for task in dict.fromkeys(tasks):
            path = Path(task)
            if path.is_file() or is_record_file(path.name):
                files.append((path, ""))
            else:
                named.append((task, num_fewshot))
        if files and num_fewshot:
            raise OpenELMError(
                f"--num-fewshot is for tasks of the harness, and {files[0][0]} is a "
                "file; leave it out."
            )
    elif suite.local:
        assert tasks_dir is not None
        files = _find_files(console, suite, tasks_dir)
    else:
        named = [(task.task, task.num_fewshot) for task in suite.tasks]
    local = [read_task(path, name=name) for path, name in files]
    names = [task.name for task in local] + [name for name, _ in named]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise OpenELMError(f"Two tasks have the name {twice[0]}; rename a file.")
    opened: tuple[HarnessTask, ...] = ()
    if named:
        from mlx_openelm.evaluation.harness import open_tasks
        from mlx_openelm.evaluation.harness_model import require_harness

        require_harness()
        console.note("[loading the tasks of lm-evaluation-harness]")
        shown = io.StringIO() if console.quiet else sys.stderr  # progress of downloads
        with contextlib.redirect_stderr(shown):
            opened = open_tasks(named, include_path=include_path, offline=offline)
    elif include_path is not None:
        raise OpenELMError(
            "--include-path is for tasks of the harness; name one with --tasks, or "
            "leave it out."
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
        raise OpenELMError(f"There is no suite {name}; choose {', '.join(SUITES)}.")
    if name is not None and num_fewshot is not None:
        raise OpenELMError(
            f"--suite {name} sets the number of solved examples; leave out "
            "--num-fewshot."
        )
    suite = SUITES[name] if name is not None else None
    is_local = suite is not None and suite.local
    if is_local and tasks_dir is None:
        raise OpenELMError(
            f"--suite {name} needs task files, which are not published; give their "
            "folder with --tasks-dir."
        )
    if tasks_dir is not None and not is_local:
        raise OpenELMError("--tasks-dir is for --suite peft; leave it out.")
    return suite


def _find_files(
    console: Console, suite: "Suite", folder: Path
) -> list[tuple[Path, str]]:
    from mlx_openelm.evaluation.suites import find_suite_file

    files = {task.task: find_suite_file(folder, task) for task in suite.tasks}
    missing = [f"{name}.json" for name, path in files.items() if path is None]
    if len(missing) == len(files):
        raise OpenELMError(
            f"{folder} has none of the files of --suite {suite.name}: "
            f"{', '.join(missing)}."
        )
    if missing:
        console.note(f"note: {folder} lacks {', '.join(missing)}; skipping them")
    return [(path, name) for name, path in files.items() if path is not None]
