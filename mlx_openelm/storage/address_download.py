"""Files at https addresses, downloaded once into a cache.

A download that was interrupted resumes, if the file at the address is still the same.
An address may end with the expected hash: `https://.../checkpoint.pt#sha256=0123...`.

    NAME                a complete file
    NAME.part           what was downloaded of it
    NAME.origin.json    address, size and version of the file, and its hash if complete
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import read_json
from mlx_openelm.message_parts import cannot_access
from mlx_openelm.storage.staging import lock_file, replaced_file
from mlx_openelm.storage.weight_files import CONFIG
from mlx_openelm.version import __version__

SCHEME = "https"
WEIGHTS = ".safetensors"  # of a model folder: its config.json is downloaded, too

_TIMEOUT = 30.0  # seconds without data
_MAX_REDIRECTIONS = 10
_ORIGIN = ".origin.json"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a file comes from.

    Attributes:
        url: without user, password and query, which may be secret.
        version: ETag or date of the file on the server.
        sha256: of the complete file.
    """

    url: str
    num_bytes: int | None
    version: str | None
    sha256: str | None = None


def download_address(
    address: str,
    *,
    offline: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Return the local copy of a file at an address, or the folder of model weights.

    Args:
        on_progress: called with the bytes that are there, and those of the file.

    Raises:
        OpenELMError: the address is not encrypted, there is no file, it has another
            hash than the address, or the download was interrupted. The message has the
            address without user, password and query.
    """
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    url, _, fragment = address.partition("#")
    expected = _read_hash(public_address(url), fragment)
    if urlsplit(url).scheme != SCHEME:
        raise OpenELMError(
            f"{public_address(url)} is not encrypted, so its content could be changed "
            "on the way; use its https:// address, or download the file yourself and "
            "pass its path."
        )
    folder = _cache() / hashlib.sha256(url.encode()).hexdigest()[:16]
    name = _name_of(url)
    files = {name: (url, expected)}
    if name.endswith(WEIGHTS):
        files = {CONFIG: (urljoin(url, CONFIG), None), **files}
    for file, (location, digest) in files.items():
        _download(location, folder / file, digest, offline, on_progress)
    return folder if name.endswith(WEIGHTS) else folder / name


def origin_of(folder: Path) -> Origin | None:
    """Return where the weights in a folder of the cache come from."""
    for path in folder.glob(f"*{_ORIGIN}"):
        if path.name != f"{CONFIG}{_ORIGIN}" and folder.parent == _cache():
            return _read_origin(path)
    return None


def public_address(url: str) -> str:
    """Return an address without user, password and query."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def _download(
    url: str,
    target: Path,
    expected: str | None,
    offline: bool,
    on_progress: Callable[[int, int], None],
) -> None:
    record, shown = target.with_name(f"{target.name}{_ORIGIN}"), public_address(url)
    stored = _read_origin(record)
    size = target.stat().st_size if target.is_file() else None
    if stored is None or stored.sha256 is None or stored.num_bytes != size:
        if offline:
            raise OpenELMError(
                f"{shown} is not in the cache; leave out `offline` to download it."
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            busy = f"{shown} is being downloaded by another process; wait for it."
            with lock_file(target.with_name(".lock"), busy):
                stored = _fetch(url, target, record, expected, on_progress)
        except OpenELMError:
            raise
        except (KeyboardInterrupt, SystemExit) as stopped:
            stopped.add_note("Repeat the command to resume the download.")
            raise
        except Exception as error:  # the HTTP client is that of huggingface_hub
            raise OpenELMError(_explain(url, target, error)) from error
    if expected not in (None, stored.sha256):
        again = f" Remove {target} to download it again."
        raise _other_hash(shown, stored.sha256, expected, again)


def _fetch(
    url: str,
    target: Path,
    record: Path,
    expected: str | None,
    on_progress: Callable[[int, int], None],
) -> Origin:
    """Download a file, or the rest of it."""
    part = target.with_name(f"{target.name}.part")
    before, shown = _read_origin(record), public_address(url)
    # Without a version, a change of the file between the parts would not be noticed.
    resumes = before is not None and before.version is not None and part.is_file()
    start = part.stat().st_size if resumes else 0
    with _open(url, start) as response:
        if response.status_code == 416:  # the file is not longer than the part
            part.unlink()
            raise _changed(shown)
        if response.status_code not in (200, 206):
            raise OpenELMError(
                f"{shown} cannot be downloaded: the server answers "
                f"{response.status_code} {response.reason_phrase}."
            )
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise OpenELMError(f"{shown} is a web page, not a checkpoint.")
        if response.status_code == 200:
            start = 0  # the server sends the whole file
        origin = _describe(shown, response, start)
        if start and before and replace(before, sha256=None) != origin:
            part.unlink()
            raise _changed(shown)
        _refuse_small_disk(shown, part.parent, (origin.num_bytes or start) - start)
        _write_origin(record, origin)
        with part.open("ab" if start else "wb") as file:
            size = _copy(response, file, start, origin.num_bytes, on_progress)
    if origin.num_bytes not in (None, size):
        raise OpenELMError(
            f"The download of {shown} ended after {size:,} of {origin.num_bytes:,} "
            "bytes; repeat the command to resume it."
        )
    with part.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    if expected not in (None, digest):
        part.unlink()
        raise _other_hash(shown, digest, expected)
    complete = replace(origin, num_bytes=size, sha256=digest)
    _write_origin(record, complete)
    part.rename(target)
    return complete


@contextlib.contextmanager
def _open(url: str, start: int) -> Iterator[Any]:
    """Yield the response to a request of a file from byte `start` on.

    Every address that it is redirected to must be encrypted.
    """
    from huggingface_hub.utils import get_session

    headers = {
        "User-Agent": f"mlx-openelm/{__version__}",
        "Accept-Encoding": "identity",
    }
    if start:
        headers["Range"] = f"bytes={start}-"
    location = url
    for _ in range(_MAX_REDIRECTIONS):
        request = get_session().stream(
            "GET", location, headers=headers, timeout=_TIMEOUT, follow_redirects=False
        )
        with request as response:
            if not response.has_redirect_location:
                yield response
                return
            location = urljoin(location, response.headers["Location"])
        if urlsplit(location).scheme != SCHEME:
            raise OpenELMError(
                f"{public_address(url)} redirects to {public_address(location)}, which "
                "is not encrypted."
            )
    raise OpenELMError(
        f"{public_address(url)} is redirected more than {_MAX_REDIRECTIONS} times."
    )


def _copy(
    response: Any,
    file: IO[bytes],
    done: int,
    total: int | None,
    on_progress: Callable[[int, int], None],
) -> int:
    """Append the body of a response to a file; return the size of the file."""
    for block in response.iter_raw():  # in blocks as they arrive
        file.write(block)
        done += len(block)
        on_progress(done, total or done)
    return done


def _describe(url: str, response: Any, start: int) -> Origin:
    headers = response.headers
    length = headers.get("Content-Length")
    return Origin(
        url=url,
        num_bytes=start + int(length) if length else None,
        version=headers.get("ETag") or headers.get("Last-Modified"),
    )


# Names and records ---------------------------------------------------------------


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "mlx-openelm"


def _name_of(url: str) -> str:
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise OpenELMError(f"{public_address(url)} does not end in the name of a file.")
    return name


def _read_hash(url: str, fragment: str) -> str | None:
    if not fragment:
        return None
    found = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if found is None:
        raise OpenELMError(
            f"{url} ends in #{fragment}; expected #sha256= and 64 hexadecimal "
            "digits, or nothing."
        )
    return found[1].lower()


def _read_origin(record: Path) -> Origin | None:
    """Return a stored record; None if it is missing or damaged."""
    try:
        values: Mapping[str, Any] = read_json(record)
        return Origin(**values)
    except (OSError, ValueError, TypeError):
        return None


def _write_origin(record: Path, origin: Origin) -> None:
    with replaced_file(record) as part:
        part.write_text(json.dumps(asdict(origin), indent=2))


# Errors --------------------------------------------------------------------------


def _changed(url: str) -> OpenELMError:
    return OpenELMError(
        f"{url} has changed since its download began, so the part of it was removed; "
        "repeat the command to download the new file."
    )


def _other_hash(
    url: str, actual: str | None, expected: str | None, advice: str = ""
) -> OpenELMError:
    return OpenELMError(
        f"{url} has the hash sha256:{actual}, not the expected sha256:{expected}; it "
        f"was changed, or the expected hash is that of another file.{advice}"
    )


def _refuse_small_disk(url: str, folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OpenELMError(
            f"The download of {url} needs {num_bytes / 1e9:.2f} GB, and the disk of "
            f"{folder} has {free / 1e9:.2f} GB free; free disk space, or set HF_HOME "
            "to a folder on another disk."
        )


def _explain(url: str, target: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return cannot_access(target, error, "write")
    reason = (str(error) or type(error).__name__).rstrip(".")
    return (
        f"The download of {public_address(url)} was interrupted ({reason}); check the "
        "address and the network, and repeat the command to resume it."
    )
