"""Peak memory of training with the operations for a GPU, without a GPU.

    python benchmarks/training_memory.py [--sequences 4] [--tokens 2048] [--layers 2]
    python benchmarks/training_memory.py --update [...]

In float32, with the widths of the middle layers of the 270M: of attention, forward and
backward, in parts and not; or of an update of LoRA, with the memory that `lora
--dry-run` plans. As in Metal's training, attention is not fused on the CPU. The update
is compiled, for which the first run calls the C++ compiler for minutes.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["MLX_OPENELM_GPU_PATH"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

from trainings import make_recipe, make_samples, make_training, planned_memory

import mlx.core as mx  # isort: skip

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.finetuning.preparation import make_trainable
from mlx_openelm.model import token_layout
from mlx_openelm.model.joined_heads import Heads
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.token_layout import PaddedSequences
from mlx_openelm.signals import Stop


def middle_layers(count: int) -> OpenELMConfig:
    config = OpenELMConfig.preset("270M")
    first = (config.num_transformer_layers - count) // 2
    per_layer = ("num_query_heads", "num_kv_heads", "ffn_dims")
    widths = {name: getattr(config, name)[first:][:count] for name in per_layer}
    return replace(config, **widths)


def attention_peak(config: OpenELMConfig, sequences: int, tokens: int) -> int:
    """Return the peak memory of the attention of all layers with their gradients."""
    count = sequences * tokens
    places = mx.arange(count)
    layout = PaddedSequences(
        places % tokens,
        places,
        places.reshape(sequences, tokens),
        mx.broadcast_to(mx.arange(sequences)[:, None], (sequences, tokens)),
    )
    layers = list(zip(config.num_query_heads, config.num_kv_heads, strict=True))
    shapes = [(1, Q + 2 * K, count, config.head_dim) for Q, K in layers]
    inputs = [mx.random.normal(shape) for shape in shapes]
    mx.eval(inputs)

    def total(inputs: list[mx.array]) -> mx.array:
        sums, previous = [], mx.zeros(())
        for x, (Q, _) in zip(inputs, layers, strict=True):  # one after another
            heads = Heads.of(x + previous, Q)
            sums.append(mx.square(layout.attend(heads, None)).sum())
            previous = 1e-9 * sums[-1]
        return mx.stack(sums).sum()

    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(total)(inputs))
    return mx.get_peak_memory() - before


def update_peak(config: OpenELMConfig, sequences: int, tokens: int) -> tuple[int, int]:
    """Return the planned and the measured peak memory of an update of LoRA."""
    recipe = make_recipe(
        rank=8,
        batch_size=sequences,
        grad_accumulation_steps=1,
        max_seq_length=tokens,
    )
    before = mx.get_active_memory()
    model = OpenELM(config)
    make_trainable(model, recipe)
    mx.eval(model.parameters())
    samples = make_samples((tokens - 1,) * sequences, config.vocab_size)
    training = make_training(recipe, samples, model)
    training.trainer.update(Stop())  # compiles
    mx.reset_peak_memory()
    training.trainer.update(Stop())
    measured = mx.get_peak_memory() - before
    return planned_memory(training, samples), measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args()
    config = middle_layers(options.layers)
    size = options.sequences, options.tokens
    print(f"{options.layers} layers, {size[0]} x {size[1]} tokens, float32")
    if options.update:
        planned, peak = update_peak(config, *size)
        print(f"update: planned {planned / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB")
        return
    for name, scores in (("in parts", token_layout.SCORES_AT_ONCE), ("at once", 2**60)):
        token_layout.SCORES_AT_ONCE = scores
        peak = attention_peak(config, *size)
        print(f"attention {name}: {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
