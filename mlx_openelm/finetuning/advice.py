"""Advice of a fine-tuning run: how to resume, and what to do when memory runs out."""

import contextlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.recipe import FinetuneRecipe


def advise_half_a_batch(recipe: FinetuneRecipe) -> str:
    """Return a sentence on which options to use where the memory ran out."""
    if recipe.dropout and not recipe.grad_checkpoint:
        return "`resume` `grad_checkpoint` needs much less, and goes on the same."
    if recipe.batch_size == 1 or recipe.dropout:
        return "Begin anew with a smaller `max_seq_length` or `batch_size`."
    return (
        f"Half the batch needs half the memory: `resume` `batch_size` "
        f"{recipe.batch_size // 2} `grad_accumulation_steps` "
        f"{recipe.grad_accumulation_steps * 2} goes on with the same steps."
    )


def describe_resume(folder: Path) -> str:
    """Return the command that resumes the run in a folder."""
    path = shlex.quote(str(folder))
    return f"Go on with: mlx-openelm lora --resume --adapter-path {path}"


def describe_death(step: int, recipe: FinetuneRecipe) -> str:
    """Return a sentence on a run that ended without a trace, after a saved step."""
    return (
        f"The last run here was killed without a word, after step {step} was saved: by "
        f"a kill, or because the memory ran out. {advise_half_a_batch(recipe)}"
    )


@contextlib.contextmanager
def explain_out_of_memory(
    step: int, recipe: FinetuneRecipe, describe_kept: Callable[[], str]
) -> Iterator[None]:
    """Turn MLX's error into advice, where it raises; most back ends end the process.

    Raises:
        OpenELMError: the memory ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if "alloc" not in str(error) and "emory" not in str(error):
            raise
        raise OpenELMError(
            f"The memory ran out in step {step}; "
            f"{describe_kept()} {advise_half_a_batch(recipe)}"
        ) from error
