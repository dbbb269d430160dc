"""Finds the tokenizer of a model and verifies it.

OpenELM's repositories contain no tokenizer, many tokenizers resemble Llama's, and a
wrong one degrades a model without any error. Every tokenizer is therefore verified. It
has two files: tokenizer.model (SentencePiece, which we use) and tokenizer.json (Hugging
Face, for mlx-lm and transformers). `text.tokenizer_json` converts between them; this
module checks that they agree.
"""

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mlx_openelm.config import BOS_ID, EOS_ID, pad_vocabulary
from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import read_json, read_text
from mlx_openelm.message_parts import cannot_access, describe_error, describe_failure
from mlx_openelm.paths import user_path
from mlx_openelm.storage.added_token_files import read_added_tokens
from mlx_openelm.storage.file_checks import refuse_unreadable
from mlx_openelm.storage.hub import (
    TOKENIZER,
    TOKENIZER_FILES,
    cached_snapshots,
    download,
    refuse_address,
)
from mlx_openelm.text.tokenizer import SPACE, Tokenizer
from mlx_openelm.text.tokenizer_json import (
    BYTE_PIECES,
    TOKENIZER_HINT,
    UNK_ID,
    describe,
    rebuild,
    refuse,
)

MODEL_FILE, JSON_FILE, CONFIG_FILE, *_ = TOKENIZER_FILES

PROBES = (  # texts in which tokenizers differ; no U+2581, which decodes to a space
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
ADDED_PROBES = ("{}", "a{}b", "a {} b", "  {0}{0}\n{0}")  # around added tokens
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
    # From Llama 2's own file. transformers 5 ranks the merges of a tokenizer.model by
    # id instead of score, which joins spaces before words:
    "x  x": [1, 921, 29871, 921],
    " " * 40: [1, 462, 462, 3986],
}
LLAMA_BYTES = 499_723  # size of Llama's tokenizer.model

PUBLIC_COPIES = (  # repositories with Llama's tokenizer; the first is downloaded
    "NousResearch/Llama-2-7b-hf",
    "NousResearch/Llama-2-7b-chat-hf",
    "mlx-community/OpenELM-*",
    "PrunaAI/apple-OpenELM-*",
)
MOST_FOLDERS, MOST_TOKENIZERS, MOST_BYTES = 2000, 20, 20_000_000  # limits of the search


@dataclass(frozen=True, slots=True)
class FoundTokenizer:
    """A verified tokenizer and its file.

    Attributes:
        notes: the places that were searched, and what was skipped and why; empty if the
            tokenizer was given or is in the source's folder.
    """

    tokenizer: Tokenizer
    path: Path
    notes: tuple[str, ...] = ()


def find_tokenizer(
    source: Path, given: str | None, num_rows: int, *, offline: bool = False
) -> FoundTokenizer:
    """Find and verify the tokenizer of a model.

    The search covers the source's folder, its subfolders and siblings, and, if it can
    be Llama's, the Hub cache and the Hub. A tokenizer that is given or in the source's
    folder must fit the model; others that do not fit are skipped.

    Args:
        source: the model's folder or file.
        given: the value of `tokenizer`: a file, a folder, or a repository on the Hub.
        num_rows: rows of the model's embedding.
        offline: use only the local Hub cache.

    Raises:
        OpenELMError: no tokenizer was found, or it does not fit the model.
    """
    folder = source if source.is_dir() else source.parent
    if given is not None:
        file = find_tokenizer_file(_locate(given, offline=offline))
        if file is None:
            refuse(f"{given} holds neither {MODEL_FILE} nor {JSON_FILE}")
        return FoundTokenizer(_read_and_verify(file, num_rows), file)
    if own := find_tokenizer_file(folder):
        return FoundTokenizer(_read_and_verify(own, num_rows), own)
    notes = [f"There is no tokenizer in {folder}."]
    result = _search_nearby(folder, num_rows, notes)
    if result is None and num_rows in (LLAMA_SIZE, pad_vocabulary(LLAMA_SIZE)):
        result = _search_hub(num_rows, notes, offline=offline)
    if result is None:
        tried = f" ({' '.join(notes[1:][-4:])})" if notes[1:] else ""
        raise OpenELMError(
            f"No tokenizer was found next to {source}{tried}, and OpenELM's own "
            f"repositories contain none. {TOKENIZER_HINT}, or with `tokenizer` none "
            "for a folder without one."
        )
    return result


