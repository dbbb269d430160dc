"""Finding a tokenizer, and proving that it is the right one.

OpenELM's repositories carry no tokenizer, look-alikes of Llama's are about, and a wrong
one spoils a model without any error: so what is found here is proved. A tokenizer has
two files: tokenizer.model (SentencePiece's, which is ours) and tokenizer.json (Hugging
Face's, for mlx-lm and transformers). Either is made from the other.
"""

import contextlib
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mlx_openelm.config import BOS_ID, EOS_ID
from mlx_openelm.errors import OpenELMError
from mlx_openelm.hub import download
from mlx_openelm.tokenizer import SPACE, Tokenizer

UNK_ID = 0
MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (MODEL_FILE, JSON_FILE, CONFIG_FILE)

PROBES = (  # what tokenizers differ in; none holds U+2581, which decodes to a space
    *("", " ", "a", " a", "  two spaces", "trailing  ", "a b  c   d    e     f"),
    *(f"{' ' * n}x{' ' * n}\n" for n in (7, 15, 16, 17, 23, 33, 50)),
    *("\n", "\n\n\n", "tab\there\t\t", "windows\r\nlines\r\n", " \n \n  \n\t "),
    *("naïve café, 日本語 와 中文。", "مرحبا שלום नमस्ते", "e\u0301 \u200b\u00a0\ufeff"),
    *(
        "\U0001f469\u200d\U0001f467 \U0001f1e8\U0001f1ed",
        "🙂🙂",
        "\U0001d54f \U0010ffff",
    ),
    *("\x00\x01\x7f\x80\xff\ufffd", "1234567890 3.14 -1e-9", "<0x41> <0x0A>"),
    *(
        "[INST] <|user|>\n### Response:\n",
        "    def f(x):\n        return {'a': x**2}\n",
    ),
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
_GET_ONE = (
    "Say --tokenizer FILE, FOLDER or REPO with Llama 2's tokenizer.model, such as "
    "--tokenizer NousResearch/Llama-2-7b-hf (a copy that is open to all)"
)


def _refuse(reason: str) -> NoReturn:
    raise OpenELMError(f"{reason}. {_GET_ONE}.")


@dataclass(frozen=True, slots=True)
class FoundTokenizer:
    """A proved tokenizer, and the file that it came from."""

    tokenizer: Tokenizer
    path: Path


def find_tokenizer(
    source: Path, given: str | None, num_rows: int, *, offline: bool = False
) -> FoundTokenizer:
    """Find the tokenizer of a model and prove it.

    Args:
        source: the model's folder or file; looked beside unless a tokenizer is given.
        given: what --tokenizer says: a file, a folder, or a repository on the Hub.
        num_rows: rows of the model's embedding.
        offline: of the Hub, use only what is on this machine already.

    Raises:
        OpenELMError: none was found, or the one found is not this model's.
    """
    if given is not None:
        places = [_locate(given, offline=offline)]
    else:
        places = [source if source.is_dir() else source.parent]
    file = next(filter(None, map(_tokenizer_file, places)), None)
    if file is None and given is not None:
        _refuse(f"{given} holds neither {MODEL_FILE} nor {JSON_FILE}")
    if file is None:
        raise OpenELMError(
            f"No tokenizer was found beside {source}, and OpenELM's own repositories "
            f"carry none. {_GET_ONE}, or --tokenizer none to convert without one."
        )
    tokenizer = read_tokenizer(file)
    try:
        prove_tokenizer(tokenizer, num_rows)
    except OpenELMError as error:
        raise OpenELMError(f"{file}: {error}") from error
    return FoundTokenizer(tokenizer, file)


def _locate(given: str, *, offline: bool) -> Path:
    """Return the path that `given` is; a repository on the Hub becomes a folder."""
    path = Path(given).expanduser()
    if path.exists():
        return path
    is_repo = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given)
    if not is_repo or path.suffix in {".model", ".json"}:
        _refuse(f"There is no file or folder {given}")
    with contextlib.suppress(OpenELMError):  # what is here is not asked for again
        cached = download(given, TOKENIZER_FILES, offline=True)
        if _tokenizer_file(cached):
            return cached
    return download(given, TOKENIZER_FILES, offline=offline)


