"""Added tokens: texts with an id of their own after the SentencePiece pieces.

Fine-tunes with transformers add them and enlarge the embedding. As in Hugging Face's
tokenizers, they are matched in a text first, and the text between them is split into
pieces. A token with `normalized` is matched after the spaces were replaced and the
dummy space was added, so that `<x>` then matches only at the start of a word.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

SPACE = "\u2581"  # how SentencePiece spells a space inside a piece


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token of Hugging Face's `added_tokens`, with its names of the flags.

    Attributes:
        special: left out of decoded text, as BOS is (not if it is also normalized).
        single_word: matched only where no word character is next to it.
        lstrip, rstrip: it includes the white space on its left or right.
        normalized: see the module.
    """

    id: int
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> "AddedToken":
        """Read an entry of a tokenizer.json.

        Raises:
            LookupError, TypeError, ValueError: it does not have that structure.
        """
        id, content = entry["id"], entry["content"]
        if type(id) is not int or not isinstance(content, str) or not content:
            raise TypeError(f"an added token {content!r:.80} with the id {id!r:.80}")
        content.encode()  # an unpaired surrogate is a ValueError
        flags = ("special", "single_word", "lstrip", "rstrip", "normalized")
        return cls(id, content, **{name: bool(entry.get(name)) for name in flags})


class AddedTokens:
    """The added tokens of a vocabulary.

    Attributes:
        by_id: the tokens, in the order of their ids.
        roles: what transformers uses them for: their texts by names such as
            "pad_token".
        spaces_each: whether the text after an added token gets a dummy space, or only
            the start of the whole text.
    """

    def __init__(
        self,
        tokens: Sequence[AddedToken] = (),
        *,
        roles: Mapping[str, str] | None = None,
        spaces_each: bool = True,
    ) -> None:
        ordered = sorted(tokens, key=lambda token: token.id)
        if not spaces_each:  # without dummy spaces, they match in the text itself
            ordered = [replace(token, normalized=False) for token in ordered]
        self.by_id = {token.id: token for token in ordered}
        self.roles, self.spaces_each = dict(roles or {}), spaces_each
        self._literal = _Matcher([t for t in ordered if not t.normalized], str)
        self._normalized = _Matcher([t for t in ordered if t.normalized], _with_space)

    def __bool__(self) -> bool:
        return bool(self.by_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AddedTokens) and (
            (self.by_id, self.spaces_each) == (other.by_id, other.spaces_each)
        )

    __hash__ = None  # type: ignore[assignment] # it holds mappings

    def find_role(self, role: str) -> int | None:
        """Return the id of the token with this role, such as "eos_token"."""
        content = self.roles.get(role)
        ids = (i for i, token in self.by_id.items() if token.content == content)
        return next(ids, None)

    def spell(self, id: int) -> str:
        """Return a token as a piece, with `SPACE` for spaces."""
        token = self.by_id[id]
        spelled = _with_space(token.content)
        return spelled if token.normalized else spelled[1:]

    def split(self, text: str) -> Iterator[int | str]:
        """Yield the ids of added tokens in a text, and what is between them.

        The texts have their dummy space, so that SentencePiece must not add one.
        """
        for start, part in self._literal.split(text):
            if isinstance(part, int):
                yield part
            elif self.spaces_each or start == 0:
                for _, inner in self._normalized.split(_with_space(part)):
                    yield inner
            else:
                yield part


def _with_space(text: str) -> str:
    return SPACE + text.replace(" ", SPACE)


_WORD, _WHITE = re.compile(r"\w"), re.compile(r"\s*")


class _Matcher:
    """Finds tokens in a text: the leftmost, and of those the longest."""

    def __init__(
        self, tokens: Sequence[AddedToken], spell: Callable[[str], str]
    ) -> None:
        self._tokens: dict[str, AddedToken] = {}
        for token in tokens:
            self._tokens.setdefault(spell(token.content), token)
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def split(self, text: str) -> Iterator[tuple[int, int | str]]:
        """Yield (start, id of a token or text between tokens); no text is empty."""
        done = 0
        for match in self._pattern.finditer(text) if self._tokens else ():
            token = self._tokens[match.group()]
            start, stop = match.span()
            if token.single_word and (
                _WORD.match(text[start - 1 : start]) or _WORD.match(text, stop)
            ):
                continue
            if token.lstrip:
                start = done + len(text[done:start].rstrip())
            if token.rstrip:
                stop = _WHITE.match(text, stop).end()  # type: ignore[union-attr]
            if done < start:
                yield done, text[done:start]
            yield start, token.id
            done = stop
        if done < len(text):
            yield done, text[done:]
