"""The command line: options in, one verb, its report out."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mlx_openelm.console import Console, close_broken_pipe, prepare_streams
from mlx_openelm.errors import OpenELMError
from mlx_openelm.version import __version__

if TYPE_CHECKING:
    from converters.pretrain import Event


class _Face(TyperGroup):
    """Turns what escapes a verb into one line and an exit code."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _in_one_line():  # --help and --version print here
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _in_one_line():
            return super().invoke(ctx)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        close_broken_pipe()
        raise typer.Exit(0) from None
    except (OpenELMError, OSError) as error:  # OSError: a full disk behind stdout, say
        if os.environ.get("MLX_OPENELM_DEBUG") == "1":
            raise
        Console().error(str(error) if isinstance(error, OpenELMError) else f"{error}.")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stopped:
        Console().note(" ".join(("\nInterrupted.", *_notes(stopped))))
        raise typer.Exit(130) from None
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich's own way out
            raise typer.Exit(0) from None
        for note in _notes(error):  # of SIGTERM: what was kept
            Console().note(note)
        raise


def _notes(stopped: BaseException) -> list[str]:
    return list(getattr(stopped, "__notes__", ()))


app = typer.Typer(
    cls=_Face,
    name="mlx-openelm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="List, show or copy the bundled recipes.")
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)

Model = Annotated[
    str | None,
    typer.Option(
        help="demo, a model folder, or a Hub id.",
        envvar="MLX_OPENELM_MODEL",
        show_default="demo, or the adapter's base",
    ),
]
Adapter = Annotated[
    str | None, typer.Option("--adapter-path", help="An adapter folder to use.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Nothing but the answer.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the random numbers.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a model that is there.")]


def main() -> None:
    """Run the command line; SIGTERM unwinds as Ctrl-C does, so nothing half stays."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see __main__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_streams()
    app()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        parts = (f"{name} {version(name)}" for name in ("mlx", "mlx-lm"))
        Console().answer(f"mlx-openelm {__version__} ({', '.join(parts)})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Versions."
        ),
    ] = False,
) -> None:
    """Run, convert and train OpenELM, Apple's small open language models, on MLX."""


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help='The prompt; "-" or a pipe: from stdin.')
    ] = None,
    prompt_option: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The same, as an option.")
    ] = None,
    model: Model = None,
    adapter_path: Adapter = None,
    max_tokens: Annotated[
        int | None, typer.Option("-m", "--max-tokens", help="Default 256.")
    ] = None,
    temp: Annotated[
        float | None, typer.Option(help="Temperature; 0 is greedy.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest of this mass.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the N likeliest.")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Keep what is this likely beside the likeliest."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: repeat less.")
    ] = None,
    repetition_context: Annotated[
        int | None, typer.Option(help="Tokens that it looks back; default 256.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the answer; repeatable.")
    ] = None,
    template: Annotated[
        str, typer.Option(help="auto, raw, instruct, alpaca or openelm-peft.")
    ] = "auto",
    system: Annotated[str, typer.Option(help="System text of the template.")] = "",
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
    text = _read_prompt(prompt, prompt_option)
    from mlx_openelm.sampling import Sampling

    said: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temp": temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "repetition_context": repetition_context,
        "stop": tuple(stop) if stop else None,
        "seed": seed,
    }
    _check_utf8(text, system, *(stop or ()))
    Sampling.from_defaults({}, said)  # a wrong flag is named before anything is loaded
    from mlx_openelm.generation import stream

    folder, loaded, tokenizer = _load(console, model, adapter_path, offline)
    sampling = Sampling.from_defaults(folder.generation_defaults, said)
    pieces = stream(loaded, tokenizer, text, sampling, template=template, system=system)
    parts: list[str] = []
    tokens: list[int] = []
    last = None
    for last in pieces:
        parts.append(last.text)
        if last.token != tokenizer.eos_id:
            tokens.append(last.token)
        if last.text and not (as_json or no_stream):
            console.answer(last.text, end="")
    assert last is not None
    from mlx_openelm.report import generated_json, note_generated

    if as_json:
        console.answer_json(generated_json("".join(parts), tokens, last))
        return
    if no_stream:
        console.answer("".join(parts), end="")
    if sys.stdout.isatty():
        console.answer("")
    if last.prompt_tokens + last.generation_tokens == folder.config.max_context_length:
        console.note(f"[the context of {folder.config.max_context_length} is full]")
    note_generated(console, last)


