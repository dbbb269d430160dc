"""The SentencePiece tokenizer: encoding with one BOS, streaming decoding.

OpenELM uses Llama's tokenizer: 32000 BPE pieces, `<s>` = 1, `</s>` = 2, one dummy
space before each text, byte fallback. `tokenizer_json` reads tokenizer.json.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import sentencepiece

from mlx_openelm.errors import OpenELMError
from mlx_openelm.message_parts import describe_error
from mlx_openelm.text.added_tokens import SPACE as SPACE
from mlx_openelm.text.added_tokens import AddedTokens

EOS_TEXT = "</s>"
LONGEST_PIECE = 128  # characters; Llama's longest has 16

# Appended to a SentencePiece model: NormalizerSpec.add_dummy_prefix is false.
_NO_DUMMY_SPACE = b"\x1a\x02\x18\x00"

_NOT_UNICODE = (
    "The text is not valid UTF-8 or contains an unpaired surrogate; pass valid UTF-8."
)
_ADVICE = (
    "Replace the file with a copy of the original, or convert the model again with "
    "another `tokenizer`"
)


def check_pieces(pieces: Iterable[str]) -> None:
    """Raise OpenELMError if a piece is longer than a tokenizer's can be."""
    longest = max(pieces, key=len, default="")
    if len(longest) > LONGEST_PIECE:
        raise OpenELMError(
            f"The tokenizer has a piece of {len(longest)} characters, "
            f"{longest[:20]!r}...; pieces have at most {LONGEST_PIECE}. {_ADVICE}."
        )


class Tokenizer:
    """Text to ids and back.

    Attributes:
        processor: the SentencePieceProcessor.
        template: the prompt template stored with the model, or None.
        added: tokens whose ids follow those of the pieces.
    """

    def __init__(
        self,
        model_proto: bytes,
        *,
        template: str | None = None,
        added: AddedTokens | None = None,
    ) -> None:
        self.processor = _load(model_proto)
        check_pieces(self._list_pieces())
        if self.processor.bos_id() < 0 or self.processor.eos_id() < 0:
            raise OpenELMError(
                "The tokenizer has no BOS or no EOS piece, so OpenELM cannot use it. "
                f"{_ADVICE}."
            )
        self.model_proto = model_proto
        self.template = template
        self.added = added or AddedTokens()
        if self.added:
            self._between_added = _load(model_proto + _NO_DUMMY_SPACE)

    def _list_pieces(self) -> list[str]:
        ids = list(range(self.vocab_size))
        try:
            pieces: list[str] = self.processor.IdToPiece(ids)
        except UnicodeDecodeError as error:
            raise OpenELMError(
                f"The tokenizer is damaged: a piece is not UTF-8 ({error}). {_ADVICE}."
            ) from error
        return pieces

    @classmethod
    def from_file(cls, path: Path, *, template: str | None = None) -> Self:
        """Read a tokenizer.model.

        Raises:
            OpenELMError: the file is missing or not a SentencePiece model.
        """
        try:
            return cls(path.read_bytes(), template=template)
        except OSError as error:
            raise OpenELMError(
                f"Cannot read the tokenizer {path}: {describe_error(error)}."
            ) from error
        except OpenELMError as error:
            raise OpenELMError(f"{path}: {error}") from error

    @property
    def bos_id(self) -> int:
        return int(self.processor.bos_id())

    @property
    def eos_id(self) -> int:
        """The added token with this role, else the EOS piece."""
        added = self.added.find_role("eos_token")
        return int(self.processor.eos_id()) if added is None else added

    @property
    def vocab_size(self) -> int:
        """The number of SentencePiece pieces, without added tokens."""
        return int(self.processor.vocab_size())

    @property
    def num_ids(self) -> int:
        """One more than the largest id; the embedding may have more rows."""
        return max([self.vocab_size, *(id + 1 for id in self.added.by_id)])

    def has(self, id: int) -> bool:
        """Return whether an id is that of a piece or an added token."""
        return 0 <= id < self.vocab_size or id in self.added.by_id

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Return the ids of `text`, with exactly one BOS first unless `bos` is False.

        Raises:
            OpenELMError: the text contains an unpaired surrogate.
        """
        if self.added:
            ids = self.encode_many([text])[0]
            return [self.bos_id, *ids] if bos else ids
        try:
            ids = self.processor.encode(text)
        except RuntimeError as error:
            raise OpenELMError(_NOT_UNICODE) from error
        return [self.bos_id, *ids] if bos else ids

    def encode_rendered(self, text: str) -> list[int]:
        """Encode a rendered template: one BOS, and each `</s>` as the EOS token."""
        return [self.bos_id, *self.encode_many([text], rendered=True)[0]]

    def encode_many(
        self, texts: Sequence[str], *, rendered: bool = False
    ) -> list[list[int]]:
        """Return the ids of many texts, without BOS, on all cores.

        Args:
            rendered: encode each `</s>` as the EOS token, not as four characters.

        Raises:
            OpenELMError: a text contains an unpaired surrogate.
        """
        if not rendered or not any(EOS_TEXT in text for text in texts):
            return self._encode_all(texts)
        split = [text.split(EOS_TEXT) for text in texts]
        encoded = iter(self._encode_all([s for parts in split for s in parts]))
        many = []
        for parts in split:
            ids: list[int] = next(encoded)
            for _ in parts[1:]:
                ids += [self.eos_id, *next(encoded)]
            many.append(ids)
        return many

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            if self.added:
                return [self._encode_with_added(text) for text in texts]
            encoded: list[list[int]] = self.processor.encode(list(texts))
        except (RuntimeError, TypeError) as error:
            raise OpenELMError(_NOT_UNICODE) from error
        return encoded

    def _encode_with_added(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.added.split(text):
            between = self._between_added
            ids += [part] if isinstance(part, int) else between.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; BOS, EOS and special added tokens are dropped.

        Raises:
            OpenELMError: an id is not in the vocabulary.
        """
        size, added = self.vocab_size, self.added.by_id
        wrong = [i for i in ids if not (0 <= i < size or i in added)]
        if wrong:
            raise OpenELMError(
                f"Token ids {wrong[:5]} are outside the vocabulary of {size} pieces."
            )
        if added:
            decoder = self.stream_decoder()
            return "".join(map(decoder.add, ids)) + decoder.finish()
        text: str = self.processor.decode(list(ids))
        return text

    def piece(self, token: int) -> str:
        """Return the piece of a token, as "\u2581king"; empty for an unknown id."""
        if token in self.added.by_id:
            return self.added.spell(token)
        return self.processor.IdToPiece(token) if self.has(token) else ""

    def byte_of(self, token: int) -> bytes | None:
        """Return the byte that a piece such as `<0x0A>` stands for; else None."""
        if token >= self.vocab_size or not self.processor.IsByte(token):
            return None
        return bytes([int(self.processor.IdToPiece(token)[3:5], 16)])

    def is_silent(self, token: int) -> bool:
        """Return whether an id has no text: special tokens and rows without a piece."""
        if added := self.added.by_id.get(token):
            return added.special and not added.normalized  # as Hugging Face's
        return not self.has(token) or bool(self.processor.IsControl(token))

    def stream_decoder(
        self, after: Sequence[int] = (), *, keeps_first_space: bool = False
    ) -> "StreamDecoder":
        """Return a decoder of ids that follow the ids `after`, such as a prompt's.

        Args:
            keeps_first_space: do not drop the space that begins a text.
        """
        return StreamDecoder(self, after, keeps_first_space=keeps_first_space)


