"""Mixed-precision bit allocation: the least loss for a given size.

The sensitivity of a tensor is the KL divergence of the model's next-token distribution
when this tensor alone is quantized to 4 bits. To second order it is quadratic in the
rounding error, so for other bits and group sizes the loss is estimated in proportion to
the squared rounding error. Choosing one packing per tensor for the least total loss
within a size is a knapsack problem, which dynamic programming solves exactly.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from converters.quantization.receipt import CHUNK, LayerwiseModel, Read
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.openelm import from_start
from mlx_openelm.model.packed_weights import pack_weight, unpack_weight
from mlx_openelm.model.quantization import AFFINE_BITS, GROUP_SIZES, Packing
from mlx_openelm.tensor_names import EMBEDDING, HEAD

PROBE_BITS = 4
ERROR_ROWS = 512  # of a tensor, evenly spaced, on which its rounding error is measured
MAX_CELLS = 500_000  # of the knapsack's table; larger budgets use coarser cells

Choices = Mapping[str, Sequence[Packing]]  # by CoreNet name


def count_tokens(config: OpenELMConfig) -> int:
    """Return the number of tokens to measure sensitivities on; less for larger models.

    4096 for the demo model, 768 (three windows) for the 270M, 512 from the 450M on.
    """
    return max(512, min(4096, 22 * 10**10 // config.num_parameters))


def list_choices(
    config: OpenELMConfig,
    *,
    keeps: Callable[[str], bool] = lambda name: False,
    group_size: int | None = None,
    embed_bits: int | None = None,
) -> dict[str, list[Packing]]:
    """Return the packings to choose from for each tensor, by CoreNet name.

    Args:
        keeps: whether a tensor stays unquantized.
        group_size: None: every size that divides the tensor's row length.
        embed_bits: of the embedding and an untied head; None: every number of bits.

    Raises:
        OpenELMError: no group size divides a tensor's row length; names all of them.
    """
    choices = {}
    for name, (*rows, width) in config.tensor_shapes().items():
        if not rows or keeps(name):
            continue
        sizes = GROUP_SIZES if group_size is None else (group_size,)
        fixed = embed_bits if name in (EMBEDDING, HEAD) else None
        choices[name] = [
            Packing(bits, size)
            for bits in (AFFINE_BITS if fixed is None else (fixed,))
            for size in sizes
            if width % size == 0
        ]
    indivisible = [name for name, packings in choices.items() if not packings]
    if indivisible:
        raise OpenELMError(
            f"No group size divides the row length of {', '.join(indivisible)}; "
            "exclude them with `keep`, or choose another `group_size`."
        )
    return choices


def allocate(
    config: OpenELMConfig,
    read: Read,
    windows: mx.array,
    bits_per_weight: float,
    choices: Choices,
    *,
    dtype: mx.Dtype = mx.bfloat16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Packing]:
    """Choose a packing for each tensor, with an average of `bits_per_weight` or less.

    Args:
        read: reads the original weights.
        windows: token ids (N, 1 + T) on which sensitivities are measured.
        choices: for each tensor to pack; the others stay in `dtype`.
        dtype: of scales, biases and unpacked tensors.
        on_progress: called with the layers measured and the number of layers.

    Raises:
        OpenELMError: these choices cannot reach `bits_per_weight`.
    """
    _refuse_unreachable(config, bits_per_weight, choices, dtype)
    losses = estimate_losses(
        config, read, windows, choices, dtype=dtype, on_progress=on_progress
    )
    return choose(config, bits_per_weight, choices, losses, dtype=dtype)


def estimate_losses(
    config: OpenELMConfig,
    read: Read,
    windows: mx.array,
    choices: Choices,
    *,
    dtype: mx.Dtype = mx.bfloat16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Return the estimated KL of each choice; arguments as for `allocate`."""
    probe_packings = {
        name: min(packings, key=lambda p: abs(p.bits - PROBE_BITS))
        for name, packings in choices.items()
        if len(packings) > 1
    }
    sensitivities = measure_sensitivities(
        config, read, windows, probe_packings, dtype=dtype, on_progress=on_progress
    )
    losses = {}
    for name, packings in choices.items():
        if name not in probe_packings:
            losses[name] = [0.0]
            continue
        stored = read(name).astype(dtype)
        errors = _measure_errors(stored, [probe_packings[name], *packings])
        per_error = sensitivities[name] / max(errors[0], 1e-30)
        losses[name] = [per_error * error for error in errors[1:]]
    return losses


def choose(
    config: OpenELMConfig,
    bits_per_weight: float,
    choices: Choices,
    losses: Mapping[str, Sequence[float]],
    *,
    dtype: mx.Dtype = mx.bfloat16,
) -> dict[str, Packing]:
    """Return the choices of least loss with at most `bits_per_weight` on average."""
    costs, unpacked = _count_costs(config, choices, dtype)
    budget = int(bits_per_weight * config.num_parameters / 8) - unpacked
    names = list(choices)
    picked = solve_knapsack(
        [costs[n] for n in names], [losses[n] for n in names], budget
    )
    return {n: choices[n][i] for n, i in zip(names, picked, strict=True)}


