"""The command that generates text for one prompt or a file of prompts: `generate`."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.decoding_options import check_sampling, check_utf8, make_drafter
from mlx_openelm.cli.derived_options import GivenOptions, OptionsOf, derive_options
from mlx_openelm.cli.help.examples import PROMPT
from mlx_openelm.cli.options import (
    Adapter,
    Json,
    Model,
    NoTuning,
    Offline,
    Quiet,
    open_model,
    use_tuning,
)
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.options import (
    SPEED_AND_MEMORY,
    CacheOptions,
    ConstraintOptions,
    DraftOptions,
    PromptOptions,
    Sampling,
)
from mlx_openelm.input_files import MAX_RECORD_BYTES, read_text_of
from mlx_openelm.message_parts import count_of
from mlx_openelm.options import OUTPUT_PANEL

if TYPE_CHECKING:
    from mlx_openelm.generation.constraints import Constraint
    from mlx_openelm.generation.prompt_file import Prompts
    from mlx_openelm.generation.streaming import Piece
    from mlx_openelm.model.openelm import OpenELM
    from mlx_openelm.storage.model_folder import ModelFolder
    from mlx_openelm.text.tokenizer import Tokenizer
    from mlx_openelm.tuning import Tuning

MANY_PROMPTS = "Many prompts"  # a heading in --help


@derive_options
def generate_command(
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help='Text to continue; "-", or a pipe, reads stdin.'
        ),
    ] = None,
    prompt_option: Annotated[
        str | None, typer.Option("-p", "--prompt", help="PROMPT, as an option.")
    ] = None,
    model: Model = None,
    adapter_path: Adapter = None,
    sampling: Annotated[GivenOptions, OptionsOf(Sampling)],
    prompting: Annotated[GivenOptions, OptionsOf(PromptOptions)],
    constraining: Annotated[GivenOptions, OptionsOf(ConstraintOptions)],
    drafting: Annotated[GivenOptions, OptionsOf(DraftOptions)],
    prompt_cache: Annotated[
        Path | None,
        typer.Option(
            help="File that stores the KV cache of the prompt for the next call.",
            rich_help_panel=SPEED_AND_MEMORY,
        ),
    ] = None,
    caching: Annotated[GivenOptions, OptionsOf(CacheOptions)],
    prompts_file: Annotated[
        str | None,
        typer.Option(
            help='File of prompts: JSON lines, or one per line; "-" reads stdin.',
            rich_help_panel=MANY_PROMPTS,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File for the answers of --prompts-file; a stopped run resumes.",
            rich_help_panel=MANY_PROMPTS,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Number of prompts in a batch.",
            show_default="16",
            rich_help_panel=MANY_PROMPTS,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace an --output file of other prompts.",
            rich_help_panel=MANY_PROMPTS,
        ),
    ] = False,
    no_stream: Annotated[
        bool,
        typer.Option(
            "--no-stream",
            help="Print the answer only when it is complete.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    no_tuning: NoTuning = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Generate text.

    Omitted options come from the model's generation_config.json; without one, decoding
    is greedy. Prints the generated text.
    """
    console = Console(quiet=quiet)
    tuning = use_tuning(no_tuning)
    check_sampling(sampling)
    prompt_options = PromptOptions(**prompting)
    template, system = prompt_options.template, prompt_options.system
    constraints = ConstraintOptions(**constraining)
    single = {
        "PROMPT": prompt if prompt is not None else prompt_option,
        "--lookup": drafting.get("lookup"),
        "--draft-model": drafting.get("draft_model"),
        "--prompt-cache": prompt_cache,
        "--kv-bits": caching.get("kv_bits"),
        "--max-kv-size": caching.get("max_kv_size"),
    }
    if prompts_file is not None:
        for flag in (flag for flag, value in single.items() if value is not None):
            raise typer.BadParameter(
                "cannot be used with --prompts-file", param_hint=flag
            )
        check_utf8(system)
        prompts = _read_prompts_file(console, prompts_file, output)
        _answer_file(
            console,
            open_model(console, model, adapter_path, offline),
            prompts,
            sampling,
            constraints,
            template=template,
            system=system,
            batch_size=batch_size or 16,
            tuning=tuning,
            output=output,
            force=force,
            as_json=as_json or not sys.stdout.isatty(),
        )
        return
    many = {"--output": output, "--batch-size": batch_size, "--force": force or None}
    for flag in (flag for flag, value in many.items() if value is not None):
        raise typer.BadParameter("needs --prompts-file", param_hint=flag)
    if sampling.get("logprobs") and not as_json:
        raise typer.BadParameter("needs --json", param_hint="--logprobs")
    for flag, name in (("--lookup", "lookup"), ("--draft-model", "draft_model")):
        if constraining and drafting.get(name) is not None:
            raise typer.BadParameter(
                "cannot be used with --json-schema or --regex", param_hint=flag
            )
    text = _read_prompt(prompt, prompt_option)
    check_utf8(text, system)
    from mlx_openelm.cli.views.generation import (
        generated_json,
        note_drafts,
        note_generated,
    )
    from mlx_openelm.generation.compact_caches import cache_maker
    from mlx_openelm.generation.decoding import Context
    from mlx_openelm.generation.streaming import prepare_prompt, stream

    folder, loaded, tokenizer = open_model(console, model, adapter_path, offline)
    chosen = Sampling.from_defaults(folder.generation_defaults, sampling)
    constraint = _read_constraint(constraints, folder, tokenizer)
    make_cache = cache_maker(folder.config, CacheOptions(**caching))
    drafter = make_drafter(DraftOptions(**drafting), loaded, tokenizer, offline)
    ids = prepare_prompt(tokenizer, text, template=template, system=system)
    shown: list[Piece] = []
    with ExitStack() as opened:
        if prompt_cache is None:
            cache, context = None, Context(loaded, make_cache, tuning)
        else:
            name = (tokenizer.template or "raw") if template == "auto" else template
            from mlx_openelm.generation.prompt_cache import open_prompt_cache

            cache = opened.enter_context(
                open_prompt_cache(prompt_cache, loaded, name, console.note, make_cache)
            )
            context = cache.context
            context.tuning = tuning
        for piece in stream(
            loaded,
            tokenizer,
            ids,
            chosen,
            context=context,
            drafter=drafter,
            constraint=constraint,
        ):
            shown.append(piece)
            if piece.text and not (as_json or no_stream):
                console.answer(piece.text, end="")
            if cache is not None and len(shown) == 1:
                cache.store(ids)  # written while generation continues
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
    if constraint is not None and last.finish_reason == "length":
        console.note("[the answer is incomplete; allow more with --max-tokens]")
    note_generated(console, last)
    if drafter is not None:
        note_drafts(console, drafter)


