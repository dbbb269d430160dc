"""Finds the local folder of a model: the demo, a path, or a Hugging Face Hub id.

A complete snapshot in the local Hub cache is used without network access. A branch
therefore stays at the commit that was downloaded first.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, unquote, urlsplit

from mlx_openelm.errors import OpenELMError
from mlx_openelm.paths import user_path
from mlx_openelm.storage.hub_download import RequestedFiles, fetch
from mlx_openelm.storage.similar_names import suggest_similar
from mlx_openelm.storage.weight_files import (
    ADAPTER_CONFIG,
    CONFIG,
    LAYOUTS,
    SAFETENSORS,
    read_index,
)

DEMO = "demo"
RELEASED = tuple(
    f"apple/OpenELM-{size}{suffix}"
    for size in ("270M", "450M", "1_1B", "3B")
    for suffix in ("", "-Instruct")
)
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("added_tokens.json", "special_tokens_map.json"),  # of transformers 4
)
CHAT_TEMPLATE_FILE = "chat_template.jinja"
SMALL_FILES = (
    *(CONFIG, "generation_config.json", ADAPTER_CONFIG),
    *(*TOKENIZER_FILES, CHAT_TEMPLATE_FILE),
)

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_VIEWS = ("tree", "blob", "resolve", "raw", "commit", "commits", "revision")
_OTHER_PAGES = {  # first parts of addresses that are not of models
    *("datasets", "spaces", "models", "papers", "collections", "docs", "api", "blog"),
    *("learn", "tasks", "posts", "organizations", "settings", "buckets", "kernels"),
}
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_SNAPSHOT = re.compile(r"models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def demo_folder() -> Path:
    """Return the folder of the built-in model."""
    folder = Path(__file__).parents[1] / "demo"
    if not (folder / CONFIG).is_file():
        raise OpenELMError(
            f"The built-in model is missing from {folder}; reinstall mlx-openelm, or "
            "pass `model` NAME."
        )
    return folder


def is_demo(path: Path) -> bool:
    """Return whether a folder is that of the built-in model."""
    return path.resolve() == demo_folder().resolve()


def find_model(
    name: str, *, offline: bool = False, revision: str | None = None
) -> Path:
    """Return the local folder of a model or adapter, downloading a Hub id if necessary.

    Args:
        name: "demo", a path, or a Hub id such as mlx-community/OpenELM-270M-Instruct.
        offline: use only the local Hub cache.
        revision: branch, tag or commit of a Hub id.

    Raises:
        OpenELMError: there is no such folder, or the download failed.
    """
    refuse_address(name)
    path = user_path(name)
    if revision is not None and (path.exists() or name == DEMO):
        raise OpenELMError(
            f"`revision` applies to a Hub id, but {name} is local; leave it out."
        )
    if path.is_dir():
        return path
    if name == DEMO:
        return demo_folder()
    if path.exists():
        if problem := describe_file(path):
            raise OpenELMError(problem)
        advice = "pass demo, a folder, or a Hub id"
        if _is_checkpoint(path):
            advice = f"`mlx-openelm convert {shlex.quote(name)}` converts it to one"
        raise OpenELMError(f"{name} is a file, not a model folder; {advice}.")
    if not HUB_ID.fullmatch(name):
        raise OpenELMError(
            f"There is no folder {name}{_suggest(name)} Use demo, a folder, a Hub id "
            "or, to convert, a .pt file; the released models are "
            f"{', '.join(RELEASED)}."
        )
    try:
        return download(name, MODEL, offline=offline, revision=revision)
    except OpenELMError as error:
        if name in RELEASED:
            raise
        raise OpenELMError(f"{str(error).rstrip('.')}{_suggest(name)}") from error


def refuse_address(name: str) -> None:
    """Raise OpenELMError for the address of a web page, with the id of a Hub's page."""
    address = _parse_address(name)
    if address is None:
        return
    parts = [part for part in map(unquote, address.path.split("/")) if part]
    if address.scheme == "hf":
        parts.insert(0, address.netloc)
    if parts[:2] == ["api", "models"]:
        parts = parts[2:]
    elif address.scheme == "hf" and parts[:1] == ["models"]:
        parts = parts[1:]
    repo, _, revision = "/".join(parts[:2]).partition("@")
    repo = repo.removesuffix(".git")
    known = address.scheme == "hf" or address.hostname in _hub_hosts()
    if not known or not HUB_ID.fullmatch(repo) or parts[0] in _OTHER_PAGES:
        raise OpenELMError(
            f"{name} is a web address, but not the page of a model on the Hub; "
            "download the file or folder, and pass its path."
        )
    if len(parts) > 3 and parts[2] in _VIEWS:
        revision = "/".join(parts[3:6] if parts[3] == "refs" else parts[3:4])
    advice = ""
    if revision not in ("", "main"):
        command = f"mlx-openelm convert {repo} --revision {shlex.quote(revision)}"
        advice = f", or use that revision with `{command}`"
    raise OpenELMError(
        f"{name} is the address of a page; pass its Hub id, {repo}{advice}."
    )


