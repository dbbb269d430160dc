"""Draw the loss curve of a pre-training run from its metrics.jsonl.

python benchmarks/plot_training.py metrics.jsonl loss.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(metrics: Path, picture: Path) -> None:
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    trained = [(e["step"], e["loss"]) for e in events if e["event"] == "trained"]
    scored = [
        (e["step"], e["nats_per_token"], e["bits_per_byte"])
        for e in events
        if e["event"] == "evaluated"
    ]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(*zip(*trained, strict=True), lw=1, label="training")
    steps, nats, bits = zip(*scored, strict=True)
    axes.plot(steps, nats, "o-", label="held-out books")
    for step, height, value in zip(steps[1::2], nats[1::2], bits[1::2], strict=False):
        axes.annotate(
            f"{value:.3f}", (step, height), (0, 7), textcoords="offset points"
        )
    axes.set(
        xlabel="step (8192 tokens)",
        ylabel="loss (nats per token)",
        title="The demo model; numbers: held-out bits per byte",
        ylim=(min(nats) - 0.4, 6),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
