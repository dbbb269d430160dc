"""Statistics of a generation, on stderr and for `--json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlx_openelm.cli.console import Console
from mlx_openelm.generation.options import SHOWN_DIGITS
from mlx_openelm.message_parts import count_of

if TYPE_CHECKING:
    from mlx_openelm.generation.batch_job import PromptsReport
    from mlx_openelm.generation.drafters import Drafter
    from mlx_openelm.generation.streaming import Piece
    from mlx_openelm.text.tokenizer import Tokenizer


def generated_json(pieces: Sequence["Piece"], tokenizer: "Tokenizer") -> dict[str, Any]:
    """Return a generation for `--json`: text, tokens and statistics."""
    figures = dataclasses.asdict(pieces[-1])
    for part in ("text", "token", "logprob", "top_logprobs"):
        del figures[part]
    for name, digits in SHOWN_DIGITS.items():
        figures[name] = round(figures[name], digits)
    answer = [piece for piece in pieces if piece.token != tokenizer.eos_id]
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
            for piece in answer
        ]
    return {
        "text": "".join(piece.text for piece in pieces),
        "tokens": [piece.token for piece in answer],
        **figures,
    }


def note_generated(console: Console, last: "Piece") -> None:
    """Write the token counts, speeds and memory of a generation to stderr."""
    cached = f" ({last.cached_tokens} of them cached)" if last.cached_tokens else ""
    console.note(
        f"[{count_of(last.prompt_tokens, 'prompt token')}{cached} at "
        f"{last.prompt_tps:.0f}/s, "
        f"{last.generation_tokens} new at {last.generation_tps:.0f}/s, first after "
        f"{last.time_to_first_token_s:.2f} s, peak memory "
        f"{last.peak_memory_bytes / 1e6:.0f} MB, ended by {last.finish_reason}]"
    )


def note_drafts(console: Console, drafter: "Drafter") -> None:
    """Write the counts of drafted and accepted tokens to stderr."""
    drafted = count_of(drafter.drafted, "draft token")
    parts = [f"{drafter.accepted} of {drafted} accepted"]
    if drafter.equal_ties:
        tokens = count_of(drafter.equal_ties, "token")
        parts.append(f"{tokens} had the same logit as another one")
    if drafter.note:
        parts.append(drafter.note)
    console.note(f"[{'; '.join(parts)}]")


def note_prompts(console: Console, report: "PromptsReport") -> None:
    """Write the counts of answered prompts of a file to stderr."""
    kept = f", {report.kept} of them in an earlier run" if report.kept else ""
    answered = report.prompts - len(report.problems)
    prompts = count_of(report.prompts, "prompt")
    tokens = count_of(report.tokens, "token")
    console.note(f"[{answered} of {prompts} answered{kept}; {tokens} generated]")


def show_answer(console: Console, answer: Mapping[str, Any]) -> None:
    """Print a prompt of a file and its answer as text."""
    prompt = answer.get("prompt")
    for message in answer.get("messages", ()):
        prompt = message["content"]  # the last one is the user's
    console.answer(f"{answer['line']}: {'' if prompt is None else prompt}")
    console.answer(f"{answer.get('text', 'no answer')}\n")
