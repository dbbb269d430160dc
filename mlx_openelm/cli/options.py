"""Options that many commands have, and opening the model that they name."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, overload

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


@overload
def expand_path(path: None) -> None: ...
@overload
def expand_path(path: str | Path) -> Path: ...
def expand_path(path: str | Path | None) -> Path | None:
    """Return a path with "~" expanded, which the shell does not do in "--option=~"."""
    return None if path is None else Path(os.path.expanduser(path))


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
    """Load a model, with an adapter if one is given; note defaults and slow set-ups."""
    from mlx_openelm.device import describe_slowness
    from mlx_openelm.storage.adapter_folder import attach, open_adapter_folder
    from mlx_openelm.storage.hub import DEMO, find_model
    from mlx_openelm.storage.loading import load_model, load_tokenizer, stored_dtype
    from mlx_openelm.storage.model_folder import open_folder

    if name is not None and not name.strip():
        raise OpenELMError("--model is empty; say demo, a model folder, or a Hub id.")
    adapter = None
    if adapter_path is not None:
        adapter = open_adapter_folder(expand_path(adapter_path))
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
