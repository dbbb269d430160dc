"""Reports for a person; `--json` shows the same values as they are."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_openelm.cli.console import Console

if TYPE_CHECKING:
    from converters.conversion.adapters import AdapterReport
    from converters.conversion.fusing import FusionReport
    from converters.conversion.run import ConversionReport
    from converters.conversion.verification import Verification
    from converters.parity import ParityReport
    from mlx_openelm.bench.selfcheck import SelfCheck
    from mlx_openelm.evaluation.texts import TextScore
    from mlx_openelm.finetuning.preparation import Prepared
    from mlx_openelm.finetuning.run import FinetuneReport
    from mlx_openelm.generation.batch_job import PromptsReport
    from mlx_openelm.generation.drafters import Drafter
    from mlx_openelm.generation.streaming import Piece
    from mlx_openelm.storage.inspection import Inspection
    from mlx_openelm.text.tokenizer import Tokenizer


def as_json(report: Any) -> dict[str, Any]:
    """Return a report's fields for `--json`."""
    return dataclasses.asdict(report)


def generated_json(pieces: Sequence["Piece"], tokenizer: "Tokenizer") -> dict[str, Any]:
    """Return a generation for `--json`: the text, its tokens, the figures."""
    figures = dataclasses.asdict(pieces[-1])
    for part in ("text", "token", "logprob", "top_logprobs"):
        del figures[part]
    said = [piece for piece in pieces if piece.token != tokenizer.eos_id]
    if pieces[-1].logprob is not None:
        figures["logprobs"] = [
            {
                "token": piece.token,
                "piece": tokenizer.piece(piece.token),
                "logprob": piece.logprob,
                "top": [
                    {"token": token, "piece": tokenizer.piece(token), "logprob": value}
                    for token, value in piece.top_logprobs
                ],
            }
            for piece in said
        ]
    return {
        "text": "".join(piece.text for piece in pieces),
        "tokens": [piece.token for piece in said],
        **figures,
    }


def note_generated(console: Console, last: "Piece") -> None:
    """Say the figures of a generation in one line."""
    cached = f" ({last.cached_tokens} of them cached)" if last.cached_tokens else ""
    console.note(
        f"[{last.prompt_tokens} prompt tokens{cached} at {last.prompt_tps:.0f}/s, "
        f"{last.generation_tokens} new at {last.generation_tps:.0f}/s, first after "
        f"{last.time_to_first_token_s:.2f} s, peak memory "
        f"{last.peak_memory_bytes / 1e6:.0f} MB, ended by {last.finish_reason}]"
    )


def note_drafts(console: Console, drafter: "Drafter") -> None:
    """Say how many tokens were guessed, and how many of them were right."""
    said = f"{drafter.accepted} of {drafter.drafted} guessed tokens were right"
    if drafter.equal_ties:
        said += f"; {drafter.equal_ties} tokens shared their logit with another one"
    if drafter.note:
        said += f"; {drafter.note}"
    console.note(f"[{said}]")


def note_prompts(console: Console, report: "PromptsReport") -> None:
    """Say what came of a file of prompts."""
    kept = f", {report.kept} of them by a former run" if report.kept else ""
    answered = report.prompts - len(report.problems)
    console.note(
        f"[{answered} of {report.prompts} prompts answered{kept}; "
        f"{report.tokens} tokens drawn]"
    )


def note_adapter(console: Console, report: "AdapterReport") -> None:
    """Say which adapter was converted; the path itself is the answer."""
    for note in report.notes:
        console.note(note)
    console.note(
        f"{report.kind}: {report.method} of rank {report.rank} on "
        f"{report.num_modules} modules, {report.num_parameters:,} parameters, "
        f"{report.seconds:.1f} s"
    )


def note_fused(console: Console, report: "FusionReport") -> None:
    """Say what was fused and that it is still there; the path itself is the answer."""
    for note in report.notes:
        console.note(note)
    proof, stored = report.proof, f"{report.bits:g} bits" if report.bits else None
    console.note(
        f"{report.method} adapter in {report.size}: {report.num_parameters:,} "
        f"parameters in {stored or report.dtype} ({report.num_bytes / 1e6:.1f} MB), "
        f"{report.seconds:.1f} s"
    )
    console.note(
        f"The adapter is still there: from base with adapter the fused model is "
        f"{proof.kl_fused:.2g} nats away (mean KL), the base alone "
        f"{proof.kl_adapter:.2g}; same first choice {proof.top1_agreement:.1%}, on "
        f"{proof.tokens} tokens of {proof.text}"
    )
    console.note(f"Try it: mlx-openelm generate --model {report.path} --prompt ...")


