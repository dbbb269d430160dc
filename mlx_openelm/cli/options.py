"""Options that many commands have: their checks, and opening the model they name."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, overload

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.errors import OpenELMError

MODEL_VARIABLE = "MLX_OPENELM_MODEL"  # environment variable: the default of --model
Model = Annotated[
    str | None,
    typer.Option(
        help="demo, a model folder, or a Hub id.",
        envvar=MODEL_VARIABLE,
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


def check_report_file(
    path: Path | None, flag: str, suffix: str, *, force: bool | None = None
) -> None:
    """Raise OpenELMError, before the long work, if a report cannot be written.

    Args:
        force: the value of --force; None for a command without it.
    """
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise OpenELMError(f"{flag} is {path}; say a name that ends in {suffix}.")
    if os.path.lexists(path) and not force:
        instead = "" if force is None else ", or --force"
        raise OpenELMError(
            f"{path} exists already; say another name with {flag}{instead}."
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OpenELMError(
            f"Cannot write {path}: {error.strerror or error}; say another place with "
            f"{flag}."
        ) from error


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
    from mlx_openelm.storage.adapter_folder import attach
    from mlx_openelm.storage.loading import (
        choose_model,
        load_model,
        load_tokenizer,
        stored_dtype,
    )

    if name is not None and not name.strip():
        raise OpenELMError("--model is empty; say demo, a model folder, or a Hub id.")
    choice = choose_model(name, expand_path(adapter_path), offline=offline)
    folder, adapter = choice.folder, choice.adapter
    if choice.is_base:
        console.note(f"[the adapter's base, {choice.name}; --model NAME says another]")
    tokenizer = load_tokenizer(folder, adapter)  # what is missing is reported first
    if choice.is_demo:
        console.note("[the built-in demo model; --model NAME runs another]")
    stored, quantized = stored_dtype(folder), bool(folder.packings)
    for slowness in describe_slowness(stored, quantized=quantized):
        console.note(f"[{slowness}]")
    model = load_model(folder)
    if adapter is not None:
        for note in attach(model, adapter.path):
            console.note(note)
    return folder, model, tokenizer