def _read_and_verify(file: Path, num_rows: int) -> Tokenizer:
    tokenizer = read_tokenizer(file, num_rows=num_rows)
    try:
        verify_tokenizer(tokenizer, num_rows)
    except OpenELMError as error:
        raise OpenELMError(f"{file}: {error}") from error
    return tokenizer


def _search_nearby(
    folder: Path, num_rows: int, notes: list[str]
) -> FoundTokenizer | None:
    """Return the fitting tokenizer of a subfolder or sibling of the source's folder.

    Llama's is recognised by its ids, others only by their size. If two of the latter
    fit, the user must choose.
    """
    files = islice(_files_nearby(folder), MOST_TOKENIZERS)
    tried = (
        _try(file, num_rows, "a folder next to the source", notes) for file in files
    )
    fitting = filter(None, tried)
    first = next(fitting, None)
    if first is None or first.tokenizer.vocab_size == LLAMA_SIZE:
        return first
    for other in fitting:
        if _describe(other.tokenizer) != _describe(first.tokenizer):
            raise OpenELMError(
                f"{first.path} and {other.path} both fit the model and differ; choose "
                "one with `tokenizer`."
            )
    return first


def _files_nearby(folder: Path) -> Iterator[Path]:
    absolute = Path(os.path.abspath(folder))
    for parent in (absolute, absolute.parent):
        paths: list[Path] = []
        with contextlib.suppress(OSError):  # not readable
            paths = sorted(islice(parent.iterdir(), MOST_FOLDERS))
        for path in paths:
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
        if result := _try(file, num_rows, f"{repo} in the Hub cache", notes):
            return result
    notes.append("The Hub cache has no copy of Llama's.")
    repo = PUBLIC_COPIES[0]
    if offline:
        notes.append(f"Offline, so {repo} was not downloaded.")
        return None
    try:
        copy = find_tokenizer_file(download(repo, TOKENIZER))
    except OpenELMError as error:
        reason, *_ = str(error).split("; ")
        notes.append(f"The download of a copy failed: {reason.rstrip('.')}.")
        return None
    return _try(copy, num_rows, f"downloaded from {repo}", notes) if copy else None


def _files_in_cache() -> Iterator[tuple[str, Path]]:
    """Yield cached files that may be Llama's with their repositories, public first."""
    snapshots = cached_snapshots()
    for pattern in PUBLIC_COPIES:
        for repo, folder in snapshots:
            file = find_tokenizer_file(folder)
            if file is not None and fnmatch.fnmatchcase(repo, pattern):
                yield repo, file
    for repo, folder in snapshots:
        copy = folder / MODEL_FILE
        is_public = any(fnmatch.fnmatchcase(repo, pattern) for pattern in PUBLIC_COPIES)
        if not is_public and copy.is_file() and copy.stat().st_size == LLAMA_BYTES:
            yield repo, copy