def note_converted(console: Console, report: "ConversionReport") -> None:
    """Say what was converted; the path itself is the answer."""
    for note in report.notes:
        console.note(note)
    stored = f"{report.bits:g} bits" if report.bits else report.dtype
    console.note(
        f"{report.size}: {report.num_parameters:,} parameters in {stored} "
        f"({report.bits_per_weight:.2f} bits a weight, "
        f"{report.num_bytes / 1e6:.1f} MB), {report.seconds:.1f} s"
    )
    if report.receipt is not None:
        console.note(f"Receipt: {describe_receipt(dataclasses.asdict(report.receipt))}")
    if report.tokenizer:
        console.note(f"Tokenizer from {report.tokenizer}")
    if report.adapter_path:
        console.note(f"Adapter: {report.adapter_path}")
    if report.tokenizer and report.to in ("mlx", "hf"):
        adapter = (
            f" --adapter-path {report.adapter_path}" if report.adapter_path else ""
        )
        console.note(
            f"Try it: mlx-openelm generate --model {report.path}{adapter} --prompt ..."
        )


_FIGURES = (
    *("mean_kl", "p99_kl", "top1_agreement", "tokens"),
    *("perplexity_before", "perplexity_after"),
)


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e305


def describe_receipt(receipt: Mapping[str, Any]) -> str:
    """Say in one line what a quantization cost."""
    if not all(_is_figure(receipt.get(key)) for key in _FIGURES):
        return "damaged"
    return (
        f"mean KL {receipt['mean_kl']:.4f} nats (99 % of tokens below "
        f"{receipt['p99_kl']:.3f}), same first choice {receipt['top1_agreement']:.1%}, "
        f"perplexity {receipt['perplexity_before']:.2f} -> "
        f"{receipt['perplexity_after']:.2f}, on {receipt['tokens']} tokens of "
        f"{receipt.get('text')}"
    )


def show_verification(console: Console, found: "Verification") -> None:
    """Show each check and what is wrong."""
    from rich.table import Table

    table = Table("check", "", box=None)
    for check in found.checks:
        table.add_row(check.name, "ok" if check.passed else "\n".join(check.problems))
    console.answer_table(table)


def show_score(console: Console, score: "TextScore") -> None:
    """Say a text's score in one line."""
    console.answer(
        f"{score.bits_per_byte:.4f} bits per byte, {score.nats_per_token:.4f} nats per "
        f"token, perplexity {score.perplexity:.2f} ({score.tokens:,} tokens, "
        f"{score.bytes:,} bytes)"
    )


def show_inspection(console: Console, found: "Inspection") -> None:
    """Show a folder's facts, then its layers."""
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    tokenizer = f"{found.tokenizer:,} pieces" if found.tokenizer else "none"
    for name, value in (
        ("size", f"{found.size}, {found.num_parameters:,} parameters"),
        ("width", f"{found.model_dim}, heads of {found.head_dim}"),
        ("context", f"{found.context_length:,} tokens"),
        (
            "vocabulary",
            f"{found.vocab_size:,} rows, head {'tied' if found.tied else 'untied'}",
        ),
        ("tokenizer", tokenizer),
        ("template", found.template),
        *((name, stored) for name, stored in found.storage.items()),
        (
            "on disk",
            f"{found.weight_bytes / 1e6:,.1f} MB, "
            f"{found.bits_per_weight:.2f} bits a weight",
        ),
        (
            "at work here",
            f"{found.memory_bytes / 1e6:,.1f} MB with a full context "
            f"({found.kv_bytes_per_token:,} bytes a token)",
        ),
        (
            "made from",
            f"{found.source.get('name', '?')}, {found.source.get('kind', '?')}",
        ),
        *((n, str(found.source[n])) for n in ("repo", "revision") if n in found.source),
        ("options", ", ".join(f"{k} {v}" for k, v in found.options.items()) or "none"),
        ("receipt", describe_receipt(found.receipt) if found.receipt else "none"),
    ):
        facts.add_row(name, value)
    layers = Table("layer", "query heads", "key-value heads", "FFN", box=None)
    for i, layer in enumerate(found.layers):
        layers.add_row(
            str(i), str(layer.query_heads), str(layer.kv_heads), str(layer.ffn_dim)
        )
    console.answer_table(facts)
    console.answer("")
    console.answer_table(layers)


