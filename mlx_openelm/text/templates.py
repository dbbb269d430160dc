"""Prompt templates: conversations rendered as text and encoded as token ids."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import EOS_TEXT, Tokenizer

RAW = "raw"  # the template name of models without a template


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        input: the input of an Alpaca instruction; usually empty.
    """

    role: str
    text: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A rendered answer, without its EOS, and the text since the previous EOS."""

    context: str
    answer: str


_TASK = "Below is an instruction that describes a task"
ALPACA_HEADER = f"{_TASK}. Write a response that appropriately completes the request."
_ALPACA_INPUT = (
    f"{_TASK}, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True, slots=True)
class Layout:
    """White space of a template with Alpaca's sections.

    Attributes:
        header_ends: end of the header without and with an input.
        start: before the first section of an exchange.
        gap: before a section that follows another one.
    """

    indent: str
    header_ends: tuple[str, str]

    @property
    def start(self) -> str:
        return f"\n\n{self.indent}"

    @property
    def gap(self) -> str:
        return f"\n{self.indent}\n{self.indent}"


LAYOUTS = {
    "alpaca": Layout(indent="", header_ends=("", "")),
    # Byte for byte Apple's PEFT template, with the indent of its source code
    "openelm-peft": Layout(indent=" " * 16, header_ends=("  ", " ")),
}


def _raw(turns: Sequence[Turn]) -> list[Exchange]:
    roles = [turn.role for turn in turns]
    if roles == ["assistant"]:
        return [Exchange("", turns[0].text)]
    if roles != ["user", "assistant"]:
        raise OpenELMError(
            "The raw template renders one prompt and answer, not a conversation "
            f"({', '.join(roles)}); choose `template` {_either(_TEMPLATES)}."
        )
    prompt, answer = _with_input(turns[0]), turns[1].text
    spaced = not prompt or prompt[-1].isspace() or answer[:1].isspace()
    return [Exchange(prompt, answer if spaced else f" {answer}")]


def _instruct(turns: Sequence[Turn]) -> list[Exchange]:
    # Zephyr's format, with the empty system turn that OpenELM-Instruct was trained with
    if turns[0].role != "system":
        turns = [Turn("system", ""), *turns]
    exchanges, context = [], ""
    for turn in turns:
        context += f"<|{turn.role}|>\n"
        if turn.role == "assistant":
            exchanges.append(Exchange(context, turn.text))
            context = "\n"
        else:
            context += f"{_with_input(turn)}{EOS_TEXT}\n"
    return exchanges


def _sections(turns: Sequence[Turn], layout: Layout) -> list[Exchange]:
    """Render Alpaca's sections; only the first exchange has the header.

    System turns at the start are the header; a later one is an instruction.
    """
    with_input = any(turn.input for turn in turns)
    header = _ALPACA_INPUT if with_input else ALPACA_HEADER
    count = next((i for i, t in enumerate(turns) if t.role != "system"), len(turns))
    system = "\n\n".join(turn.text for turn in turns[:count] if turn.text)
    header, turns = system or header, turns[count:]
    indent, start, gap = layout.indent, layout.start, layout.gap
    exchanges, context, before = [], header + layout.header_ends[with_input], start
    for turn in turns:
        title = "Response" if turn.role == "assistant" else "Instruction"
        context += f"{before}### {title}:\n{indent}"
        if turn.role == "assistant":
            exchanges.append(Exchange(context, turn.text))
            context, before = "", start
        else:
            context += turn.text
            if turn.input:
                context += f"{gap}### Input:\n{indent}{turn.input}"
            before = gap
    return exchanges


def _with_input(turn: Turn) -> str:
    """Return text and input joined, for templates without a section for inputs."""
    return f"{turn.text}\n\n{turn.input}" if turn.input else turn.text


_TEMPLATES: dict[str, Callable[[Sequence[Turn]], list[Exchange]]] = {
    "instruct": _instruct,
    **{name: partial(_sections, layout=layout) for name, layout in LAYOUTS.items()},
}
TEMPLATE_NAMES = ("auto", RAW, *_TEMPLATES)


def render(turns: Sequence[Turn], template: str) -> list[Exchange]:
    """Render a conversation as text, with one exchange for each assistant turn.

    Turns after the last answer are left out. `</s>` in the text is the EOS token,
    except with the raw template.

    Raises:
        OpenELMError: no such template, or the template cannot hold these turns.
    """
    if template == RAW:
        return _raw(turns)
    if template not in _TEMPLATES:
        raise OpenELMError(
            f"No template is called {template!r}; there are {_either(TEMPLATE_NAMES)}."
        )
    return _TEMPLATES[template](turns)


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str,
    *,
    template: str = "auto",
    system: str = "",
    as_trained: bool = False,
) -> list[int]:
    """Render `prompt` and return its ids, with one BOS first and no EOS last.

    Args:
        template: one of `TEMPLATE_NAMES`; "auto" is the one stored with the model, else
            raw.
        as_trained: remove a trailing space, because the first piece of the answer
            includes it when prompt and answer are tokenized as one text.

    Raises:
        OpenELMError: no such template, or a system text with the raw template.
    """
    name = (tokenizer.template or RAW) if template == "auto" else template
    if name == RAW:
        if system:
            raise OpenELMError(
                "The raw template does not support `system`; "
                f"choose `template` {_either(_TEMPLATES)}."
            )
        return tokenizer.encode(prompt.removesuffix(" ") if as_trained else prompt)
    turns = [Turn("user", prompt), Turn("assistant", "")]
    exchanges = render([Turn("system", system), *turns] if system else turns, name)
    text = exchanges[-1].context
    return tokenizer.encode_rendered(text.removesuffix(" ") if as_trained else text)


def encode_turns(
    tokenizer: Tokenizer, turns: Sequence[Turn], template: str, system: str = ""
) -> tuple[list[int], bool]:
    """Render turns that end with the user's, and return the prompt's ids.

    Returns:
        The ids, with one BOS first and an EOS after each answer (none if raw); whether
        a trailing space was removed, because the first piece of the answer includes it.

    Raises:
        OpenELMError: no such template, or a text is not valid Unicode.
    """
    if template == RAW:
        return tokenizer.encode(_join(turns)), False
    first = [Turn("system", system)] if system else []
    *before, last = render([*first, *turns, Turn("assistant", "")], template)
    text = "".join(f"{e.context}{e.answer}{EOS_TEXT}" for e in before) + last.context
    return tokenizer.encode_rendered(text.removesuffix(" ")), text.endswith(" ")


def _join(turns: Sequence[Turn]) -> str:
    """Join turns as one raw text; a user turn starts a new word."""
    text = ""
    for turn in turns:
        new_word = turn.role == "user" and text and turn.text
        if new_word and not (text[-1].isspace() or turn.text[0].isspace()):
            text += " "
        text += turn.text
    return text


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"
