"""The chat template of a model folder, which other tools render chats with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import read_json, read_text
from mlx_openelm.message_parts import cannot_access
from mlx_openelm.storage.hub import CHAT_TEMPLATE_FILE
from mlx_openelm.storage.tokenizer_finder import CONFIG_FILE, JSON_FILE
from mlx_openelm.text.chat_templates import chat_template
from mlx_openelm.text.templates import Turn, encode_turns
from mlx_openelm.text.tokenizer import Tokenizer

_CHAT = (Turn("user", " Who?\n"), Turn("assistant", "\u738b."), Turn("user", "2 + 3 "))
_PROBES = (_CHAT, (Turn("system", "Be brief."), *_CHAT), (Turn("user", ""),))


def write_chat_template(
    folder: Path, template: str | None, tokenizer: Tokenizer | None
) -> tuple[str, ...]:
    """Write the chat template of a stored prompt template; none for None and raw.

    Args:
        folder: holds the tokenizer.json of `tokenizer`, unless that is None.

    Returns:
        A note for the user if none was written because other tools would tokenize the
        rendered text differently.

    Raises:
        OpenELMError: Jinja has no version of this template.
        OSError: the file cannot be written.
    """
    text = chat_template(template)
    if text is None or template is None:
        return ()
    if tokenizer is not None and not _gives_same_ids(folder, text, template, tokenizer):
        return (
            f"No {CHAT_TEMPLATE_FILE}: with this tokenizer's added tokens other tools "
            f"would tokenize the template {template} differently.",
        )
    (folder / CHAT_TEMPLATE_FILE).write_bytes(text.encode())
    return ()


def read_chat_template(folder: Path) -> str | None:
    """Return the Jinja text of a folder of any tool, or None if it has none.

    Raises:
        OpenELMError: a file is damaged.
    """
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return str(_read(path, read_text))
    path = folder / CONFIG_FILE  # until transformers 4.43
    config = _read(path, read_json) if path.is_file() else None
    text = config.get("chat_template") if isinstance(config, dict) else None
    return text if isinstance(text, str) else None


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise OpenELMError(cannot_access(path, error)) from error


def _gives_same_ids(
    folder: Path, text: str, template: str, tokenizer: Tokenizer
) -> bool:
    """Whether rendered chats have the ids that the model was trained with."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    other = HuggingFaceTokenizer.from_file(str(folder / JSON_FILE))
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    compiled = jinja.from_string(text)
    return all(
        other.encode(
            compiled.render(
                messages=[{"role": t.role, "content": t.text} for t in turns],
                add_generation_prompt=True,
                **{name: tokenizer.piece(id) for name, id in names.items()},
            ),
            add_special_tokens=False,
        ).ids
        == encode_turns(tokenizer, turns, template)[0]
        for turns in _PROBES
    )
