"""One measurement of `bench --against`, in a process of its own; prints JSON.

    python -m mlx_openelm.bench.against_worker ENGINE STEP JSON

Both engines get the same weights, token ids and dtype, and on Linux the same BLAS.
mlx-lm is imported here alone, when it is measured.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_openelm.device import compute_dtype, takes_gpu_path
from mlx_openelm.input_files import parse_json
from mlx_openelm.storage.loading import load_model, stored_dtype
from mlx_openelm.storage.model_folder import ModelFolder, open_folder

OURS, THEIRS = "mlx-openelm", "mlx-lm"
RANK, BATCH, RATE = 8, 4, 1e-4


def main(arguments: list[str]) -> None:
    """Measure, and write the result to stdout."""
    engine, step, text = arguments
    options = parse_json(text)
    folder = open_folder(Path(options.pop("model")))
    steps: dict[str, Callable[..., dict[str, float]]]
    steps = {"decode": _decode, "train": _train}
    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints a table
        result = steps[step](engine, folder, **options)
    os.write(1, json.dumps(result).encode())


def _decode(
    engine: str, folder: ModelFolder, prompt_tokens: int, new_tokens: int
) -> dict[str, float]:
    """Return tokens per second of prompt and generation."""
    ids = [3 + 7919 * n % (folder.config.vocab_size - 3) for n in range(prompt_tokens)]
    generate = (_our_tokens if engine == OURS else _their_tokens)(folder)
    list(generate(ids, min(new_tokens, 4)))  # compiles
    started = time.perf_counter()
    times = [time.perf_counter() for _ in generate(ids, new_tokens)]
    return {
        "prompt": prompt_tokens / (times[0] - started),
        "decode": (len(times) - 1) / (times[-1] - times[0]),
    }


Generate = Callable[[list[int], int], Iterable[Any]]


def _our_tokens(folder: ModelFolder) -> Generate:
    from mlx_openelm.generation.decoding import Context, draw_tokens
    from mlx_openelm.generation.options import Sampling
    from mlx_openelm.tuning import start_tuned

    model, tuning = load_model(folder), start_tuned()

    def generate(ids: list[int], count: int) -> Iterable[Any]:
        context = Context(model, tuning=tuning)
        return draw_tokens(model, ids, Sampling(), count, context=context)

    return generate


def _their_tokens(folder: ModelFolder) -> Generate:
    from mlx_lm.generate import generate_step

    model = _load_theirs(folder)
    return lambda ids, count: generate_step(mx.array(ids), model, max_tokens=count)


def _load_theirs(folder: ModelFolder) -> Any:
    """Return mlx-lm's model in the dtype in which ours computes."""
    from mlx_lm.utils import dequantize_model, load_model

    model, _ = load_model(folder.path)
    stored = stored_dtype(folder)
    dtype = compute_dtype(stored)
    if dtype != stored:
        model = dequantize_model(model)
        floats = {mx.float16, mx.bfloat16}
        model.update(
            tree_map(
                lambda a: a.astype(dtype) if a.dtype in floats else a,
                model.parameters(),
            )
        )
    mx.eval(model.parameters())
    return model


def _train(engine: str, folder: ModelFolder, steps: int) -> dict[str, float]:
    """Return LoRA's tokens per second that count in the loss, and the peak memory."""
    numbers = np.random.default_rng(0)
    samples = [
        numbers.integers(3, folder.config.vocab_size, int(length)).astype(np.int32)
        for length in numbers.integers(24, 120, BATCH * steps)
    ]
    warm = steps // 3
    rates = (_train_ours if engine == OURS else _train_theirs)(folder, samples, steps)
    return {"train": sum(t for _, t in rates[warm:]) / sum(s for s, _ in rates[warm:])}


def _train_ours(
    folder: ModelFolder, samples: list[Any], steps: int
) -> list[tuple[float, int]]:
    """Return seconds and tokens of each step."""
    from mlx_openelm.bench.training import make_update
    from mlx_openelm.finetuning.recipe import FinetuneRecipe
    from mlx_openelm.finetuning.samples import Sample

    recipe = FinetuneRecipe(data="none", rank=RANK)
    wrapped = [Sample(s, np.arange(len(s)) > 0, str(i)) for i, s in enumerate(samples)]
    parts = [wrapped[i : i + BATCH] for i in range(0, len(wrapped), BATCH)]
    update, _ = make_update(
        load_model(folder), recipe, parts, compiled=takes_gpu_path()
    )
    rates = []
    for part in parts:
        started = time.perf_counter()
        count = update(part, RATE)
        rates.append((time.perf_counter() - started, count))
    return rates


def _train_theirs(
    folder: ModelFolder, samples: list[Any], steps: int
) -> list[tuple[float, int]]:
    import tempfile

    import mlx.optimizers as optim
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = _load_theirs(folder)
    model.freeze()
    config = {"rank": RANK, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), config)
    rates: list[tuple[float, int]] = []
    trained = 0

    class Collect(TrainingCallback):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            nonlocal trained
            # A padding token of each sequence counts there, too.
            count = info["trained_tokens"] - trained - BATCH
            trained = info["trained_tokens"]
            rates.append((1 / info["iterations_per_second"], count))

    with tempfile.TemporaryDirectory() as out:
        train(
            model,
            optim.AdamW(RATE),
            [(s.tolist(), 0) for s in samples],
            args=TrainingArgs(
                batch_size=BATCH,
                iters=steps,
                steps_per_report=1,
                steps_per_save=steps,
                adapter_file=str(Path(out) / "adapters.safetensors"),
            ),
            training_callback=Collect(),
        )
    return rates


if __name__ == "__main__":
    main(sys.argv[1:])
