"""Run tasks of EleutherAI's lm-evaluation-harness.

The harness builds the requests and computes the metrics; `harness_model` answers the
requests. It is the optional extra `eval`, imported inside the functions.
"""

import contextlib
import difflib
import hashlib
import importlib.metadata
import io
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.harness_model import (
    AnswerStore,
    quiet,
    require_harness,
    wrap_model,
)
from mlx_openelm.evaluation.results import Metric, TaskResult
from mlx_openelm.evaluation.scorer import Scorer
from mlx_openelm.input_files import read_json
from mlx_openelm.storage.staging import lock_target, replaced_file

SEEDS = (0, 1234)  # the harness's defaults: `random`; numpy and few-shot examples
BOOTSTRAP = 1000  # draws, for the standard error of metrics that are not means (F1)

_NO_PROCESSES = "DISABLE_MULTIPROC"

# Tasks ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """A task, a group or a tag of the harness, with its questions."""

    name: str
    num_fewshot: int | None
    loaded: Any  # lm_eval.tasks.manager.TaskDict


def open_tasks(
    requested: Sequence[tuple[str, int | None]],
    *,
    include_path: Path | None = None,
    offline: bool = False,
) -> tuple[HarnessTask, ...]:
    """Find tasks and load their questions, from the Hub for the harness's own tasks.

    Args:
        requested: names and numbers of few-shot examples; None: the task's own number.
            A task whose own number is 0 keeps it.
        include_path: a folder with more tasks (YAML files).
        offline: use only downloaded data.

    Raises:
        OpenELMError: the harness is not installed, a name is unknown (the closest names
            are listed), or the questions cannot be loaded.
    """
    require_harness()
    if include_path is not None and not include_path.is_dir():
        raise OpenELMError(
            f"`include_path` is {include_path}, which is not a folder; pass a folder "
            "with YAML task files."
        )
    names = [name for name, _ in requested]
    with quiet(), network(allowed=not offline):
        manager = _open_manager(names, include_path)
        for name in names:
            if name not in manager.task_index:
                raise OpenELMError(_describe_unknown(name, manager.task_index))
        return tuple(_open_task(manager, name, shots) for name, shots in requested)


def _open_manager(names: Sequence[str], include_path: Path | None) -> Any:
    """Return a TaskManager, if possible without lm_eval's tasks, which load slowly."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped] # it has no stubs

    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(_is_whole(own, name) for name in names):
            return own
    return TaskManager(include_path=str(include_path) if include_path else None)


def _is_whole(manager: Any, name: Any) -> bool:
    """Whether a manager has a task, or all tasks of a group."""
    if name not in manager.all_groups:
        return name in manager.all_tasks
    members = manager.task_index[name].cfg["task"]
    return all(_is_whole(manager, member) for member in members)


def _describe_unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    closest = f" closest are {', '.join(near)};" if near else ""
    return (
        f"{name} is neither a file nor a task of the harness;{closest} pass a task "
        "file, or a name that `lm-eval ls tasks` lists."
    )


def _open_task(manager: Any, name: str, num_fewshot: int | None) -> HarnessTask:
    try:
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            shots = own if own == 0 or num_fewshot is None else num_fewshot
            task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=SEEDS[1])
    except _network_errors() as error:
        raise OpenELMError(
            f"The questions of the task {name} are not on this machine and cannot be "
            f"downloaded: {_in_one_line(error)}; run it once with network access, or "
            "choose another task."
        ) from error
    except Exception as error:  # a task is a YAML file that may contain any code
        raise OpenELMError(
            f"The harness cannot load the task {name}: {type(error).__name__}, "
            f"{_in_one_line(error)}; correct it, or choose another task."
        ) from error
    return HarnessTask(name, num_fewshot, loaded)


def run_task(
    lm: Any, task: HarnessTask, *, limit: int | None
) -> tuple[TaskResult, ...]:
    """Run a task; a group without an aggregate score gives one result per task.

    Args:
        lm: see `wrap_model`.
        limit: use only the first questions; in a group, of each of its tasks.

    Raises:
        OpenELMError: the model or the task fails.
    """
    import lm_eval  # type: ignore[import-untyped] # it has no stubs

    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    try:
        with _silent():
            output = lm_eval.evaluate(
                lm, task.loaded, limit=limit, bootstrap_iters=BOOTSTRAP
            )
    except OpenELMError as error:
        raise OpenELMError(f"In the task {task.name}: {error}") from error
    except Exception as error:  # see `_open_task`
        raise OpenELMError(
            f"The harness fails in the task {task.name}: {type(error).__name__}, "
            f"{_in_one_line(error)}; correct it, or choose another task."
        ) from error
    return _read_results(output, task)


def _read_results(
    output: Mapping[str, Any], task: HarnessTask
) -> tuple[TaskResult, ...]:
    groups = output.get("groups") or {}
    if task.name in groups:
        return (_read_result(task.name, output, list(output["samples"])),)
    return tuple(_read_result(name, output, [name]) for name in output["samples"])


def _read_result(
    name: str, output: Mapping[str, Any], leaves: Sequence[str]
) -> TaskResult:
    """Return the result of a task, or of a group whose tasks are `leaves`."""
    samples = [sample for leaf in leaves for sample in output["samples"][leaf]]
    sizes = [output["n-samples"][leaf] for leaf in leaves]
    metrics = {}
    row = output["results"][name]
    for key, value in row.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{metric}_stderr,{kind}")
        metrics[metric if kind == "none" else key] = Metric(
            float(value),
            float(stderr) if isinstance(stderr, int | float) else None,
            _values(samples, metric, kind, float(value)),
        )
    digest = hashlib.sha256("".join(s["doc_hash"] for s in samples).encode())
    return TaskResult(
        task=name,
        num_fewshot=max(output["n-shot"].get(leaf, 0) for leaf in leaves),
        n=sum(size["effective"] for size in sizes),
        total=sum(size["original"] for size in sizes),
        digest=digest.hexdigest(),
        metrics=metrics,
    )


def _values(
    samples: Sequence[Mapping[str, Any]], metric: str, kind: str, mean: float
) -> tuple[float, ...]:
    """Return a metric's values by question if their mean is the metric, else none."""
    values = [s[metric] for s in samples if s["filter"] == kind and metric in s]
    if not values or not all(isinstance(value, int | float) for value in values):
        return ()
    if abs(sum(values) / len(values) - mean) <= 1e-9 * max(1.0, abs(mean)):
        return tuple(map(float, values))
    return ()  # also for NaN