@app.command()
def convert(
    source: Annotated[
        list[str] | None,
        typer.Argument(
            help="A CoreNet .pt, a model or adapter folder, a Hub id or demo; several "
            ".pt with --average."
        ),
    ] = None,
    hf_path: Annotated[
        str | None,
        typer.Option(
            "--hf-path", "--model", help="The same; or the base of an adapter folder."
        ),
    ] = None,
    mlx_path: Annotated[
        Path | None, typer.Option(help="Where to; default ./<source name>-mlx[-4bit].")
    ] = None,
    to: Annotated[
        str, typer.Option(help="mlx, hf, corenet, gguf; of an adapter peft, corenet.")
    ] = "mlx",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float16, bfloat16 or float32; default as stored, and for --to mlx "
            "float32 -> bfloat16."
        ),
    ] = None,
    allow_overflow: Annotated[
        bool, typer.Option("--allow-overflow", help="float16 even for the 3B.")
    ] = False,
    quantize: Annotated[
        bool, typer.Option("-q", "--quantize", help="Quantize to --q-bits.")
    ] = False,
    q_bits: Annotated[
        str | None,
        typer.Option(help="Bits of the linears, default 4; auto:X: X on average."),
    ] = None,
    q_group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale, default 64.")
    ] = None,
    q_mode: Annotated[
        str | None, typer.Option(help="affine, mxfp4, mxfp8 or nvfp4.")
    ] = None,
    q_embed_bits: Annotated[
        int | None, typer.Option(help="Bits of the embedding, default 8.")
    ] = None,
    q_keep: Annotated[
        str | None,
        typer.Option(help="Leave modules that this regex finds as they are."),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Unpack what is quantized.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Text for prices and receipt.")
    ] = None,
    no_receipt: Annotated[
        bool, typer.Option("--no-receipt", help="Do not measure what bits cost.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Put an adapter into the weights.")
    ] = False,
    adapter_out: Annotated[
        Path | None, typer.Option(help="Write the source's adapter here, apart.")
    ] = None,
    average: Annotated[
        bool, typer.Option("--average", help="The mean of several sources.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="A file, a folder, a Hub id, or none.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a Hub id.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Make a model folder, which mlx-openelm and mlx-lm read. Prints its path."""
    console = Console(quiet=quiet)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported
    if source and hf_path and average:
        raise typer.BadParameter("say the sources once", param_hint="--model")
    named = list(source or ())
    base = hf_path if named else None
    if not named and hf_path is not None:
        named = [hf_path]
    if not named:
        raise typer.BadParameter("say what to convert", param_hint="SOURCE")
    bits = q_bits
    if bits is None and (quantize or q_mode) and q_mode in (None, "affine"):
        bits = "4"  # the other modes have their own
    from converters.conversion import convert as run

    with console.progress("Converting") as progress:
        report = run(
            named,
            _expand(mlx_path),
            to=to,
            dtype=dtype,
            bits=bits,
            group_size=q_group_size,
            embed_bits=q_embed_bits,
            mode=q_mode or "affine",
            keep=q_keep,
            dequantize=dequantize,
            calibration=_expand(calibration),
            receipt=not no_receipt,
            merge=merge,
            adapter_out=_expand(adapter_out),
            base=base,
            average=average,
            tokenizer=tokenizer,
            allow_overflow=allow_overflow,
            force=force,
            offline=offline,
            revision=revision,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
        )
    from converters.adapter_conversion import AdapterReport
    from mlx_openelm.report import as_json as fields
    from mlx_openelm.report import note_adapter, note_converted

    if as_json:
        console.answer_json(fields(report))
        return
    if isinstance(report, AdapterReport):
        note_adapter(console, report)
    else:
        note_converted(console, report)
    console.answer(str(report.path))


@app.command()
def fuse(
    adapter_path: Annotated[
        str, typer.Option(help="An adapter folder, or its Hub id.", show_default=False)
    ],
    save_path: Annotated[Path, typer.Option(help="Where to.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="The base; default the adapter's own.")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write 16 bits a weight.")
    ] = False,
    quantize: Annotated[
        bool, typer.Option("-q", "--quantize", help="Quantize to --q-bits.")
    ] = False,
    q_bits: Annotated[
        int | None, typer.Option(help="Bits of the linears; default the base's own.")
    ] = None,
    q_group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale, default 64.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Put an adapter into its base, and prove that it is still there. Prints the path.

    Nothing is written if the weights' bits would lose it.
    """
    console = Console(quiet=quiet)
    bits = 4 if quantize and q_bits is None else q_bits
    from converters.fusing import fuse as run
    from mlx_openelm.report import as_json as fields
    from mlx_openelm.report import note_fused

    with console.progress("Fusing") as progress:
        report = run(
            os.path.expanduser(adapter_path),
            os.path.expanduser(save_path),
            base=model,
            dequantize=dequantize,
            bits=bits,
            group_size=q_group_size,
            force=force,
            offline=offline,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
        )
    if as_json:
        console.answer_json(fields(report))
        return
    note_fused(console, report)
    console.answer(str(report.path))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="demo, a model folder, or a Hub id.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="What it was made from; repeatable, if it was averaged."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Check that a folder is whole, and what it says it is."""
    from converters.verification import verify as run
    from mlx_openelm.hub import find_model
    from mlx_openelm.report import as_json as fields
    from mlx_openelm.report import show_verification

    console = Console(quiet=quiet)
    with console.progress("Verifying") as progress:
        found = run(
            find_model(model, offline=offline),
            against=against or (),
            offline=offline,
            on_progress=lambda p: progress.update(p.done, p.total, p.units),
        )
    if as_json:
        console.answer_json(fields(found))
    else:
        show_verification(console, found)
    if not found.passed:
        raise OpenELMError(
            f"{model} is not what it should be: {found.describe_problems()}; convert "
            "or download it again."
        )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="demo, a model folder, or a Hub id.")],
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens to reckon the memory for.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Show sizes, bits, tokenizer, origin and memory, without loading weights."""
    from mlx_openelm.hub import find_model
    from mlx_openelm.inspection import inspect as run
    from mlx_openelm.report import as_json as fields
    from mlx_openelm.report import show_inspection

    console = Console(quiet=quiet)
    found = run(find_model(model, offline=offline), context=context)
    if as_json:
        console.answer_json(fields(found))
    else:
        show_inspection(console, found)


@app.command()
def evaluate(
    text: Annotated[list[Path], typer.Option(help="A text file to score; repeatable.")],
    model: Model = None,
    adapter_path: Adapter = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens in a window; default the context length.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Score how well a model predicts text files: bits per byte, perplexity."""
    console = Console(quiet=quiet)
    from mlx_openelm.evaluation import evaluate as run
    from mlx_openelm.report import as_json as fields
    from mlx_openelm.report import show_score

    _, loaded, tokenizer = _load(console, model, adapter_path, offline)
    with console.progress("Scoring") as progress:
        score = run(
            loaded,
            tokenizer,
            text=text,
            window=window,
            on_progress=lambda done, total: progress.update(done, total, "windows"),
        )
    if as_json:
        console.answer_json(fields(score))
    else:
        show_score(console, score)