def _try(
    file: Path, num_rows: int, where: str, notes: list[str]
) -> FoundTokenizer | None:
    """Verify a tokenizer and add a note on the result."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise OpenELMError(f"{file} is too large for Llama's.")
        tokenizer = _read_and_verify(file, num_rows)
        if num_rows not in (tokenizer.num_ids, pad_vocabulary(tokenizer.num_ids)):
            raise OpenELMError(f"{file} has no text for some of the {num_rows} rows.")
    except (OpenELMError, OSError) as error:
        reason, *_ = describe_failure(error).split(". ")  # without the advice
        notes.append(f"Skipped {reason.rstrip('.')}.")
        return None
    check = (
        "it gives Llama's ids for every probe"
        if tokenizer.vocab_size == LLAMA_SIZE
        else f"it fits {num_rows} rows; if the model has another, pass `tokenizer`"
    )
    note = f"The tokenizer is {file}, {where}: {check}."
    return FoundTokenizer(tokenizer, file, (*notes, note))


def _describe(tokenizer: Tokenizer) -> tuple[list[str], list[list[int]]]:
    pieces = [tokenizer.processor.IdToPiece(i) for i in range(tokenizer.vocab_size)]
    return pieces, [tokenizer.encode(text) for text in PROBES]


def _locate(given: str, *, offline: bool) -> Path:
    """Return the path of a file, a folder, or a repository, which is downloaded."""
    refuse_address(given)
    path = user_path(given)
    if path.exists():
        return path
    is_repo = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given)
    if not is_repo or path.suffix in {".model", ".json"}:
        refuse(f"There is no file or folder {given}")
    return download(given, TOKENIZER, offline=offline)


def find_tokenizer_file(path: Path) -> Path | None:
    """Return the tokenizer file in a folder, or `path` itself if it is a file."""
    files = (path / MODEL_FILE, path / JSON_FILE) if path.is_dir() else (path,)
    return next((file for file in files if file.is_file()), None)


def read_tokenizer(
    path: Path, *, template: str | None = None, num_rows: int | None = None
) -> Tokenizer:
    """Read the tokenizer of a file or folder; in a folder, tokenizer.model comes first.

    A tokenizer.json is converted to a SentencePiece model with the same ids.

    Args:
        num_rows: rows of the model's embedding. If the tokenizer has fewer pieces, the
            tokens that were added to it are read from the files of its folder.

    Raises:
        OpenELMError: there is no tokenizer, or it is not SentencePiece BPE.
    """
    file = find_tokenizer_file(path)
    if file is None:
        refuse(f"{path} holds neither {MODEL_FILE} nor {JSON_FILE}")
    refuse_unreadable(file)
    if file.suffix != ".json":
        tokenizer = Tokenizer.from_file(file, template=template)
    else:
        tokenizer = _read_json(file, template, num_rows)
    if num_rows is None or num_rows <= tokenizer.vocab_size:
        return tokenizer
    added = read_added_tokens(file.parent, tokenizer.vocab_size, num_rows)
    if not added:
        return tokenizer
    return Tokenizer(tokenizer.model_proto, template=template, added=added)


def _read_json(file: Path, template: str | None, num_rows: int | None) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, verified to give the same ids."""
    try:
        description = read_json(file)
        tokenizer = rebuild(description, template=template, num_rows=num_rows)
        with contextlib.suppress(ImportError):  # `rebuild` has compared the merges
            combined = {**describe(tokenizer), "model": description["model"]}
            verify_same(json.dumps(combined), tokenizer)
    except (OSError, ValueError) as error:
        raise OpenELMError(
            f"Cannot read the tokenizer {file}: {describe_error(error)}."
        ) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise OpenELMError(
            f"{file} does not have the structure of {JSON_FILE} ({error!r}). "
            f"{TOKENIZER_HINT}."
        ) from error
    except OpenELMError as error:
        raise OpenELMError(f"{file}: {error}") from error
    return tokenizer


