"""Bits for each tensor by what they cost: the same bytes, the least loss.

A tensor's price is measured: packed at 4 bits, alone, it moves the model's next-token
distribution by a KL divergence. To second order that divergence is quadratic in the
rounding error, so at other bits and groups the price is taken in proportion to the
squared error there. What a model of so many bytes loses least with is then a knapsack
problem with one choice a tensor, which dynamic programming solves exactly.
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
ERROR_ROWS = 512  # of a tensor, spread over it, that the rounding error is taken from
MAX_CELLS = 500_000  # of the knapsack's table; more bytes than that share a cell

Choices = Mapping[str, Sequence[Packing]]  # by CoreNet name


def count_tokens(config: OpenELMConfig) -> int:
    """Return how much text to price on: the less, the larger the model.

    768 tokens for the 270M (three windows), 4096 for the demo model, 512 from the 450M
    on.
    """
    return max(512, min(4096, 22 * 10**10 // config.num_parameters))


def list_choices(
    config: OpenELMConfig,
    *,
    keeps: Callable[[str], bool] = lambda name: False,
    group_size: int | None = None,
    embed_bits: int | None = None,
) -> dict[str, list[Packing]]:
    """Return the packings that each tensor may have.

    Args:
        keeps: tells of a tensor that is not packed.
        group_size: the only one; None: all that divide the tensor's rows.
        embed_bits: of the embedding and an untied head; None: they are priced, too.

    Raises:
        OpenELMError: no group size divides some tensor's rows (all of them named).
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
            f"No group size divides the rows of {', '.join(indivisible)}; `keep` "
            "them, or choose another `group_size`."
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
    """Choose each tensor's packing, so that all tensors have so many bits a weight.

    Args:
        read: reads the original's weights.
        windows: token ids (N, 1 + T) that the price is measured on.
        choices: of each tensor that is packed; the others stay in `dtype`.
        dtype: of scales, biases and what is not packed.
        on_progress: called with layers priced and layers in all.

    Raises:
        OpenELMError: so many bits cannot be reached with these choices.
    """
    _refuse_unreachable(config, bits_per_weight, choices, dtype)
    losses = price_choices(
        config, read, windows, choices, dtype=dtype, on_progress=on_progress
    )
    return choose(config, bits_per_weight, choices, losses, dtype=dtype)


def price_choices(
    config: OpenELMConfig,
    read: Read,
    windows: mx.array,
    choices: Choices,
    *,
    dtype: mx.Dtype = mx.bfloat16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Return what each choice of each tensor costs, in KL; arguments as `allocate`."""
    probes = {
        name: min(packings, key=lambda p: abs(p.bits - PROBE_BITS))
        for name, packings in choices.items()
        if len(packings) > 1
    }
    prices = measure_prices(
        config, read, windows, probes, dtype=dtype, on_progress=on_progress
    )
    losses = {}
    for name, packings in choices.items():
        if name not in probes:
            losses[name] = [0.0]
            continue
        stored = read(name).astype(dtype)
        errors = _measure_errors(stored, [probes[name], *packings])
        unit = prices[name] / max(errors[0], 1e-30)
        losses[name] = [unit * error for error in errors[1:]]
    return losses


def choose(
    config: OpenELMConfig,
    bits_per_weight: float,
    choices: Choices,
    losses: Mapping[str, Sequence[float]],
    *,
    dtype: mx.Dtype = mx.bfloat16,
) -> dict[str, Packing]:
    """Return the choices of the least loss that have at most so many bits a weight."""
    costs, unpacked = _count_costs(config, choices, dtype)
    budget = int(bits_per_weight * config.num_parameters / 8) - unpacked
    names = list(choices)
    picked = solve_knapsack(
        [costs[n] for n in names], [losses[n] for n in names], budget
    )
    return {n: choices[n][i] for n, i in zip(names, picked, strict=True)}


def measure_prices(
    config: OpenELMConfig,
    read: Read,
    windows: mx.array,
    packings: Mapping[str, Packing],
    *,
    dtype: mx.Dtype = mx.bfloat16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Return the mean KL (nats a token) of packing each tensor alone.

    All variants walk through the layers together, so each layer is read once; a variant
    leaves the original's path at the layer that its tensor is in.
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
    """Return each variant's mean KL from the original, from hidden states (N, T, D)."""
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
            sums[name] += _add_up(weights * (p - q))
    return {name: max(0.0, kl / before.shape[0]) for name, kl in sums.items()}


def solve_knapsack(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """Pick one choice of each item: the least loss whose costs fit the budget.

    Exact where the costs have a divisor that leaves at most `MAX_CELLS` cells; else
    they are rounded up to cells of that size. The cheapest choices must fit.
    """
    cell = max(math.gcd(*(c for item in costs for c in item)), budget // MAX_CELLS + 1)
    if budget // cell < sum(math.ceil(min(item) / cell) for item in costs):
        return [item.index(min(item)) for item in costs]
    # What is cheapest is paid in advance, so that the table holds what can be chosen.
    least = [math.ceil(min(item) / cell) for item in costs]
    cells = budget // cell - sum(least)
    best = np.zeros(cells + 1)  # least loss of the items so far, by cells spent
    picks = []
    for item_costs, item_losses, floor in zip(costs, losses, least, strict=True):
        total = np.full(cells + 1, np.inf)
        pick = np.zeros(cells + 1, np.int16)
        for i, (cost, loss) in enumerate(zip(item_costs, item_losses, strict=True)):
            more = math.ceil(cost / cell) - floor
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
    for pick, item_costs, floor in zip(
        reversed(picks), reversed(costs), reversed(least), strict=True
    ):
        i = int(pick[left])
        chosen.append(i)
        left -= math.ceil(item_costs[i] / cell) - floor
    return chosen[::-1]


def _measure_errors(weight: mx.array, packings: Sequence[Packing]) -> list[float]:
    """Return the squared rounding error of each packing, summed over some rows."""
    rows = weight[:: max(1, weight.shape[0] // ERROR_ROWS)]
    exact = rows.astype(mx.float32)
    return [
        _add_up(
            mx.square(
                unpack_weight(packing, pack_weight(packing, rows), mx.float32) - exact
            )
        )
        for packing in packings
    ]


def _add_up(array: mx.array) -> float:
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
    """Return the bytes of each choice, and those of all that is not packed."""
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
    least, most = (
        8 * (unpacked + sum(map(bound, costs.values()))) / config.num_parameters
        for bound in (min, max)
    )
    if not least <= bits_per_weight <= most:
        raise OpenELMError(
            f"`bits` auto:{bits_per_weight:g} cannot be reached: this model takes "
            f"{math.ceil(1000 * least) / 1000:g} to {math.floor(1000 * most) / 1000:g} "
            "bits a weight in all."
        )
