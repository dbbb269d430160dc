"""EleutherAI's lm-evaluation-harness lets our models do its tasks.

It builds the questions and counts the answers, which `harness_model` gives. It is the
extra `eval`, and imported inside the functions.
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
    KeptAnswers,
    need_harness,
    quiet,
    wrap_model,
)
from mlx_openelm.evaluation.results import Metric, TaskResult
from mlx_openelm.generation.batching import BATCH_SIZE
from mlx_openelm.model.fingerprint import fingerprint_model
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.staging import lock_target, replaced_file
from mlx_openelm.text.tokenizer import Tokenizer

SEEDS = (0, 1234)  # the harness's: of `random`; of numpy and of the examples in prompts
BOOTSTRAP = 1000  # draws, for the error of what is no mean (F1, say)

_NO_PROCESSES = "DISABLE_MULTIPROC"

# Tasks ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """A task, a group or a tag of the harness, with its questions."""

    name: str
    num_fewshot: int | None
    loaded: Any  # lm_eval.tasks.manager.TaskDict


def open_tasks(
    wanted: Sequence[tuple[str, int | None]],
    *,
    include_path: Path | None = None,
    offline: bool = False,
) -> tuple[HarnessTask, ...]:
    """Find tasks and read their questions; those of the harness are on the Hub.

    Args:
        wanted: names, with the solved examples in front of every question; None: as
            the task says. A task that says 0 stays so.
        include_path: a folder with more tasks, YAML files.
        offline: use what was downloaded already.

    Raises:
        OpenELMError: the harness is not installed, a name is unknown (the nearest are
            named), or the questions are not to be had.
    """
    need_harness()
    if include_path is not None and not include_path.is_dir():
        raise OpenELMError(f"`include_path` is {include_path}, where no folder is.")
    names = [name for name, _ in wanted]
    with quiet(), _network(allowed=not offline):
        manager = _open_manager(names, include_path)
        for name in names:
            if name not in manager.task_index:
                raise OpenELMError(_describe_unknown(name, manager.task_index))
        return tuple(_open_task(manager, name, shots) for name, shots in wanted)


def _open_manager(names: Sequence[str], include_path: Path | None) -> Any:
    """Return lm_eval's TaskManager; to know all its tasks takes it seconds."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped] # it has no stubs

    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(_is_whole(own, name) for name in names):
            return own
    return TaskManager(include_path=str(include_path) if include_path else None)


def _is_whole(manager: Any, name: Any) -> bool:
    """Whether a task, and all the tasks of a group, are known."""
    if name not in manager.all_groups:
        return name in manager.all_tasks
    members = manager.task_index[name].cfg["task"]
    return all(_is_whole(manager, member) for member in members)


def _describe_unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    nearest = f" nearest are {', '.join(near)};" if near else ""
    return (
        f"There is no file {name}, and the harness has no task of that name;{nearest} "
        "say a task file, or a name that `lm-eval ls tasks` lists."
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
            f"The questions of the task {name} are not on this machine, and they "
            f"cannot be fetched: {_in_one_line(error)}; run it once with the network, "
            "or say another task."
        ) from error
    except Exception as error:  # a task is a YAML file with code, and may be anyone's
        raise OpenELMError(
            f"The harness cannot read the task {name}: {type(error).__name__}, "
            f"{_in_one_line(error)}; correct it, or say another task."
        ) from error
    return HarnessTask(name, num_fewshot, loaded)


def run_task(
    lm: Any, task: HarnessTask, *, limit: int | None
) -> tuple[TaskResult, ...]:
    """Let a wrapped model do a task; a group without a score of its own gives several.

    Args:
        lm: see `wrap_model`.
        limit: of questions, the first ones; in a group, of each of its tasks.

    Raises:
        OpenELMError: the model or the task fails.
    """
    import lm_eval  # type: ignore[import-untyped] # it has no stubs

    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    try:
        with _silent():
            found = lm_eval.evaluate(
                lm, task.loaded, limit=limit, bootstrap_iters=BOOTSTRAP
            )
    except OpenELMError as error:
        raise OpenELMError(f"In the task {task.name}: {error}") from error
    except Exception as error:  # see `_open_task`
        raise OpenELMError(
            f"The harness fails in the task {task.name}: {type(error).__name__}, "
            f"{_in_one_line(error)}; correct it, or say another task."
        ) from error
    return _read_results(found, task)


def _read_results(
    found: Mapping[str, Any], task: HarnessTask
) -> tuple[TaskResult, ...]:
    groups = found.get("groups") or {}
    if task.name in groups:
        return (_read_result(task.name, found, list(found["samples"])),)
    return tuple(_read_result(name, found, [name]) for name in found["samples"])


def _read_result(
    name: str, found: Mapping[str, Any], leaves: Sequence[str]
) -> TaskResult:
    """Return one task's result; `leaves` are the tasks that a group is made of."""
    samples = [sample for leaf in leaves for sample in found["samples"][leaf]]
    sizes = [found["n-samples"][leaf] for leaf in leaves]
    metrics = {}
    row = found["results"][name]
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
        num_fewshot=max(found["n-shot"].get(leaf, 0) for leaf in leaves),
        n=sum(size["effective"] for size in sizes),
        total=sum(size["original"] for size in sizes),
        digest=digest.hexdigest(),
        metrics=metrics,
    )


