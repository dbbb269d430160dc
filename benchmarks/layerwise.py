"""Layer-wise scaling and its shapes compared with uniform layers at equal cost.

    python benchmarks/layerwise.py [--steps 600] [--seeds 0,1] [--large] [--bf16]
        [--out DIR]

Trains recipes/pretrain/layerwise/{uniform,layerwise,reverse,crown,frame}.yaml with each
seed (with the same seed all train on the same batches), prints the held-out losses and
their differences from the uniform layers, and draws them. All have the same numbers of
parameters and FLOPs, and the same peak learning rate, 3e-3 with AdamW. --large doubles
model_dim (10 million parameters); twice the tokens are --steps 1200. --bf16 trains all
with torch.autocast, for processors that multiply bfloat16.
"""

import argparse
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from pretraining_runs import (
    derive,
    pretrain,
    read_scores,
    refuse_other_tokenizers,
)

from mlx_openelm.config import OpenELMConfig

RECIPES = Path(__file__).parent.parent / "recipes/pretrain/layerwise"
COLOURS = {
    "uniform": "tab:gray",
    "layerwise": "tab:blue",
    "reverse": "tab:orange",
    "crown": "tab:green",
    "frame": "tab:red",
}
LARGE = {"model": {"model_dim": 256, "head_dim": 32, "num_layers": 14}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--large", action="store_true", help="10 million parameters")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--names", default=",".join(COLOURS), help="recipes to train")
    parser.add_argument("--out", type=Path, default=Path("pretrained/scaling"))
    args = parser.parse_args()
    names = args.names.split(",")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    steps = [] if args.steps is None else ["--steps", str(args.steps)]
    folders = {
        (name, seed): args.out / f"{name}-{seed}" for seed in seeds for name in names
    }
    for (name, seed), folder in folders.items():
        changes = {"bf16": args.bf16, **(LARGE if args.large else {})}
        recipe = derive(RECIPES / f"{name}.yaml", args.out / f"{name}.yaml", changes)
        pretrain(recipe, folder, "--seed", str(seed), *steps)
    refuse_other_tokenizers(list(folders.values()))
    print_table(folders, names, seeds)
    draw(folders, args.out / "layerwise.png")


def print_table(
    folders: dict[tuple[str, int], Path], names: list[str], seeds: list[int]
) -> None:
    for name in names:
        config = OpenELMConfig.from_file(folders[name, seeds[0]] / "config.json")
        print(
            f"{name:10s} {config.num_parameters:,} parameters; in all layers "
            f"{sum(config.num_query_heads)} heads, {sum(config.ffn_dims)} FFN columns"
        )
    first, *others = names
    print("\nheld-out nats per token, and differences from the first")
    print("seed   step  " + "  ".join(f"{name:>9s}" for name in names))
    last: dict[str, list[float]] = {name: [] for name in others}
    for seed in seeds:
        scores = {name: read_scores(folders[name, seed]) for name in names}
        for step in sorted(scores[first]):
            losses = [scores[name][step] for name in names]
            differences = [loss - losses[0] for loss in losses[1:]]
            shown = [f"{losses[0]:9.4f}", *(f"{d:+9.4f}" for d in differences)]
            print(f"{seed:4d}  {step:5d}  " + "  ".join(shown))
        for name, difference in zip(others, differences, strict=True):
            last[name].append(difference)
    print(f"\nat the end, mean over the seeds; below 0 is better than {first}")
    for name, found in last.items():
        listed = ", ".join(f"{d:+.4f}" for d in found)
        print(f"{name:10s} {statistics.mean(found):+.4f} ({listed})")


def draw(folders: dict[tuple[str, int], Path], picture: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    for (name, seed), folder in folders.items():
        scores = sorted(read_scores(folder).items())
        style = "o-" if seed == min(s for _, s in folders) else "o--"
        label = f"{name}, seed {seed}"
        axes.plot(*zip(*scores, strict=True), style, ms=3, c=COLOURS[name], label=label)
    axes.set(
        xlabel="step (4096 tokens)",
        ylabel="held-out loss (nats per token)",
        title="Layer-wise scaling against uniform layers",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    print(picture)


if __name__ == "__main__":
    main()
