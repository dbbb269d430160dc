"""`--upload-repo`: check before the work, ask on a terminal, and upload its result."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.message_parts import count_of

if TYPE_CHECKING:
    from mlx_openelm.storage.hub_upload import UploadTarget

UPLOAD = "Upload"  # a heading in --help

UploadRepo = Annotated[
    str | None,
    typer.Option(
        "--upload-repo",
        metavar="ORG/NAME",
        help="Upload the result to this new repository on the Hugging Face Hub.",
        rich_help_panel=UPLOAD,
    ),
]
Public = Annotated[
    bool,
    typer.Option(
        "--public",
        help="Make the repository of --upload-repo public, not private.",
        rich_help_panel=UPLOAD,
    ),
]


def check_upload(
    repo: str | None, *, public: bool, offline: bool
) -> "UploadTarget | None":
    """Return the target of --upload-repo, checked; None without the option."""
    if repo is None:
        if public:
            raise typer.BadParameter("needs --upload-repo", param_hint="--public")
        return None
    from mlx_openelm.storage.hub_upload import check_target

    return check_target(repo, public=public, offline=offline)


def answer_and_upload(
    console: Console,
    report: Any,
    show: Callable[[Console, Any], None],
    target: "UploadTarget | None",
    *,
    as_json: bool,
) -> None:
    """Write a report with the path of a folder, and upload the folder to a target."""
    if as_json:
        uploaded = {"uploaded": _upload(console, target, report.path)} if target else {}
        console.answer_json(dataclasses.asdict(report) | uploaded)
        return
    show(console, report)
    if target is not None:
        _upload(console, target, report.path)


def _upload(console: Console, target: "UploadTarget", folder: Path) -> str | None:
    """Upload a folder and return its address; None without consent on a terminal."""
    from mlx_openelm.storage.hub_upload import list_files, upload

    files = list_files(folder)
    listed = "\n".join(f"  {size:>13,}  {name}" for name, size in files.items())
    plan = (
        f"Uploading {folder} to the new {target.visibility} repository {target.repo}, "
        f"as {target.account}: {count_of(len(files), 'file')}, "
        f"{sum(files.values()) / 1e6:.1f} MB, and a model card\n{listed}"
    )
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        console.note(plan)
    elif not console.confirm(f"{plan}\nUpload?"):
        console.note("Not uploaded.")
        options = [] if target.public else ["--private"]
        options += [f"--include={name}" for name in files]
        console.note_next("upload", target.repo, folder, *options, program="hf")
        return None
    url = upload(target, folder)
    console.note(f"Uploaded to {url}")
    return url
