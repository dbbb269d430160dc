"""Conversion of a SentencePiece model to Hugging Face's tokenizer.json, and back.

`storage.tokenizer_finder` finds the files and checks that both give the same ids.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, NoReturn

from mlx_openelm.config import BOS_ID, EOS_ID
from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.added_tokens import SPACE, AddedToken
from mlx_openelm.text.tokenizer import Tokenizer, check_pieces

UNK_ID = 0
BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
TOKENIZER_HINT = (
    "Convert with `tokenizer` FILE, FOLDER or REPO of Llama 2's tokenizer.model, such "
    "as `tokenizer` NousResearch/Llama-2-7b-hf (a public copy)"
)


def refuse(reason: str) -> NoReturn:
    """Raise OpenELMError: the reason, and where to get Llama's tokenizer."""
    raise OpenELMError(f"{reason}. {TOKENIZER_HINT}.")


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int  # ModelProto.SentencePiece.Type


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE = 2  # TrainerSpec.ModelType
_FLOAT = struct.Struct("<f")


# SentencePiece -> tokenizer.json -------------------------------------------------

_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [{"type": "Prepend", "prepend": SPACE}, _ESCAPE],
}
_KEEP_LEADING = {  # as transformers 5 converts a tokenizer.model
    "type": "Replace",
    "pattern": {"Regex": f"\\A{SPACE}"},
    "content": SPACE * 2,
}
_METASPACE = {"type": "Metaspace", "split": False}
# The dummy space at the start of the whole text alone, not after added tokens. The
# normalizer has replaced all spaces, so the first Metaspace only adds one.
_PREPEND_ONCE = {
    "type": "Sequence",
    "pretokenizers": [
        {**_METASPACE, "replacement": " ", "prepend_scheme": "first"},
        {**_METASPACE, "replacement": SPACE, "prepend_scheme": "never"},
    ],
}
_DECODER = {  # mlx-lm recognises a SentencePiece decoder by exactly this value
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer.json of a SentencePiece model.

    One difference remains: "<s>" in a text is ordinary text to SentencePiece and the
    special token to Hugging Face.

    Raises:
        OpenELMError: our tokenizer.json cannot express what the model does.
    """
    pieces = _read_proto(tokenizer.model_proto)
    added = tokenizer.added
    bos = pieces[tokenizer.bos_id].text
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece.text, "special": True, **plain}
            for i, piece in enumerate(pieces)
            if piece.kind in (_UNKNOWN, _CONTROL)
        ]
        + [asdict(token) for token in added.by_id.values()],
        "normalizer": _NORMALIZER if added.spaces_each else _ESCAPE,
        "pre_tokenizer": None if added.spaces_each else _PREPEND_ONCE,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
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
    """Return the merges, best first, that make Hugging Face's BPE equal SentencePiece.

    SentencePiece joins the neighbours whose union scores highest, and on ties the
    leftmost; Hugging Face joins the pair of the lowest rank, then the leftmost. Among
    equal scores the longest left part ranks first, so that Llama's runs of spaces,
    which all have the same score, are split as in SentencePiece.
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


def rebuild(
    description: Mapping[str, Any],
    *,
    template: str | None = None,
    num_rows: int | None = None,
) -> Tokenizer:
    """Return the SentencePiece tokenizer with the ids of a tokenizer.json.

    Its added tokens are left out; `read_added` returns them.

    Args:
        num_rows: rows of the model's embedding; default: one for each piece.

    Raises:
        OpenELMError: SentencePiece's BPE cannot express it.
        LookupError, TypeError, AttributeError, ValueError: it does not have the
            structure of a tokenizer.json.
    """
    model = description["model"]
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        refuse("It is not BPE with byte fallback, as OpenELM's is")
    special = {token["id"]: token["content"] for token in description["added_tokens"]}
    vocab = {  # some list the added tokens here too
        text: i
        for text, i in model["vocab"].items()
        if i <= EOS_ID or special.get(i) != text
    }
    check_pieces(vocab)
    names = sorted(vocab, key=vocab.__getitem__)
    if [vocab[name] for name in names] != list(range(len(names))):
        refuse(f"Its ids are not 0 to {len(names) - 1}")
    if _read_spaces(description) is None:
        refuse(
            "It does not put one space in front of a text and keep the rest: it has "
            f"{description.get('normalizer')!r:.300} and "
            f"{description.get('pre_tokenizer')!r:.300}"
        )
    if {*special} & {*range(len(names))} != {UNK_ID, BOS_ID, EOS_ID}:
        refuse(
            f"Its special tokens are {special!r:.300}; OpenELM has only unknown, BOS "
            "and EOS, and added tokens that follow the pieces"
        )
    # A padding token without a row never occurs in a text and is left out.
    last = max(num_rows or 0, len(names))
    lost = [x for i, x in special.items() if i >= last and "pad" not in x.lower()]
    if lost:
        refuse(f"The embedding has no rows for its added tokens {lost!r:.300}")
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    kinds = dict.fromkeys(BYTE_PIECES, _BYTE) | dict.fromkeys(names[1:3], _CONTROL)
    kinds[names[0]] = _UNKNOWN
    lowest = -float(len(merges))
    pieces = [_Piece(x, scores.get(x, lowest), kinds.get(x, _NORMAL)) for x in names]
    # SentencePiece joins any two pieces that make a piece; other merges, other ids.
    if {m for m in merges if "".join(m) not in kinds} != {*_merges(pieces)}:
        refuse("Its merges are not those of a SentencePiece model")
    return Tokenizer(_write_proto(pieces), template=template)


def read_added(
    description: Mapping[str, Any],
) -> tuple[list[AddedToken], bool]:
    """Return the added tokens of a tokenizer.json, and `AddedTokens.spaces_each`.

    Raises:
        LookupError, TypeError, AttributeError, ValueError: see `rebuild`.
    """
    tokens = [AddedToken.read(entry) for entry in description["added_tokens"]]
    return tokens, _read_spaces(description) != "first"


def _read_spaces(description: Mapping[str, Any]) -> str | None:
    """Return which texts a tokenizer.json puts a dummy space in front of.

    Returns:
        "each" text between added tokens, or the "first" one. None: it does more, or
        does not keep the spaces.

    transformers 5 rewrites Llama's normalizer as the pre-tokenizer Metaspace, which
    drops one leading space of a text. That is accepted but not reproduced, as OpenELM
    was trained with SentencePiece.
    """
    normalizer = description.get("normalizer")
    pre_tokenizer = description.get("pre_tokenizer") or {}
    if normalizer == _NORMALIZER:
        return None if pre_tokenizer else "each"
    if (normalizer, pre_tokenizer) == (_ESCAPE, _PREPEND_ONCE):
        return "first"
    if normalizer is not None and normalizer.get("type") == "Sequence":
        first, *rest = normalizer["normalizers"]
        normalizer = first if rest in ([], [_KEEP_LEADING]) else {}
    if pre_tokenizer.get("type") == "Sequence":
        pre_tokenizer, *rest = pre_tokenizer["pretokenizers"]
        pre_tokenizer = {} if rest else pre_tokenizer
    scheme = pre_tokenizer.get("prepend_scheme", "always")
    if (
        normalizer not in (None, _ESCAPE)
        or not _METASPACE.items() <= pre_tokenizer.items()
        or pre_tokenizer["replacement"] != SPACE
        or scheme == "never"
    ):
        return None
    return "first" if scheme == "first" else "each"


# The fields of sentencepiece_model.proto that are used ---------------------------
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
        OpenELMError: our tokenizer.json cannot express what the model does.
    """
    messages: dict[int, list[dict[int, Any]]] = {1: [], 2: [{}], 3: [{}]}
    try:
        for number, value in _fields(proto):
            if number in messages:
                messages[number].append(dict(_fields(value)))
        pieces = [
            _Piece(
                m[1].decode(), _FLOAT.unpack(m.get(2, bytes(4)))[0], m.get(3, _NORMAL)
            )
            for m in messages[1]
        ]
    except (LookupError, TypeError, AttributeError, ValueError, struct.error) as error:
        refuse(f"The tokenizer.model is damaged ({error!r:.80})")
    trainer, normalizer = messages[2][-1], messages[3][-1]
    name = bytes(normalizer.get(1, b"")).decode(errors="replace")
    odd = [piece.text for piece in pieces if piece.kind in (_USER_DEFINED, _UNUSED)]
    reasons = {
        "is not BPE": trainer.get(3, 1) != _BPE,
        "has no byte fallback": not trainer.get(35, 0),
        "puts spaces after words": trainer.get(24, 0),
        f"normalizes text ({name:.80})": normalizer.get(2),
        "puts no dummy space in front of a text": not normalizer.get(3, 1),
        "removes extra white space": normalizer.get(4, 1),
        "does not escape spaces": not normalizer.get(5, 1),
        f"has user-defined or unused pieces ({odd[:5]})": odd,
    }
    if any(reasons.values()):
        listed = ", ".join(reason for reason, applies in reasons.items() if applies)
        refuse(f"tokenizer.json cannot express this tokenizer, which {listed}")
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
    """Yield a protobuf message's fields: (number, an integer or bytes)."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire_type) or varint()
        yield number, data[position : position + size]
        position += size


def _message(fields: Mapping[int, float | bytes]) -> bytes:
    return b"".join(_field(number, value) for number, value in fields.items())


def _field(number: int, value: float | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + _FLOAT.pack(value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers as two's complement
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
