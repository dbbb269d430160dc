"""What learned scales and quantization-aware adapters recover, on held-out text.

    python benchmarks/learned_quantization.py --text FILE --heldout FILE [--steps 1000]
        [--only 4-bit,3-bit,auto,aware,memory] [--adapt FILE] [--tokenizer FILE]

4-bit, 3-bit   the demo model, rounded and learned: mean KL from the unquantized model
auto           auto:4.5 learned, and the best uniform bits in the same bytes, learned
aware          the share of an adapter's gain that is kept when it is fused to few bits,
               with and without --quantize-aware, on the last tenth of --adapt
memory         peak memory of a step at the shape of the 270M, with random weights;
               --tokenizer is one of 32000 pieces

A step learns from 512 tokens of --text, which must not have the held-out books.
"""

import argparse
import dataclasses
import gc
import json
import tempfile
import time
from pathlib import Path

TOKENS = 8192  # of the held-out text
GAIN_STEPS, WINDOW = 150, 256  # of the adapters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--adapt", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--only", default="4-bit,3-bit,auto,aware,memory")
    options = parser.parse_args()
    parts = {
        "4-bit": lambda folder: compare_learned(options, folder, 4),
        "3-bit": lambda folder: compare_learned(options, folder, 3),
        "auto": lambda folder: compare_auto(options, folder),
        "aware": lambda folder: compare_aware(options, folder),
        "memory": lambda folder: compare_memory(options, folder),
    }
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder))


# Learned scales --------------------------------------------------------------------


def compare_learned(options, folder: Path, bits: int) -> None:
    rounded = quantize(options, folder / "rounded", None, bits=bits)
    learned = quantize(options, folder / "learned", options.steps, bits=bits)
    show(f"{bits} bits", rounded, learned)


def compare_auto(options, folder: Path) -> None:
    auto = [
        quantize(options, folder / f"auto-{steps}", steps, bits="auto:4.5")
        for steps in (None, options.steps)
    ]
    show("auto:4.5", *auto)
    uniform = []
    for bits in (3, 4):
        for embed_bits in (2, 3, 4, 5, 6, 8):
            chosen = {"bits": bits, "embed_bits": embed_bits}
            target = folder / f"uniform-{bits}-{embed_bits}"
            measured = quantize(options, target, None, **chosen)
            if measured["bits_per_weight"] <= auto[0]["bits_per_weight"]:
                uniform.append((measured["kl"], chosen, measured))
    _, chosen, rounded = min(uniform, key=lambda entry: entry[0])
    learned = quantize(options, folder / "best-learned", options.steps, **chosen)
    name = f"{chosen['bits']} bits, embedding {chosen['embed_bits']}"
    show(name, rounded, learned)
    print(f"  auto / uniform, learned: {auto[1]['kl'] / learned['kl']:.2f} of its KL")


def quantize(options, target: Path, steps: int | None, **chosen) -> dict[str, float]:
    """Convert the demo model; return the figures on the held-out text."""
    from converters.conversion.run import convert

    started = time.process_time()
    report = convert(
        "demo",
        target,
        learn=steps and f"{steps}steps",
        calibration=str(options.text),
        receipt=False,
        **chosen,
    )
    seconds = time.process_time() - started
    return measure(target, options.heldout) | {
        "bits_per_weight": report.bits_per_weight,
        "seconds": seconds,
        "tokens": report.learned.learned_tokens if report.learned else 0,
    }


def measure(folder: Path, heldout: Path) -> dict[str, float]:
    from converters.formats.sources import open_path, open_source
    from converters.quantization.calibration import (
        calibration_windows,
        read_calibration,
    )
    from converters.quantization.receipt import measure_quantization
    from mlx_openelm.storage.loading import load_tokenizer
    from mlx_openelm.storage.model_folder import open_folder

    original, written = open_source("demo"), open_path(folder)
    tokenizer = load_tokenizer(open_folder(folder))
    windows = calibration_windows(
        tokenizer, read_calibration(heldout)[1], original.config, num_tokens=TOKENS
    )
    receipt = measure_quantization(
        original.config,
        lambda name: original.tensors[name].read(),
        lambda name: written.tensors[name].read(),
        windows,
        text="",
        bits_per_weight=0,
    )
    return {"kl": receipt.mean_kl, "top1": receipt.top1_agreement}


def show(name: str, rounded: dict[str, float], learned: dict[str, float]) -> None:
    recovered = f"{1 - learned['kl'] / rounded['kl']:.0%} recovered"
    print(
        f"{name:22} {rounded['bits_per_weight']:.2f} bits/weight  KL "
        f"{rounded['kl']:.4f} -> {learned['kl']:.4f} ({recovered})  "
        f"top-1 {rounded['top1']:.1%} -> {learned['top1']:.1%}  "
        f"{learned['tokens']:,} tokens, {learned['seconds']:.0f} CPU-seconds",
        flush=True,
    )


