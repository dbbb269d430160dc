"""The command that trains from nothing, in PyTorch: `pretrain`."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_openelm.command_options import Json, Quiet, Seed, need_torch
from mlx_openelm.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

    from converters.pretrain import Event


def pretrain(
    recipe: Annotated[
        str, typer.Option("-c", "--recipe", help="A recipe: name or file.")
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="Text file pattern; repeatable.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Seed = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an OpenELM from nothing, in PyTorch (needs PyTorch). Prints the weights."""
    need_torch()
    rank = int(os.environ.get("RANK", "0"))  # set by torchrun; the first alone speaks
    console = Console(quiet=quiet or rank > 0)
    from mlx_openelm.pretrain_recipe import PretrainRecipe
    from mlx_openelm.recipe import load_recipe

    said = {"data.train": data, "output": output, "steps": steps, "seed": seed}
    chosen = load_recipe(PretrainRecipe, recipe, said)
    from converters.pretrain import pretrain as run  # seconds: torch is imported

    with console.progress("Training") as progress:
        try:
            path = run(chosen, resume=resume, on_event=_pretraining(console, progress))
        except KeyboardInterrupt:
            console.note(f"\nSaved. Go on with: pretrain -c {recipe} --resume")
            raise
    if rank == 0 and as_json:
        console.answer_json({"path": str(path)})
    elif rank == 0:
        console.answer(str(path))


def _pretraining(console: Console, progress: Any) -> "Callable[[Event], None]":
    from converters.pretrain import Evaluated, Saved, Started, Trained

    steps = 0

    def show(event: "Event") -> None:
        nonlocal steps
        if isinstance(event, Started):
            steps = event.steps
            console.note(
                f"{event.num_parameters:,} parameters, {event.num_documents:,} "
                f"documents, {event.num_tokens:,} tokens in "
                f"{event.num_sequences:,} sequences; "
                f"dropped {event.dropped or 'nothing'}; step {event.first_step} of "
                f"{event.steps}"
            )
        elif isinstance(event, Trained):
            progress.update(event.step, steps, f"loss {event.loss:.3f}")
        elif isinstance(event, Evaluated):
            console.note(
                f"step {event.step}: held-out {event.nats_per_token:.4f} nats per "
                f"token, {event.bits_per_byte:.4f} bits per byte"
            )
        elif isinstance(event, Saved):
            console.note(f"step {event.step}: saved {event.path}")

    return show
