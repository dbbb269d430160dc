"""The command that merges an adapter into its base: `fuse`."""

from pathlib import Path
from typing import Annotated

import typer

from converters.conversion.options import (  # noqa: TID253 - needs no mlx
    QUANTIZATION,
)
from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import Force, Json, Offline, Quiet
from mlx_openelm.cli.uploading import (
    Public,
    UploadRepo,
    answer_and_upload,
    check_upload,
)


def fuse_command(
    adapter_path: Annotated[
        str, typer.Option(help="Adapter folder, or its Hub id.", show_default=False)
    ],
    save_path: Annotated[
        Path, typer.Option(help="Model folder to write.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model: demo, a folder, or a Hub id.",
            show_default="the adapter's base",
        ),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize",
            help="Unpack quantized weights to 16 bits.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = False,
    quantize: Annotated[
        bool,
        typer.Option(
            "-q",
            "--quantize",
            help="Quantize, to 4 bits unless --q-bits is given.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = False,
    bits: Annotated[
        int | None,
        typer.Option(
            "--q-bits",
            help="Bits of the linear layers: 2, 3, 4, 5, 6 or 8.",
            show_default="as in the base",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--q-group-size",
            help="Number of weights that share a scale.",
            show_default="64",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None,
    learn: Annotated[
        str | None,
        typer.Option(
            help="Train scales and biases after rounding, to match the base with its "
            "adapter: minutes (10), or steps (200steps).",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None,
    teacher_cache: Annotated[
        str | None,
        typer.Option(
            help="Folder in which the outputs of base and adapter are kept, so that "
            "--learn does not have them in memory.",
            rich_help_panel=QUANTIZATION,
        ),
    ] = None,
    upload_repo: UploadRepo = None,
    public: Public = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Merge an adapter into its base model, and check the result.

    Nothing is written if quantization would lose the adapter's effect. Prints the path
    of the model folder.
    """
    console = Console(quiet=quiet)
    if quantize and bits is None:
        bits = 4
    target = check_upload(upload_repo, public=public, offline=offline)
    from converters.conversion.fusing import fuse
    from mlx_openelm.cli.views.conversion import show_fused

    with console.progress("Fusing") as progress:
        report = fuse(
            adapter_path,
            save_path,
            base=model,
            dequantize=dequantize,
            bits=bits,
            group_size=group_size,
            learn=learn,
            teacher_cache=teacher_cache,
            force=force,
            offline=offline,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
        )
    answer_and_upload(console, report, show_fused, target, as_json=as_json)