def measure_sensitivities(
    config: OpenELMConfig,
    read: Read,
    windows: mx.array,
    packings: Mapping[str, Packing],
    *,
    dtype: mx.Dtype = mx.bfloat16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Return the mean KL (nats per token) of packing each tensor alone.

    All variants run side by side, so each layer is read once. A variant shares the
    original's hidden states up to the layer of its packed tensor.
    """

    def pack(name: str) -> mx.array:
        packing = packings[name]
        return unpack_weight(
            packing, pack_weight(packing, read(name).astype(dtype)), mx.float32
        )

    inputs = windows[:, :-1]
    model, packed = LayerwiseModel(config, read), LayerwiseModel(config, pack)
    original = model.embed(inputs)  # (N, T, D)
    rotate, layout = from_start(config, inputs.shape[1])
    variants = {}
    if EMBEDDING in packings:
        variants[EMBEDDING] = packed.embed(inputs)
    for layer in range(config.num_transformer_layers):
        block = model.block(layer)
        for name, hidden in variants.items():
            variants[name] = block(hidden, rotate, layout)
            mx.eval(variants[name])
        prefix = f"layers.{layer}."
        for name in (n for n in packings if n.startswith(prefix)):
            own = name.removeprefix(prefix)
            block.load_weights([(own, pack(name))], strict=False)
            variants[name] = block(original, rotate, layout)
            mx.eval(variants[name])
            block.load_weights([(own, read(name).astype(mx.float32))], strict=False)
        original = block(original, rotate, layout)
        mx.eval(original)
        on_progress(layer + 1, config.num_transformer_layers)
    if HEAD in packings:
        variants[HEAD] = original
    return _compare(model, packed, original, variants)


def _compare(
    model: LayerwiseModel,
    packed: LayerwiseModel,
    original: mx.array,
    variants: Mapping[str, mx.array],
) -> dict[str, float]:
    """Return each variant's mean KL to the original, from hidden states (N, T, D)."""
    before = model.norm(original)  # (N T, D)
    head = model.head()
    table = EMBEDDING if model.config.share_input_output_layers else HEAD
    heads = {table: packed.head()} if table in variants else {}
    sums = dict.fromkeys(variants, 0.0)
    for start in range(0, before.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        p = nn.log_softmax(head(before[rows]))
        weights = mx.exp(p)
        for name, hidden in variants.items():
            after = model.norm(hidden.reshape(before.shape)[rows])
            q = nn.log_softmax(heads.get(name, head)(after))
            sums[name] += _sum(weights * (p - q))
    return {name: max(0.0, kl / before.shape[0]) for name, kl in sums.items()}


def solve_knapsack(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """Pick one choice per item for the least total loss within the budget.

    Costs are counted in cells of their greatest common divisor, which is exact; if that
    needs more than `MAX_CELLS` cells, they are rounded up to larger ones. The cheapest
    choices must fit.
    """
    cell = max(math.gcd(*(c for item in costs for c in item)), budget // MAX_CELLS + 1)
    if budget // cell < sum(math.ceil(min(item) / cell) for item in costs):
        return [item.index(min(item)) for item in costs]
    # The table covers only the cells beyond the cheapest choices.
    least = [math.ceil(min(item) / cell) for item in costs]
    cells = budget // cell - sum(least)
    best = np.zeros(cells + 1)  # least loss of the items so far, by cells spent
    picks = []
    for item_costs, item_losses, minimum in zip(costs, losses, least, strict=True):
        total = np.full(cells + 1, np.inf)
        pick = np.zeros(cells + 1, np.int16)
        for i, (cost, loss) in enumerate(zip(item_costs, item_losses, strict=True)):
            more = math.ceil(cost / cell) - minimum
            if more > cells:
                continue
            candidate = best[: cells + 1 - more] + loss
            better = candidate < total[more:]
            total[more:][better] = candidate[better]
            pick[more:][better] = i
        best = total
        picks.append(pick)
    left = cells
    chosen = []
    for pick, item_costs, minimum in zip(
        reversed(picks), reversed(costs), reversed(least), strict=True
    ):
        i = int(pick[left])
        chosen.append(i)
        left -= math.ceil(item_costs[i] / cell) - minimum
    return chosen[::-1]


def _measure_errors(weight: mx.array, packings: Sequence[Packing]) -> list[float]:
    """Return the squared rounding error of each packing, summed over some rows."""
    rows = weight[:: max(1, weight.shape[0] // ERROR_ROWS)]
    exact = rows.astype(mx.float32)
    return [
        _sum(
            mx.square(
                unpack_weight(packing, pack_weight(packing, rows), mx.float32) - exact
            )
        )
        for packing in packings
    ]


def _sum(array: mx.array) -> float:
    return float(array.sum().item())  # type: ignore[arg-type] # it is real


def _count_bytes(packing: Packing, shape: tuple[int, ...], dtype: mx.Dtype) -> int:
    parts = packing.part_shapes(shape)
    return sum(
        math.prod(part) * (4 if suffix == "weight" else dtype.size)
        for suffix, part in parts.items()
    )


def _count_costs(
    config: OpenELMConfig, choices: Choices, dtype: mx.Dtype
) -> tuple[dict[str, list[int]], int]:
    """Return the bytes of each choice, and the total of the unpacked tensors."""
    shapes = config.tensor_shapes()
    costs = {
        name: [_count_bytes(packing, shapes[name], dtype) for packing in packings]
        for name, packings in choices.items()
    }
    unpacked = (math.prod(s) * dtype.size for n, s in shapes.items() if n not in costs)
    return costs, sum(unpacked)


def _refuse_unreachable(
    config: OpenELMConfig, bits_per_weight: float, choices: Choices, dtype: mx.Dtype
) -> None:
    costs, unpacked = _count_costs(config, choices, dtype)
    smallest, largest = (
        8 * (unpacked + sum(map(bound, costs.values()))) / config.num_parameters
        for bound in (min, max)
    )
    if not smallest <= bits_per_weight <= largest:
        raise OpenELMError(
            f"`bits` is auto:{bits_per_weight:g}; for this model it must be "
            f"auto:{math.ceil(1000 * smallest) / 1000:g} to "
            f"auto:{math.floor(1000 * largest) / 1000:g}."
        )
