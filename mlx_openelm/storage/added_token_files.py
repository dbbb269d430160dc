"""Reads the tokens that a fine-tune with transformers added to a tokenizer.

They are in up to four files: tokenizer.json (all of them), tokenizer_config.json of
transformers 4 (`added_tokens_decoder`), added_tokens.json (texts and ids) and
special_tokens_map.json (which of them are special, and for what).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.storage.hub import TOKENIZER_FILES
from mlx_openelm.text.added_tokens import AddedToken, AddedTokens
from mlx_openelm.text.tokenizer_json import read_added

_FIXED_ROLES = ("bos_token", "unk_token")  # always those of the pieces
_, JSON_FILE, CONFIG_FILE, ADDED_FILE, SPECIAL_FILE = TOKENIZER_FILES


def read_added_tokens(folder: Path, num_pieces: int, num_rows: int) -> AddedTokens:
    """Return the added tokens with a row in the embedding but no SentencePiece piece.

    Raises:
        OpenELMError: a file is damaged, or two files contradict each other.
    """
    files = {
        name: read_mapping(folder / name)
        for name in TOKENIZER_FILES[1:]
        if (folder / name).is_file()
    }
    tokens: dict[int, tuple[AddedToken, str]] = {}
    spaces_each = files.get(CONFIG_FILE, {}).get("legacy") is not False
    for name, content in files.items():
        try:
            listed = list(_list_tokens(name, content))
            if name == JSON_FILE:
                listed, spaces_each = read_added(content)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise OpenELMError(
                f"{folder / name} does not have the structure of this file "
                f"({error!r:.200}); save the tokenizer again."
            ) from error
        for token in listed:
            other, where = tokens.setdefault(token.id, (token, name))
            if other.content != token.content and token.id >= num_pieces:
                raise OpenELMError(
                    f"The token {token.id} is {other.content!r:.80} in "
                    f"{folder / where} and {token.content!r:.80} in {name}; remove the "
                    "file that belongs to another tokenizer."
                )
    roles = _read_roles(files)
    special = {text for texts in roles.values() for text in texts}
    kept = [
        replace(token, special=token.special or token.content in special)
        for token, _ in tokens.values()
        if num_pieces <= token.id < num_rows
    ]
    contents = {token.content for token in kept}
    singles = {
        role: text
        for role, texts in roles.items()
        for text in texts
        if role.endswith("_token") and role not in _FIXED_ROLES and text in contents
    }
    return AddedTokens(kept, roles=singles, spaces_each=spaces_each)


def _list_tokens(name: str, content: Mapping[str, Any]) -> Iterator[AddedToken]:
    if name == CONFIG_FILE:
        for id, entry in content.get("added_tokens_decoder", {}).items():
            yield AddedToken.read({**entry, "id": int(id)})
    elif name == ADDED_FILE:
        for text, id in content.items():
            yield AddedToken.read({"id": id, "content": text})


def _read_roles(files: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the texts of the special tokens, by name such as "pad_token"."""
    roles: dict[str, list[str]] = {}
    for name in (CONFIG_FILE, SPECIAL_FILE):
        for role, value in files.get(name, {}).items():
            if role.endswith(("_token", "_special_tokens")):
                values = value if isinstance(value, list) else [value]
                texts = (v.get("content") if isinstance(v, dict) else v for v in values)
                roles.setdefault(role, [t for t in texts if isinstance(t, str)])
    return roles
