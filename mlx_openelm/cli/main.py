"""The command line: options in, one verb, its report out."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mlx_openelm.cli.bench import bench
from mlx_openelm.cli.console import Console, close_broken_pipe, prepare_streams
from mlx_openelm.cli.evaluation import evaluate
from mlx_openelm.cli.finetuning import lora
from mlx_openelm.cli.generation import chat, generate
from mlx_openelm.cli.growing import grow
from mlx_openelm.cli.options import (
    Force,
    Json,
    Offline,
    Quiet,
    need_torch,
)
from mlx_openelm.cli.pretraining import pretrain
from mlx_openelm.cli.serving import serve
from mlx_openelm.errors import OpenELMError
from mlx_openelm.version import __version__


class _Face(TyperGroup):
    """Turns what escapes a verb into one line and an exit code."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _in_one_line():  # --help and --version print here
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _in_one_line():
            return super().invoke(ctx)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        close_broken_pipe()
        raise typer.Exit(0) from None
    except (OpenELMError, OSError) as error:  # OSError: a full disk behind stdout, say
        if os.environ.get("MLX_OPENELM_DEBUG") == "1":
            raise
        Console().error(str(error) if isinstance(error, OpenELMError) else f"{error}.")
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
    cls=_Face,
    name="mlx-openelm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="List, show or copy the bundled recipes.")
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)


def main() -> None:
    """Run the command line; SIGTERM unwinds as Ctrl-C does, so nothing half stays."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see __main__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_streams()
    app()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


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


app.command()(generate)
app.command()(chat)


@app.command()
def convert(
    source: Annotated[
        list[str] | None,
        typer.Argument(
            help="A CoreNet .pt, a model or adapter folder, a Hub id or demo; several "
            ".pt with --average."
        ),
    ] = None,
    hf_path: Annotated[
        str | None,
        typer.Option(
            "--hf-path", "--model", help="The same; or the base of an adapter folder."
        ),
    ] = None,
    mlx_path: Annotated[
        Path | None, typer.Option(help="Where to; default ./<source name>-mlx[-4bit].")
    ] = None,
    to: Annotated[
        str, typer.Option(help="mlx, hf, corenet, gguf; of an adapter peft, corenet.")
    ] = "mlx",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float16, bfloat16 or float32; default as stored, and for --to mlx "
            "float32 -> bfloat16."
        ),
    ] = None,
    allow_overflow: Annotated[
        bool, typer.Option("--allow-overflow", help="float16 even for the 3B.")
    ] = False,
    quantize: Annotated[
        bool, typer.Option("-q", "--quantize", help="Quantize to --q-bits.")
    ] = False,
    q_bits: Annotated[
        str | None,
        typer.Option(help="Bits of the linears, default 4; auto:X: X on average."),
    ] = None,
    q_group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale, default 64.")
    ] = None,
    q_mode: Annotated[
        str | None, typer.Option(help="affine, mxfp4, mxfp8 or nvfp4.")
    ] = None,
    q_embed_bits: Annotated[
        int | None, typer.Option(help="Bits of the embedding, default 8.")
    ] = None,
    q_keep: Annotated[
        str | None,
        typer.Option(help="Leave modules that this regex finds as they are."),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Unpack what is quantized.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Text for prices and receipt.")
    ] = None,
    no_receipt: Annotated[
        bool, typer.Option("--no-receipt", help="Do not measure what bits cost.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Put an adapter into the weights.")
    ] = False,
    adapter_out: Annotated[
        Path | None, typer.Option(help="Write the source's adapter here, apart.")
    ] = None,
    average: Annotated[
        bool, typer.Option("--average", help="The mean of several sources.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="A file, a folder, a Hub id, or none.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a Hub id.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Make a model folder, which mlx-openelm and mlx-lm read. Prints its path."""
    console = Console(quiet=quiet)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported
    if source and hf_path and average:
        raise typer.BadParameter("say the sources once", param_hint="--model")
    named = list(source or ())
    base = hf_path if named else None
    if not named and hf_path is not None:
        named = [hf_path]
    if not named:
        raise typer.BadParameter("say what to convert", param_hint="SOURCE")
    bits = q_bits
    if bits is None and (quantize or q_mode) and q_mode in (None, "affine"):
        bits = "4"  # the other modes have their own
    from converters.conversion.run import convert as run

    with console.progress("Converting") as progress:
        report = run(
            named,
            _expand(mlx_path),
            to=to,
            dtype=dtype,
            bits=bits,
            group_size=q_group_size,
            embed_bits=q_embed_bits,
            mode=q_mode or "affine",
            keep=q_keep,
            dequantize=dequantize,
            calibration=_expand(calibration),
            receipt=not no_receipt,
            merge=merge,
            adapter_out=_expand(adapter_out),
            base=base,
            average=average,
            tokenizer=tokenizer,
            allow_overflow=allow_overflow,
            force=force,
            offline=offline,
            revision=revision,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
        )
    from converters.conversion.adapters import AdapterReport
    from mlx_openelm.cli.conversion_view import as_json as fields
    from mlx_openelm.cli.conversion_view import note_adapter, note_converted

    if as_json:
        console.answer_json(fields(report))
        return
    if isinstance(report, AdapterReport):
        note_adapter(console, report)
    else:
        note_converted(console, report)
    console.answer(str(report.path))


