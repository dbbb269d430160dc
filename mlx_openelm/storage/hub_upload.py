"""Uploads of folders to new repositories on the Hugging Face Hub.

A repository is created only after the folder is complete, and is filled by one commit.
If that fails, the repository is deleted again.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import list_names
from mlx_openelm.storage.hub import CHAT_TEMPLATE_FILE, HUB_ID, choose_model_files
from mlx_openelm.storage.hub_download import describe_refusal, silenced
from mlx_openelm.storage.model_card import CARD, FOLDER, adapter_card
from mlx_openelm.storage.model_folder import METADATA_KEY
from mlx_openelm.storage.staging import CODE_FILES
from mlx_openelm.storage.weight_files import ADAPTER_CONFIG


@dataclass(frozen=True, slots=True)
class UploadTarget:
    """A new repository that the owner of the token may create.

    Attributes:
        account: the owner of the token.
    """

    repo: str
    public: bool
    account: str

    @property
    def visibility(self) -> str:
        return "public" if self.public else "private"


def check_target(repo: str, *, public: bool, offline: bool = False) -> UploadTarget:
    """Check a repository's name and the token, before the work that is uploaded.

    Raises:
        OpenELMError: the name is not an id, the repository exists, or the token is
            missing, rejected or has no right to write.
    """
    from huggingface_hub import HfApi, constants, get_token

    if not HUB_ID.fullmatch(repo):
        raise OpenELMError(
            f"`upload_repo` is {repo!a:.100}; expected ORG/NAME, the account or "
            "organization and the name of a new repository."
        )
    if offline or constants.HF_HUB_OFFLINE:
        raise OpenELMError(
            "`upload_repo` needs the network; leave out `offline` and HF_HUB_OFFLINE."
        )
    if get_token() is None:
        raise OpenELMError(
            "`upload_repo` needs a Hub token with write access; log in with `hf auth "
            "login`, or set HF_TOKEN."
        )
    with _explained(f"The Hub was not asked for {repo}"):
        user = HfApi().whoami()
        _check_rights(user, repo.partition("/")[0])
        if HfApi().repo_exists(repo):
            raise OpenELMError(
                f"{repo} exists already on the Hub; choose another name."
            )
    return UploadTarget(repo, public, user["name"])


def list_files(folder: Path) -> dict[str, int]:
    """Return the files of a model or an adapter to upload, with their sizes.

    Other files, such as the report of a training run with its samples, stay local.
    """
    present = {path.name for path in folder.iterdir() if path.is_file()}
    names = [*choose_model_files(present), *CODE_FILES, CHAT_TEMPLATE_FILE]
    return {
        name: (folder / name).stat().st_size
        for name in dict.fromkeys(names)
        if name in present
    }


def upload(target: UploadTarget, folder: Path) -> str:
    """Create the repository, with the files and a model card; return its address.

    Raises:
        OpenELMError: the repository exists, or the Hub refused or failed. The
            repository is deleted again; if that fails, the message says so.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [
        CommitOperationAdd(name, _read_content(folder / name))
        for name in list_files(folder)
    ]
    operations.append(CommitOperationAdd(CARD, _write_card(folder, target.repo)))
    api, repo = HfApi(), target.repo
    with _explained(f"{folder} is complete, but was not uploaded to {repo}"):
        url = api.create_repo(repo, private=not target.public)
        try:
            api.create_commit(
                repo, operations, commit_message="Upload with mlx-openelm"
            )
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C
                error.add_note(f"{folder} is complete, but was not uploaded to {repo}.")
            if left := _delete(repo):
                error.add_note(left)
            raise
        return str(url)


def _delete(repo: str) -> str:
    """Delete a repository; return a sentence if it remains."""
    from huggingface_hub import HfApi

    try:
        HfApi().delete_repo(repo, missing_ok=True)
    except Exception:
        return (
            f"{repo}, which is new and incomplete, could not be deleted; delete it "
            "before you repeat the command."
        )
    return ""


def _read_content(file: Path) -> Path | bytes:
    """Return what is uploaded of a file: an adapter's config without local paths."""
    if file.name != ADAPTER_CONFIG:
        return file
    raw = read_mapping(file)
    base = (raw.get(METADATA_KEY) or {}).get("base") or {}
    for values in (raw, base):
        for key in ("model", "base_model_name_or_path", "name"):
            name = values.get(key)
            if isinstance(name, str) and Path(name).is_absolute():
                values[key] = Path(name).name
    return json.dumps(raw, indent=4).encode()


def _write_card(folder: Path, repo: str) -> bytes:
    """Return the model card of a folder for a repository."""
    if (folder / ADAPTER_CONFIG).is_file():
        raw = read_mapping(folder / ADAPTER_CONFIG)
        card = adapter_card(raw, raw.get(METADATA_KEY) or {}, repo)
        return card.encode(errors="replace")
    return (folder / CARD).read_bytes().replace(FOLDER.encode(), repo.encode())


def _check_rights(user: Mapping[str, Any], namespace: str) -> None:
    """Raise OpenELMError unless the token may write to a namespace.

    Of a fine-grained token, the Hub lists permissions by namespace.
    """
    token = user.get("auth", {}).get("accessToken", {})
    where = f"The Hub token {token.get('displayName', '')!a} of {user['name']}"
    advice = "create one with write access, and log in with `hf auth login`"
    names = [user["name"], *(org["name"] for org in user.get("orgs", ()))]
    if namespace not in names:
        raise OpenELMError(
            f"{where} cannot write to {namespace}; it can to "
            f"{list_names(names, quoted=False)}."
        )
    allowed = token.get("role") != "read"
    if token.get("role") == "fineGrained":
        allowed = any(
            "repo.write" in scope.get("permissions", ())
            for scope in token.get("fineGrained", {}).get("scoped", ())
            if scope.get("entity", {}).get("name") == namespace
        )
    if not allowed:
        raise OpenELMError(f"{where} has no right to write to {namespace}; {advice}.")


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn errors of the Hub's client into one sentence that begins with `what`."""
    try:
        with silenced():
            yield
    except OpenELMError:
        raise
    except Exception as error:  # the client's, httpx's and Rust's have no common base
        sentence = f"{what}: {describe_refusal(error)}."
        notes = getattr(error, "__notes__", ())
        raise OpenELMError(" ".join((sentence, *notes))) from error
