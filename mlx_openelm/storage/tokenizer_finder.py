"""Finding a tokenizer, and proving that it is the right one.

OpenELM's repositories carry no tokenizer, look-alikes of Llama's are about, and a wrong
one spoils a model without any error: so what is found here is proved. A tokenizer has
two files: tokenizer.model (SentencePiece's, which is ours) and tokenizer.json (Hugging
Face's, for mlx-lm and transformers). `tokenizer_json` makes either from the other; that
they agree is proved here.
"""

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_openelm.config import BOS_ID, EOS_ID, pad_vocabulary
from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.hub import (
    TOKENIZER,
    TOKENIZER_FILES,
    cached_snapshots,
    download,
)
from mlx_openelm.text.tokenizer import SPACE, Tokenizer
from mlx_openelm.text.tokenizer_json import (
    BYTE_PIECES,
    GET_ONE,
    UNK_ID,
    describe,
    rebuild,
    refuse,
)

MODEL_FILE, JSON_FILE, CONFIG_FILE = TOKENIZER_FILES

PROBES = (  # what tokenizers differ in; none holds U+2581, which decodes to a space
    *("", " ", "a", " a", "  two spaces", "trailing  ", "a b  c   d    e     f"),
    *(f"{' ' * n}x{' ' * n}\n" for n in (7, 15, 16, 17, 23, 33, 50)),
    *("\n", "\n\n\n", "tab\there\t\t", "windows\r\nlines\r\n", " \n \n  \n\t "),
    *("naïve café, 日本語 와 中文。", "مرحبا שלום नमस्ते", "e\u0301 \u200b\u00a0\ufeff"),
    *("\U0001f469\u200d\U0001f467 \U0001f1e8\U0001f1ed", "🙂🙂"),
    "\U0001d54f \U0010ffff",
    *("\x00\x01\x7f\x80\xff\ufffd", "1234567890 3.14 -1e-9", "<0x41> <0x0A>"),
    "[INST] <|user|>\n### Response:\n",
    "    def f(x):\n        return {'a': x**2}\n",
    "Once upon a time there was a dear little girl who was loved by every one who "
    "looked at her; “it suited her so well,” they said, that she'd never wear "
    "anything else — so she was always called “Little Red-Cap”.\n\n",
)
LLAMA_SIZE = 32000
LLAMA_VECTORS = {
    # From an independent implementation, llama-tokenizer-js 1.2.2:
    "Once upon a time there was": [1, 9038, 2501, 263, 931, 727, 471],
    "Hello world\n": [1, 15043, 3186, 13],
    "  two spaces": [1, 259, 1023, 8162],
    "the correct answer is true": [1, 278, 1959, 1234, 338, 1565],
    "### Instruction:": [1, 835, 2799, 4080, 29901],
    "<|user|>\n": [1, 529, 29989, 1792, 29989, 29958, 13],
    "日本語 café": [1, 29871, 30325, 30346, 30968, 274, 28059],
    # From Llama 2's own file. transformers 5, given a tokenizer.model alone, ranks its
    # merges by id instead of score, which joins spaces before words:
    "x  x": [1, 921, 29871, 921],
    " " * 40: [1, 462, 462, 3986],
}
LLAMA_BYTES = 499_723  # of Llama's tokenizer.model

OPEN_COPIES = (  # of Llama's tokenizer, open to all; the first is what is downloaded
    "NousResearch/Llama-2-7b-hf",
    "NousResearch/Llama-2-7b-chat-hf",
    "mlx-community/OpenELM-*",
    "PrunaAI/apple-OpenELM-*",
)
MOST_FOLDERS, MOST_TOKENIZERS, MOST_BYTES = 2000, 20, 20_000_000  # looked at unasked


@dataclass(frozen=True, slots=True)
class FoundTokenizer:
    """A proved tokenizer, and the file that it came from.

    Attributes:
        notes: where it was looked for, and what was passed over and why; nothing where
            it was given or lies in the source's folder.
    """

    tokenizer: Tokenizer
    path: Path
    notes: tuple[str, ...] = ()


