"""Start-up and generation speed, compared with mlx-lm and PyTorch.

    python benchmarks/speed.py [--rounds 5] [--only start,help,prompt,decode]

The rounds alternate between the programs, each in its own process, and the ratio of the
medians is printed. The 270M has synthetic weights. All computation is in float32, the
fastest type on a Linux CPU. mlx-lm is measured in its default installation and with
OpenBLAS. Needs the torch extra.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROMPT_TOKENS, NEW_TOKENS = 512, 32
STEPS = ("start", "help", "prompt", "decode")
PROMPT = "Once upon a time there was a king who"


# In a worker process -----------------------------------------------------------------


def measure(engine: str, folder: str, prompt_tokens: int, new_tokens: int) -> None:
    """Print the seconds to the first token and the tokens per second after it."""
    import random

    random.seed(0)
    prompt = [1, *(random.randrange(3, 4000) for _ in range(prompt_tokens - 1))]
    run = {
        "ours": _ours,
        "mlx-lm": _mlx_lm,
        "mlx-lm+OpenBLAS": _mlx_lm,
        "PyTorch": _pytorch,
    }[engine](folder)
    list(run(prompt[:16], 2))  # warm-up
    started = time.perf_counter()
    times = []
    for _ in run(prompt, new_tokens):
        times.append(time.perf_counter())
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    print(json.dumps({"first": times[0] - started, "rate": rate}))


def _ours(folder: str) -> Callable:
    from mlx_openelm.generation.decoding import draw_tokens
    from mlx_openelm.generation.options import Sampling
    from mlx_openelm.storage.loading import load_model
    from mlx_openelm.storage.model_folder import open_folder

    model = load_model(open_folder(Path(folder)))
    return lambda prompt, count: draw_tokens(model, prompt, Sampling(), count)


def _mlx_lm(folder: str) -> Callable:
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    model.update(tree_map(lambda a: a.astype(mx.float32), model.parameters()))
    return lambda prompt, count: generate_step(
        mx.array(prompt), model, max_tokens=count
    )


def _pytorch(folder: str) -> Callable:
    import torch
    from safetensors.torch import load_file

    from converters.reference import GrowingCache, ReferenceOpenELM
    from mlx_openelm.config import OpenELMConfig

    model = ReferenceOpenELM(OpenELMConfig.from_file(Path(folder) / "config.json"))
    state = {
        name.removeprefix("transformer."): tensor.float()
        for file in Path(folder).glob("model*.safetensors")
        for name, tensor in load_file(file).items()
    }
    model.load_state_dict(state, assign=True)

    def run(prompt: list[int], count: int):
        with torch.inference_mode():
            cache = GrowingCache()
            tokens = torch.tensor([prompt])
            for _ in range(count):
                hidden = model.hidden(tokens, cache)[:, -1:]
                tokens = model.head(hidden).argmax(-1)
                yield tokens.item()

    return run


# Side by side ------------------------------------------------------------------------


def timed(command: list[str], **options) -> float:
    started = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **options,
    )
    return time.perf_counter() - started


def worker(engine: str, folder: Path, prompt_tokens: int, new_tokens: int) -> dict:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        + ("" if engine == "mlx-lm" else "import mlx_openelm; ")  # loads OpenBLAS
        + "import speed; speed.measure(sys.argv[2], sys.argv[3], "
        "int(sys.argv[4]), int(sys.argv[5]))"
    )
    arguments = [engine, str(folder), str(prompt_tokens), str(new_tokens)]
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def report(what: str, ours: list[float], theirs: list[float], against: str, unit: str):
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"{what:<34} {a:9.3f} {unit:<9} {b:9.3f} {against:<24} ratio {a / b:6.2f}")
    sys.stdout.flush()


def compare_starts(rounds: int, demo: Path) -> None:
    ours, theirs = [], []
    command = ["mlx-openelm", "generate", "--prompt", PROMPT, "-m", "1"]
    stock = ["mlx_lm.generate", "--model", str(demo), "--prompt", PROMPT, "-m", "1"]
    stock += ["--ignore-chat-template"]
    for _ in range(rounds + 1):
        ours.append(timed([_script(command[0]), *command[1:]]))
        theirs.append(timed([_script(stock[0]), *stock[1:]]))
    report("shell to first token, demo", ours[1:], theirs[1:], "mlx_lm.generate", "s")


def compare_help(rounds: int) -> None:
    ours, theirs = [], []
    for _ in range(rounds + 1):
        ours.append(timed([_script("mlx-openelm"), "--help"]))
        theirs.append(timed([sys.executable, "-c", "pass"]))
    more = statistics.median(ours[1:]) - statistics.median(theirs[1:])
    print(f"{'--help':<34} {more:9.3f} s more than python -c pass")


def compare_prompts(rounds: int, folder: Path) -> None:
    rates: dict[str, list[float]] = {}
    for round_ in range(rounds):
        for engine in ("ours", "mlx-lm+OpenBLAS", "PyTorch", "mlx-lm"):
            if engine == "mlx-lm" and round_ >= 1:
                continue  # takes minutes
            seconds = worker(engine, folder, PROMPT_TOKENS, 1)["first"]
            rates.setdefault(engine, []).append(PROMPT_TOKENS / seconds)
    for engine in ("mlx-lm", "mlx-lm+OpenBLAS", "PyTorch"):
        report("prompt of 512, 270M", rates["ours"], rates[engine], engine, "tokens/s")


def compare_decoding(rounds: int, name: str, folder: Path, engines: tuple) -> None:
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for engine in ("ours", *engines):
            rate = worker(engine, folder, 16, NEW_TOKENS)["rate"]
            rates.setdefault(engine, []).append(rate)
    for engine in engines:
        report(f"decoding, {name}", rates["ours"], rates[engine], engine, "tokens/s")


def make_270m(scratch: Path) -> Path:
    """Write a model folder of the 270M in float32 with synthetic weights."""
    import torch

    import mlx_openelm  # noqa: F401 - loads OpenBLAS
    from converters.conversion.run import convert
    from mlx_openelm.bench.selfcheck import made_weight
    from mlx_openelm.config import OpenELMConfig

    config = OpenELMConfig.preset("270M", vocab_size=32128)
    state = {
        name: torch.from_numpy(made_weight(name, shape, 7))
        for name, shape in config.tensor_shapes().items()
    }
    source = scratch / "OpenELM-270M.pt"
    torch.save(state, source)
    convert(source, scratch / "270m", dtype="float32", tokenizer="none")
    return scratch / "270m"


def _script(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(STEPS))
    options = parser.parse_args()
    chosen = options.only.split(",")
    from mlx_openelm.storage.hub import demo_folder

    demo = demo_folder()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(f"{'what':<34} {'ours':>9} {'':<9} {'theirs':>9} against")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if "start" in chosen:
            compare_starts(options.rounds, demo)
        if "help" in chosen:
            compare_help(options.rounds)
        if not {"prompt", "decode"} & set(chosen):
            return
        folder = make_270m(scratch)
        if "prompt" in chosen:
            compare_prompts(options.rounds, folder)
        if "decode" in chosen:
            others = ("mlx-lm+OpenBLAS", "PyTorch")
            compare_decoding(options.rounds, "270M", folder, others)
            compare_decoding(options.rounds, "demo", demo, others[:1])


if __name__ == "__main__":
    main()
