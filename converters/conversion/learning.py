"""Learned scales of a conversion: builds both models and trains in staging."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from converters.conversion.plan import ConversionPlan
from converters.quantization.calibration import LearningWindows
from converters.quantization.learning import LearningRecord, OnStep, ScaleLearner
from converters.quantization.learning_amount import LearningAmount
from converters.quantization.teachers import CachedTeacher, LoadedTeacher, Teacher
from mlx_openelm.device import compute_dtype
from mlx_openelm.model.fingerprint import fingerprint_arrays
from mlx_openelm.model.head_divergence import head_of
from mlx_openelm.model.learned_scales import (
    LearnedEmbedding,
    LearnedLinear,
    LearnedScales,
)
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.packed_weights import pack_weight
from mlx_openelm.model.quantization import Packing
from mlx_openelm.tensor_names import EMBEDDING, HEAD, to_module


@dataclass(frozen=True, slots=True)
class LearningOptions:
    """How scales are learned, and from which teacher.

    Attributes:
        seed: determines the order of the windows.
        teacher_bits: the teacher is packed with this number of bits; then activations
            are recomputed in the backward pass, for less memory.
        teacher_cache: folder in which the teacher's outputs are kept; then it is not in
            memory while scales are learned.
    """

    amount: LearningAmount
    seed: int
    teacher_bits: int | None
    teacher_cache: Path | None


def learn_scales(
    plan: ConversionPlan,
    windows: LearningWindows,
    options: LearningOptions,
    *,
    text: str,
    folder: Path,
    on_step: OnStep,
    on_cached: Callable[[int, int], None],
) -> tuple[ConversionPlan, LearningRecord]:
    """Return the plan with trained scales and biases, and what was measured.

    Args:
        text: name of the text.
        folder: of the state.
        on_cached: receives the windows that the cache has, of those that it lacked.

    Raises:
        OpenELMError: a tensor or the divergence is not finite, or the cache belongs to
            other windows or another teacher.
    """
    teacher = _open_teacher(plan, windows, options, on_cached)
    student = _build(plan, plan.packings, plan.read, plan.packed_parts)
    student.transformer.checkpointed = options.teacher_bits is not None
    learner = ScaleLearner(
        student, teacher, windows, folder, seed=options.seed, on_step=on_step
    )
    record = learner.learn(options.amount, text)
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


def _open_teacher(
    plan: ConversionPlan,
    windows: LearningWindows,
    options: LearningOptions,
    on_cached: Callable[[int, int], None],
) -> Teacher:
    bits = options.teacher_bits
    if options.teacher_cache is None:
        return LoadedTeacher(_build_teacher(plan, bits))
    tied = plan.config.share_input_output_layers
    head = _build_teacher(plan, bits, [EMBEDDING if tied else HEAD])
    parts = (windows.learn, windows.choose, windows.report)
    return CachedTeacher(
        options.teacher_cache,
        {
            "teacher": _fingerprint(plan, bits),
            "data": hashlib.sha256(b"".join(map(_as_bytes, parts))).hexdigest(),
            "teacher_bits": bits,
        },
        width=plan.config.model_dim,
        head=head_of(head),
        load=lambda: _build_teacher(plan, bits),
        on_progress=on_cached,
    )


def _as_bytes(tokens: mx.array) -> bytes:
    return np.array(tokens).astype("<i4").tobytes()


def _fingerprint(plan: ConversionPlan, bits: int | None) -> str:
    """Return a fingerprint of a teacher; one tensor is read at a time."""
    packings = _teacher_packings(plan, bits)
    texts = [repr(plan.config), str(compute_dtype(plan.dtype)), repr(packings)]
    for name in plan.config.tensor_shapes():
        texts.append(fingerprint_arrays({name: plan.read_whole(name)}))
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _teacher_packings(plan: ConversionPlan, bits: int | None) -> dict[str, Packing]:
    if bits is None:
        return {}
    return {n: Packing(bits, p.group_size) for n, p in plan.packings.items()}


def _build_teacher(
    plan: ConversionPlan, bits: int | None, names: Collection[str] | None = None
) -> OpenELM:
    packings = _teacher_packings(plan, bits)

    def pack(name: str) -> dict[str, mx.array]:
        return pack_weight(packings[name], plan.read_whole(name).astype(plan.dtype))

    return _build(plan, packings, plan.read_whole, pack, names)


def _build(
    plan: ConversionPlan,
    packings: Mapping[str, Packing],
    read: Callable[[str], mx.array],
    read_parts: Callable[[str], Mapping[str, mx.array]],
    names: Collection[str] | None = None,
) -> OpenELM:
    """Return a model whose packed tensors have the layers of `learned_scales`.

    Args:
        read: CoreNet name -> weight.
        read_parts: CoreNet name -> parts of a packed weight, by suffix.
        names: the tensors to read (CoreNet names); None: all.
    """
    dtype, model = compute_dtype(plan.dtype), OpenELM(plan.config)
    layers = dict(model.named_modules())
    packed, plain = [], []
    for name in plan.config.tensor_shapes() if names is None else names:
        path = to_module(name)
        if name in packings:
            embeds = isinstance(layers[path], nn.Embedding)
            kind = LearnedEmbedding if embeds else LearnedLinear
            packed.append((path, kind(packings[name], read_parts(name), dtype)))
        else:
            plain.append((f"{path}.weight", read(name).astype(dtype)))
            mx.eval(plain[-1][1])  # frees the stored weight
    model.update_modules(tree_unflatten(packed))
    model.load_weights(plain, strict=False)
    model.eval()
    return model