def verify_tokenizer(tokenizer: Tokenizer, num_rows: int) -> None:
    """Raise OpenELMError unless the tokenizer fits a model with `num_rows` rows.

    It must behave like Llama's (special ids, byte pieces, one dummy space, lossless
    round trip) and match the embedding, which may have padding rows: up to a multiple
    of 128, as CoreNet and transformers pad. With 32000 pieces it must be Llama's own.
    """
    num_ids, num_added = tokenizer.num_ids, len(tokenizer.added.by_id)
    if tokenizer.added:  # checked by `verify_same`; they may occur in the texts below
        tokenizer = Tokenizer(tokenizer.model_proto)
    processor = tokenizer.processor
    special = (processor.unk_id(), tokenizer.bos_id, processor.eos_id())
    if special != (UNK_ID, BOS_ID, EOS_ID):
        refuse(
            f"The tokenizer's unknown, BOS and EOS pieces are {special}; OpenELM's are "
            f"{(UNK_ID, BOS_ID, EOS_ID)}"
        )
    if not all(processor.IsByte(processor.PieceToId(name)) for name in BYTE_PIECES):
        refuse("The tokenizer has not all byte pieces, so rare characters are lost")
    first = processor.IdToPiece(tokenizer.encode("a", bos=False)[0])
    if not first.startswith(SPACE):
        refuse(
            "The tokenizer puts no dummy space in front of a text, as OpenELM's does: "
            f'"a" starts with the piece {first!r}'
        )
    for text in PROBES:
        if (decoded := tokenizer.decode(tokenizer.encode(text))) != text:
            refuse(f"The tokenizer loses text: {text!r} is decoded as {decoded!r}")
    size, padded = tokenizer.vocab_size, pad_vocabulary(num_ids)
    if not num_ids <= num_rows <= padded:
        added = f", {num_added} added tokens" if num_added else ""
        raise OpenELMError(
            f"The tokenizer has {size} pieces{added} and the model's embedding "
            f"{num_rows} rows; expected {num_ids}, or with padding up to {padded}. "
            "Pass the `tokenizer` that the model was trained with."
        )
    # Mistral's has the same size and special ids and passes all checks above.
    for text, ids in LLAMA_VECTORS.items() if size == LLAMA_SIZE else ():
        if (actual := tokenizer.encode(text)) != ids:
            refuse(
                f"The tokenizer has {size} pieces but is not Llama's: {text!r} gives "
                f"{actual}, not {ids}"
            )


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.model, tokenizer.json and its config; verify that they agree.

    Raises:
        OpenELMError: tokenizer.json cannot express this tokenizer or gives other ids,
            or the folder cannot be written.
    """
    described = json.dumps(describe(tokenizer), ensure_ascii=False)
    processor, name = tokenizer.processor, tokenizer.processor.IdToPiece
    config = {
        # transformers 5 rebuilds a "LlamaTokenizer" and drops one leading space of a
        # text; this class uses tokenizer.json unchanged.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name(tokenizer.bos_id),
        "eos_token": name(processor.eos_id()),
        "unk_token": name(processor.unk_id()),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **tokenizer.added.roles,
    }
    try:
        (folder / MODEL_FILE).write_bytes(tokenizer.model_proto)
        (folder / JSON_FILE).write_bytes(described.encode())
        (folder / CONFIG_FILE).write_bytes(json.dumps(config, indent=2).encode())
        verify_file(folder / JSON_FILE, tokenizer)
    except (OSError, ImportError) as error:
        raise OpenELMError(
            f"Cannot write the tokenizer into {folder}: {describe_error(error)}."
        ) from error


def verify_file(path: Path, tokenizer: Tokenizer) -> None:
    """Raise OpenELMError unless the file of a tokenizer.json is as in `verify_same`."""
    refuse_unreadable(path)
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise OpenELMError(cannot_access(path, error)) from error
    verify_same(text, tokenizer)


def verify_same(json_text: str, tokenizer: Tokenizer) -> None:
    """Raise OpenELMError unless a tokenizer.json gives the same ids and text."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    try:
        other = HuggingFaceTokenizer.from_str(json_text)
    except Exception as error:  # Rust's errors arrive as plain Exceptions
        raise OpenELMError(f"{JSON_FILE} cannot be used: {error}.") from error
    added = [token.content for token in tokenizer.added.by_id.values()]
    for text in (*PROBES, *(probe.format(x) for x in added for probe in ADDED_PROBES)):
        ids, other_ids = tokenizer.encode(text), other.encode(text).ids
        if other_ids != ids or other.decode(ids) != tokenizer.decode(ids):
            refuse(
                f"{JSON_FILE} differs from SentencePiece: {text!r} gives {other_ids}, "
                f"not {ids}, which decode to {other.decode(ids)!r}"
            )