def _tokenizer_file(path: Path) -> Path | None:
    """Return the tokenizer's file in a folder; a file stands for itself."""
    files = (path / MODEL_FILE, path / JSON_FILE) if path.is_dir() else (path,)
    return next((file for file in files if file.is_file()), None)


def read_tokenizer(path: Path, *, template: str | None = None) -> Tokenizer:
    """Read a folder's or a file's tokenizer; in a folder, tokenizer.model goes first.

    From a tokenizer.json, a SentencePiece model with the same ids is built.

    Raises:
        OpenELMError: there is none, or it cannot be read as SentencePiece BPE.
    """
    file = _tokenizer_file(path)
    if file is None:
        _refuse(f"{path} holds neither {MODEL_FILE} nor {JSON_FILE}")
    if file.suffix != ".json":
        return Tokenizer.from_file(file, template=template)
    try:
        return _from_json(json.loads(file.read_bytes()), template)
    except (OSError, ValueError) as error:
        raise OpenELMError(f"Cannot read the tokenizer {file}: {error}.") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise OpenELMError(
            f"{file} is not laid out as a {JSON_FILE} is ({error!r}). {_GET_ONE}."
        ) from error
    except OpenELMError as error:
        raise OpenELMError(f"{file}: {error}") from error


def prove_tokenizer(tokenizer: Tokenizer, num_rows: int) -> None:
    """Raise OpenELMError unless the tokenizer may be that of a model with `num_rows`.

    It must have Llama's manners (special ids, byte pieces, one dummy space, lossless
    round trip) and fit the embedding; with 32000 pieces it must be Llama's own.
    """
    processor = tokenizer.processor
    special = (processor.unk_id(), tokenizer.bos_id, tokenizer.eos_id)
    if special != (UNK_ID, BOS_ID, EOS_ID):
        _refuse(
            f"The tokenizer's unknown, BOS and EOS pieces are {special}; OpenELM's are "
            f"{(UNK_ID, BOS_ID, EOS_ID)}"
        )
    if not all(processor.IsByte(processor.PieceToId(name)) for name in _BYTE_PIECES):
        _refuse("The tokenizer lacks byte pieces, so rare characters would be lost")
    first = processor.IdToPiece(tokenizer.encode("a", bos=False)[0])
    if not first.startswith(SPACE):
        _refuse(
            "The tokenizer puts no dummy space in front of a text, as OpenELM's does: "
            f'"a" begins with the piece {first!r}'
        )
    for text in PROBES:
        if (back := tokenizer.decode(tokenizer.encode(text))) != text:
            _refuse(f"The tokenizer loses text: {text!r} comes back as {back!r}")
    size = tokenizer.vocab_size
    padded = math.ceil((size + 1) / 128) * 128  # CoreNet's: a padding id, then 128s
    if num_rows not in (size, padded):
        raise OpenELMError(
            f"The tokenizer has {size} pieces and the model's embedding {num_rows} "
            f"rows, where {size} would fit or, as CoreNet pads them, {padded}. Say the "
            "--tokenizer that the model was trained with."
        )
    # Mistral's has the same size and special ids and passes all of the above.
    for text, ids in LLAMA_VECTORS.items() if size == LLAMA_SIZE else ():
        if (found := tokenizer.encode(text)) != ids:
            _refuse(
                f"The tokenizer has {size} pieces but is not Llama's: {text!r} gives "
                f"{found}, not {ids}"
            )


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.model, tokenizer.json and its config, and prove that they agree.

    Raises:
        OpenELMError: tokenizer.json cannot say what this tokenizer does, or read back
            it gives other ids; or the folder cannot be written.
    """
    described = json.dumps(_describe(tokenizer), ensure_ascii=False)
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
        _prove_same((folder / JSON_FILE).read_text(encoding="utf-8"), tokenizer)
    except (OSError, ImportError) as error:
        raise OpenELMError(
            f"Cannot write the tokenizer into {folder}: {error}."
        ) from error


def _prove_same(described: str, tokenizer: Tokenizer) -> None:
    """Raise OpenELMError unless a tokenizer.json gives the same ids and text."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    try:
        other = HuggingFaceTokenizer.from_str(described)
    except Exception as error:  # Rust's errors arrive as plain Exceptions
        raise OpenELMError(f"{JSON_FILE} cannot be used: {error}.") from error
    for text in PROBES:
        ids, found = tokenizer.encode(text), other.encode(text).ids
        if found != ids or other.decode(ids) != text:
            _refuse(
                f"{JSON_FILE} differs from SentencePiece: {text!r} gives {found}, not "
                f"{ids}, which decode to {other.decode(ids)!r}"
            )


