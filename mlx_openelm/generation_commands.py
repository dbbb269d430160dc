"""generate and chat: a prompt, or a conversation, and its answers."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_openelm.command_options import (
    Adapter,
    Json,
    Model,
    Offline,
    Quiet,
    Seed,
    open_model,
)
from mlx_openelm.console import Console
from mlx_openelm.errors import OpenELMError

if TYPE_CHECKING:
    from mlx_openelm.generation import Piece

MaxTokens = Annotated[
    int | None, typer.Option("-m", "--max-tokens", help="Default 256.")
]
MinTokens = Annotated[
    int | None, typer.Option(help="The model may not end it before so many.")
]
Temp = Annotated[float | None, typer.Option(help="Temperature; 0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest of this mass.")]
TopK = Annotated[int | None, typer.Option(help="Keep the N likeliest.")]
MinP = Annotated[
    float | None, typer.Option(help="Keep what is this likely beside the likeliest.")
]
Penalty = Annotated[float | None, typer.Option(help="Above 1: repeat less.")]
PenaltyContext = Annotated[
    int | None, typer.Option(help="Tokens that it looks back; default 256.")
]
NoRepeat = Annotated[
    int | None,
    typer.Option("--no-repeat-ngram", help="No N tokens in a row come twice."),
]
Bias = Annotated[
    list[str] | None,
    typer.Option("--logit-bias", help="ID=BIAS, added to a token's logit; repeatable."),
]
StopText = Annotated[
    list[str] | None,
    typer.Option("--stop", help="A text that ends the answer; repeatable."),
]
StopLoops = Annotated[
    int | None,
    typer.Option(help="End where the answer says one thing N times in a row."),
]
Logprobs = Annotated[
    int | None,
    typer.Option(help="With --json: each token's log-probability, the N likeliest."),
]
Template = Annotated[
    str, typer.Option(help="auto, raw, instruct, alpaca or openelm-peft.")
]
System = Annotated[str, typer.Option(help="System text of the template.")]


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help='The prompt; "-" or a pipe: from stdin.')
    ] = None,
    prompt_option: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The same, as an option.")
    ] = None,
    model: Model = None,
    adapter_path: Adapter = None,
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    temp: Temp = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    repetition_context: PenaltyContext = None,
    no_repeat_ngram: NoRepeat = None,
    logit_bias: Bias = None,
    stop: StopText = None,
    stop_loops: StopLoops = None,
    logprobs: Logprobs = None,
    template: Template = "auto",
    system: System = "",
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print the answer when it is whole.")
    ] = False,
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Continue a prompt. What is not said comes from the model's own defaults."""
    console = Console(quiet=quiet)
    said = _decoding(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        repetition_context=repetition_context,
        no_repeat_ngram=no_repeat_ngram,
        logit_bias=logit_bias,
        stop=stop,
        stop_loops=stop_loops,
        logprobs=logprobs,
        seed=seed,
    )
    if logprobs and not as_json:
        raise typer.BadParameter("is shown with --json", param_hint="--logprobs")
    text = _read_prompt(prompt, prompt_option)
    _check_utf8(text, system, *(stop or ()))
    from mlx_openelm.generation import stream
    from mlx_openelm.sampling import Sampling

    folder, loaded, tokenizer = open_model(console, model, adapter_path, offline)
    sampling = Sampling.from_defaults(folder.generation_defaults, said)
    pieces = stream(loaded, tokenizer, text, sampling, template=template, system=system)
    shown: list[Piece] = []
    for piece in pieces:
        shown.append(piece)
        if piece.text and not (as_json or no_stream):
            console.answer(piece.text, end="")
    from mlx_openelm.report import generated_json, note_generated

    if as_json:
        console.answer_json(generated_json(shown, tokenizer))
        return
    if no_stream:
        console.answer("".join(piece.text for piece in shown), end="")
    if sys.stdout.isatty():
        console.answer("")
    last = shown[-1]
    if last.prompt_tokens + last.generation_tokens == folder.config.max_context_length:
        console.note(f"[the context of {folder.config.max_context_length} is full]")
    note_generated(console, last)


def chat(
    model: Model = None,
    adapter_path: Adapter = None,
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    temp: Temp = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    repetition_context: PenaltyContext = None,
    no_repeat_ngram: NoRepeat = None,
    logit_bias: Bias = None,
    stop: StopText = None,
    stop_loops: StopLoops = None,
    template: Template = "auto",
    system: System = "",
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Hold a conversation. Piped lines are messages; stdout has the answers only."""
    console = Console(quiet=quiet)
    said = _decoding(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        repetition_context=repetition_context,
        no_repeat_ngram=no_repeat_ngram,
        logit_bias=logit_bias,
        stop=stop,
        stop_loops=stop_loops,
        seed=seed,
    )
    _check_utf8(system, *(stop or ()))
    from mlx_openelm.chat import run_chat
    from mlx_openelm.sampling import Sampling

    folder, loaded, tokenizer = open_model(console, model, adapter_path, offline)
    run_chat(
        console,
        folder,
        loaded,
        tokenizer,
        Sampling.from_defaults(folder.generation_defaults, said),
        template=template,
        system=system,
        adapter=None if adapter_path is None else Path(adapter_path),
        as_json=as_json,
    )


def _decoding(
    *, logit_bias: list[str] | None, stop: list[str] | None, **said: float | None
) -> dict[str, Any]:
    """Return what was said of `Sampling`; a wrong value is named at once."""
    from mlx_openelm.sampling import Sampling

    found: dict[str, Any] = {
        **said,
        "logit_bias": _read_bias(logit_bias),
        "stop": tuple(stop) if stop else None,
    }
    Sampling.from_defaults({}, found)
    return found


def _read_bias(said: list[str] | None) -> tuple[tuple[int, float], ...] | None:
    if not said:
        return None
    pairs = []
    for pair in said:
        token, _, bias = pair.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError as error:
            raise OpenELMError(
                f"--logit-bias is {pair!r}; it must be ID=BIAS, 42=-5 say."
            ) from error
    return tuple(pairs)


def _read_prompt(positional: str | None, option: str | None) -> str:
    if positional is not None and option is not None:
        raise typer.BadParameter("say the prompt once", param_hint="PROMPT")
    said = positional if positional is not None else option
    if said is not None and said != "-":
        return said
    if sys.stdin is None or (said is None and sys.stdin.isatty()):
        raise typer.BadParameter("say a prompt, or pipe one in", param_hint="PROMPT")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise OpenELMError(
            f"The prompt on stdin is not UTF-8 text: {error}."
        ) from error


def _check_utf8(*texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a terminal of another encoding
            raise OpenELMError(
                f"{text!a} is not UTF-8 text: {error.reason}."
            ) from error
