"""Reports for a person; `--json` shows the same values as they are."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlx_openelm.console import Console

if TYPE_CHECKING:
    from converters.adapter_conversion import AdapterReport
    from converters.conversion import ConversionReport
    from converters.parity import ParityReport
    from converters.verification import Verification
    from mlx_openelm.benchmark import SelfCheck
    from mlx_openelm.evaluation import TextScore
    from mlx_openelm.generation import Piece
    from mlx_openelm.inspection import Inspection


def as_json(report: Any) -> dict[str, Any]:
    """Return a report's fields for `--json`."""
    return dataclasses.asdict(report)


def generated_json(text: str, tokens: Sequence[int], last: "Piece") -> dict[str, Any]:
    """Return a finished generation for `--json`: the text, its tokens, the figures."""
    figures = dataclasses.asdict(last)
    for part in ("text", "token"):
        del figures[part]
    return {"text": text, "tokens": list(tokens), **figures}


def note_generated(console: Console, last: "Piece") -> None:
    """Say the figures of a generation in one line."""
    console.note(
        f"[{last.prompt_tokens} prompt tokens at {last.prompt_tps:.0f}/s, "
        f"{last.generation_tokens} new at {last.generation_tps:.0f}/s, first after "
        f"{last.time_to_first_token_s:.2f} s, peak memory "
        f"{last.peak_memory_bytes / 1e6:.0f} MB, ended by {last.finish_reason}]"
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