def find_tokenizer(
    source: Path, given: str | None, num_rows: int, *, offline: bool = False
) -> FoundTokenizer:
    """Find the tokenizer of a model and prove it.

    It is looked for in the source's folder, in folders in and beside that, and, if it
    may be Llama's, in the Hub cache and on the Hub. What claims to belong, because it
    was given or lies in the source's folder, must; what does not is passed over.

    Args:
        source: the model's folder or file.
        given: what `tokenizer` says: a file, a folder, or a repository on the Hub.
        num_rows: rows of the model's embedding.
        offline: of the Hub, use only what is on this machine already.

    Raises:
        OpenELMError: none was found, or the one found is not this model's.
    """
    folder = source if source.is_dir() else source.parent
    if given is not None:
        file = find_tokenizer_file(_locate(given, offline=offline))
        if file is None:
            refuse(f"{given} holds neither {MODEL_FILE} nor {JSON_FILE}")
        return FoundTokenizer(_read_and_prove(file, num_rows), file)
    if own := find_tokenizer_file(folder):
        return FoundTokenizer(_read_and_prove(own, num_rows), own)
    notes = [f"There is no tokenizer in {folder}."]
    found = _search_beside(folder, num_rows, notes)
    if found is None and num_rows in (LLAMA_SIZE, pad_vocabulary(LLAMA_SIZE)):
        found = _search_hub(num_rows, notes, offline=offline)
    if found is None:
        tried = f" ({' '.join(notes[1:][-4:])})" if notes[1:] else ""
        raise OpenELMError(
            f"No tokenizer was found beside {source}{tried}, and OpenELM's own "
            f"repositories carry none. {GET_ONE}, or `tokenizer` none to convert "
            "without one."
        )
    return found


def _read_and_prove(file: Path, num_rows: int) -> Tokenizer:
    tokenizer = read_tokenizer(file)
    try:
        prove_tokenizer(tokenizer, num_rows)
    except OpenELMError as error:
        raise OpenELMError(f"{file}: {error}") from error
    return tokenizer


def _search_beside(
    folder: Path, num_rows: int, notes: list[str]
) -> FoundTokenizer | None:
    """Return the fitting tokenizer of a folder in or beside the source's.

    Llama's is known by its ids. Any other is known by its size alone, so two that
    differ are a question for a person.
    """
    files = islice(_files_beside(folder), MOST_TOKENIZERS)
    tried = (
        _try(file, num_rows, "a folder beside the source", notes) for file in files
    )
    fitting = filter(None, tried)
    first = next(fitting, None)
    if first is None or first.tokenizer.vocab_size == LLAMA_SIZE:
        return first
    for other in fitting:
        if _describe(other.tokenizer) != _describe(first.tokenizer):
            raise OpenELMError(
                f"{first.path} and {other.path} both fit the model and differ; say "
                "which is its own with `tokenizer`."
            )
    return first


def _files_beside(folder: Path) -> Iterator[Path]:
    here = Path(os.path.abspath(folder))
    for parent in (here, here.parent):
        found: list[Path] = []
        with contextlib.suppress(OSError):  # not ours to read
            found = sorted(islice(parent.iterdir(), MOST_FOLDERS))
        for path in found:
            file = None
            with contextlib.suppress(OSError):
                file = find_tokenizer_file(path) if path.is_dir() else None
            if file is not None:
                yield file


def _search_hub(
    num_rows: int, notes: list[str], *, offline: bool
) -> FoundTokenizer | None:
    """Return Llama's tokenizer from the Hub cache, or from the Hub."""
    for repo, file in islice(_files_in_cache(), MOST_TOKENIZERS):
        if found := _try(file, num_rows, f"{repo} in the Hub cache", notes):
            return found
    notes.append("The Hub cache has no copy of Llama's.")
    repo = OPEN_COPIES[0]
    if offline:
        notes.append(f"Offline, so {repo} was not asked for its copy.")
        return None
    try:
        copy = find_tokenizer_file(download(repo, TOKENIZER))
    except OpenELMError as error:
        reason, *_ = str(error).split("; ")
        notes.append(f"The download of a copy failed: {reason.rstrip('.')}.")
        return None
    return _try(copy, num_rows, f"downloaded from {repo}", notes) if copy else None


