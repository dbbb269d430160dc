"""Prompt templates as Jinja, for the chats of other tools (`chat_template.jinja`).

Such a text is rendered with `messages`, `bos_token`, `eos_token` and
`add_generation_prompt`, and tokenized without adding special tokens. The ids are those
of `templates.encode_turns`, except where a message contains `<s>` or `<unk>`: other
tools read these as special tokens.
"""

from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.templates import ALPACA_HEADER, LAYOUTS, RAW, Layout

_ROLE = (  # OpenAI's "developer" is the system
    "{% set role = 'system' if m['role'] == 'developer' else m['role'] %}"
    "{% if role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The role ' + role + ' is not system, user or assistant') }}"
    "{% endif %}"
)

_INSTRUCT = (
    "{{ bos_token }}"
    "{% if not messages or messages[0]['role'] not in ['system', 'developer'] %}"
    r"{{ '<|system|>\n' + eos_token + '\n' }}{% endif %}"
    "{% for m in messages %}"
    f"{_ROLE}"
    r"{{ '<|' + role + '|>\n' + m['content'] + eos_token }}"
    r"{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# `state.count` is the number of system messages at the start, which are the header.
# Without its last space the prompt ends as in training, where that space is part of the
# first piece of the answer.
_SECTIONS = (
    "{{ bos_token }}"
    "{% set state = namespace(count=0, system='', before=START) %}"
    "{% for m in messages %}"
    f"{_ROLE}"
    "{% if role == 'system' and loop.index0 == state.count %}"
    "{% set state.count = loop.index %}"
    "{% if m['content'] %}{% set state.system ="
    r" state.system + ('\n\n' if state.system else '') + m['content'] %}{% endif %}"
    "{% endif %}{% endfor %}"
    "{{ (state.system if state.system else HEADER) + END }}"
    "{% for m in messages[state.count:] %}"
    "{% if m['role'] == 'assistant' %}"
    r"{{ state.before + '### Response:\n' + INDENT + m['content'] + eos_token }}"
    "{% set state.before = START %}"
    "{% else %}"
    r"{{ state.before + '### Instruction:\n' + INDENT + m['content'] }}"
    "{% set state.before = GAP %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    r"{{ state.before + '### Response:\n' + LAST_INDENT }}{% endif %}"
)


def _fill(layout: Layout) -> str:
    text = _SECTIONS
    for name, value in (
        ("HEADER", ALPACA_HEADER),
        ("START", layout.start),
        ("GAP", layout.gap),
        ("END", layout.header_ends[False]),
        ("LAST_INDENT", layout.indent.removesuffix(" ")),
        ("INDENT", layout.indent),
    ):
        text = text.replace(name, f"{value!r}")
    return text


_JINJA = {"instruct": _INSTRUCT, **{name: _fill(x) for name, x in LAYOUTS.items()}}


def chat_template(template: str | None) -> str | None:
    """Return the Jinja text of a stored prompt template; None if it is None or raw.

    Raises:
        OpenELMError: Jinja has no version of this template.
    """
    if template in (None, RAW):
        return None
    if template not in _JINJA:
        raise OpenELMError(
            f"The stored template {template!r:.60} has no chat template for other "
            f"tools; those of {', '.join(_JINJA)} exist. Correct the entry template of "
            "mlx_openelm in its config."
        )
    return _JINJA[template]


def recognize(text: str) -> str | None:
    """Return the name of the prompt template with this Jinja text, or None."""
    names = (name for name, jinja in _JINJA.items() if jinja == text.rstrip("\n"))
    return next(names, None)
