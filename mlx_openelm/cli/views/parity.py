"""The report of `parity` as a table."""

from typing import TYPE_CHECKING

from mlx_openelm.cli.console import Console
from mlx_openelm.message_parts import count_of

if TYPE_CHECKING:
    from converters.parity import ParityReport


def show_parity(console: Console, report: "ParityReport") -> None:
    """Print a table of the difference at each layer, and the result."""
    from rich.table import Table

    table = Table("layer", "largest difference", "largest value", box=None)
    for place in report.places:
        table.add_row(place.place, f"{place.difference:.1e}", f"{place.largest:.3g}")
    console.answer_table(table)
    verdict = "equal" if report.equal else "NOT EQUAL"
    console.answer(
        f"{report.size}, {count_of(report.num_tokens, 'token')}: PyTorch and MLX are "
        f"{verdict} "
        f"(logits within {report.limit:.0e}: {report.places[-1].difference:.1e}; same "
        f"top token at {report.same_top_token:.0%})"
    )