def _files_in_cache() -> Iterator[tuple[str, Path]]:
    """Give the cached repositories with what may be Llama's, open copies first."""
    snapshots = cached_snapshots()
    for pattern in OPEN_COPIES:
        for repo, folder in snapshots:
            file = find_tokenizer_file(folder)
            if file is not None and fnmatch.fnmatchcase(repo, pattern):
                yield repo, file
    for repo, folder in snapshots:
        copy = folder / MODEL_FILE
        is_open = any(fnmatch.fnmatchcase(repo, pattern) for pattern in OPEN_COPIES)
        if not is_open and copy.is_file() and copy.stat().st_size == LLAMA_BYTES:
            yield repo, copy


def _try(
    file: Path, num_rows: int, where: str, notes: list[str]
) -> FoundTokenizer | None:
    """Prove a tokenizer that nobody named, and say what became of it."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise OpenELMError(f"{file} is too large for Llama's.")
        tokenizer = _read_and_prove(file, num_rows)
    except (OpenELMError, OSError) as error:
        reason, *_ = str(error).split(". ")  # what to do is no news here
        notes.append(f"Passed over {reason.rstrip('.')}.")
        return None
    said = (
        "it gives Llama's ids for every probe"
        if tokenizer.vocab_size == LLAMA_SIZE
        else f"it fits {num_rows} rows; if the model has another, say `tokenizer`"
    )
    taken = f"The tokenizer is {file}, {where}: {said}."
    return FoundTokenizer(tokenizer, file, (*notes, taken))


def _describe(tokenizer: Tokenizer) -> tuple[list[str], list[list[int]]]:
    pieces = [tokenizer.processor.IdToPiece(i) for i in range(tokenizer.vocab_size)]
    return pieces, [tokenizer.encode(text) for text in PROBES]


def _locate(given: str, *, offline: bool) -> Path:
    """Return the path that `given` is; a repository on the Hub becomes a folder."""
    path = Path(given).expanduser()
    if path.exists():
        return path
    is_repo = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given)
    if not is_repo or path.suffix in {".model", ".json"}:
        refuse(f"There is no file or folder {given}")
    return download(given, TOKENIZER, offline=offline)


def find_tokenizer_file(path: Path) -> Path | None:
    """Return the tokenizer's file in a folder; a file stands for itself."""
    files = (path / MODEL_FILE, path / JSON_FILE) if path.is_dir() else (path,)
    return next((file for file in files if file.is_file()), None)


def read_tokenizer(path: Path, *, template: str | None = None) -> Tokenizer:
    """Read a folder's or a file's tokenizer; in a folder, tokenizer.model goes first.

    From a tokenizer.json, a SentencePiece model with the same ids is built.

    Raises:
        OpenELMError: there is none, or it cannot be read as SentencePiece BPE.
    """
    file = find_tokenizer_file(path)
    if file is None:
        refuse(f"{path} holds neither {MODEL_FILE} nor {JSON_FILE}")
    if file.suffix != ".json":
        return Tokenizer.from_file(file, template=template)
    try:
        return _from_json(json.loads(file.read_bytes()), template)
    except (OSError, ValueError) as error:
        raise OpenELMError(f"Cannot read the tokenizer {file}: {error}.") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise OpenELMError(
            f"{file} is not laid out as a {JSON_FILE} is ({error!r}). {GET_ONE}."
        ) from error
    except OpenELMError as error:
        raise OpenELMError(f"{file}: {error}") from error