# SentencePiece -> tokenizer.json -------------------------------------------------

_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
_DECODER = {  # mlx-lm tells a SentencePiece decoder by exactly this value
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
_BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int  # ModelProto.SentencePiece.Type


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE = 2  # TrainerSpec.ModelType


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer.json of a SentencePiece model.

    One thing stays different: "<s>" typed in a text is ordinary text to SentencePiece
    and the special token to Hugging Face.
    """
    pieces = _read_proto(tokenizer.model_proto)
    bos = pieces[tokenizer.bos_id].text
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, pair = ({"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB"))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece.text, "special": True, **plain}
            for i, piece in enumerate(pieces)
            if piece.kind in (_UNKNOWN, _CONTROL)
        ],
        "normalizer": _NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, pair],
            "special_tokens": {
                bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}
            },
        },
        "decoder": _DECODER,
        "model": {
            "type": "BPE",
            "unk_token": pieces[tokenizer.processor.unk_id()].text,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }


def _merges(pieces: Sequence[_Piece]) -> list[tuple[str, str]]:
    """Return the merges, best first, that make Hugging Face's BPE SentencePiece's.

    SentencePiece joins the neighbours whose union scores highest, of equals the
    leftmost; Hugging Face the pair that ranks first, then the leftmost. Of equal scores
    the longest left part ranks first: what was begun on the left grows on, and Llama's
    runs of spaces, which all score the same, come out as SentencePiece cuts them.
    """
    normal = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    splits = [
        (-score, -i, text[:i], text[i:])
        for text, score in normal.items()
        for i in range(1, len(text))
        if text[:i] in normal and text[i:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(splits)]


# tokenizer.json -> SentencePiece -------------------------------------------------


def _from_json(found: Mapping[str, Any], template: str | None) -> Tokenizer:
    """Return the SentencePiece tokenizer with a tokenizer.json's ids.

    Raises:
        OpenELMError: it does what SentencePiece's BPE cannot.
    """
    model = found["model"]
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        _refuse("It is not BPE with byte fallback, as OpenELM's is")
    vocab = model["vocab"]
    names = sorted(vocab, key=vocab.__getitem__)
    if [vocab[name] for name in names] != list(range(len(names))):
        _refuse(f"Its ids are not 0 to {len(names) - 1}")
    if not _has_dummy_space(found):
        _refuse(
            "It does not put one space in front of a text and leave the rest: it has "
            f"{found.get('normalizer')} and {found.get('pre_tokenizer')}"
        )
    special = {token["id"]: token["content"] for token in found["added_tokens"]}
    # A padding token behind the vocabulary comes out of no text, so it is left out.
    kept = {i for i, x in special.items() if i < len(names) or "pad" not in x.lower()}
    if kept != {UNK_ID, BOS_ID, EOS_ID}:
        _refuse(f"Its added tokens are {special}; OpenELM has unknown, BOS, EOS only")
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    kinds = dict.fromkeys(_BYTE_PIECES, _BYTE) | dict.fromkeys(names[1:3], _CONTROL)
    kinds[names[0]] = _UNKNOWN
    lowest = -float(len(merges))
    pieces = [_Piece(x, scores.get(x, lowest), kinds.get(x, _NORMAL)) for x in names]
    # SentencePiece joins whatever spells a piece: with other merges, ids would differ.
    if {m for m in merges if "".join(m) not in kinds} != {*_merges(pieces)}:
        _refuse("Its merges are not those of a SentencePiece model")
    tokenizer = Tokenizer(_write_proto(pieces), template=template)
    with contextlib.suppress(ImportError):  # then the comparison of merges has to do
        _prove_same(json.dumps({**_describe(tokenizer), "model": model}), tokenizer)
    return tokenizer


def _has_dummy_space(found: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts one space in front of a text and no more.

    transformers 5 rewrites Llama's normalizer as the pre-tokenizer Metaspace, which
    drops one of the spaces that a text begins with. OpenELM was trained with
    SentencePiece, so this is let pass and not taken over.
    """
    pre_tokenizer = found.get("pre_tokenizer") or {}
    if found.get("normalizer") is not None:
        return found["normalizer"] == _NORMALIZER and not pre_tokenizer
    return (
        (pre_tokenizer.get("type"), pre_tokenizer.get("split")) == ("Metaspace", False)
        and pre_tokenizer["replacement"] == SPACE
        and pre_tokenizer.get("prepend_scheme", "always") != "never"
    )


# The part of sentencepiece_model.proto that matters ------------------------------
#
# ModelProto      1 pieces (1 piece, 2 score, 3 type), 2 trainer_spec, 3 normalizer_spec
# TrainerSpec     3 model_type, 4 vocab_size, 24 treat_whitespace_as_suffix,
#                 35 byte_fallback, 40 to 43 unk_id, bos_id, eos_id, pad_id, 45 to 47
#                 unk_piece, bos_piece, eos_piece
# NormalizerSpec  1 name, 2 precompiled_charsmap, 3 add_dummy_prefix,
#                 4 remove_extra_whitespaces, 5 escape_whitespaces


def _read_proto(proto: bytes) -> list[_Piece]:
    """Return a SentencePiece model's pieces.

    Raises:
        OpenELMError: the model does what a tokenizer.json of ours cannot express.
    """
    messages: dict[int, list[dict[int, Any]]] = {1: [], 2: [{}], 3: [{}]}
    for number, value in _fields(proto):
        if number in messages:
            messages[number].append(dict(_fields(value)))
    pieces = [
        _Piece(m[1].decode(), _float(m.get(2, bytes(4))), m.get(3, _NORMAL))
        for m in messages[1]
    ]
    trainer, normalizer = messages[2][-1], messages[3][-1]
    odd = [piece.text for piece in pieces if piece.kind in (_USER_DEFINED, _UNUSED)]
    reasons = {
        "is not BPE": trainer.get(3, 1) != _BPE,
        "has no byte fallback": not trainer.get(35, 0),
        "puts spaces behind words": trainer.get(24, 0),
        f"normalizes text ({normalizer.get(1, b'').decode()})": normalizer.get(2),
        "puts no dummy space in front of a text": not normalizer.get(3, 1),
        "removes extra white space": normalizer.get(4, 1),
        "does not escape spaces": not normalizer.get(5, 1),
        f"has user-defined or unused pieces ({odd[:5]})": odd,
    }
    if any(reasons.values()):
        found = ", ".join(reason for reason, holds in reasons.items() if holds)
        _refuse(f"{JSON_FILE} cannot express this tokenizer, which {found}")
    return pieces


def _write_proto(pieces: Sequence[_Piece]) -> bytes:
    names = [piece.text.encode() for piece in pieces[: EOS_ID + 1]]
    ids = {40: UNK_ID, 41: BOS_ID, 42: EOS_ID, 43: -1}  # -1: no padding piece
    trainer = _message({3: _BPE, 4: len(pieces), 35: 1, **ids})
    trainer += _message(dict(enumerate(names, 45)))
    normalizer = _message({1: b"identity", 3: 1, 4: 0, 5: 1})
    messages = [
        (1, _message({1: p.text.encode(), 2: p.score, 3: p.kind})) for p in pieces
    ]
    messages += [(2, trainer), (3, normalizer)]
    return b"".join(_field(number, message) for number, message in messages)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield a protobuf message's fields: (number, a whole number or bytes)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire_type) or varint()
        yield number, data[at : at + size]
        at += size


def _float(data: bytes) -> float:
    (value,) = struct.unpack("<f", data)
    return float(value)


def _message(fields: Mapping[int, float | bytes]) -> bytes:
    return b"".join(_field(number, value) for number, value in fields.items())


def _field(number: int, value: float | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written as their two's complement
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
