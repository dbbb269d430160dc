"""The command that converts: `convert`."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Force, Json, Offline, Quiet, expand_path


def convert_command(
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
    from converters.conversion.run import convert

    with console.progress("Converting") as progress:
        report = convert(
            named,
            expand_path(mlx_path),
            to=to,
            dtype=dtype,
            bits=bits,
            group_size=q_group_size,
            embed_bits=q_embed_bits,
            mode=q_mode or "affine",
            keep=q_keep,
            dequantize=dequantize,
            calibration=expand_path(calibration),
            receipt=not no_receipt,
            merge=merge,
            adapter_out=expand_path(adapter_out),
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
    from mlx_openelm.cli.views.conversion import note_adapter, note_converted

    if as_json:
        console.answer_json(dataclasses.asdict(report))
        return
    if isinstance(report, AdapterReport):
        note_adapter(console, report)
    else:
        note_converted(console, report)
    console.answer(str(report.path))
