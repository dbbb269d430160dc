"""Learned scales of a conversion: builds both models and trains in staging."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from converters.conversion.plan import ConversionPlan
from converters.quantization.calibration import LearningWindows
from converters.quantization.learning import LearningRecord, OnStep, ScaleLearner
from converters.quantization.learning_amount import LearningAmount
from mlx_openelm.device import compute_dtype
from mlx_openelm.model.learned_scales import (
    LearnedEmbedding,
    LearnedLinear,
    LearnedScales,
)
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.packed_weights import pack_weight
from mlx_openelm.model.quantization import Packing
from mlx_openelm.tensor_names import to_module


def learn_scales(
    plan: ConversionPlan,
    windows: LearningWindows,
    amount: LearningAmount,
    *,
    text: str,
    folder: Path,
    seed: int,
    teacher_bits: int | None,
    on_step: OnStep,
) -> tuple[ConversionPlan, LearningRecord]:
    """Return the plan with trained scales and biases, and what was measured.

    Args:
        text: name of the text.
        folder: of the state.
        teacher_bits: keep the teacher packed in memory, with this number of bits, and
            recompute activations in the backward pass.

    Raises:
        OpenELMError: a tensor or the divergence is not finite.
    """
    student = _build(plan, plan.packings, plan.read, plan.packed_parts)
    student.transformer.checkpointed = teacher_bits is not None
    learner = ScaleLearner(
        student,
        _build_teacher(plan, teacher_bits),
        windows,
        folder,
        seed=seed,
        on_step=on_step,
    )
    record = learner.learn(amount, text)
    if not record.best_step:
        return plan, record
    layers = dict(student.named_modules())
    learned = {}
    for name in plan.packings:
        layer = layers[to_module(name)]
        assert isinstance(layer, LearnedScales)
        learned[name] = layer.stored_parts()
    mx.eval(learned)
    return replace(plan, learned=learned), record


def _build_teacher(plan: ConversionPlan, bits: int | None) -> OpenELM:
    if bits is None:
        return _build(plan, {}, plan.read_whole, plan.packed_parts)
    packings = {n: Packing(bits, p.group_size) for n, p in plan.packings.items()}

    def pack(name: str) -> dict[str, mx.array]:
        return pack_weight(packings[name], plan.read_whole(name).astype(plan.dtype))

    return _build(plan, packings, plan.read_whole, pack)


def _build(
    plan: ConversionPlan,
    packings: Mapping[str, Packing],
    read: Callable[[str], mx.array],
    read_parts: Callable[[str], Mapping[str, mx.array]],
) -> OpenELM:
    """Return a model whose packed tensors have the layers of `learned_scales`.

    Args:
        read: CoreNet name -> weight.
        read_parts: CoreNet name -> parts of a packed weight, by suffix.
    """
    dtype, model = compute_dtype(plan.dtype), OpenELM(plan.config)
    layers = dict(model.named_modules())
    packed, plain = [], []
    for name in plan.config.tensor_shapes():
        path = to_module(name)
        if name in packings:
            embeds = isinstance(layers[path], nn.Embedding)
            kind = LearnedEmbedding if embeds else LearnedLinear
            packed.append((path, kind(packings[name], read_parts(name), dtype)))
        else:
            plain.append((f"{path}.weight", read(name).astype(dtype)))
    model.update_modules(tree_unflatten(packed))
    model.load_weights(plain, strict=False)
    model.eval()
    mx.eval(model.parameters())
    return model
