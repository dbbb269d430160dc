"""Draws docs/images/terminal.svg: a terminal session, from a true run.

    python docs/terminal_session.py

The picture makes no request (fonts are the reader's), and has no date and no path of
this machine.
"""

import io
import re
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text
from run_examples import DOCS, Shell

PICTURE = DOCS / "images" / "terminal.svg"
COMMANDS = (
    "mlx-openelm convert demo -q",
    "mlx-openelm inspect demo-mlx-4bit | head -9",
    "mlx-openelm generate 'There was once a king who' --temp 0 -m 40 --quiet",
)


def main() -> None:
    """Run the commands and write the picture."""
    console = Console(record=True, width=100, file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder:
        shell = Shell(Path(folder).resolve())
        for command in COMMANDS:
            console.print(Text(f"$ {command}", style="bold green"))
            lines, code = shell.run(command)
            if code:
                raise SystemExit("\n".join(lines))
            for line in lines:
                console.print(Text(line))
            console.print()
    svg = console.export_svg(title="mlx-openelm", unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    PICTURE.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
