"""The Typer application: its commands, its error handling and the entry point."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from mlx_openelm.cli.bench import bench_command
from mlx_openelm.cli.chat import chat_command
from mlx_openelm.cli.console import Console, close_broken_pipe, prepare_streams
from mlx_openelm.cli.convert import convert_command
from mlx_openelm.cli.evaluate import evaluate_command
from mlx_openelm.cli.flags import show_flags, use_flags_of
from mlx_openelm.cli.fuse import fuse_command
from mlx_openelm.cli.generate import generate_command
from mlx_openelm.cli.grow import grow_command
from mlx_openelm.cli.help.commands import Command, CommandGroup
from mlx_openelm.cli.help.examples import show_examples
from mlx_openelm.cli.inspect import inspect_command
from mlx_openelm.cli.lora import lora_command
from mlx_openelm.cli.parity import parity_command
from mlx_openelm.cli.pretrain import pretrain_command
from mlx_openelm.cli.recipes import recipes_app
from mlx_openelm.cli.selfcheck import selfcheck_command
from mlx_openelm.cli.serve import serve_command
from mlx_openelm.cli.verify import verify_command
from mlx_openelm.errors import OpenELMError, shorten
from mlx_openelm.message_parts import describe_failure
from mlx_openelm.version import __version__

_UsageError: Any = typer.BadParameter.__base__  # Typer exports only its subclasses
_USAGE_LENGTH = 1000  # characters of such an error, which quotes arguments in a box


class _Program(CommandGroup):
    """The program; turns errors into one line on stderr and an exit code."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _errors_in_one_line():  # --help and --version print here
            return super().make_context(*args, **kwargs)

    def resolve_command(self, ctx: Any, args: Any) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        use_flags_of(command, self.commands.values())
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        with _errors_in_one_line():
            return super().invoke(ctx)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        close_broken_pipe()
        raise typer.Exit(0) from None
    except _UsageError as error:
        error.message = shorten(error.message, _USAGE_LENGTH)
        raise
    except (OpenELMError, OSError) as error:  # OSError: for example a full disk
        if os.environ.get("MLX_OPENELM_DEBUG") == "1":
            raise
        Console().error(show_flags(describe_failure(error)))
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stopped:
        Console().note(" ".join(("\nInterrupted.", *_notes(stopped))))
        raise typer.Exit(130) from None
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # raised by rich
            raise typer.Exit(0) from None
        for note in _notes(error):  # after SIGTERM: what was saved
            Console().note(note)
        raise


def _notes(stopped: BaseException) -> list[str]:
    return list(getattr(stopped, "__notes__", ()))


app = typer.Typer(
    cls=_Program,
    name="mlx-openelm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=show_examples(""),
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        parts = (f"{name} {version(name)}" for name in ("mlx", "mlx-lm"))
        Console().answer(f"mlx-openelm {__version__} ({', '.join(parts)})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the versions of mlx-openelm, MLX and mlx-lm.",
        ),
    ] = False,
) -> None:
    """Run, convert and train OpenELM, Apple's small open language models, on MLX."""


_COMMANDS = {
    "Use a model": (generate_command, chat_command, serve_command),
    "Convert and check": (
        convert_command,
        fuse_command,
        inspect_command,
        verify_command,
    ),
    "Train": (lora_command, pretrain_command, grow_command),
    "Measure": (evaluate_command, bench_command, selfcheck_command, parity_command),
}  # by heading in --help
for _heading, _commands in _COMMANDS.items():
    for _command in _commands:
        _name = _command.__name__.removesuffix("_command")
        app.command(
            _name, cls=Command, epilog=show_examples(_name), rich_help_panel=_heading
        )(_command)
app.add_typer(
    recipes_app, name="recipes", invoke_without_command=True, rich_help_panel="Train"
)


def main() -> None:
    """Run the command line; SIGTERM unwinds the stack, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see __main__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_streams()
    app()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
