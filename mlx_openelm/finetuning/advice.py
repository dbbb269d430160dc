"""Commands that resume or restart a fine-tuning run, for its messages."""

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.run_files import RECIPE


def advise_resume(folder: Path) -> str:
    """Return the command that resumes the run in a folder."""
    return f"Resume with: {_resume_command(folder)}"


def advise_less_memory(folder: Path, recipe: FinetuneRecipe) -> str:
    """Return a command that resumes the run with less memory, or else restarts it."""
    if recipe.batch_size % 2 == 0 and not recipe.masks_by_batch:
        command = _resume_command(
            folder,
            batch_size=recipe.batch_size // 2,
            grad_accumulation_steps=recipe.grad_accumulation_steps * 2,
        )
        return f"Resume with half the memory and the same steps: {command}"
    if not recipe.grad_checkpoint:
        command = _resume_command(folder, grad_checkpoint=True)
        return f"Resume with much less memory: {command}"
    length = max(4, (recipe.max_seq_length or 0) // 2)
    command = _command(
        *("--recipe", str(folder / RECIPE), "--force"),
        *("--adapter-path", str(folder)),
        max_seq_length=length,
        max_prompt_length=length // 2,
    )
    return f"Start again with shorter sequences: {command}"


def describe_killed(folder: Path, step: int, recipe: FinetuneRecipe) -> str:
    """Describe a run whose process was killed after a saved step."""
    return (
        f"The last process here was killed after step {step} was saved, perhaps "
        f"because it was out of memory. {advise_less_memory(folder, recipe)}"
    )


@contextlib.contextmanager
def explain_out_of_memory(
    folder: Path, step: int, recipe: FinetuneRecipe, describe_saved: Callable[[], str]
) -> Iterator[None]:
    """Turn MLX's out-of-memory error into advice.

    On most backends MLX ends the process instead; see `describe_killed`.

    Raises:
        OpenELMError: out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if "alloc" not in str(error) and "emory" not in str(error):
            raise
        raise OpenELMError(
            f"Out of memory in step {step}. "
            f"{describe_saved()} {advise_less_memory(folder, recipe)}"
        ) from error


def _resume_command(folder: Path, **changes: int | bool) -> str:
    return _command("--resume", "--adapter-path", str(folder), **changes)


def _command(*words: str, **changes: int | bool) -> str:
    for name, value in changes.items():
        words += (f"--{name.replace('_', '-')}",)
        words += () if value is True else (str(value),)
    return shlex.join(["mlx-openelm", "lora", *words])