def is_file_address(name: str) -> bool:
    """Whether a name is the web address of a checkpoint, not on the Hub."""
    address = _parse_address(name)
    return (
        address is not None
        and address.scheme in ("http", "https")
        and address.hostname not in _hub_hosts()
        and PurePosixPath(address.path).suffix in (*CHECKPOINT_SUFFIXES, ".safetensors")
    )


def _hub_hosts() -> tuple[str | None, ...]:
    return (*_HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname)


def find_released(name: str) -> str | None:
    """Return the Hub id of a released model by its name: "OpenELM-1.1B-Instruct"."""
    for released in RELEASED:
        if released.partition("/")[2].lower() == name.lower().replace(".", "_"):
            return released
    return None


def _parse_address(name: str) -> SplitResult | None:
    """Return the parts of a web address; None for other names."""
    text = name.strip(" <>")
    if ssh := re.fullmatch(r"git@([\w.-]+):(.+)", text):
        text = f"ssh://{ssh[1]}/{ssh[2]}"
    has_scheme = re.match(r"\w[\w.+-]*:/", text)
    text = re.sub(r"^([\w.+-]+):/+", r"\1://", text)  # a Path has one slash
    try:
        address = urlsplit(text if has_scheme else f"//{text.removeprefix('//')}")
    except ValueError:  # brackets that are not of an IPv6 address
        return SplitResult("", "", "", "", "") if has_scheme else None
    return address if has_scheme or address.hostname in _HOSTS else None


def describe_file(path: Path) -> str | None:
    """Return why a file is not a source to convert; None if it may be one."""
    if _is_checkpoint(path):
        return None
    if path.suffix == ".gguf":
        return (
            f"{path} is a GGUF file, which can only be written; convert its source "
            "instead."
        )
    for config, noun in ((ADAPTER_CONFIG, "an adapter"), (CONFIG, "a model")):
        if path.with_name(config).is_file():
            return (
                f"{path} is one file of {noun} folder; pass the folder, {path.parent}."
            )
    if path.suffix == ".safetensors":
        return (
            f"{path} has no {CONFIG} next to it, which has the sizes; add the one that "
            f"belongs to it, and pass the folder, {path.parent}."
        )
    return None


def _is_checkpoint(path: Path) -> bool:
    """Return whether a file may be one of torch.save, by its name or first bytes."""
    if path.suffix in CHECKPOINT_SUFFIXES or not path.is_file():
        return True
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _suggest(name: str) -> str:
    """Return the end of a sentence, with the models that a name may refer to.

    A released model can have a shorter name here, such as "1.1B".
    """
    short = name.removeprefix("apple/").lower().removeprefix("openelm-")
    for released in RELEASED:
        if released.partition("-")[2].lower() == short.replace(".", "_"):
            similar = suggest_similar(name, (DEMO,), CONFIG)
            return f"; `mlx-openelm convert {released}` makes one.{similar}"
    return f".{suggest_similar(name, (DEMO, *RELEASED), CONFIG)}"


