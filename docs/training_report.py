"""Draws docs/images/training-report.png: the report of a short fine-tuning run.

    python docs/training_report.py

The demo model is trained for some minutes on the paragraphs of this documentation.
Needs Chromium; the picture is of the top of `report.html`, 1,200 pixels wide.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from run_examples import DOCS, Shell

PICTURE = DOCS / "images" / "training-report.png"
COMMAND = (
    "mlx-openelm lora --data docs.jsonl --iters 240 --batch-size 4 "
    "--max-seq-length 128 --learning-rate 1e-3 --steps-per-eval 20 "
    "--val-batches 8 --quiet"
)
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
HEIGHT = 840


def main() -> None:
    """Train, and write the picture."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"None of {', '.join(BROWSERS)} is installed.")
    with tempfile.TemporaryDirectory() as temporary:
        shell = Shell(Path(temporary).resolve())
        records = [json.dumps({"text": text}) for text in read_paragraphs()]
        data = shell.folder / "docs.jsonl"
        data.write_text("\n".join(records), encoding="utf-8")
        lines, code = shell.run(COMMAND)
        if code:
            raise SystemExit("\n".join(lines))
        subprocess.run(
            [
                browser,
                *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                f"--window-size=1200,{HEIGHT}",
                f"--screenshot={PICTURE}",
                (shell.folder / lines[-1] / "report.html").as_uri(),
            ],
            check=True,
            capture_output=True,
        )


def read_paragraphs() -> list[str]:
    """Return the longer paragraphs of the pages."""
    pages = [page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))]
    paragraphs = [paragraph for page in pages for paragraph in page.split("\n\n")]
    return [text for text in paragraphs if len(text) > 80 and "|" not in text]


if __name__ == "__main__":
    main()
