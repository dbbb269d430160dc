"""Models for `bench`: format of the weights in memory, loading, memory estimates."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_openelm.bench.plan import RANDOM_DTYPE, Case, Subject
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.device import compute_dtype
from mlx_openelm.generation.decoding import PREFILL_CHUNK
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.packed_weights import pack_weight
from mlx_openelm.model.quantization import GROUP_SIZES, Packing, Quantization
from mlx_openelm.storage.adapter_folder import attach
from mlx_openelm.storage.loading import load_model, make_quantized, stored_dtype
from mlx_openelm.storage.model_folder import spell_dtype
from mlx_openelm.tensor_names import EMBEDDING, to_folder, to_module


@dataclass(frozen=True, slots=True)
class Form:
    """Format of the weights in memory during the computation.

    Attributes:
        dtype: of activations and of weights that are not quantized.
        packings: of quantized weights, by CoreNet name; empty if they are dequantized.
    """

    dtype: mx.Dtype
    packings: Mapping[str, Packing]

    @property
    def key(self) -> tuple[str, frozenset[tuple[str, Packing]]]:
        """Equal for two forms with the same computation."""
        return str(self.dtype), frozenset(self.packings.items())

    def __str__(self) -> str:
        return ("packed, " if self.packings else "") + spell_dtype(self.dtype)


def choose_form(subject: Subject, bits: int) -> Form | None:
    """Return the form that loading chooses for `bits` on this device.

    None if no group size of MLX divides the rows of the model.
    """
    stored, packings = RANDOM_DTYPE, dict[str, Packing]()
    if subject.folder is not None:
        stored = stored_dtype(subject.folder)
    if subject.folder is not None and bits == subject.bits:
        packings = dict(subject.folder.packings)
    else:
        stored = RANDOM_DTYPE if stored == mx.float32 else stored
        if bits < 8 * stored.size:
            group = _choose_group(subject.config)
            if group is None:
                return None
            chosen = Quantization(bits=bits, group_size=group)
            packings = chosen.packings(subject.config)
    dtype = compute_dtype(stored)
    return Form(dtype, packings if dtype == stored else {})


def _choose_group(config: OpenELMConfig) -> int | None:
    widths = [shape[1] for shape in config.tensor_shapes().values() if len(shape) == 2]
    return next(
        (size for size in GROUP_SIZES if all(width % size == 0 for width in widths)),
        None,
    )


def estimate_memory(case: Case, form: Form) -> int:
    """Estimate the bytes of a case: weights, cache, and activations of a chunk."""
    config, size = case.subject.config, form.dtype.size
    weights = 0
    for name, shape in config.tensor_shapes().items():
        packing = form.packings.get(name)
        if packing is None:
            weights += math.prod(shape) * size
            continue
        for suffix, part in packing.part_shapes(shape).items():
            weights += math.prod(part) * (4 if suffix == "weight" else size)
    if case.subject.folder is not None and not (case.as_stored and form.packings):
        tensors = case.subject.folder.tensors.values()
        weights += max(tensor.num_bytes for tensor in tensors)  # read before its cast
    cache = case.batch * case.context * config.kv_bytes_per_token(form.dtype.size)
    chunk = min(case.prompt_tokens, PREFILL_CHUNK)
    tokens = case.batch * chunk
    scores = 2 * max(config.num_query_heads) * case.context
    work = tokens * (6 * max(config.ffn_dims) + 8 * config.model_dim + scores) * size
    logits = 4 * case.batch * config.vocab_size * size
    # While a cache grows, both the old and the new arrays exist.
    return int(weights + 2 * cache + work + logits)


def count_step_bytes(model: OpenELM, batch: int, attended: float) -> float:
    """Return the bytes that a decoding step of `batch` sequences must read.

    These are all weights and the keys and values of each sequence. Of an embedding that
    is not tied to the output head, only one row per sequence counts.

    Args:
        attended: tokens in the KV cache of a sequence.
    """
    config = model.config
    table = to_module(EMBEDDING) + "."
    read = 0.0
    for name, array in dict(tree_flatten(model.parameters())).items():
        looked_up = not config.share_input_output_layers and name.startswith(table)
        if looked_up and array.shape[0] == config.vocab_size:
            read += min(batch / config.vocab_size, 1) * array.nbytes
        else:
            read += array.nbytes
    size = model.transformer.norm.weight.dtype.size
    return read + batch * attended * config.kv_bytes_per_token(size)


def load_subject(
    subject: Subject,
    bits: int,
    form: Form,
    on_note: Callable[[str], None] = lambda note: None,
) -> OpenELM:
    """Load the model of a subject in this form."""
    if subject.folder is None:
        return make_model(subject.config, form)
    if bits == subject.bits:
        model = load_model(subject.folder)
    else:
        model = load_model(subject.folder, form.dtype)
        make_quantized(model, form.packings)
        mx.eval(model.parameters())
    if subject.adapter is not None:
        for note in attach(model, subject.adapter):
            on_note(note)
    return model


def make_model(config: OpenELMConfig, form: Form) -> OpenELM:
    """Return a model with random weights: 2**20 normals, repeated and scaled."""
    model = OpenELM(config)
    make_quantized(model, form.packings)
    normals = mx.random.normal((2**20,), key=mx.random.key(0)).astype(form.dtype)
    arrays: list[tuple[str, mx.array]] = []
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:  # a norm
            arrays.append((to_folder(name), mx.ones(shape, form.dtype)))
            continue
        count = math.prod(shape)
        times = math.ceil(count / normals.size)
        repeated = mx.broadcast_to(normals, (times, normals.size)).reshape(-1)
        weight = repeated[:count].reshape(shape) * shape[1] ** -0.5
        packing = form.packings.get(name)
        parts = pack_weight(packing, weight) if packing else {"weight": weight}
        mx.eval(parts)
        arrays += [(f"{to_module(name)}.{part}", a) for part, a in parts.items()]
    model.load_weights(arrays)
    model.eval()
    mx.eval(model.parameters())
    return model
