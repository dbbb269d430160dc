"""Reports on converted model and adapter folders, in lines and tables."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.help.examples import PROMPT
from mlx_openelm.message_parts import count_of

if TYPE_CHECKING:
    from converters.conversion.adapters import AdapterReport
    from converters.conversion.fusing import FusionReport
    from converters.conversion.run import ConversionReport
    from converters.conversion.verification import Verification
    from converters.quantization.learning import LearningRecord
    from mlx_openelm.storage.inspection import Inspection


def show_converted(console: Console, report: "ConversionReport") -> None:
    """Print a model's path; write a summary and the next command to stderr."""
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
    elif report.learned is not None:
        _note_learned(console, report.learned)
    if report.tokenizer:
        console.note(f"Tokenizer from {report.tokenizer}")
    if report.adapter_path:
        console.note(f"Adapter: {report.adapter_path}")
    console.answer(str(report.path))
    if report.to == "gguf":
        console.note_next("-m", report.path, "-p", PROMPT, program="llama-cli")
    elif report.to == "corenet":
        console.note_next("parity", report.path)
    elif report.tokenizer is None:
        console.note_next("verify", report.path)
    else:
        adapter = ("--adapter-path", report.adapter_path) if report.adapter_path else ()
        console.note_next("generate", "--model", report.path, *adapter, PROMPT)


def show_adapter(console: Console, report: "AdapterReport") -> None:
    """Print an adapter's path; write a summary and the next command to stderr."""
    for note in report.notes:
        console.note(note)
    console.note(
        f"{report.kind}: {report.method} of rank {report.rank} on "
        f"{count_of(report.num_modules, 'module')}, "
        f"{report.num_parameters:,} parameters, "
        f"{report.seconds:.1f} s"
    )
    console.answer(str(report.path))
    if report.to == "mlx" and report.base:
        console.note_next("generate", "--adapter-path", report.path, PROMPT)
    elif report.to == "peft" and report.base:
        fused = f"{report.path}-fused"
        console.note_next("fuse", "--adapter-path", report.path, "--save-path", fused)
    elif report.to == "corenet":
        console.note_next("convert", report.path, "--merge")
    elif report.to == "gguf":
        args = ("-m", "BASE.gguf", "--lora", report.path, "-p", PROMPT)
        console.note_next(*args, program="llama-cli")


def show_fused(console: Console, report: "FusionReport") -> None:
    """Print a fused model's path; write a summary and the next command to stderr."""
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
        f"Loss on the sample: {proof.loss_fused:.4f} nats per token fused, "
        f"{proof.loss_adapter:.4f} base with adapter, {proof.loss_base:.4f} base alone"
    )
    verdict = "The adapter's effect is preserved"
    if proof.lost:
        verdict = "The adapter was trained with this rounding, which changes its effect"
    console.note(
        f"{verdict}: mean KL from the base with adapter is "
        f"{proof.kl_fused:.2g} nats for the fused model and {proof.kl_adapter:.2g} for "
        f"the base alone; same top token {proof.top1_agreement:.1%}, on "
        f"{proof.tokens} tokens of {proof.text}"
    )
    if report.learned is not None:
        _note_learned(console, report.learned)
    console.answer(str(report.path))
    console.note_next("generate", "--model", report.path, PROMPT)


def _note_learned(console: Console, learned: "LearningRecord") -> None:
    console.note(
        f"Learned for {count_of(learned.steps, 'step')}: mean KL "
        f"{learned.mean_kl_before:.4f} -> {learned.mean_kl_after:.4f} nats, same top "
        f"token {learned.top1_before:.1%} -> {learned.top1_after:.1%}, on "
        f"{learned.tokens} other tokens of {learned.text}"
    )


_FIGURES = (
    *("mean_kl", "p99_kl", "top1_agreement", "tokens"),
    *("perplexity_before", "perplexity_after"),
)
_FIGURES_OF_ROUNDING = ("mean_kl_rounded", "top1_agreement_rounded")


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e305


def describe_receipt(receipt: Mapping[str, Any]) -> str:
    """Return one line on the quantization error."""
    if not all(_is_figure(receipt.get(key)) for key in _FIGURES):
        return "damaged"
    before = {key: receipt.get(key) for key in _FIGURES_OF_ROUNDING}
    kl = agreement = ""
    if all(map(_is_figure, before.values())):
        kl = f" ({before['mean_kl_rounded']:.4f} before learning)"
        agreement = f" ({before['top1_agreement_rounded']:.1%})"
    return (
        f"mean KL {receipt['mean_kl']:.4f} nats{kl} (99 % of tokens below "
        f"{receipt['p99_kl']:.3f}), same top token {receipt['top1_agreement']:.1%}"
        f"{agreement}, perplexity {receipt['perplexity_before']:.2f} -> "
        f"{receipt['perplexity_after']:.2f}, on {receipt['tokens']} tokens of "
        f"{receipt.get('text')}"
    )


def show_verification(console: Console, verification: "Verification") -> None:
    """Print a table of the checks and their problems."""
    from rich.table import Table

    table = Table("check", "", box=None)
    for check in verification.checks:
        table.add_row(check.name, "ok" if check.passed else "\n".join(check.problems))
    console.answer_table(table)
    for note in verification.notes:
        console.note(note)


def show_inspection(console: Console, model: "Inspection") -> None:
    """Print a table of a folder's properties, and one of its layers."""
    from rich.table import Table

    from mlx_openelm.cli.views.selfcheck import describe_tuning

    tokenizer = f"{model.tokenizer:,} pieces" if model.tokenizer else "none"
    facts = (
        ("size", f"{model.size}, {model.num_parameters:,} parameters"),
        ("width", f"{model.model_dim}, heads of {model.head_dim}"),
        ("context", f"{model.context_length:,} tokens"),
        (
            "vocabulary",
            f"{model.vocab_size:,} rows, head {'tied' if model.tied else 'untied'}",
        ),
        ("tokenizer", tokenizer),
        ("template", model.template),
        *((name, stored) for name, stored in model.storage.items()),
        (
            "on disk",
            f"{model.weight_bytes / 1e6:,.1f} MB, "
            f"{model.bits_per_weight:.2f} bits a weight",
        ),
        (
            "memory here",
            f"{model.memory_bytes / 1e6:,.1f} MB with a full context "
            f"({model.kv_bytes_per_token:,} bytes a token)",
        ),
        (
            "made from",
            f"{model.source.get('name', '?')}, {model.source.get('kind', '?')}"
            + (", rewritten by another tool" if model.rewritten else ""),
        ),
        *((n, str(model.source[n])) for n in ("repo", "revision") if n in model.source),
        ("options", ", ".join(f"{k} {v}" for k, v in model.options.items()) or "none"),
        ("receipt", describe_receipt(model.receipt) if model.receipt else "none"),
        (
            "opens in",
            "\n".join(f"{tool}: {how}" for tool, how in model.opens_in.items()),
        ),
        *([("tuning here", describe_tuning(model.tuning))] if model.tuning else []),
    )
    layers = Table("layer", "query heads", "key-value heads", "FFN", box=None)
    for i, layer in enumerate(model.layers):
        layers.add_row(
            str(i), str(layer.query_heads), str(layer.kv_heads), str(layer.ffn_dim)
        )
    console.answer_facts(facts)
    console.answer("")
    console.answer_table(layers)
