"""Checkpoints of a training run for `evaluate --checkpoints`, converted one by one."""

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.evaluation.plan import Entrant, EvaluationPlan, named
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.weight_files import CONFIG, is_adapter

if TYPE_CHECKING:
    from mlx_openelm.evaluation.results import ModelScores
    from mlx_openelm.storage.model_folder import ModelFolder

_ITERATION = re.compile(
    r"(?:iter|iteration|step|checkpoint)s?[_-]?(\d+)", re.IGNORECASE
)
_WEIGHTS = "checkpoint_epoch_*_iter_*.pt"  # in the folder of a training run
_SCORES = "scores.json"  # of a checkpoint that was evaluated as a whole


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder or a .pt file, and the training iteration in its name."""

    path: Path
    iteration: int | None

    @property
    def label(self) -> str:
        return str(self.path)

    def identity(self) -> list[tuple[str, int, int]]:
        """Return path, size and time of its files, to detect that it has changed."""
        from converters.conversion.provenance import identify

        is_folder = self.path.is_dir()
        files = sorted(self.path.iterdir()) if is_folder else [self.path]
        return identify([file for file in files if file.is_file()])


def list_checkpoints(
    paths: Sequence[Path], tokenizer: str | None, *, offline: bool
) -> list[Checkpoint]:
    """Return the checkpoints by iteration; those without one come last.

    A folder of a training run stands for the weights in it.

    Raises:
        OpenELMError: one is named twice; or some are missing, adapters, or not a model
            with a tokenizer, by their headers; all of them are named.
    """
    paths = [one for path in paths for one in sorted(path.glob(_WEIGHTS)) or [path]]
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(paths):
        if resolved[i] in resolved[:i]:
            raise OpenELMError(f"The checkpoint {path} is named twice; leave one out.")
    found = []
    for path in paths:
        match = _ITERATION.search(path.name)
        found.append(Checkpoint(path, int(match[1]) if match else None))
    problems: dict[str, list[str]] = {}
    for path in paths:
        try:
            _check_checkpoint(path, tokenizer, offline=offline)
        except OpenELMError as error:
            problems.setdefault(str(error), []).append(str(path))
    if problems:
        raise OpenELMError(
            " ".join(
                problem if labels[0] in problem else f"{', '.join(labels)}: {problem}"
                for problem, labels in problems.items()
            )
        )
    return sorted(found, key=lambda c: (c.iteration is None, c.iteration or 0))


def _check_checkpoint(path: Path, tokenizer: str | None, *, offline: bool) -> None:
    """Open the headers and the tokenizer of a checkpoint.

    Raises:
        OpenELMError: it cannot be scored.
    """
    from converters.formats.sources import open_without_adapter
    from mlx_openelm.storage.loading import load_tokenizer
    from mlx_openelm.storage.tokenizer_finder import find_tokenizer

    if not path.exists():
        raise OpenELMError(f"There is no checkpoint {path}.")
    if is_adapter(path):
        raise OpenELMError(f"{path}: an adapter, not a model; score it with `compare`.")
    if path.is_dir() and not (path / CONFIG).is_file():
        raise OpenELMError(
            f"{path} has neither {_WEIGHTS} nor {CONFIG}; pass a model folder or .pt "
            "files."
        )
    if folder := _open_model_folder(path, tokenizer):
        load_tokenizer(folder)
        return
    source = open_without_adapter(path)
    find_tokenizer(source.folder, tokenizer, source.config.vocab_size, offline=offline)


def _open_model_folder(path: Path, tokenizer: str | None) -> "ModelFolder | None":
    """Open a checkpoint that can be scored without a conversion; None for others."""
    from mlx_openelm.storage.model_folder import open_folder

    if path.is_dir() and tokenizer is None:
        with contextlib.suppress(OpenELMError):
            return open_folder(path)
    return None


def check_checkpoint_options(
    checkpoints: Sequence[Path] | None,
    tokenizer: str | None,
    others: Sequence[object],
) -> None:
    """Raise a usage error for options that contradict each other.

    Args:
        others: the values of --model, --adapter-path and --compare.
    """
    if tokenizer is not None and not checkpoints:
        raise typer.BadParameter("needs --checkpoints", param_hint="--tokenizer")
    flags = ("--model", "--adapter-path", "--compare")
    for flag, value in zip(flags, others, strict=True):
        if checkpoints and value:
            raise typer.BadParameter(
                "cannot be used with --checkpoints", param_hint=flag
            )


def score_checkpoints(
    console: Console,
    checkpoints: Sequence[Checkpoint],
    plan: EvaluationPlan,
    score: Callable[[Entrant], "ModelScores"],
    *,
    texts: Sequence[Path],
    window: int | None,
    make_folder: Callable[[str], Path | None],
    tokenizer: str | None,
    force: bool,
    offline: bool,
) -> Iterator["ModelScores"]:
    """Yield the scores of each checkpoint; those that are stored are not computed.

    Args:
        score: loads a model folder and scores it.
        make_folder: returns the folder of a checkpoint's answers, or None.
        force: replace stored scores.
    """
    evaluation = {
        **_describe_evaluation(plan, texts, window),
        "tokenizer": _describe_tokenizer(tokenizer),
    }
    for checkpoint in checkpoints:
        where = make_folder(checkpoint.label)
        done = None if force else _read_scores(where, checkpoint, evaluation)
        if done is None:
            with (
                named(checkpoint.label),
                _as_model_folder(
                    console, checkpoint, tokenizer, offline=offline
                ) as folder,
            ):
                done = score(Entrant(checkpoint.label, folder))
            _write_scores(where, checkpoint, evaluation, done)
        yield done


@contextlib.contextmanager
def _as_model_folder(
    console: Console, checkpoint: Checkpoint, tokenizer: str | None, *, offline: bool
) -> Iterator[str]:
    """Provide a checkpoint as a model folder; another format is converted meanwhile.

    Raises:
        OpenELMError: it is not an OpenELM, or has no tokenizer.
    """
    from converters.conversion.run import convert

    path = checkpoint.path
    if _open_model_folder(path, tokenizer):
        yield str(path)
        return
    with tempfile.TemporaryDirectory(prefix="mlx-openelm-") as folder:
        with console.progress(f"Converting {path.name}") as progress:
            convert(
                path,
                Path(folder) / "model",
                tokenizer=tokenizer,
                dtype="float32",
                receipt=False,
                offline=offline,
                on_progress=lambda at: progress.update(at.done, at.total, at.units),
            )
        yield str(Path(folder) / "model")


# Scores of finished checkpoints --------------------------------------------------


def _describe_evaluation(
    plan: EvaluationPlan, texts: Sequence[Path], window: int | None
) -> dict[str, Any]:
    """Return everything but the model that determines scores, as JSON values."""
    from converters.conversion.provenance import identify

    named = []
    if plan.named:
        from mlx_openelm.evaluation.harness import describe_run

        named = [describe_run(task, "") for task in plan.named]
    return {
        "texts": identify(texts),
        "window": window,
        "limit": plan.limit,
        "files": [[task.name, task.digest] for task in plan.local],
        "tasks": named,
    }


def _describe_tokenizer(tokenizer: str | None) -> Any:
    """Return the name of a tokenizer, and its files if it is a path."""
    from converters.conversion.provenance import identify
    from mlx_openelm.paths import user_path

    path = user_path(tokenizer) if tokenizer else None
    if path is None or not path.exists():
        return tokenizer
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return identify([file for file in files if file.is_file()])


def _read_scores(
    folder: Path | None, checkpoint: Checkpoint, evaluation: Mapping[str, Any]
) -> "ModelScores | None":
    """Return the scores of this evaluation that are stored in a folder, or None."""
    from mlx_openelm.evaluation.results import ModelScores
    from mlx_openelm.input_files import read_json

    if folder is None or not (folder / _SCORES).is_file():
        return None
    run = _as_json(_describe(checkpoint, evaluation))
    with contextlib.suppress(ValueError, TypeError, KeyError):  # damaged: scored again
        stored = read_json(folder / _SCORES)
        if stored["run"] == run:
            return ModelScores.from_json(stored["scores"])
    return None


def _write_scores(
    folder: Path | None,
    checkpoint: Checkpoint,
    evaluation: Mapping[str, Any],
    scores: "ModelScores",
) -> None:
    """Store the scores of a checkpoint, so that it is not converted again."""
    from mlx_openelm.storage.staging import replaced_file

    if folder is not None:
        run = _describe(checkpoint, evaluation)
        with replaced_file(folder / _SCORES) as part:
            content = {"run": run, "scores": asdict(scores)}
            part.write_text(json.dumps(content), encoding="utf-8")


def _describe(checkpoint: Checkpoint, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {"checkpoint": checkpoint.identity(), **evaluation}


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