def download(
    repo: str,
    requested: RequestedFiles,
    *,
    offline: bool = False,
    revision: str | None = None,
) -> Path:
    """Return the cached snapshot of a Hub repository; missing files are downloaded.

    Raises:
        OpenELMError: offline and incomplete in the cache, or the download failed.
    """
    from huggingface_hub import constants

    folder = _cached(repo, revision)
    missing = None if folder is None else _missing(folder, requested)
    if folder is not None and not missing:
        return folder
    if missing:
        state = f"the local cache has {repo} without {', '.join(missing)}"
    else:
        key = "name and revision" if revision else "name"
        state = f"the local cache has no {requested.noun} of that {key}"
    if offline or constants.HF_HUB_OFFLINE:
        raise OpenELMError(
            f"{repo} is not a local folder, and {state}; check the name, or download "
            "it by leaving out `offline` and HF_HUB_OFFLINE."
        )
    folder = fetch(repo, requested, revision=revision, state=state)
    if missing := _missing(folder, requested):
        raise OpenELMError(
            f"{repo} is incomplete on the Hub: its index names {missing[0]}, which is "
            "missing."
        )
    return folder


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return the snapshot folder of a revision, complete or not, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            repo, revision=revision, allow_patterns=[], local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    except (HFValidationError, OSError) as error:
        reason = str(error).rstrip(".")
        raise OpenELMError(
            f"{repo} is neither a local folder nor a valid Hub id: {reason}."
        ) from error
    return Path(snapshot)


def _missing(folder: Path, requested: RequestedFiles) -> list[str]:
    """Return the requested files that are missing from a snapshot.

    The complete list comes from the repository's listing, if the client has cached it,
    and from the index of the weights.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    present = {path.name for path in folder.iterdir() if path.is_file()}
    listed = present
    if snapshot := snapshot_of(folder):
        repo, commit = snapshot
        try:
            tree = get_cached_repo_tree(repo, revision=commit)
            listed = {file.path for file in tree}
        except CachedRepoTreeNotFoundError:
            pass
    for index in {layout.index for layout in LAYOUTS} & present:
        with contextlib.suppress(OpenELMError):  # reported when the folder is opened
            listed = listed | set(read_index(folder / index).values())
    return [name for name in requested.choose(listed) if name not in present]


# The files that are needed -------------------------------------------------------


def choose_model_files(names: Collection[str]) -> list[str]:
    """Return the files of a model or an adapter, with its weights in one layout.

    If there are no weights or no config, those of the first layout are included.
    """
    top = sorted(name for name in names if "/" not in name)
    for layout in LAYOUTS:  # only the first one that a repository has is used
        if weights := layout.choose(top):
            break
    else:
        layout, weights = SAFETENSORS, [SAFETENSORS.single]
    index = () if layout.single in weights else (layout.index,)
    small = [name for name in (*SMALL_FILES, *index) if name in top]
    return list(dict.fromkeys([layout.config, *small, *weights]))


def choose_tokenizer_files(names: Collection[str]) -> list[str]:
    """Return the files of a tokenizer; if there are none, tokenizer.model."""
    present = [name for name in TOKENIZER_FILES if name in names]
    complete = any(name in present for name in TOKENIZER_FILES[:2])
    return present if complete else [TOKENIZER_FILES[0], *present]


MODEL = RequestedFiles("model", choose_model_files)
TOKENIZER = RequestedFiles("tokenizer", choose_tokenizer_files)


# The cache -----------------------------------------------------------------------


def snapshot_of(path: Path) -> tuple[str, str] | None:
    """Return the repository id and the commit of a folder in the Hub cache."""
    repo = _SNAPSHOT.fullmatch(path.parent.parent.name)
    if path.parent.name != "snapshots" or not repo or not _COMMIT.fullmatch(path.name):
        return None
    return f"{repo['org']}/{repo['name']}", path.name


def cached_snapshots() -> list[tuple[str, Path]]:
    """Return the repositories in the Hub cache with their newest snapshots, by name."""
    from huggingface_hub import constants

    newest: dict[str, Path] = {}
    pattern = "models--*/snapshots/*"
    try:
        folders = sorted(
            Path(constants.HF_HUB_CACHE).glob(pattern),
            key=lambda folder: folder.stat().st_mtime,
        )
    except OSError:  # removed in the meantime
        return []
    for folder in folders:
        if snapshot := snapshot_of(folder):
            newest[snapshot[0]] = folder
    return sorted(newest.items())