# Quantization-aware adapters -------------------------------------------------------


def compare_aware(options, folder: Path) -> None:
    from converters.conversion.fusing import FusionProof, fuse
    from mlx_openelm import finetune, load
    from mlx_openelm.finetuning.recipe import FinetuneRecipe

    data = folder / "data"
    data.mkdir()
    lines = (options.adapt or options.text).read_text().split("\n")
    cut = len(lines) * 9 // 10
    for name, part in (("train", lines[:cut]), ("valid", lines[cut:])):
        record = json.dumps({"text": "\n".join(part)})
        (data / f"{name}.jsonl").write_text(record + "\n")
    text = folder / "valid.txt"
    text.write_text("\n".join(lines[cut:]))
    base = loss_on(*load("demo"), text)
    FusionProof.lost = property(lambda self: False)  # also where it would refuse
    recipe = FinetuneRecipe(
        data=str(data),
        max_seq_length=WINDOW,
        iters=min(GAIN_STEPS, options.steps),
        batch_size=4,
        learning_rate=3e-3,
        val_batches=4,
    )
    for bits in (4, 3):
        for aware in (None, bits):
            path = folder / f"{bits}-{aware}"
            run = dataclasses.replace(
                recipe, adapter_path=str(path), quantize_aware=aware
            )
            finetune(run, offline=True)
            fuse(path, folder / f"fused-{bits}-{aware}", bits=bits)
            tuned = loss_on(*load(None, path), text)
            fused = loss_on(*load(folder / f"fused-{bits}-{aware}"), text)
            print(
                f"{bits} bits, quantize_aware {aware}: base {base:.4f}, with adapter "
                f"{tuned:.4f}, fused {fused:.4f}; gain kept {base - fused:.4f} nats",
                flush=True,
            )


def loss_on(model, tokenizer, text: Path) -> float:
    from mlx_openelm import evaluate

    return evaluate(model, tokenizer, text=text, window=WINDOW).nats_per_token


# Memory ----------------------------------------------------------------------------


def compare_memory(options, folder: Path) -> None:
    import mlx_openelm  # noqa: F401 - loads OpenBLAS, before mlx.core is imported

    # isort: split
    import mlx.core as mx

    from converters.conversion.run import convert
    from mlx_openelm import finetune
    from mlx_openelm.config import OpenELMConfig
    from mlx_openelm.finetuning.recipe import FinetuneRecipe
    from mlx_openelm.storage.shards import write_json
    from mlx_openelm.tensor_names import to_folder

    config = dataclasses.replace(OpenELMConfig.preset("270M"), vocab_size=32000)
    source = folder / "source"
    source.mkdir()
    arrays = {}
    for i, (name, shape) in enumerate(config.tensor_shapes().items()):
        normal = 0.02 * mx.random.normal(shape, key=mx.random.key(i))
        weight = mx.ones(shape) if len(shape) == 1 else normal
        arrays[to_folder(name)] = weight.astype(mx.bfloat16)
    mx.save_safetensors(str(source / "model.safetensors"), arrays, {"format": "pt"})
    write_json(source / "config.json", config.to_dict())
    (source / "tokenizer.model").write_bytes(options.tokenizer.read_bytes())
    del arrays
    text = folder / "text.txt"
    text.write_text(options.text.read_text()[:6000])
    record = json.dumps({"text": options.text.read_text()[:20000]})
    (folder / "train.jsonl").write_text(f"{record}\n{record}\n")
    recipe = FinetuneRecipe(
        data=str(folder / "train.jsonl"),
        model=str(source),
        adapter_path=str(folder / "full"),
        fine_tune_type="full",
        max_seq_length=256,
        batch_size=2,
        iters=1,
        val_batches=1,
    )
    full = finetune(recipe, offline=True).peak_memory_bytes
    print(f"full fine-tuning, 2 x 256 tokens: {full / 1e9:.2f} GB", flush=True)
    cached = {"teacher_cache": folder / "cache"}
    for name, chosen in (
        ("teacher in memory", {}),
        ("teacher of 8 bits in memory", {"teacher_bits": 8}),
        ("outputs of the teacher computed and cached", cached),
        ("outputs of the teacher read from the cache", cached),
    ):
        gc.collect()  # the run of fine-tuning, which has cycles
        mx.clear_cache()
        mx.reset_peak_memory()
        started = time.process_time()
        convert(
            source,
            folder / "learned",
            bits=4,
            learn="1steps",
            calibration=str(text),
            receipt=False,
            force=True,
            **chosen,
        )
        peak, seconds = mx.get_peak_memory(), time.process_time() - started
        print(
            f"learning, {name}: {peak / 1e9:.2f} GB, {peak / full:.2f} of it, "
            f"{seconds:.0f} CPU-seconds",
            flush=True,
        )


if __name__ == "__main__":
    main()