def show_parity(console: Console, report: "ParityReport") -> None:
    """Show the difference at each place, and the verdict."""
    from rich.table import Table

    table = Table("place", "largest difference", "largest value", box=None)
    for place in report.places:
        table.add_row(place.place, f"{place.difference:.1e}", f"{place.largest:.3g}")
    console.answer_table(table)
    verdict = "equal" if report.equal else "NOT EQUAL"
    console.answer(
        f"{report.size}, {report.num_tokens} tokens: PyTorch and MLX are {verdict} "
        f"(logits within {report.limit:.0e}: {report.places[-1].difference:.1e}; same "
        f"top token at {report.same_top_token:.0%})"
    )


def show_selfcheck(console: Console, report: "SelfCheck") -> None:
    """Show the machine, each check, and what the demo wrote."""
    from rich.table import Table

    machine = dataclasses.asdict(report.machine)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("mlx-openelm", report.version)
    for name, value in machine.items():
        facts.add_row(
            name, f"{value / 1e9:.1f} GB" if name == "memory_bytes" else value
        )
    table = Table("check", "found", "at most", "", box=None)
    for check in report.checks:
        table.add_row(
            check.name,
            f"{check.value:.2g}",
            f"{check.limit:.2g}",
            "ok" if check.passed else "FAILED",
        )
    console.answer_table(facts)
    console.answer("")
    console.answer_table(table)
    console.answer("")
    console.answer(report.text)


# Fine-tuning ---------------------------------------------------------------------


def plan_json(prepared: "Prepared") -> dict[str, Any]:
    """Return a run before its start as JSON has it."""
    plan = prepared.plan
    return {
        "path": str(prepared.path),
        "plan": {
            **dataclasses.asdict(plan),
            "memory_bytes": plan.memory.total,
            "fits": plan.fits,
        },
        "data": dataclasses.asdict(prepared.table),
        "recipe": dataclasses.asdict(prepared.recipe),
    }


def note_plan(console: Console, prepared: "Prepared") -> None:
    """Say what was found in the data, and what the run will take."""
    table, plan, recipe = prepared.table, prepared.plan, prepared.recipe
    for name, split in (
        ("train", table.train),
        ("valid", table.valid),
        ("test", table.test),
    ):
        if split is None:
            continue
        console.note(
            f"{name}: {Path(split.file).name} ({split.format}), {split.records:,} "
            f"records, {split.samples:,} samples of {split.shortest} to "
            f"{split.longest} tokens (median {split.median}); {split.targets:,} of "
            f"{split.tokens:,} tokens count"
        )
    if len(table.train.lengths) > 1:
        bars = ", ".join(
            f"{count:,} up to {edge}"
            for edge, count in zip(
                table.train.edges[1:], table.train.lengths, strict=True
            )
            if count
        )
        console.note(f"lengths in train: {bars} tokens")
    console.note(f"template: {table.template} ({table.reason})")
    for warning in table.warnings:
        console.note(f"note: {warning}")
    memory = plan.memory
    console.note(
        f"{plan.trainable:,} of {plan.parameters:,} weights are trained "
        f"({plan.trainable / plan.parameters:.2%}), {plan.steps:,} steps of "
        f"{recipe.step_size} {'row' if recipe.pack else 'sample'}"
        f"{'s' * (recipe.step_size > 1)} "
        f"({plan.epochs:.2f} epochs), {plan.targets:,} tokens to learn, no padding"
    )
    console.note(
        f"memory: about {memory.total / 1e9:.2f} GB of {plan.limit / 1e9:.1f} GB "
        f"(weights {memory.weights / 1e9:.2f}, adapter and optimizer "
        f"{(memory.adapter + memory.gradients + memory.optimizer) / 1e9:.2f}, "
        f"one batch {(memory.activations + memory.loss) / 1e9:.2f})"
    )
    if not plan.fits or plan.memory.total > plan.limit / 2:
        for flags, total in plan.smaller[:4]:
            console.note(f"  {total / 1e9:.2f} GB with {flags}")


def note_trained(console: Console, report: "FinetuneReport") -> None:
    """Say what came of a run, and how to use it."""
    if report.first_loss is not None and report.last_loss is not None:
        best = ""
        if report.best_step not in (None, 0, report.steps):
            best = f" (best {report.best_loss:.4f} at step {report.best_step})"
        console.note(
            f"validation loss {report.first_loss:.4f} -> {report.last_loss:.4f} nats "
            f"per {report.unit}{best}"
        )
    if report.test_loss is not None:
        console.note(f"test loss {report.test_loss:.4f} nats per {report.unit}")
    console.note(
        f"{report.steps:,} steps, {report.tokens:,} {report.unit}s in "
        f"{report.seconds:,.0f} s ({report.tokens_per_second:,.0f} {report.unit}s/s), "
        f"{report.peak_memory_bytes / 1e9:.2f} GB at most; "
        f"look at {report.path / 'report.html'}"
    )
