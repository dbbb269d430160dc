"""Layer-wise scaling compared with uniform layers of equal parameters and FLOPs.

    python benchmarks/layerwise.py [--steps 600] [--seeds 0,1] [--out DIR]

Trains recipes/pretrain/layerwise/{uniform,layerwise}.yaml with each seed (with the same
seed both train on the same batches), prints the held-out losses and their difference,
and draws them. Both have the same peak learning rate, 3e-3 with AdamW.
"""

import argparse
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from pretraining_runs import pretrain, read_scores, refuse_other_tokenizers

from mlx_openelm.config import OpenELMConfig

RECIPES = Path(__file__).parent.parent / "recipes/pretrain/layerwise"
COLOURS = {"uniform": "tab:gray", "layerwise": "tab:blue"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path, default=Path("pretrained/scaling"))
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    steps = [] if args.steps is None else ["--steps", str(args.steps)]
    folders = {
        (name, seed): args.out / f"{name}-{seed}" for seed in seeds for name in COLOURS
    }
    for (name, seed), folder in folders.items():
        pretrain(RECIPES / f"{name}.yaml", folder, "--seed", str(seed), *steps)
    refuse_other_tokenizers(list(folders.values()))
    print_table(folders, seeds)
    draw(folders, args.out / "layerwise.png")


def print_table(folders: dict[tuple[str, int], Path], seeds: list[int]) -> None:
    for name in COLOURS:
        config = OpenELMConfig.from_file(folders[name, seeds[0]] / "config.json")
        print(
            f"{name:10s} {config.num_parameters:,} parameters; in all layers "
            f"{sum(config.num_query_heads)} heads, {sum(config.ffn_dims)} FFN columns"
        )
    print("\nheld-out nats per token\nseed  step  uniform  layerwise  difference")
    last = []
    for seed in seeds:
        uniform, layerwise = (read_scores(folders[name, seed]) for name in COLOURS)
        for step in sorted(uniform.keys() & layerwise.keys()):
            difference = layerwise[step] - uniform[step]
            print(
                f"{seed:4d} {step:5d}  {uniform[step]:7.4f}  {layerwise[step]:9.4f}  "
                f"{difference:+10.4f}"
            )
        last.append(difference)
    print(
        f"\nlayerwise - uniform at the end: {statistics.mean(last):+.4f} "
        f"({', '.join(f'{d:+.4f}' for d in last)}); below 0, layer-wise is better"
    )


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
        title="Layer-wise scaling against uniform layers, 2.4 M parameters",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    print(picture)


if __name__ == "__main__":
    main()
