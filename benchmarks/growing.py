"""Training speed of a grown model, compared with training from scratch.

    python benchmarks/growing.py [--seeds 0,1,2] [--grown-rate 1e-3] [--bf16]
        [--out DIR]

For each seed: trains a small model (recipes/pretrain/growing/small.yaml), grows it to
twice its width, and trains two models of the new shape by large.yaml, with the same
seed, batches and steps: the grown one, with the peak rate --grown-rate, because the
full rate loses the small model's start, and one with CoreNet's initial weights and the
recipe's rate. Prints held-out losses and the FLOPs after which the grown model reaches
the final loss of the other, without and with those of the small model, and draws the
curves of each seed. --bf16 trains all with torch.autocast, for processors that multiply
bfloat16.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from pretraining_runs import derive, pretrain, read_scores, run

from mlx_openelm.config import OpenELMConfig

RECIPES = Path(__file__).parent.parent / "recipes/pretrain/growing"
WIDTH = 2

Curve = list[tuple[float, float]]  # FLOPs, held-out nats per token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noise-db", default="10")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--grown-rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--steps", help="steps per run, for a trial")
    parser.add_argument("--out", type=Path, default=Path("pretrained/growing"))
    args = parser.parse_args()
    rates = {
        "learning_rate": args.grown_rate,
        "final_learning_rate": args.grown_rate / 10,
    }
    changes = {
        "small": ("small", {"bf16": args.bf16}),
        "grown": ("large", {"bf16": args.bf16, "optimizer": rates}),
        "scratch": ("large", {"bf16": args.bf16}),
    }
    recipes = {
        name: derive(RECIPES / f"{recipe}.yaml", args.out / f"{name}.yaml", change)
        for name, (recipe, change) in changes.items()
    }
    print(f"peak rate of the grown model: {args.grown_rate:g}")
    differences = []
    for seed in args.seeds.split(","):
        out = args.out / f"seed-{seed}"
        train(out, recipes, seed, args.noise_db, args.steps)
        print(f"\nseed {seed}")
        differences.append(compare(out))
    mean = statistics.mean(differences)
    listed = ", ".join(f"{d:+.4f}" for d in differences)
    print(f"\ngrown - scratch at the end: {mean:+.4f} ({listed})")


def train(
    out: Path,
    recipes: Mapping[str, Path],
    seed: str,
    noise_db: str,
    steps: str | None,
) -> None:
    """Train the small model, and the large one from it and from initial weights."""
    flags = ["--seed", seed, *([] if steps is None else ["--steps", steps])]
    grown, fresh = out / "grown-init", out / "fresh-init"
    weights = pretrain(recipes["small"], out / "small", *flags)
    if not grown.exists():
        width = ["--width", str(WIDTH), "--noise-db", noise_db]
        run("grow", str(weights), *width, "--seed", seed, "-o", str(grown))
    if not fresh.exists():
        write_fresh(grown, fresh, int(seed))
    for name, init in (("grown", grown), ("scratch", fresh)):
        start = ["--init", str(init / "checkpoint.pt")]
        pretrain(recipes[name], out / name, *start, *flags)


def write_fresh(like: Path, folder: Path, seed: int) -> None:
    """Write a checkpoint of the same shape with initial weights."""
    import torch

    from converters.reference import ReferenceOpenELM

    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(like / name, folder / name)
    torch.manual_seed(seed)
    model = ReferenceOpenELM(OpenELMConfig.from_file(folder / "config.json"))
    torch.save(model.state_dict(), folder / "checkpoint.pt")


def compare(out: Path) -> float:
    """Print the losses of a seed; return grown - scratch at the end."""
    small, grown, scratch = (read_curve(out / n) for n in ("small", "grown", "scratch"))
    cost, initial = small[-1]
    grown = [(0.0, initial), *grown]  # growing preserves the small model's function
    print("held-out nats per token\n  TFLOP  scratch    grown  difference")
    for (flops, theirs), (_, ours) in zip(scratch, grown[1:], strict=True):
        print(
            f"{flops / 1e12:7.1f}  {theirs:7.4f}  {ours:7.4f}  {ours - theirs:+10.4f}"
        )
    end, last = scratch[-1]
    print(f"the small model: {cost / 1e12:.1f} TFLOP, {initial:.4f}")
    reached = first_below(grown, last)
    if reached is None:
        print(f"the grown model never reaches {last:.4f}, the final loss of scratch")
    else:
        print(
            f"the grown model reaches {last:.4f}, the final loss of scratch, after "
            f"{reached / 1e12:.1f} of {end / 1e12:.1f} TFLOP: {ratio(end, reached)}; "
            f"including the small model's {(cost + reached) / 1e12:.1f}: "
            f"{ratio(end, cost + reached)}"
        )
    draw(out / "growing.png", small, grown, scratch)
    return grown[-1][1] - last


def read_curve(run_folder: Path) -> Curve:
    from converters.pretraining.plan import count_flops_per_token

    config = OpenELMConfig.from_file(run_folder / "config.json")
    recipe = json.loads((run_folder / "recipe.json").read_text())
    context = config.max_context_length
    step = count_flops_per_token(config, context) * recipe["batch_size"] * context
    return [(n * step, loss) for n, loss in sorted(read_scores(run_folder).items())]


def first_below(curve: Curve, loss: float) -> float | None:
    """Return the FLOPs at which a curve reaches a loss, interpolated, or None."""
    if curve[0][1] <= loss:
        return curve[0][0]
    for (x, before), (y, after) in pairwise(curve):
        if after <= loss:
            return x + (y - x) * (before - loss) / (before - after)
    return None


def ratio(more: float, less: float) -> str:
    return f"{more / less:.2f} times as fast" if less else "at once"


def draw(picture: Path, small: Curve, grown: Curve, scratch: Curve) -> None:
    cost = small[-1][0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axes, paid, title in (
        (left, 0.0, "without the small model's training"),
        (right, cost, "with the small model's training"),
    ):
        for label, curve, colour, start in (
            ("from scratch", scratch, "tab:gray", 0.0),
            ("grown", grown, "tab:green", paid),
        ):
            points = [((start + flops) / 1e12, loss) for flops, loss in curve]
            axes.plot(*zip(*points, strict=True), "o-", ms=3, c=colour, label=label)
        axes.set(xlabel="TFLOP of training", title=title)
        axes.grid(alpha=0.3)
    points = [(flops / 1e12, loss) for flops, loss in small]
    right.plot(*zip(*points, strict=True), "o--", ms=3, c="tab:blue", label="small")
    left.set_ylabel("held-out loss (nats per token)")
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    print(picture)


if __name__ == "__main__":
    main()