@app.command()
def fuse(
    adapter_path: Annotated[
        str, typer.Option(help="An adapter folder, or its Hub id.", show_default=False)
    ],
    save_path: Annotated[Path, typer.Option(help="Where to.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="The base; default the adapter's own.")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write 16 bits a weight.")
    ] = False,
    quantize: Annotated[
        bool, typer.Option("-q", "--quantize", help="Quantize to --q-bits.")
    ] = False,
    q_bits: Annotated[
        int | None, typer.Option(help="Bits of the linears; default the base's own.")
    ] = None,
    q_group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale, default 64.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Put an adapter into its base, and prove that it is still there. Prints the path.

    Nothing is written if the weights' bits would lose it.
    """
    console = Console(quiet=quiet)
    bits = 4 if quantize and q_bits is None else q_bits
    from converters.conversion.fusing import fuse as run
    from mlx_openelm.cli.conversion_view import as_json as fields
    from mlx_openelm.cli.conversion_view import note_fused

    with console.progress("Fusing") as progress:
        report = run(
            os.path.expanduser(adapter_path),
            os.path.expanduser(save_path),
            base=model,
            dequantize=dequantize,
            bits=bits,
            group_size=q_group_size,
            force=force,
            offline=offline,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
        )
    if as_json:
        console.answer_json(fields(report))
        return
    note_fused(console, report)
    console.answer(str(report.path))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="demo, a model folder, or a Hub id.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="What it was made from; repeatable, if it was averaged."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Check that a folder is whole, and what it says it is."""
    from converters.conversion.verification import verify as run
    from mlx_openelm.cli.conversion_view import as_json as fields
    from mlx_openelm.cli.conversion_view import show_verification
    from mlx_openelm.storage.hub import find_model

    console = Console(quiet=quiet)
    with console.progress("Verifying") as progress:
        found = run(
            find_model(model, offline=offline),
            against=against or (),
            offline=offline,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
        )
    if as_json:
        console.answer_json(fields(found))
    else:
        show_verification(console, found)
    if not found.passed:
        raise OpenELMError(
            f"{model} is not what it should be: {found.describe_problems()}; convert "
            "or download it again."
        )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="demo, a model folder, or a Hub id.")],
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens to reckon the memory for.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Show sizes, bits, tokenizer, origin and memory, without loading weights."""
    from mlx_openelm.cli.conversion_view import as_json as fields
    from mlx_openelm.cli.conversion_view import show_inspection
    from mlx_openelm.storage.hub import find_model
    from mlx_openelm.storage.inspection import inspect as run

    console = Console(quiet=quiet)
    found = run(find_model(model, offline=offline), context=context)
    if as_json:
        console.answer_json(fields(found))
    else:
        show_inspection(console, found)


@app.command()
def selfcheck(as_json: Json = False, quiet: Quiet = False) -> None:
    """Check that this machine computes OpenELM rightly; prints a report to send."""
    console = Console(quiet=quiet)
    from mlx_openelm.bench.selfcheck import check_machine
    from mlx_openelm.cli.conversion_view import as_json as fields
    from mlx_openelm.cli.conversion_view import show_selfcheck

    report = check_machine(on_check=lambda name: console.note(f"checking {name} ..."))
    if as_json:
        console.answer_json(fields(report))
    else:
        show_selfcheck(console, report)
    if not report.passed:
        raise OpenELMError(
            "This machine does not compute OpenELM rightly; please send the report "
            "above to the project."
        )


@app.command()
def parity(
    source: Annotated[str, typer.Argument(help="Anything that convert takes.")],
    num_tokens: Annotated[int, typer.Option(min=1, help="Tokens to compare.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare PyTorch and MLX, layer by layer, on the same tokens (needs PyTorch)."""
    need_torch()
    from converters.parity import compare
    from mlx_openelm.cli.conversion_view import as_json as fields
    from mlx_openelm.cli.conversion_view import show_parity

    console = Console(quiet=quiet)
    report = compare(source, num_tokens=num_tokens, seed=seed)
    if as_json:
        console.answer_json(fields(report))
    else:
        show_parity(console, report)
    if not report.equal:
        raise OpenELMError(
            f"PyTorch and MLX differ on {source} by more than {report.limit:.0e}."
        )


app.command()(evaluate)
app.command()(bench)
app.command()(lora)
app.command()(pretrain)
app.command()(grow)
app.command()(serve)


@recipes_app.callback()
def _list_recipes(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """List the bundled recipes, each with its first line."""
    from mlx_openelm.recipe_loader import bundled_recipes

    console = Console()
    found = {
        name: path.read_text().splitlines()[0].lstrip("# ")
        for name, path in bundled_recipes().items()
    }
    if as_json:
        console.answer_json(found)
        return
    width = max(map(len, found))
    for name, line in found.items():
        console.answer(f"{name:<{width}}  {line}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A recipe's name.")]) -> None:
    """Print a recipe."""
    from mlx_openelm.recipe_loader import read_recipe

    Console().answer(read_recipe(name), end="")


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A recipe's name.")],
    to: Annotated[
        Path | None, typer.Argument(help="Where to; default its own file name here.")
    ] = None,
) -> None:
    """Copy a recipe, to be edited. Prints the path."""
    from mlx_openelm.recipe_loader import find_recipe, read_recipe

    path, text = find_recipe(name), read_recipe(name)
    target = to or Path(path.name)
    if target.is_dir():
        target = target / path.name
    try:
        with target.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError as error:
        raise OpenELMError(f"{target} exists already; say another place.") from error
    except OSError as error:
        raise OpenELMError(f"Cannot write {target}: {error}.") from error
    Console().answer(str(target))


def _expand(path: Path | None) -> Path | None:
    """Return a path whose "~" the shell left, as it does behind "--option="."""
    return None if path is None else Path(os.path.expanduser(path))
