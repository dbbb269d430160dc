"""A pre-training run on the terminal: plan and progress."""

import dataclasses
from typing import TYPE_CHECKING, Any

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.views.run import RunView, show_sample
from mlx_openelm.message_parts import count_of

if TYPE_CHECKING:
    from converters.pretraining.data_check import DataCheck
    from converters.pretraining.log import Event, Started, Trained
    from converters.pretraining.plan import Memory, PretrainingPlan
    from converters.pretraining.recipe import PretrainRecipe


class PretrainingView(RunView):
    """Shows the events of a pre-training run."""

    def __call__(self, event: "Event") -> None:
        from converters.pretraining import log

        match event:
            case log.Started():
                self._steps = event.steps
                self._console.note(_describe_start(event))
            case log.Trained():
                self._progress.update(event.step, self._steps, _describe_step(event))
            case log.Spiked():
                self._note(
                    event.step,
                    f"loss spike: {event.loss:.4f}, median {event.median:.4f}",
                )
            case log.Evaluated():
                weights = "mean of the last checkpoints: " if event.averaged else ""
                self._note(
                    event.step,
                    f"{weights}held-out {event.nats_per_token:.4f} nats per token, "
                    f"{event.bits_per_byte:.4f} bits per byte",
                )
            case log.Sampled():
                self._note(event.step, show_sample(event.prompt + event.text))
            case log.Noted():
                self._console.note(event.text)
            case log.Saved():
                dropped = _describe_dropped(event.dropped)
                self._note(event.step, f"saved {event.path}{dropped}")


def _describe_start(event: "Started") -> str:
    counts = (
        (event.num_documents, "document"),
        (event.num_tokens, "token"),
        (event.num_sequences, "sequence"),
    )
    sizes = ", ".join(count_of(n, noun) for n, noun in counts if n is not None)
    parts = [
        f"{event.num_parameters:,} parameters",
        sizes or "streamed text",
        *([f"{event.processes} processes"] if event.processes > 1 else []),
        f"step {event.first_step:,} of {event.steps:,}",
    ]
    return "; ".join(parts)


def _describe_step(event: "Trained") -> str:
    figures = [f"loss {event.loss:.3f}", f"{event.tokens_per_second:,.0f} tokens/s"]
    if event.mfu is not None:
        figures.append(f"MFU {event.mfu:.0%}")
    return ", ".join((*figures, f"{_show_seconds(event.seconds_left)} left"))


def _describe_dropped(dropped: dict[str, int]) -> str:
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.items())
    return f" (text dropped: {reasons})" if reasons else ""


def _show_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# The dry run -------------------------------------------------------------------------


def show_plan(
    console: Console, recipe: "PretrainRecipe", plan: "PretrainingPlan"
) -> None:
    """Print the recipe and the plan of a run; write what is missing to stderr."""
    import yaml
    from rich.table import Table

    from converters.pretraining.plan import UTILISATION

    values = plan_as_json(recipe, plan)["recipe"]
    console.answer(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    table = Table(show_header=False, box=None, pad_edge=False)
    chosen = plan.memory[recipe.parallel if plan.devices > 1 else "ddp"]
    for name, value in (
        ("parameters", f"{plan.config.num_parameters:,}"),
        ("embedding", f"{plan.config.vocab_size:,} rows"),
        ("devices", f"{plan.devices:,}"),
        (
            "a step",
            f"{plan.tokens_per_step:,} tokens: {count_of(plan.devices, 'device')} x "
            f"{plan.accumulation:,} x {plan.micro_batch_size:,} sequences of "
            f"{plan.config.max_context_length:,}",
        ),
        ("steps", f"{plan.steps:,}"),
        ("tokens", f"{plan.tokens:,} (padding included)"),
        ("FLOPs", f"{plan.flops:.3g}; {plan.flops_per_token:.3g} a token"),
        (
            "A100-days",
            f"{plan.a100_days:,.1f} at {UTILISATION:.0%} of peak FLOP/s, "
            f"{plan.a100_days / plan.devices:,.1f} days on {plan.devices:,} of them",
        ),
        *(
            (
                f"memory, {kind}",
                _show_memory(memory) + (" *" if memory is chosen else ""),
            )
            for kind, memory in plan.memory.items()
        ),
    ):
        table.add_row(name, value)
    console.answer_table(table)
    for sentence in plan.missing:
        console.note(f"Missing: {sentence}")
    if plan.closed:
        console.note(plan.closed)


def plan_as_json(recipe: "PretrainRecipe", plan: "PretrainingPlan") -> dict[str, Any]:
    """Return the recipe and the plan for `--json`; memory is in bytes."""
    import json

    document = {"recipe": dataclasses.asdict(recipe), "plan": dataclasses.asdict(plan)}
    document["plan"]["parameters"] = plan.config.num_parameters
    for kind, memory in plan.memory.items():
        document["plan"]["memory"][kind]["total"] = memory.total
    as_json: dict[str, Any] = json.loads(json.dumps(document))  # tuples become lists
    return as_json


def _show_memory(memory: "Memory") -> str:
    parts = ("weights", "gradients", "optimizer", "copies", "activations")
    sizes = ", ".join(f"{name} {getattr(memory, name) / 2**30:.1f}" for name in parts)
    return f"{memory.total / 2**30:.1f} GiB per device: {sizes}"


def show_check(console: Console, checked: "DataCheck") -> None:
    """Print each corpus; below, what is missing or damaged and where to get it."""
    from rich.table import Table

    from converters.pretraining.corpus_files import contract_ranges

    table = Table(box=None, pad_edge=False)
    for name in ("corpus", "files", "GB", "missing", "damaged"):
        table.add_column(name, justify="left" if name == "corpus" else "right")
    for corpus in checked.corpora:
        counts = (len(corpus.missing), len(corpus.damaged))
        size = f"{corpus.num_bytes / 1e9:,.1f}"
        table.add_row(
            corpus.name, f"{corpus.num_files:,}", size, *(f"{n:,}" for n in counts)
        )
    console.answer_table(table)
    for corpus in checked.corpora:
        if corpus.missing:
            source = f"; get it from {corpus.source}" if corpus.source else ""
            names = ", ".join(contract_ranges(corpus.missing))
            console.answer(f"Missing of {corpus.name}: {names}{source}")
        for problem in corpus.damaged:
            console.answer(f"Damaged of {corpus.name}: {problem}")