@app.command()
def selfcheck(as_json: Json = False, quiet: Quiet = False) -> None:
    """Check that this machine computes OpenELM rightly; prints a report to send."""
    console = Console(quiet=quiet)
    from mlx_openelm.benchmark import check_machine
    from mlx_openelm.report import as_json as fields
    from mlx_openelm.report import show_selfcheck

    report = check_machine(on_check=lambda name: console.note(f"checking {name} ..."))
    if as_json:
        console.answer_json(fields(report))
    else:
        show_selfcheck(console, report)
    if not report.passed:
        raise OpenELMError(
            "This machine does not compute OpenELM rightly; please send the report "
            "above to the project."
        )


@app.command()
def parity(
    source: Annotated[str, typer.Argument(help="Anything that convert takes.")],
    num_tokens: Annotated[int, typer.Option(min=1, help="Tokens to compare.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare PyTorch and MLX, layer by layer, on the same tokens (needs PyTorch)."""
    _need_torch()
    from converters.parity import compare
    from mlx_openelm.report import as_json as fields
    from mlx_openelm.report import show_parity

    console = Console(quiet=quiet)
    report = compare(source, num_tokens=num_tokens, seed=seed)
    if as_json:
        console.answer_json(fields(report))
    else:
        show_parity(console, report)
    if not report.equal:
        raise OpenELMError(
            f"PyTorch and MLX differ on {source} by more than {report.limit:.0e}."
        )


@app.command()
def lora(
    data: Annotated[
        str | None,
        typer.Option(help="A .jsonl or .json file, or a folder with train.jsonl."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="demo (default), a folder, or a Hub id.")
    ] = None,
    adapter_path: Annotated[
        str | None, typer.Option(help="Where to; default adapters/<data name>.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("-c", "--recipe", help="A recipe: name or file.")
    ] = None,
    fine_tune_type: Annotated[
        str | None, typer.Option(help="lora (default), dora or full.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="sft (default), or dpo for preferences.")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Train the last N blocks; -1 (default): all.")
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="Default 16; auto:16 follows the widths.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Multiplier of A B, default 2.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the adapter.")] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option(help="A module to adapt; repeatable; default all linears."),
    ] = None,
    prompt_key: Annotated[
        str | None, typer.Option(help="The prompt's name in the records.")
    ] = None,
    completion_key: Annotated[
        str | None, typer.Option(help="The answer's name in the records.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="raw, instruct, alpaca or openelm-peft.")
    ] = None,
    mask_prompt: Annotated[
        bool | None,
        typer.Option(
            "--mask-prompt/--no-mask-prompt",
            help="No loss on prompts; default where there are some.",
        ),
    ] = None,
    turns: Annotated[
        str | None, typer.Option(help="Learn all answers of a talk, or the last.")
    ] = None,
    max_seq_length: Annotated[
        int | None, typer.Option(help="Tokens; default 2048 or the context.")
    ] = None,
    max_prompt_length: Annotated[
        int | None, typer.Option(help="Of a preference; default half of that.")
    ] = None,
    pack: Annotated[
        bool | None,
        typer.Option("--pack", help="Fill rows of that length with samples."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Default 3.")] = None,
    iters: Annotated[int | None, typer.Option(help="Steps, not epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default 4.")] = None,
    grad_accumulation_steps: Annotated[
        int | None, typer.Option(help="Batches to a step, default 1.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adam, sgd, lion, adafactor or muon.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default 3e-4; of dpo 5e-5.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="cosine (default), linear or constant.")
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Default: a tenth.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default 0.")] = None,
    clip_norm: Annotated[
        float | None, typer.Option(help="Of the gradient; default 1, 0: none.")
    ] = None,
    z_loss: Annotated[float | None, typer.Option(help="Its weight, default 0.")] = None,
    dpo_loss: Annotated[str | None, typer.Option(help="sigmoid or hinge.")] = None,
    dpo_beta: Annotated[float | None, typer.Option(help="Default 0.1.")] = None,
    grad_checkpoint: Annotated[
        bool | None,
        typer.Option("--grad-checkpoint", help="Less memory, a third more work."),
    ] = None,
    seed: Seed = None,
    steps_per_report: Annotated[int | None, typer.Option(help="Default 10.")] = None,
    steps_per_eval: Annotated[int | None, typer.Option(help="Default 200.")] = None,
    val_batches: Annotated[
        int | None, typer.Option(help="Default 25; -1: all of them.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps, default 100.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after N validations without a gain.")
    ] = None,
    average_last: Annotated[
        int | None, typer.Option(help="Also write the mean of the last N saves.")
    ] = None,
    sample_prompt: Annotated[
        list[str] | None,
        typer.Option(help="Continue this at every validation; repeatable."),
    ] = None,
    memory_limit: Annotated[
        float | None, typer.Option(help="GB; default what this machine has.")
    ] = None,
    test: Annotated[
        bool | None, typer.Option("--test", help="Score the test file at the end.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run was left.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and plan; train nothing.")
    ] = False,
    fit: Annotated[
        bool, typer.Option("--fit", help="Take smaller settings, if need be.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Fine-tune a model on a file of examples. Prints the adapter's folder."""
    from mlx_openelm.finetune_recipe import FinetuneRecipe
    from mlx_openelm.recipe import load_recipe, make_recipe

    said: dict[str, Any] = {
        "data": data,
        "model": model,
        "adapter_path": adapter_path,
        "fine_tune_type": fine_tune_type,
        "objective": objective,
        "num_layers": num_layers,
        "rank": int(rank) if rank is not None and rank.isdecimal() else rank,
        "scale": scale,
        "dropout": dropout,
        "keys": tuple(keys) if keys else None,
        "prompt_key": prompt_key,
        "completion_key": completion_key,
        "template": template,
        "mask_prompt": mask_prompt,
        "turns": turns,
        "max_seq_length": max_seq_length,
        "max_prompt_length": max_prompt_length,
        "pack": pack,
        "batch_size": batch_size,
        "grad_accumulation_steps": grad_accumulation_steps,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
        "z_loss": z_loss,
        "dpo_loss": dpo_loss,
        "dpo_beta": dpo_beta,
        "grad_checkpoint": grad_checkpoint,
        "seed": seed,
        "steps_per_report": steps_per_report,
        "steps_per_eval": steps_per_eval,
        "val_batches": val_batches,
        "save_every": save_every,
        "patience": patience,
        "average_last": average_last,
        "sample_prompt": tuple(sample_prompt) if sample_prompt else None,
        "memory_limit": memory_limit,
        "test": test,
    }
    length = {"epochs": epochs, "iters": iters}
    if resume and recipe is None and adapter_path is not None:
        then = Path(adapter_path).expanduser() / "recipe.yaml"
        recipe = str(then) if then.is_file() else None
        if recipe is None and data is None:
            raise OpenELMError(
                f"{adapter_path} holds no recipe.yaml, so there is nothing to go on "
                "from; leave out --resume, and say --data."
            )
    if recipe is None and data is None:
        raise typer.BadParameter("say the examples to learn from", param_hint="--data")
    if recipe is None:
        said["model"] = model or os.environ.get("MLX_OPENELM_MODEL") or None
        chosen = make_recipe(FinetuneRecipe, {**said, **length}, "the options")
    else:
        chosen = load_recipe(FinetuneRecipe, recipe, said)
        if epochs is not None or iters is not None:  # in place of the recipe's
            chosen = dataclasses.replace(chosen, epochs=epochs, iters=iters)
    rank_here = int(os.environ.get("MLX_RANK", "0"))  # of mlx.launch: the first speaks
    console = Console(quiet=quiet or rank_here > 0)
    from mlx_openelm.finetuning import finetune, prepare
    from mlx_openelm.report import as_json as fields
    from mlx_openelm.report import note_plan, note_trained, plan_json
    from mlx_openelm.training_view import TrainingView

    if dry_run:
        prepared = prepare(chosen, fit=fit, offline=offline)
        if as_json:
            console.answer_json(plan_json(prepared))
        else:
            note_plan(console, prepared)
        return
    with TrainingView(console) as view:
        report = finetune(
            chosen,
            resume=resume,
            force=force,
            fit=fit,
            offline=offline,
            on_event=view,
            on_prepared=lambda prepared: note_plan(console, prepared),
        )
    if rank_here > 0:
        return
    if as_json:
        console.answer_json(fields(report))
    else:
        note_trained(console, report)
        console.answer(str(report.path))


@app.command()
def pretrain(
    recipe: Annotated[
        str, typer.Option("-c", "--recipe", help="A recipe: name or file.")
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="Text file pattern; repeatable.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Seed = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an OpenELM from nothing, in PyTorch (needs PyTorch). Prints the weights."""
    _need_torch()
    rank = int(os.environ.get("RANK", "0"))  # set by torchrun; the first alone speaks
    console = Console(quiet=quiet or rank > 0)
    from mlx_openelm.recipe import PretrainRecipe, load_recipe

    said = {"data.train": data, "output": output, "steps": steps, "seed": seed}
    chosen = load_recipe(PretrainRecipe, recipe, said)
    from converters.pretrain import pretrain as run  # seconds: torch is imported

    with console.progress("Training") as progress:
        try:
            path = run(chosen, resume=resume, on_event=_pretraining(console, progress))
        except KeyboardInterrupt:
            console.note(f"\nSaved. Go on with: pretrain -c {recipe} --resume")
            raise
    if rank == 0 and as_json:
        console.answer_json({"path": str(path)})
    elif rank == 0:
        console.answer(str(path))


def _pretraining(console: Console, progress: Any) -> "Callable[[Event], None]":
    from converters.pretrain import Evaluated, Saved, Started, Trained

    steps = 0

    def show(event: "Event") -> None:
        nonlocal steps
        if isinstance(event, Started):
            steps = event.steps
            console.note(
                f"{event.num_parameters:,} parameters, {event.num_documents:,} "
                f"documents, {event.num_tokens:,} tokens in "
                f"{event.num_sequences:,} sequences; "
                f"dropped {event.dropped or 'nothing'}; step {event.first_step} of "
                f"{event.steps}"
            )
        elif isinstance(event, Trained):
            progress.update(event.step, steps, f"loss {event.loss:.3f}")
        elif isinstance(event, Evaluated):
            console.note(
                f"step {event.step}: held-out {event.nats_per_token:.4f} nats per "
                f"token, {event.bits_per_byte:.4f} bits per byte"
            )
        elif isinstance(event, Saved):
            console.note(f"step {event.step}: saved {event.path}")

    return show


@recipes_app.callback()
def _list_recipes(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """List the bundled recipes, each with its first line."""
    from mlx_openelm.recipe import bundled_recipes

    console = Console()
    found = {
        name: path.read_text().splitlines()[0].lstrip("# ")
        for name, path in bundled_recipes().items()
    }
    if as_json:
        console.answer_json(found)
        return
    for name, line in found.items():
        console.answer(f"{name:<20}  {line}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A recipe's name.")]) -> None:
    """Print a recipe."""
    from mlx_openelm.recipe import read_recipe

    Console().answer(read_recipe(name), end="")


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A recipe's name.")],
    to: Annotated[
        Path | None, typer.Argument(help="Where to; default its own file name here.")
    ] = None,
) -> None:
    """Copy a recipe, to be edited. Prints the path."""
    from mlx_openelm.recipe import find_recipe, read_recipe

    path, text = find_recipe(name), read_recipe(name)
    target = to or Path(path.name)
    if target.is_dir():
        target = target / path.name
    try:
        with target.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError as error:
        raise OpenELMError(f"{target} exists already; say another place.") from error
    except OSError as error:
        raise OpenELMError(f"Cannot write {target}: {error}.") from error
    Console().answer(str(target))


def _expand(path: Path | None) -> Path | None:
    """Return a path whose "~" the shell left, as it does behind "--option="."""
    return None if path is None else Path(os.path.expanduser(path))


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


def _load(
    console: Console, name: str | None, adapter_path: str | None, offline: bool
) -> Any:
    """Open and load a model; say which where it was not said, and what is slow here."""
    from mlx_openelm.adapters import attach, open_adapter_folder
    from mlx_openelm.checkpoint import open_folder
    from mlx_openelm.device import describe_slowness
    from mlx_openelm.hub import DEMO, find_model
    from mlx_openelm.loading import load_model, load_tokenizer, stored_dtype

    adapter = None
    if adapter_path is not None:
        adapter = open_adapter_folder(Path(os.path.expanduser(adapter_path)))
    if adapter is not None and name is None:
        path = adapter.find_base(offline=offline)
        console.note(f"[the adapter's base, {adapter.base}; --model NAME says another]")
    else:
        path = find_model(name or DEMO, offline=offline)
    folder = open_folder(path)
    tokenizer = load_tokenizer(folder)  # what is missing is said before the long work
    if adapter is None and name in (None, DEMO):
        console.note("[the built-in demo model; --model NAME runs another]")
    stored, quantized = stored_dtype(folder), bool(folder.packings)
    for slowness in describe_slowness(stored, quantized=quantized):
        console.note(f"[{slowness}]")
    model = load_model(folder)
    if adapter is not None:
        tokenizer.template = adapter.template or tokenizer.template
        for note in attach(model, adapter.path):
            console.note(note)
    return folder, model, tokenizer


def _need_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise OpenELMError(
            "This command needs PyTorch, which is not installed; "
            "in the checkout, pip install -e '.[torch]'."
        )
