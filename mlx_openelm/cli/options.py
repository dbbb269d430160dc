"""Options that many commands have, and what they do with them first."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.errors import OpenELMError

Model = Annotated[
    str | None,
    typer.Option(
        help="demo, a model folder, or a Hub id.",
        envvar="MLX_OPENELM_MODEL",
        show_default="demo, or the adapter's base",
    ),
]
Adapter = Annotated[
    str | None, typer.Option("--adapter-path", help="An adapter folder to use.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Nothing but the answer.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the random numbers.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a model that is there.")]

SAMPLING = "What is drawn"  # the heading of these in --help
MaxTokens = Annotated[
    int | None, typer.Option("-m", "--max-tokens", help="Default 256.")
]
Temp = Annotated[
    float | None,
    typer.Option(help="Temperature; 0 is greedy.", rich_help_panel=SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Keep the likeliest of this mass.", rich_help_panel=SAMPLING),
]
TopK = Annotated[
    int | None, typer.Option(help="Keep the N likeliest.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Keep what is this likely beside the likeliest.", rich_help_panel=SAMPLING
    ),
]
Penalty = Annotated[
    float | None, typer.Option(help="Above 1: repeat less.", rich_help_panel=SAMPLING)
]


def need_torch() -> None:
    """Raise OpenELMError where PyTorch is not installed."""
    if find_spec("torch") is None:
        raise OpenELMError(
            "This command needs PyTorch, which is not installed; "
            "in the checkout, pip install -e '.[torch]'."
        )


def open_model(
    console: Console, name: str | None, adapter_path: str | None, offline: bool
) -> Any:
    """Open and load a model; say which where it was not said, and what is slow here."""
    from mlx_openelm.device import describe_slowness
    from mlx_openelm.storage.adapter_folder import attach, open_adapter_folder
    from mlx_openelm.storage.hub import DEMO, find_model
    from mlx_openelm.storage.loading import load_model, load_tokenizer, stored_dtype
    from mlx_openelm.storage.model_folder import open_folder

    if name is not None and not name.strip():
        raise OpenELMError("--model is empty; say demo, a model folder, or a Hub id.")
    adapter = None
    if adapter_path is not None:
        adapter = open_adapter_folder(Path(os.path.expanduser(adapter_path)))
    if adapter is not None and name is None:
        path = adapter.find_base(offline=offline)
        console.note(f"[the adapter's base, {adapter.base}; --model NAME says another]")
    else:
        path = find_model(name or DEMO, offline=offline)
    folder = open_folder(path)
    tokenizer = load_tokenizer(folder)  # what is missing is said before the long work
    if adapter is None and name in (None, DEMO):
        console.note("[the built-in demo model; --model NAME runs another]")
    stored, quantized = stored_dtype(folder), bool(folder.packings)
    for slowness in describe_slowness(stored, quantized=quantized):
        console.note(f"[{slowness}]")
    model = load_model(folder)
    if adapter is not None:
        tokenizer.template = adapter.template or tokenizer.template
        for note in attach(model, adapter.path):
            console.note(note)
    return folder, model, tokenizer
