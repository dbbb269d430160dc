"""Time and memory of `convert`, compared with mlx_lm.convert.

    python benchmarks/conversion.py [--rounds 5] [--tokenizer tokenizer.model] [--large]

Both programs convert the same Hugging Face folder (the shape of the 270M, float32,
synthetic weights) to 16 and to 4 bits, each run in its own process, in alternating
rounds. Printed are the ratio of the medians and the peak of anonymous memory (on Linux;
pages of mapped files can be reclaimed and do not count). The conversion of a CoreNet
.pt is compared with copying and hashing the file. `--large` also converts a .pt of the
3B (12 GB on disk, minutes) and prints its peak memory. Needs the torch extra.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizer", type=Path, help="Llama's tokenizer.model")
    parser.add_argument("--large", action="store_true", help="also convert the 3B")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        scratch = Path(name)
        source = scratch / "OpenELM-270M.pt"
        make_checkpoint(source, "270M")
        folder = make_folder(source, scratch, options.tokenizer)
        for what, flags in (("16 bits", ["--dtype", "bfloat16"]), ("4 bits", ["-q"])):
            compare_with_mlx_lm(what, flags, options.rounds, folder, scratch)
        compare_with_copying(options.rounds, source, scratch)
        if options.large:
            source.unlink()
            shutil.rmtree(folder)
            measure_large(scratch)


def compare_with_mlx_lm(
    what: str, flags: list[str], rounds: int, folder: Path, scratch: Path
) -> None:
    """Compare conversions to a new folder; our convert also hashes and syncs."""
    out = scratch / "out"
    ours = [script("mlx-openelm"), "convert", str(folder), "--mlx-path", str(out)]
    ours += ["--no-receipt", *flags]
    if not (folder / "tokenizer.model").is_file():
        ours += ["--tokenizer", "none"]
    theirs = [script("mlx_lm.convert"), "--hf-path", str(folder)]
    theirs += ["--mlx-path", str(out), *flags]
    runs: dict[str, list[tuple[float, int]]] = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):
        for name, command in (("ours", ours), ("theirs", theirs)):
            runs[name].append(watch(command))
            shutil.rmtree(out)
    first, second = (transpose(runs[name][1:]) for name in ("ours", "theirs"))
    report(f"270M to {what}", first[0], second[0], "s", "mlx_lm.convert")
    report("  anonymous memory", first[1], second[1], "GB", "mlx_lm.convert")


def compare_with_copying(rounds: int, source: Path, scratch: Path) -> None:
    out, copy = scratch / "out", scratch / "copy.pt"
    command = [script("mlx-openelm"), "convert", str(source), "--mlx-path", str(out)]
    command += ["--tokenizer", "none"]
    steps = f"cp {source} {copy} && sync {copy} && sha256sum {source}"
    ours, theirs = [], []
    for _ in range(rounds + 1):
        ours.append(watch(command)[0])
        shutil.rmtree(out)
        theirs.append(watch(["sh", "-c", steps])[0])
        copy.unlink()
    report("270M .pt to 16 bits", ours[1:], theirs[1:], "s", "cp, sync, sha256sum")


def measure_large(scratch: Path) -> None:
    source, out = scratch / "OpenELM-3B.pt", scratch / "out"
    make_checkpoint(source, "3B")
    for what, flags in (
        ("float32", ["--dtype", "float32"]),
        ("bfloat16", ["--dtype", "bfloat16"]),
        ("4 bits", ["-q"]),
    ):
        command = [script("mlx-openelm"), "convert", str(source), "--mlx-path"]
        seconds, peak = watch([*command, str(out), "--tokenizer", "none", *flags])
        print(f"3B .pt to {what:<24} {seconds:9.1f} s  {peak / 1e9:9.3f} GB anonymous")
        sys.stdout.flush()
        shutil.rmtree(out)


def watch(command: list[str]) -> tuple[float, int]:
    """Run a command; return its seconds and its peak RssAnon in bytes (0 off Linux)."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        status = Path(f"/proc/{process.pid}/status")
        while not done.wait(0.005):
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=sample)
    watcher.start()
    process.wait()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    return seconds, peak


def make_checkpoint(path: Path, size: str) -> None:
    """Write a CoreNet .pt in float32 with synthetic weights, one tensor at a time."""
    import mlx.core as mx

    from converters.formats.pt_writer import TensorToWrite, write_pt
    from mlx_openelm.config import CORENET_ROWS, OpenELMConfig

    config = OpenELMConfig.preset(size, vocab_size=CORENET_ROWS)
    mx.random.seed(7)

    def tensor(shape: tuple[int, ...]) -> TensorToWrite:
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        return TensorToWrite(
            shape, mx.float32, lambda: mx.random.normal(shape, scale=scale)
        )

    write_pt(path, {name: tensor(s) for name, s in config.tensor_shapes().items()})


def make_folder(source: Path, scratch: Path, tokenizer: Path | None) -> Path:
    """Convert it to a Hugging Face folder with a tokenizer that mlx-lm can load."""
    from converters.conversion.run import convert
    from mlx_openelm.storage.hub import demo_folder

    folder = scratch / "hf"
    option = "none" if tokenizer is None else str(tokenizer)
    convert(source, folder, to="hf", dtype="float32", tokenizer=option)
    if tokenizer is None:
        # mlx_lm.convert needs a tokenizer; ours would refuse the demo's.
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_folder() / name, folder)
    return folder


def transpose(runs: list[tuple[float, int]]) -> tuple[list[float], list[float]]:
    return [seconds for seconds, _ in runs], [peak / 1e9 for _, peak in runs]


def report(
    what: str, ours: list[float], theirs: list[float], unit: str, against: str
) -> None:
    a, b = statistics.median(ours), statistics.median(theirs)
    ratio = f"ratio {a / b:5.2f}" if b else ""
    print(f"{what:<28} {a:9.3f} {unit:<3} {b:9.3f} {against:<20} {ratio}")
    sys.stdout.flush()


def script(name: str) -> str:
    return str(Path(sys.executable).parent / name)


if __name__ == "__main__":
    main()
