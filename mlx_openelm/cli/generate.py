"""generate and chat: a prompt, or a conversation, and its answers."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.options import (
    SAMPLING,
    Adapter,
    Json,
    MaxTokens,
    MinP,
    Model,
    Offline,
    Penalty,
    Quiet,
    Seed,
    Temp,
    TopK,
    TopP,
    open_model,
)
from mlx_openelm.errors import OpenELMError

if TYPE_CHECKING:
    from mlx_openelm.generation.drafters import Drafter
    from mlx_openelm.generation.streaming import Piece
    from mlx_openelm.model.openelm import OpenELM
    from mlx_openelm.storage.model_folder import ModelFolder
    from mlx_openelm.text.tokenizer import Tokenizer

_SHORT_CUTS = "Speed and memory"
_MANY = "Many prompts"

MinTokens = Annotated[
    int | None,
    typer.Option(
        help="The model may not end it before so many.", rich_help_panel=SAMPLING
    ),
]
PenaltyContext = Annotated[
    int | None,
    typer.Option(
        help="Tokens that it looks back; default 256.", rich_help_panel=SAMPLING
    ),
]
NoRepeat = Annotated[
    int | None,
    typer.Option(
        "--no-repeat-ngram",
        help="No N tokens in a row come twice.",
        rich_help_panel=SAMPLING,
    ),
]
Bias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        help="ID=BIAS, added to a token's logit; repeatable.",
        rich_help_panel=SAMPLING,
    ),
]
StopText = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        help="A text that ends the answer; repeatable.",
        rich_help_panel=SAMPLING,
    ),
]
StopLoops = Annotated[
    int | None,
    typer.Option(
        help="End where the answer says one thing N times in a row.",
        rich_help_panel=SAMPLING,
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        help="With --json: each token's log-probability, the N likeliest.",
        rich_help_panel=SAMPLING,
    ),
]
Template = Annotated[
    str, typer.Option(help="auto, raw, instruct, alpaca or openelm-peft.")
]
System = Annotated[str, typer.Option(help="System text of the template.")]
Lookup = Annotated[
    int | None,
    typer.Option(
        help="Guess up to N tokens from an earlier place in the text.",
        rich_help_panel=_SHORT_CUTS,
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        help="Let this smaller model guess; the same names as --model.",
        rich_help_panel=_SHORT_CUTS,
    ),
]
KvBits = Annotated[
    int | None,
    typer.Option(
        help="Keep keys and values in 4 or 8 bits: less memory, slower.",
        rich_help_panel=_SHORT_CUTS,
    ),
]
KvGroupSize = Annotated[
    int,
    typer.Option(
        help="Numbers that share a scale then; 32, 64 or 128.",
        rich_help_panel=_SHORT_CUTS,
    ),
]
MaxKvSize = Annotated[
    int | None,
    typer.Option(
        help="Keep the first 4 and the newest tokens, N in all.",
        rich_help_panel=_SHORT_CUTS,
    ),
]


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
    lookup: Lookup = None,
    draft_model: DraftModel = None,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(
            help="A file that keeps the prompt as it was read.",
            rich_help_panel=_SHORT_CUTS,
        ),
    ] = None,
    kv_bits: KvBits = None,
    kv_group_size: KvGroupSize = 64,
    max_kv_size: MaxKvSize = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            help='Prompts, JSON lines or one a line; "-": from stdin.',
            rich_help_panel=_MANY,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where --prompts-file's answers go; begun, it goes on.",
            rich_help_panel=_MANY,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Prompts answered together; default 16.",
            rich_help_panel=_MANY,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace an --output of other prompts.",
            rich_help_panel=_MANY,
        ),
    ] = False,
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
    single = {
        "PROMPT": prompt if prompt is not None else prompt_option,
        "--lookup": lookup,
        "--draft-model": draft_model,
        "--prompt-cache": prompt_cache,
        "--kv-bits": kv_bits,
        "--max-kv-size": max_kv_size,
    }
    if prompts_file is not None:
        for flag in (flag for flag, value in single.items() if value is not None):
            raise typer.BadParameter("does not go with --prompts-file", param_hint=flag)
        _check_utf8(system, *(stop or ()))
        _answer_file(
            console,
            open_model(console, model, adapter_path, offline),
            prompts_file,
            said,
            template=template,
            system=system,
            batch_size=batch_size or 16,
            output=_expand(output),
            force=force,
        )
        return
    many = {"--output": output, "--batch-size": batch_size, "--force": force or None}
    for flag in (flag for flag, value in many.items() if value is not None):
        raise typer.BadParameter("is for --prompts-file", param_hint=flag)
    if logprobs and not as_json:
        raise typer.BadParameter("is shown with --json", param_hint="--logprobs")
    text = _read_prompt(prompt, prompt_option)
    _check_utf8(text, system, *(stop or ()))
    from mlx_openelm.cli.conversion_view import (
        generated_json,
        note_drafts,
        note_generated,
    )
    from mlx_openelm.generation.compact_caches import cache_maker
    from mlx_openelm.generation.decoding import Context
    from mlx_openelm.generation.sampling import Sampling
    from mlx_openelm.generation.streaming import prepare_prompt, stream

    folder, loaded, tokenizer = open_model(console, model, adapter_path, offline)
    sampling = Sampling.from_defaults(folder.generation_defaults, said)
    make_cache = cache_maker(
        folder.config,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        max_kv_size=max_kv_size,
    )
    drafter = _make_drafter(lookup, draft_model, loaded, tokenizer, offline)
    ids = prepare_prompt(tokenizer, text, template=template, system=system)
    shown: list[Piece] = []
    with ExitStack() as opened:
        if prompt_cache is None:
            cache, context = None, Context(loaded, make_cache)
        else:
            name = (tokenizer.template or "raw") if template == "auto" else template
            place = Path(os.path.expanduser(prompt_cache))
            from mlx_openelm.generation.prompt_cache import open_prompt_cache

            cache = opened.enter_context(
                open_prompt_cache(place, loaded, name, console.note, make_cache)
            )
            context = cache.context
        for piece in stream(
            loaded, tokenizer, ids, sampling, context=context, drafter=drafter
        ):
            shown.append(piece)
            if piece.text and not (as_json or no_stream):
                console.answer(piece.text, end="")
            if cache is not None and len(shown) == 1:
                cache.keep(ids)  # the disk works while more is drawn
        if as_json:
            console.answer_json(generated_json(shown, tokenizer))
            return
        if no_stream:
            console.answer("".join(piece.text for piece in shown), end="")
        if sys.stdout.isatty():
            console.answer("")
    last = shown[-1]
    length = folder.config.max_context_length
    if last.prompt_tokens + last.generation_tokens == length and not context.slides:
        console.note(f"[the context of {length} is full]")
    note_generated(console, last)
    if drafter is not None:
        note_drafts(console, drafter)


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
    lookup: Lookup = None,
    draft_model: DraftModel = None,
    kv_bits: KvBits = None,
    kv_group_size: KvGroupSize = 64,
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
    from mlx_openelm.cli.chat import run_chat
    from mlx_openelm.generation.compact_caches import cache_maker
    from mlx_openelm.generation.sampling import Sampling

    folder, loaded, tokenizer = open_model(console, model, adapter_path, offline)
    drafter = _make_drafter(lookup, draft_model, loaded, tokenizer, offline)
    run_chat(
        console,
        folder,
        loaded,
        tokenizer,
        Sampling.from_defaults(folder.generation_defaults, said),
        template=template,
        system=system,
        adapter=_expand(None if adapter_path is None else Path(adapter_path)),
        drafter=drafter,
        make_cache=cache_maker(
            folder.config, kv_bits=kv_bits, kv_group_size=kv_group_size
        ),
        as_json=as_json,
    )


def _answer_file(
    console: Console,
    opened: "tuple[ModelFolder, OpenELM, Tokenizer]",
    prompts_file: str,
    said: dict[str, Any],
    *,
    template: str,
    system: str,
    batch_size: int,
    output: Path | None,
    force: bool,
) -> None:
    from mlx_openelm.cli.conversion_view import note_prompts
    from mlx_openelm.generation.batch_job import answer_prompts
    from mlx_openelm.generation.prompt_file import read_prompts
    from mlx_openelm.generation.sampling import Sampling

    folder, model, tokenizer = opened
    source = os.path.expanduser(prompts_file)
    prompts = read_prompts(source)
    if output is not None and _are_one_file(Path(source), output):
        raise OpenELMError(
            f"--output {output} is the file of prompts itself; choose another file."
        )
    console.note(f"[{prompts.name}: {len(prompts.prompts)} prompts, {prompts.format}]")
    with console.progress("Answering") as progress:
        report = answer_prompts(
            model,
            tokenizer,
            prompts,
            Sampling.from_defaults(folder.generation_defaults, said),
            template=template,
            system=system,
            batch_size=batch_size,
            output=output,
            force=force,
            on_answer=console.answer_json,
            on_problem=console.note,
            on_progress=lambda done, total, _: progress.update(done, total, "prompts"),
        )
    note_prompts(console, report)
    if report.problems:
        raise OpenELMError(
            f"{len(report.problems)} of {report.prompts} prompts of {prompts.name} have"
            " no answer; the lines above say why."
        )


def _are_one_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _make_drafter(
    lookup: int | None,
    draft_model: str | None,
    model: "OpenELM",
    tokenizer: "Tokenizer",
    offline: bool,
) -> "Drafter | None":
    if lookup is None and draft_model is None:
        return None
    if lookup is not None and draft_model is not None:
        raise typer.BadParameter(
            "does not go with --draft-model", param_hint="--lookup"
        )
    from mlx_openelm.generation.drafters import LookupDrafter, ModelDrafter, check_draft

    if draft_model is not None and not draft_model.strip():
        raise OpenELMError("--draft-model is empty; say a model, or leave it out.")
    if draft_model is None:
        assert lookup is not None
        return LookupDrafter(lookup)
    from mlx_openelm.storage.loading import load

    smaller, its_tokenizer = load(draft_model, offline=offline)
    check_draft(model, tokenizer, smaller, its_tokenizer)
    return ModelDrafter(smaller)


def _decoding(
    *, logit_bias: list[str] | None, stop: list[str] | None, **said: float | None
) -> dict[str, Any]:
    """Return what was said of `Sampling`; a wrong value is named at once."""
    from mlx_openelm.generation.sampling import Sampling

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


def _expand(path: Path | None) -> Path | None:
    """Return a path whose "~" the shell left, as it does behind "--option="."""
    return None if path is None else Path(os.path.expanduser(path))


def _check_utf8(*texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a terminal of another encoding
            raise OpenELMError(
                f"{text!a} is not UTF-8 text: {error.reason}."
            ) from error
