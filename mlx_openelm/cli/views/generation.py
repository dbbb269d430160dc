"""Statistics of a generation, on stderr and for `--json`."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_openelm.cli.console import Console

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
        f"[{last.prompt_tokens} prompt tokens{cached} at {last.prompt_tps:.0f}/s, "
        f"{last.generation_tokens} new at {last.generation_tps:.0f}/s, first after "
        f"{last.time_to_first_token_s:.2f} s, peak memory "
        f"{last.peak_memory_bytes / 1e6:.0f} MB, ended by {last.finish_reason}]"
    )


def note_drafts(console: Console, drafter: "Drafter") -> None:
    """Write the counts of drafted and accepted tokens to stderr."""
    parts = [f"{drafter.accepted} of {drafter.drafted} draft tokens accepted"]
    if drafter.equal_ties:
        parts.append(f"{drafter.equal_ties} tokens had the same logit as another one")
    if drafter.note:
        parts.append(drafter.note)
    console.note(f"[{'; '.join(parts)}]")


def note_prompts(console: Console, report: "PromptsReport") -> None:
    """Write the counts of answered prompts of a file to stderr."""
    kept = f", {report.kept} of them in an earlier run" if report.kept else ""
    answered = report.prompts - len(report.problems)
    console.note(
        f"[{answered} of {report.prompts} prompts answered{kept}; "
        f"{report.tokens} tokens generated]"
    )
