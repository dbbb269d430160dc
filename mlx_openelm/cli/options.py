"""Options that commands share, their checks, and loading the model that they name."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.errors import OpenELMError
from mlx_openelm.options import OUTPUT_PANEL

if TYPE_CHECKING:
    from mlx_openelm.tuning import Environment, Tuning

MODEL_VARIABLE = "MLX_OPENELM_MODEL"  # environment variable: the default of --model
Model = Annotated[
    str | None,
    typer.Option(
        help="Model: demo, a folder, or a Hub id.",
        envvar=MODEL_VARIABLE,
        show_default="demo, or the adapter's base",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter-path", help="Adapter folder to use with the model."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Write JSON to stdout.", rich_help_panel=OUTPUT_PANEL),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        help="Write nothing but the result and errors.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
NoTuning = Annotated[
    bool,
    typer.Option(
        "--no-tuning",
        help="Ignore the settings that selfcheck --tune has stored.",
        rich_help_panel="Speed and memory",
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Do not use the network.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace existing output.", rich_help_panel=OUTPUT_PANEL
    ),
]


def use_tuning(
    console: Console, no_tuning: bool, variables: "Environment | None" = None
) -> "Tuning":
    """Return the settings of this machine, and apply those of the whole process.

    Args:
        variables: see `start_tuned`.
    """
    from mlx_openelm.tuning import start_tuned

    tuning = start_tuned(
        ignored=no_tuning, variables=variables, on_note=console.note_once
    )
    if tuning.wired:
        from mlx_openelm.device import wire_memory

        wire_memory()
    return tuning


def optional_path(path: str | None) -> Path | None:
    """Return the path of an option that may be absent."""
    return None if path is None else Path(path)


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
        raise OpenELMError(f"{flag} is {path}; give a name that ends in {suffix}.")
    if os.path.lexists(path) and not force:
        instead = "" if force is None else ", or use --force"
        raise OpenELMError(f"{path} exists already; give {flag} another name{instead}.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OpenELMError(
            f"Cannot write {path}: {error.strerror or error}; give {flag} another path."
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
    """Load a model and its adapter; note which model is used and why it may be slow."""
    from mlx_openelm.device import describe_slowness
    from mlx_openelm.storage.adapter_folder import attach
    from mlx_openelm.storage.loading import (
        choose_model,
        load_model,
        load_tokenizer,
        stored_dtype,
    )

    if name is not None and not name.strip():
        raise OpenELMError("--model is empty; give demo, a folder, or a Hub id.")
    choice = choose_model(name, optional_path(adapter_path), offline=offline)
    folder, adapter = choice.folder, choice.adapter
    if choice.is_base:
        console.note(f"[the adapter's base, {choice.name}; --model NAME uses another]")
    tokenizer = load_tokenizer(folder, adapter)  # before the weights, which take long
    if choice.is_demo:
        console.note("[the built-in demo model; --model NAME uses another]")
    stored, quantized = stored_dtype(folder), bool(folder.packings)
    for slowness in describe_slowness(stored, quantized=quantized):
        console.note_once(f"[{slowness}]")
    for note in folder.notes:
        console.note(note)
    model = load_model(folder)
    if adapter is not None:
        for note in attach(model, adapter.path):
            console.note(note)
    return folder, model, tokenizer
