"""Reports on converted model and adapter folders, in lines and tables."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlx_openelm.cli.console import Console

if TYPE_CHECKING:
    from converters.conversion.adapters import AdapterReport
    from converters.conversion.fusing import FusionReport
    from converters.conversion.run import ConversionReport
    from converters.conversion.verification import Verification
    from mlx_openelm.storage.inspection import Inspection


def note_converted(console: Console, report: "ConversionReport") -> None:
    """Write a summary of a converted model to stderr."""
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


def note_adapter(console: Console, report: "AdapterReport") -> None:
    """Write a summary of a converted adapter to stderr."""
    for note in report.notes:
        console.note(note)
    console.note(
        f"{report.kind}: {report.method} of rank {report.rank} on "
        f"{report.num_modules} modules, {report.num_parameters:,} parameters, "
        f"{report.seconds:.1f} s"
    )


def show_fused(console: Console, report: "FusionReport") -> None:
    """Print a fused model's path; write a summary of it and its check to stderr."""
    for note in report.notes:
        console.note(note)
    proof = report.proof
    stored = f"{report.bits:g} bits" if report.bits else report.dtype
    console.note(
        f"{report.method} adapter in {report.size}: {report.num_parameters:,} "
        f"parameters in {stored} ({report.num_bytes / 1e6:.1f} MB), "
        f"{report.seconds:.1f} s"
    )
    console.note(
        f"The adapter is still there: from base with adapter the fused model is "
        f"{proof.kl_fused:.2g} nats away (mean KL), the base alone "
        f"{proof.kl_adapter:.2g}; same first choice {proof.top1_agreement:.1%}, on "
        f"{proof.tokens} tokens of {proof.text}"
    )
    console.note(f"Try it: mlx-openelm generate --model {report.path} --prompt ...")
    console.answer(str(report.path))


_FIGURES = (
    *("mean_kl", "p99_kl", "top1_agreement", "tokens"),
    *("perplexity_before", "perplexity_after"),
)


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e305


def describe_receipt(receipt: Mapping[str, Any]) -> str:
    """Return one line on the loss of quality by quantization."""
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
    """Print a table of the checks and their problems."""
    from rich.table import Table

    table = Table("check", "", box=None)
    for check in found.checks:
        table.add_row(check.name, "ok" if check.passed else "\n".join(check.problems))
    console.answer_table(table)


def show_inspection(console: Console, found: "Inspection") -> None:
    """Print a table of a folder's properties, and one of its layers."""
    from rich.table import Table

    tokenizer = f"{found.tokenizer:,} pieces" if found.tokenizer else "none"
    facts = (
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
    )
    layers = Table("layer", "query heads", "key-value heads", "FFN", box=None)
    for i, layer in enumerate(found.layers):
        layers.add_row(
            str(i), str(layer.query_heads), str(layer.kv_heads), str(layer.ffn_dim)
        )
    console.answer_facts(facts)
    console.answer("")
    console.answer_table(layers)