# Results on disk -----------------------------------------------------------------


def run_resumable_task(
    scorer: Scorer,
    task: HarnessTask,
    folder: Path,
    *,
    limit: int | None,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TaskResult, ...]:
    """Run a task and write its result to a folder; a stopped run resumes.

    Answers are written to TASK.answers.jsonl as they come, and the result to TASK.json
    at the end. A task with a result is not run again; another limit takes over the
    answers.

    Args:
        folder: results of this model only.
        force: replace the result of another model or of other settings.

    Raises:
        OpenELMError: the folder has such a result, another process writes it, it cannot
            be written, or the model or the task fails.
    """
    run = describe_run(task, scorer.key)
    path = folder / f"{task.name.replace(os.sep, '_')}.json"
    try:
        with lock_target(path):
            done = _read_file(path, run, limit, force=force)
            if done is not None:
                return done
            with AnswerStore(path.with_suffix(".answers.jsonl"), run) as store:
                lm = wrap_model(scorer, store=store, on_progress=on_progress)
                results = run_task(lm, task, limit=limit)
                _write_file(path, {**run, "limit": limit}, results)
    except OSError as error:
        raise OpenELMError(
            f"Cannot write {path}: {error.strerror or error}; the answers are kept."
        ) from error
    return results


def describe_run(task: HarnessTask, model: str) -> dict[str, Any]:
    """Return everything that determines a task's answers; `model` is a fingerprint."""
    return {
        "task": task.name,
        "num_fewshot": task.num_fewshot,
        "questions": _digest(task),
        "model": model,
        "harness": importlib.metadata.version("lm_eval"),
    }


def _digest(task: HarnessTask) -> str:
    """Return the SHA-256 of a task's settings, questions and few-shot examples."""
    digest = hashlib.sha256()
    with quiet():
        for name, leaf in task.loaded["tasks"].items():
            shots = leaf.fewshot_docs() if leaf.get_config("num_fewshot") else ()
            content = [name, leaf.dump_config(), list(leaf.eval_docs), list(shots)]
            # Other objects count by type: their repr may contain an address.
            digest.update(json.dumps(content, default=_name_type).encode())
    return digest.hexdigest()


def _name_type(value: object) -> str:
    return type(value).__qualname__


def _read_file(
    path: Path, run: Mapping[str, Any], limit: int | None, *, force: bool
) -> tuple[TaskResult, ...] | None:
    """Return the results of an earlier run, or None; also None for another limit.

    Raises:
        OpenELMError: the file belongs to another run, or is damaged.
    """
    if not path.exists():
        return None
    try:
        content = read_json(path)
        stored = dict(content["run"])
        other_limit = stored.pop("limit") != limit
        if stored != run:
            if force:
                return None
            raise OpenELMError(
                f"{path} holds scores of another model or with other settings; choose "
                "another folder, or use `force` to replace them."
            )
        if other_limit:
            return None
        return tuple(map(TaskResult.from_json, content["results"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if force:
            return None
        raise OpenELMError(
            f"{path} is damaged; remove it, or use `force` to replace it."
        ) from error


def _write_file(
    path: Path, run: Mapping[str, Any], results: Sequence[TaskResult]
) -> None:
    """Write a task's results atomically."""
    content = {"run": run, "results": [asdict(result) for result in results]}
    with replaced_file(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")


# Output and network access of the harness ----------------------------------------


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress stderr, with the harness's progress bars; see also `wrap_model`."""
    former = os.environ.get(_NO_PROCESSES)
    os.environ[_NO_PROCESSES] = "1"  # else it forks to bootstrap standard errors
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if former is None:
            del os.environ[_NO_PROCESSES]
        else:
            os.environ[_NO_PROCESSES] = former


@contextlib.contextmanager
def network(*, allowed: bool) -> Iterator[None]:
    """Set whether the Hub may be asked, as HF_HUB_OFFLINE does."""
    if allowed:
        yield
        return
    import datasets.config  # type: ignore[import-untyped] # it has no stubs
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (datasets.config, constants)
    former = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, former, strict=True):
            module.HF_HUB_OFFLINE = value


def _network_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    return (ConnectionError, TimeoutError, HfHubHTTPError, LocalEntryNotFoundError)


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or "without a message"
    return text if len(text) <= 300 else f"{text[:297]}..."