def _from_json(found: Mapping[str, Any], template: str | None) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, proved to give the same ids."""
    tokenizer = rebuild(found, template=template)
    with contextlib.suppress(ImportError):  # then the comparison of merges has to do
        described = {**describe(tokenizer), "model": found["model"]}
        prove_same(json.dumps(described), tokenizer)
    return tokenizer


def prove_tokenizer(tokenizer: Tokenizer, num_rows: int) -> None:
    """Raise OpenELMError unless the tokenizer may be that of a model with `num_rows`.

    It must have Llama's manners (special ids, byte pieces, one dummy space, lossless
    round trip) and fit the embedding; with 32000 pieces it must be Llama's own.
    """
    processor = tokenizer.processor
    special = (processor.unk_id(), tokenizer.bos_id, tokenizer.eos_id)
    if special != (UNK_ID, BOS_ID, EOS_ID):
        refuse(
            f"The tokenizer's unknown, BOS and EOS pieces are {special}; OpenELM's are "
            f"{(UNK_ID, BOS_ID, EOS_ID)}"
        )
    if not all(processor.IsByte(processor.PieceToId(name)) for name in BYTE_PIECES):
        refuse("The tokenizer lacks byte pieces, so rare characters would be lost")
    first = processor.IdToPiece(tokenizer.encode("a", bos=False)[0])
    if not first.startswith(SPACE):
        refuse(
            "The tokenizer puts no dummy space in front of a text, as OpenELM's does: "
            f'"a" begins with the piece {first!r}'
        )
    for text in PROBES:
        if (back := tokenizer.decode(tokenizer.encode(text))) != text:
            refuse(f"The tokenizer loses text: {text!r} comes back as {back!r}")
    size = tokenizer.vocab_size
    padded = pad_vocabulary(size)
    if num_rows not in (size, padded):
        raise OpenELMError(
            f"The tokenizer has {size} pieces and the model's embedding {num_rows} "
            f"rows, where {size} would fit or, as CoreNet pads them, {padded}. Say the "
            "`tokenizer` that the model was trained with."
        )
    # Mistral's has the same size and special ids and passes all of the above.
    for text, ids in LLAMA_VECTORS.items() if size == LLAMA_SIZE else ():
        if (found := tokenizer.encode(text)) != ids:
            refuse(
                f"The tokenizer has {size} pieces but is not Llama's: {text!r} gives "
                f"{found}, not {ids}"
            )


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.model, tokenizer.json and its config, and prove that they agree.

    Raises:
        OpenELMError: tokenizer.json cannot say what this tokenizer does, or read back
            it gives other ids; or the folder cannot be written.
    """
    described = json.dumps(describe(tokenizer), ensure_ascii=False)
    name = tokenizer.processor.IdToPiece
    config = {
        # transformers 5 makes a "LlamaTokenizer" its own way, which drops one of the
        # spaces that a text begins with; this class takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name(tokenizer.bos_id),
        "eos_token": name(tokenizer.eos_id),
        "unk_token": name(tokenizer.processor.unk_id()),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    try:
        (folder / MODEL_FILE).write_bytes(tokenizer.model_proto)
        (folder / JSON_FILE).write_bytes(described.encode())
        (folder / CONFIG_FILE).write_bytes(json.dumps(config, indent=2).encode())
        prove_same((folder / JSON_FILE).read_text(encoding="utf-8"), tokenizer)
    except (OSError, ImportError) as error:
        raise OpenELMError(
            f"Cannot write the tokenizer into {folder}: {error}."
        ) from error


def prove_same(described: str, tokenizer: Tokenizer) -> None:
    """Raise OpenELMError unless a tokenizer.json gives the same ids and text."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    try:
        other = HuggingFaceTokenizer.from_str(described)
    except Exception as error:  # Rust's errors arrive as plain Exceptions
        raise OpenELMError(f"{JSON_FILE} cannot be used: {error}.") from error
    for text in PROBES:
        ids, found = tokenizer.encode(text), other.encode(text).ids
        if found != ids or other.decode(ids) != text:
            refuse(
                f"{JSON_FILE} differs from SentencePiece: {text!r} gives {found}, not "
                f"{ids}, which decode to {other.decode(ids)!r}"
            )
