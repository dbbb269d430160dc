"""The SentencePiece tokenizer: encoding with one BOS, streaming decoding.

OpenELM uses Llama's tokenizer: 32000 BPE pieces, `<s>` = 1, `</s>` = 2, one dummy
space before each text, byte fallback. `tokenizer_json` reads tokenizer.json.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import sentencepiece

from mlx_openelm.errors import OpenELMError

SPACE = "\u2581"  # how SentencePiece spells a space inside a piece
EOS_TEXT = "</s>"

_NOT_UNICODE = (
    "The text is not valid UTF-8 or contains an unpaired surrogate; pass valid UTF-8."
)


class Tokenizer:
    """Text to ids and back.

    Attributes:
        processor: the SentencePieceProcessor.
        template: the prompt template stored with the model, or None.
    """

    def __init__(self, model_proto: bytes, *, template: str | None = None) -> None:
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self.processor.LoadFromSerializedProto(model_proto)
        except (RuntimeError, OSError) as error:
            raise OpenELMError(
                f"This is not a SentencePiece model: {error}. Pass another `tokenizer`."
            ) from error
        if not loaded or self.processor.bos_id() < 0 or self.processor.eos_id() < 0:
            raise OpenELMError(
                "The tokenizer has no BOS or no EOS piece, so OpenELM cannot use it; "
                "pass another `tokenizer`."
            )
        self.model_proto = model_proto
        self.template = template

    @classmethod
    def from_file(cls, path: Path, *, template: str | None = None) -> Self:
        """Read a tokenizer.model.

        Raises:
            OpenELMError: the file is missing or not a SentencePiece model.
        """
        try:
            return cls(path.read_bytes(), template=template)
        except OSError as error:
            raise OpenELMError(f"Cannot read the tokenizer {path}: {error}.") from error
        except OpenELMError as error:
            raise OpenELMError(f"{path}: {error}") from error

    @property
    def bos_id(self) -> int:
        return int(self.processor.bos_id())

    @property
    def eos_id(self) -> int:
        return int(self.processor.eos_id())

    @property
    def vocab_size(self) -> int:
        """The number of pieces; the embedding may have more rows."""
        return int(self.processor.vocab_size())

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Return the ids of `text`, with exactly one BOS first unless `bos` is False.

        Raises:
            OpenELMError: the text contains an unpaired surrogate.
        """
        try:
            ids: list[int] = self.processor.encode(text)
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
            encoded: list[list[int]] = self.processor.encode(list(texts))
        except (RuntimeError, TypeError) as error:
            raise OpenELMError(_NOT_UNICODE) from error
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; BOS and EOS are dropped.

        Raises:
            OpenELMError: an id is not in the vocabulary.
        """
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise OpenELMError(
                f"Token ids {wrong[:5]} are outside the vocabulary of "
                f"{self.vocab_size} pieces."
            )
        text: str = self.processor.decode(list(ids))
        return text

    def piece(self, token: int) -> str:
        """Return the piece of a token, as "\u2581king"; empty for an unknown id."""
        in_vocabulary = 0 <= token < self.vocab_size
        return self.processor.IdToPiece(token) if in_vocabulary else ""

    def stream_decoder(self, after: Sequence[int] = ()) -> "StreamDecoder":
        """Return a decoder of ids that follow the ids `after`, such as a prompt's."""
        return StreamDecoder(self, after)


class StreamDecoder:
    """Decodes id by id: the parts joined are exactly `Tokenizer.decode` of all ids.

    After a prompt they are what `decode` of prompt and ids adds to the prompt's text,
    including the space before the first word. Only the bytes of an incomplete character
    are buffered.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._processor = tokenizer.processor
        self._pending = b""  # bytes of an incomplete character
        # The dummy space is dropped once, at the start of a text.
        self._at_start = all(map(self._processor.IsControl, after))

    def add(self, token: int) -> str:
        """Return the text that `token` completes; often one piece."""
        processor = self._processor
        if processor.IsByte(token):
            self._pending += bytes([int(processor.IdToPiece(token)[3:5], 16)])
            text, self._pending = _decode_bytes(self._pending)
            self._at_start = self._at_start and not text
            return text
        text = self.finish()
        if processor.IsControl(token):
            return text
        piece = " \u2047 " if processor.IsUnknown(token) else processor.IdToPiece(token)
        if self._at_start and piece.startswith(SPACE):
            piece = piece[1:]
        self._at_start = False
        return text + piece.replace(SPACE, " ")

    def finish(self) -> str:
        """Return a replacement character for each buffered byte."""
        text = "\ufffd" * len(self._pending)
        self._pending = b""
        self._at_start = self._at_start and not text
        return text


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
