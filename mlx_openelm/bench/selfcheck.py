"""Self-check of this machine's device: every code path against reference results.

The project is developed without a Mac, so this checks its results on a user's Mac.
"""

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from mlx_openelm.bench.plan import PROMPT
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.device import Machine, describe_machine, runs_on_gpu
from mlx_openelm.generation.cache import KVCache
from mlx_openelm.generation.options import Sampling
from mlx_openelm.generation.step import compiled_step
from mlx_openelm.generation.streaming import generate
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.loading import load_model, load_tokenizer
from mlx_openelm.storage.model_folder import ModelFolder, open_folder
from mlx_openelm.tensor_names import to_folder
from mlx_openelm.version import __version__

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison, which passes if `value` is at most `limit`."""

    name: str
    value: float
    limit: float
    passed: bool


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """The report of all checks.

    Attributes:
        text: greedy answer of the demo model in float32 on this device.
    """

    version: str
    machine: Machine
    checks: tuple[Check, ...]
    text: str
    seconds: float
    passed: bool


def check_machine(
    on_check: Callable[[str], None] = lambda name: None,
) -> SelfCheck:
    """Compare this device's results with Apple's reference and with the CPU.

    Raises:
        OpenELMError: the installation lacks the demo model.
    """
    started = time.perf_counter()
    folder = open_folder(demo_folder())
    tokenizer = load_tokenizer(folder)
    tokens = mx.array([tokenizer.encode(PROMPT)])
    exact = load_model(folder, mx.float32)
    with _on_cpu():
        reference = exact(tokens)
        mx.eval(reference)
    text = ""

    def compare_text() -> float:
        nonlocal text
        sampling = Sampling(max_tokens=TEXT_TOKENS)
        text = PROMPT + generate(exact, tokenizer, PROMPT, sampling, template="raw")
        return float(text != (GOLDEN / "demo.txt").read_text())

    # A GPU may compute float32 as TF32, so the limits are wider there.
    loose = 2e-2 if runs_on_gpu() else 1e-4
    planned: tuple[tuple[str, float, Callable[[], float]], ...] = (
        ("Apple's logits of gpt-test, float32", loose, _reference_difference),
        (
            "float32 against the CPU, logits",
            loose,
            lambda: _largest(exact(tokens) - reference),
        ),
        (
            "cached against uncached, logits",
            loose,
            lambda: _largest(_cached(exact, tokens) - exact(tokens)),
        ),
        (
            "compiled steps against uncached, logits",
            loose,
            lambda: _largest(_stepped(exact, tokens) - exact(tokens)[:, 1:]),
        ),
        (
            "bfloat16 against float32, KL in nats",
            1e-3,
            lambda: _divergence(load_model(folder, mx.bfloat16)(tokens), reference),
        ),
        (
            "4-bit kernels against unpacked, logits",
            loose,
            lambda: _quantized_difference(folder, tokens),
        ),
        ("the demo's text differs (1: yes)", 0.0, compare_text),
    )
    checks = []
    for name, limit, measure in planned:
        on_check(name)
        value = measure()
        checks.append(Check(name, value, limit, value <= limit))  # NaN does not pass
    return SelfCheck(
        version=__version__,
        machine=describe_machine(),
        checks=tuple(checks),
        text=text,
        seconds=time.perf_counter() - started,
        passed=all(check.passed for check in checks),
    )


def _reference_difference() -> float:
    """Compare the smallest model, with synthetic weights, with Apple's own logits."""
    with safe_open(GOLDEN / "gpt-test.safetensors", framework="numpy") as stored:
        seed = int(stored.metadata()["seed"])
        rows = int(stored.metadata()["vocab_size"])
        tokens, positions, logits = (
            stored.get_tensor(name) for name in ("tokens", "positions", "logits")
        )
    config = OpenELMConfig.preset("gpt-test", vocab_size=rows)
    model = OpenELM(config)
    weights = {
        to_folder(name): mx.array(made_weight(name, shape, seed))
        for name, shape in config.tensor_shapes().items()
    }
    model.load_weights(list(weights.items()))
    actual = model(mx.array(tokens))[:, mx.array(positions), : logits.shape[-1]]
    return _largest(actual - mx.array(logits))


def made_weight(
    name: str, shape: tuple[int, ...], seed: int
) -> npt.NDArray[np.float32]:
    """Return a synthetic weight, as used for Apple's reference logits.

    From standard normals z of PCG64, seeded with (seed, crc32 of the CoreNet name), a
    norm is 1 + 0.1 z and a matrix z / sqrt(inputs).
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    normal = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + np.float32(0.1) * normal
    return normal / np.float32(np.sqrt(shape[-1]))


def _cached(model: OpenELM, tokens: mx.array) -> mx.array:
    """Return the logits of `tokens` (1, T), processed with a cache in three chunks."""
    cache = [KVCache() for _ in model.layers]
    ends = (1, tokens.shape[1] // 2, tokens.shape[1])
    parts, start = [], 0
    for end in ends:
        parts.append(model(tokens[:, start:end], cache))
        start = end
    return mx.concatenate(parts, axis=1)


def _stepped(model: OpenELM, tokens: mx.array) -> mx.array:
    """Return the logits of `tokens` (1, T) except the first, one step per token."""
    cache, step = [KVCache() for _ in model.layers], compiled_step(model)
    mx.eval(model(tokens[:, :1], cache))
    return mx.stack(
        [step(tokens[0, i : i + 1], cache) for i in range(1, tokens.size)], 1
    )


def _quantized_difference(folder: ModelFolder, tokens: mx.array) -> float:
    packed = load_model(folder, mx.float32)
    nn.quantize(packed, group_size=64, bits=4)
    unpacked = load_model(folder, mx.float32)
    for path, module in packed.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            weight = mx.dequantize(
                module.weight, module.scales, module.biases, group_size=64, bits=4
            )
            unpacked.load_weights([(f"{path}.weight", weight)], strict=False)
    with _on_cpu():
        reference = unpacked(tokens)
        mx.eval(reference)
    return _largest(packed(tokens) - reference)


def _divergence(logits: mx.array, reference: mx.array) -> float:
    """Return the mean KL(reference || logits) over positions, in nats."""
    q = nn.log_softmax(logits.astype(mx.float32))
    p = nn.log_softmax(reference)
    return float((mx.exp(p) * (p - q)).sum(axis=-1).mean().item())


def _largest(difference: mx.array) -> float:
    return float(mx.abs(difference).max().item())  # type: ignore[arg-type] # it is real


@contextmanager
def _on_cpu() -> Iterator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(device)