def _values(
    samples: Sequence[Mapping[str, Any]], metric: str, kind: str, mean: float
) -> tuple[float, ...]:
    """Return a metric question by question, if it is their mean."""
    values = [s[metric] for s in samples if s["filter"] == kind and metric in s]
    if not values or not all(isinstance(value, int | float) for value in values):
        return ()
    if abs(sum(values) / len(values) - mean) <= 1e-9 * max(1.0, abs(mean)):
        return tuple(map(float, values))
    return ()  # of NaN, too


# Results on disk -----------------------------------------------------------------


def run_kept_task(
    model: OpenELM,
    tokenizer: Tokenizer,
    task: HarnessTask,
    folder: Path,
    *,
    limit: int | None,
    batch_size: int = BATCH_SIZE,
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TaskResult, ...]:
    """Do a task and keep what comes of it in a folder; a stopped run goes on.

    The folder gets TASK.json when the task is done, and until then every answer in
    TASK.answers.jsonl. A task that is done there is not run again.

    Args:
        folder: of this one model.
        force: replace the result of another model or of other settings.

    Raises:
        OpenELMError: such a result is there, another process writes it, or the disk,
            the model or the task fails.
    """
    said = _describe_run(task, limit, fingerprint_model(model))
    path = folder / f"{task.name.replace(os.sep, '_')}.json"
    try:
        with lock_target(path):
            done = _read_file(path, said, force=force)
            if done is not None:
                return done
            with KeptAnswers(path.with_suffix(".answers.jsonl"), said) as kept:
                lm = wrap_model(
                    model,
                    tokenizer,
                    batch_size=batch_size,
                    kept=kept,
                    on_progress=on_progress,
                )
                results = run_task(lm, task, limit=limit)
                _write_file(path, said, results)
    except OSError as error:
        raise OpenELMError(
            f"Cannot write {path}: {error.strerror or error}; what was answered stays."
        ) from error
    return results


def _describe_run(task: HarnessTask, limit: int | None, model: str) -> dict[str, Any]:
    """Return all that a task's result depends on; `model` is a fingerprint."""
    return {
        "task": task.name,
        "num_fewshot": task.num_fewshot,
        "limit": limit,
        "questions": _digest(task),
        "model": model,
        "harness": importlib.metadata.version("lm_eval"),
    }


def _digest(task: HarnessTask) -> str:
    """Return sha256 in hex of a task's settings, questions and solved examples."""
    digest = hashlib.sha256()
    with quiet():
        for name, leaf in task.loaded["tasks"].items():
            shots = leaf.fewshot_docs() if leaf.get_config("num_fewshot") else ()
            told = [name, leaf.dump_config(), list(leaf.eval_docs), list(shots)]
            # What is not JSON counts by its type: an address differs in every run.
            digest.update(json.dumps(told, default=_name_type).encode())
    return digest.hexdigest()


def _name_type(value: object) -> str:
    return type(value).__qualname__


def _read_file(
    path: Path, said: Mapping[str, Any], *, force: bool
) -> tuple[TaskResult, ...] | None:
    """Return the results that a former run has written; None where there are none.

    Raises:
        OpenELMError: the file is of another run, or damaged.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["run"] != said:
            if force:
                return None
            raise OpenELMError(
                f"{path} holds scores of another model or with other settings; choose "
                "another folder, or say `force` to replace them."
            )
        return tuple(
            TaskResult(
                **{
                    **result,
                    "metrics": {
                        name: Metric(
                            metric["value"], metric["stderr"], tuple(metric["values"])
                        )
                        for name, metric in result["metrics"].items()
                    },
                }
            )
            for result in found["results"]
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if force:
            return None
        raise OpenELMError(
            f"{path} holds no scores that can be read; remove it, or say `force`."
        ) from error


def _write_file(
    path: Path, said: Mapping[str, Any], results: Sequence[TaskResult]
) -> None:
    """Write a task's results, whole or not at all."""
    told = {"run": said, "results": [asdict(result) for result in results]}
    with replaced_file(path) as part:
        part.write_text(json.dumps(told), encoding="utf-8")


# Keeping the harness quiet -------------------------------------------------------


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Let nothing through of the harness's bars; ours gets out, see `wrap_model`."""
    former = os.environ.get(_NO_PROCESSES)
    os.environ[_NO_PROCESSES] = "1"  # else it forks, for the errors of F1 and the like
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if former is None:
            del os.environ[_NO_PROCESSES]
        else:
            os.environ[_NO_PROCESSES] = former


@contextlib.contextmanager
def _network(*, allowed: bool) -> Iterator[None]:
    """Keep the data sets' library from the network, as HF_HUB_OFFLINE does."""
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
    said = " ".join(str(error).split()).rstrip(".") or "without a word"
    return said if len(said) <= 300 else f"{said[:297]}..."