def _read_prompts_file(
    console: Console, prompts_file: str, output: Path | None
) -> "Prompts":
    from mlx_openelm.generation.prompt_file import read_prompts

    prompts = read_prompts(prompts_file)
    if output is not None and _are_one_file(Path(prompts_file), output):
        raise OpenELMError(
            f"--output {output} is the file of prompts; choose another file."
        )
    count = count_of(len(prompts.prompts), "prompt")
    console.note(f"[{prompts.name}: {count}, {prompts.format}]")
    return prompts


def _read_constraint(
    options: ConstraintOptions, folder: "ModelFolder", tokenizer: "Tokenizer"
) -> "Constraint | None":
    if options == ConstraintOptions():
        return None
    from mlx_openelm.generation.constraints import read_constraint

    return read_constraint(options, tokenizer, folder.config.vocab_size)


def _answer_file(
    console: Console,
    opened: "tuple[ModelFolder, OpenELM, Tokenizer]",
    prompts: "Prompts",
    sampling: GivenOptions,
    constraints: ConstraintOptions,
    *,
    template: str,
    system: str,
    batch_size: int,
    tuning: "Tuning",
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Answer the prompts of a file.

    Args:
        as_json: write a JSON object a line, else prompts and answers as text.
    """
    from mlx_openelm.cli.views.generation import note_prompts, show_answer
    from mlx_openelm.generation.batch_job import answer_prompts

    folder, model, tokenizer = opened

    def read_options(options: Mapping[str, Any]) -> Sampling:
        return Sampling.from_defaults(
            folder.generation_defaults, {**sampling, **options}
        )

    with console.progress("Answering") as progress:
        report = answer_prompts(
            model,
            tokenizer,
            prompts,
            read_options({}),
            read_options=read_options,
            constraint=_read_constraint(constraints, folder, tokenizer),
            template=template,
            system=system,
            batch_size=batch_size,
            tuning=tuning,
            output=output,
            force=force,
            on_answer=console.answer_json if as_json else partial(show_answer, console),
            on_problem=console.note,
            on_progress=lambda done, total, _: progress.update(done, total, "prompts"),
        )
    note_prompts(console, report)
    if report.problems:
        raise OpenELMError(
            f"{len(report.problems)} of {count_of(report.prompts, 'prompt')} of "
            f"{prompts.name} have no answer; see the messages above."
        )


def _are_one_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _read_prompt(positional: str | None, option: str | None) -> str:
    if positional is not None and option is not None:
        raise typer.BadParameter("cannot be used with --prompt", param_hint="PROMPT")
    prompt = positional if positional is not None else option
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise typer.BadParameter("give a prompt, or pipe one in", param_hint="PROMPT")
    if prompt is None or prompt == "-":
        prompt = _read_stdin()
        is_empty = not prompt.strip()
    else:
        is_empty = not prompt
    if is_empty:
        raise OpenELMError(
            "The prompt is empty; give a text to continue, as in mlx-openelm generate "
            f"'{PROMPT}'. To generate from BOS alone, use Python: stream(model, "
            "tokenizer, [tokenizer.bos_id])."
        )
    return prompt


def _read_stdin() -> str:
    if sys.stdin is None:
        raise OpenELMError("stdin is closed; give a prompt as PROMPT.")
    try:
        return read_text_of(sys.stdin.buffer, MAX_RECORD_BYTES).removesuffix("\n")
    except UnicodeDecodeError as error:
        raise OpenELMError(
            f"The prompt on stdin is not UTF-8 text: {error}."
        ) from error
    except ValueError as error:
        raise OpenELMError(f"The prompt on stdin cannot be used: {error}.") from error
