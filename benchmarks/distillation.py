"""A student of a third of the demo's size, distilled from the demo or trained plainly.

    python benchmarks/distillation.py BOOKS [--pretrain-steps 600] [--steps 600]
        [--seeds 0,1] [--weight 0.5] [--temperature 1] [--bf16] [--out DIR]

BOOKS is a folder of texts; the two held-out books of the demo are not trained on. For
each seed: the student is pre-trained (PyTorch) with the demo's tokenizer, and then both
runs continue from it with --fine-tune-type full, on the same samples in the same order.
Prints nats per token on the held-out books. --bf16 pre-trains with torch.autocast, for
processors that multiply bfloat16.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from pretraining_runs import pretrain

HELDOUT = ("lang-lilac-fairy-book", "macdonald-princess-and-curdie")
WINDOW, BATCH = 256, 8
CHARACTERS = 250_000  # of each held-out book
RECIPE = """
output: unused
model:
  num_layers: 6
  model_dim: 160
  head_dim: 32
  num_gqa_groups: 1
  qkv_multipliers: [0.5, 1.0]
  ffn_multipliers: [0.5, 4.0]
  ffn_dim_divisor: 32
  max_context_length: 256
tokenizer:
  path: {tokenizer}
data:
  train: ["{books}/*.txt"]
  exclude: ["oz-*.txt", {excluded}]
  heldout: [{heldout}]
  packing: true
optimizer:
  name: adamw
  learning_rate: 3.0e-3
  final_learning_rate: 1.0e-3
  warmup_steps: 50
steps: {steps}
batch_size: 16
compile: true
bf16: {bf16}
report_every: 10
eval_every: {steps}
save_every: 100
keep_last: 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("books", type=Path)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--weight", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("distilled"))
    args = parser.parse_args()
    data, heldout = write_data(args.books, args.out)
    for seed in args.seeds.split(","):
        student = make_student(args, int(seed))
        scores = {"start": score(student, None, heldout)}
        for objective in ("sft", "distill"):
            adapter = train(args, student, data, int(seed), objective)
            scores[objective] = score(student, adapter, heldout)
        gain = scores["sft"] - scores["distill"]
        figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        print(f"seed {seed}: {figures}; gain {gain:.4f} nats a token", flush=True)


def write_data(books: Path, out: Path) -> tuple[Path, list[Path]]:
    """Write records of the training books, and the held-out texts."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    chosen = [
        book
        for book in sorted(books.glob("*.txt"))
        if book.stem not in HELDOUT and not book.stem.startswith("oz-")
    ]
    lines = (json.dumps({"text": book.read_text()}) + "\n" for book in chosen)
    (data / "train.jsonl").write_text("".join(lines))
    heldout = []
    for name in HELDOUT:
        heldout.append(out / f"{name}.txt")
        heldout[-1].write_text((books / f"{name}.txt").read_text()[:CHARACTERS])
    (data / "valid.jsonl").write_text(
        json.dumps({"text": heldout[0].read_text()[:20000]}) + "\n"
    )
    return data, heldout


def make_student(args, seed: int) -> Path:
    from converters.conversion.run import convert
    from mlx_openelm.storage.hub import demo_folder

    recipe, folder = args.out / "student.yaml", args.out / f"student-{seed}"
    books = args.books.absolute()
    recipe.write_text(
        RECIPE.format(
            tokenizer=demo_folder() / "tokenizer.model",
            books=books,
            excluded=", ".join(f'"{name}.txt"' for name in HELDOUT),
            heldout=", ".join(f'"{books}/{name}.txt"' for name in HELDOUT),
            steps=args.pretrain_steps,
            bf16=str(args.bf16).lower(),
        )
    )
    weights = pretrain(recipe, args.out / f"pretrained-{seed}", "--seed", str(seed))
    if not folder.exists():
        convert(weights, folder, dtype="float32")
    return folder


def train(args, student: Path, data: Path, seed: int, objective: str) -> Path:
    from mlx_openelm import finetune
    from mlx_openelm.finetuning.recipe import FinetuneRecipe

    path = args.out / f"{objective}-{seed}"
    recipe = FinetuneRecipe(
        data=str(data),
        model=str(student),
        adapter_path=str(path),
        fine_tune_type="full",
        max_seq_length=WINDOW,
        iters=args.steps,
        batch_size=BATCH,
        learning_rate=1e-3,
        val_batches=4,
        steps_per_eval=args.steps,
        seed=seed,
    )
    if objective == "distill":
        recipe = dataclasses.replace(
            recipe,
            objective="distill",
            teacher="demo",
            distill_weight=args.weight,
            temperature=args.temperature,
        )
    finetune(recipe, offline=True, force=True)
    return path


def score(student: Path, adapter: Path | None, texts: list[Path]) -> float:
    """Return the mean nats per token of the held-out texts."""
    from mlx_openelm import evaluate, load

    model, tokenizer = load(student, adapter)
    results = [evaluate(model, tokenizer, text=text, window=WINDOW) for text in texts]
    tokens = sum(result.tokens for result in results)
    return sum(result.nats_per_token * result.tokens for result in results) / tokens


if __name__ == "__main__":
    main()
