"""Fine-tuning the demo model on the Oz books: LoRA, full, and mlx_lm.lora.

    python benchmarks/oz.py BOOKS [--steps 300] [--only lora,full,mlx-lm] [--out DIR]

BOOKS holds oz-01-*.txt to oz-14-*.txt. The last one is held out; the score is its mean
loss in nats per token, in windows of 256 tokens, computed in the same way for all.
mlx-lm gets the same windows as token ids, and the same rank, scale, keys, rate,
schedule and batch; it has no gradient clipping, and another order of batches.
"""

import argparse
import json
import time
from pathlib import Path

WINDOW, BATCH, RANK, SCALE, WARMUP = 256, 8, 32, 2.0, 10
RATES = {"lora": 5e-3, "full": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("books", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", default="lora,full,mlx-lm")
    parser.add_argument("--out", type=Path, default=Path("oz-runs"))
    args = parser.parse_args()
    books = sorted(args.books.glob("oz-*.txt"))
    data = args.out / "oz"
    data.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", books[:-1]), ("valid", books[-1:])):
        lines = (json.dumps({"text": book.read_text()}) + "\n" for book in chosen)
        (data / f"{name}.jsonl").write_text("".join(lines))
    print(
        f"held out: {books[-1].name}; {args.steps} steps of {BATCH} x {WINDOW} tokens"
    )
    for what in args.only.split(","):
        started = time.perf_counter()
        train = train_theirs if what == "mlx-lm" else train_ours
        before, after = train(what, data, args.out / what, args.steps)
        seconds = time.perf_counter() - started
        print(
            f"{what:8s} {before:.4f} -> {after:.4f}  gain {before - after:.4f} nats, "
            f"{seconds:.0f} s in all",
            flush=True,
        )


def make_recipe(what: str, data: Path, out: Path, steps: int):
    from mlx_openelm import FinetuneRecipe

    rate = RATES["full" if what == "full" else "lora"]
    return FinetuneRecipe(
        data=str(data),
        adapter_path=str(out),
        fine_tune_type="full" if what == "full" else "lora",
        rank=RANK,
        scale=SCALE,
        max_seq_length=WINDOW,
        iters=steps,
        batch_size=BATCH,
        learning_rate=rate,
        final_learning_rate=rate / 10,
        warmup_steps=WARMUP,
        val_batches=-1,
        steps_per_eval=steps,
        sample_prompt=("Dorothy looked at the Scarecrow and",),
    )


def train_ours(what: str, data: Path, out: Path, steps: int) -> tuple[float, float]:
    from mlx_openelm import finetune

    report = finetune(make_recipe(what, data, out, steps), force=True, offline=True)
    print(f"  {report.tokens} tokens in {report.seconds:.0f} s of training")
    return report.first_loss, report.last_loss


def train_theirs(what: str, data: Path, out: Path, steps: int) -> tuple[float, float]:
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    import mlx_openelm  # noqa: F401 - loads OpenBLAS, for mlx-lm too
    from mlx_openelm.finetuning.preparation import prepare
    from mlx_openelm.storage.hub import find_model

    prepared = prepare(make_recipe("lora", data, out, steps), offline=True)

    class Windows(list):
        def itemlen(self, i: int) -> int:
            return len(self[i][0])

    train_set, valid_set = (
        Windows((sample.tokens.tolist(), 0) for sample in samples)
        for samples in (prepared.train, prepared.valid)
    )
    mx.random.seed(0)
    model, _ = load(str(find_model("demo", offline=True)))
    model.set_dtype(mx.float32)

    def score() -> float:
        total = count = 0.0
        for sample in prepared.valid:
            logits = model(mx.array(sample.tokens[:-1])[None])[0]
            losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(
                logits, mx.array(sample.tokens[1:])[:, None], axis=-1
            ).squeeze(-1)
            total, count = total + losses.sum().item(), count + losses.size
        return total / count

    before = score()
    model.freeze()
    linear_to_lora_layers(
        model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    )
    recipe = prepared.recipe
    rates = optim.join_schedules(
        [
            optim.linear_schedule(0.0, recipe.learning_rate, WARMUP),
            optim.cosine_decay(
                recipe.learning_rate, steps - WARMUP, recipe.final_learning_rate
            ),
        ],
        [WARMUP],
    )
    optimizer = optim.AdamW(
        rates, list(recipe.betas), recipe.eps, 0.0, bias_correction=True
    )
    out.mkdir(parents=True, exist_ok=True)
    train(
        model,
        optimizer,
        train_set,
        val_dataset=valid_set,
        args=TrainingArgs(
            batch_size=BATCH,
            iters=steps,
            val_batches=0,
            steps_per_eval=10**9,
            steps_per_save=10**9,
            max_seq_length=WINDOW + 1,
            adapter_file=str(out / "adapters.safetensors"),
        ),
    )
    return before, score()


if __name__ == "__main__":
    main()
