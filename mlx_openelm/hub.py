"""A name becomes a local folder: the demo, a path, or a Hugging Face Hub id."""

import os
import re
from pathlib import Path

from mlx_openelm.errors import OpenELMError

DEMO = "demo"
MODEL_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def demo_folder() -> Path:
    """Return the folder of the built-in model."""
    folder = Path(__file__).parent / "demo"
    if not (folder / "config.json").is_file():
        raise OpenELMError(
            f"The built-in model is missing from {folder}; reinstall mlx-openelm, or "
            "say --model NAME."
        )
    return folder


def find_model(
    name: str, *, offline: bool = False, revision: str | None = None
) -> Path:
    """Return the local folder of a model; only a Hub id may use the network.

    Args:
        name: "demo", a path, or a Hub id such as mlx-community/OpenELM-270M-Instruct.
        offline: look into the local Hub cache only.

    Raises:
        OpenELMError: there is no such folder, or the Hub cannot give it.
    """
    path = Path(os.path.expanduser(name))  # Path.expanduser raises on "~nobody"
    if path.is_dir():
        return path
    if name == DEMO:
        return demo_folder()
    if path.exists():
        raise OpenELMError(
            f"{name} is a file, not a model folder; `mlx-openelm convert {name}` makes "
            "one of it."
        )
    if not _HUB_ID.fullmatch(name):
        raise OpenELMError(
            f"There is no folder {name}; say demo, a folder, or a Hub id such as "
            "mlx-community/OpenELM-270M-Instruct."
        )
    return download(name, MODEL_FILES, offline=offline, revision=revision)


def download(
    repo: str,
    patterns: tuple[str, ...],
    *,
    offline: bool = False,
    revision: str | None = None,
) -> Path:
    """Return the cached snapshot of a Hub repository, fetched if it is not there.

    Raises:
        OpenELMError: not cached and offline, no such repository, gated, no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=offline,
            )
        )
    except LocalEntryNotFoundError as error:
        where = "the local cache" if offline else "the local cache, and the Hub is away"
        raise OpenELMError(
            f"There is no folder {repo}, and no model of that name in {where}; check "
            "the name, the network and --offline."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OpenELMError(
            f"The Hub does not give {repo}: {reason.rstrip('.')}. If it is gated, "
            "accept its terms there and run `hf auth login`."
        ) from error