class StreamDecoder:
    """Decodes id by id: the parts joined are exactly `Tokenizer.decode` of all ids.

    After a prompt they are what `decode` of prompt and ids adds to the prompt's text,
    including the space before the first word. Only the bytes of an incomplete character
    are buffered.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        after: Sequence[int] = (),
        *,
        keeps_first_space: bool = False,
    ) -> None:
        self._tokenizer, self._processor = tokenizer, tokenizer.processor
        self._pending = b""  # bytes of an incomplete character
        # The dummy space is dropped once, at the start of a text.
        is_first = all(map(tokenizer.is_silent, after))
        self._at_start = is_first and not keeps_first_space

    def add(self, token: int) -> str:
        """Return the text that `token` completes; often one piece."""
        byte = self._tokenizer.byte_of(token)
        if byte is not None:
            self._pending += byte
            text, self._pending = _decode_bytes(self._pending)
            self._at_start = self._at_start and not text
            return text
        text = self.finish()
        if self._tokenizer.is_silent(token):
            return text
        processor = self._processor
        unknown = token < processor.vocab_size() and processor.IsUnknown(token)
        piece = " \u2047 " if unknown else self._tokenizer.piece(token)
        if self._at_start and piece.startswith(SPACE):
            piece = piece[1:]
        self._at_start = False
        return text + piece.replace(SPACE, " ")

    @property
    def is_incomplete(self) -> bool:
        """Whether bytes of an incomplete character are buffered."""
        return bool(self._pending)

    def finish(self) -> str:
        """Return a replacement character for each buffered byte."""
        text = "\ufffd" * len(self._pending)
        self._pending = b""
        self._at_start = self._at_start and not text
        return text


def _load(model_proto: bytes) -> sentencepiece.SentencePieceProcessor:
    """Return SentencePiece's processor, with the parts checked that it leaves out.

    Raises:
        OpenELMError: it is not a SentencePiece model, or damaged.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model_proto)
    except UnicodeDecodeError as error:  # SentencePiece's message holds a piece
        raise OpenELMError(f"The tokenizer is damaged: {error}. {_ADVICE}.") from error
    except (RuntimeError, OSError) as error:
        reason = str(error).rstrip(".")
        raise OpenELMError(
            f"This is not a SentencePiece model: {reason}. {_ADVICE}."
        ) from error
    return processor


def _decode_bytes(data: bytes) -> tuple[str, bytes]:
    """Return the text of bytes, and the bytes of an incomplete character at the end.

    As in SentencePiece, a byte that cannot start or continue a character becomes one
    replacement character, and decoding restarts at the next byte.
    """
    text = ""
    while data:
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            text += data[: error.start].decode()
            data = data[error.start :]
            if error.reason == "unexpected end of data":
                return text, data
            text, data = text + "\ufffd", data[1:]
    return text, data
