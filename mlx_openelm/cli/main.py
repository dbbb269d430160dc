"""The Typer application: its commands, its error handling and the entry point."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mlx_openelm.cli.bench import bench_command
from mlx_openelm.cli.chat import chat_command
from mlx_openelm.cli.console import Console, close_broken_pipe, prepare_streams
from mlx_openelm.cli.convert import convert_command
from mlx_openelm.cli.evaluate import evaluate_command
from mlx_openelm.cli.flags import show_flags, use_flags_of
from mlx_openelm.cli.fuse import fuse_command
from mlx_openelm.cli.generate import generate_command
from mlx_openelm.cli.grow import grow_command
from mlx_openelm.cli.inspect import inspect_command
from mlx_openelm.cli.lora import lora_command
from mlx_openelm.cli.parity import parity_command
from mlx_openelm.cli.pretrain import pretrain_command
from mlx_openelm.cli.recipes import recipes_app
from mlx_openelm.cli.selfcheck import selfcheck_command
from mlx_openelm.cli.serve import serve_command
from mlx_openelm.cli.verify import verify_command
from mlx_openelm.errors import OpenELMError
from mlx_openelm.version import __version__


class _CommandGroup(TyperGroup):
    """A group whose errors become one line on stderr and an exit code."""

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
    except (OpenELMError, OSError) as error:  # OSError: a full disk behind stdout, say
        if os.environ.get("MLX_OPENELM_DEBUG") == "1":
            raise
        if isinstance(error, OpenELMError):
            Console().error(show_flags(str(error)))
        else:
            Console().error(f"{error}.")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stopped:
        Console().note(" ".join(("\nInterrupted.", *_notes(stopped))))
        raise typer.Exit(130) from None
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich's own way out
            raise typer.Exit(0) from None
        for note in _notes(error):  # of SIGTERM: what was kept
            Console().note(note)
        raise


def _notes(stopped: BaseException) -> list[str]:
    return list(getattr(stopped, "__notes__", ()))


app = typer.Typer(
    cls=_CommandGroup,
    name="mlx-openelm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)


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
            "--version", callback=_show_version, is_eager=True, help="Versions."
        ),
    ] = False,
) -> None:
    """Run, convert and train OpenELM, Apple's small open language models, on MLX."""


app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("convert")(convert_command)
app.command("fuse")(fuse_command)
app.command("verify")(verify_command)
app.command("inspect")(inspect_command)
app.command("selfcheck")(selfcheck_command)
app.command("parity")(parity_command)
app.command("evaluate")(evaluate_command)
app.command("bench")(bench_command)
app.command("lora")(lora_command)
app.command("pretrain")(pretrain_command)
app.command("grow")(grow_command)
app.command("serve")(serve_command)


def main() -> None:
    """Run the command line; SIGTERM unwinds the stack, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see __main__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_streams()
    app()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
