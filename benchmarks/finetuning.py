"""Speed and memory of `lora`, compared with mlx_lm.lora.

    python benchmarks/finetuning.py --data gsm8k/train.jsonl
        --tokenizer tokenizer.model [--rounds 3] [--json FILE]
        [--only speed,parts,memory,start,loss,stock,quantized]

Both train LoRA of rank 8 with AdamW at a constant rate in batches of 4, in float32 and
with OpenBLAS, which openblas.py loads for mlx-lm as well: its default installation uses
a reference BLAS on Linux (measured by "stock"). mlx-lm gets a chat template that
renders exactly our ids, which is checked. Rounds alternate between the programs, each
run in its own process; ratios are medians over the rounds. A run has two epochs, of
which the second is timed, after mlx-lm has compiled for every length. Tokens are those
that count in the loss; mlx-lm also counts one padding token per record.

"parts" disables each optimization of our loop in turn: rows without padding, the output
head only at positions that count in the loss, and our own kernels.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

BATCH, RANK, SCALE, RATE = 4, 8, 2.0, 1e-4
LONGEST = 1100  # characters of a record: all fit into the demo's context
STEPS = ("speed", "parts", "memory", "start", "loss", "stock", "quantized")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
OURS, THEIRS, STOCK = "ours", "mlx-lm+OpenBLAS", "mlx-lm"


@dataclass(frozen=True)
class Job:
    """A training run."""

    model: str
    data: str
    out: str
    steps: int
    warm: int  # steps that are not timed
    mask: bool = True
    checkpoint: bool = False
    start: str | None = None  # mlx-lm only: the initial adapter
    without: str = ""  # ours only: "padding", "masking", "kernels" or "all"


# In a worker process -----------------------------------------------------------------


def train(engine: str, job: Job) -> None:
    """Train and print the measurements as JSON."""
    rows = (_train_ours if engine == OURS else _train_theirs)(job)
    timed = rows[job.warm :]
    measured = {
        "seconds": sum(row["seconds"] for row in timed),
        "tokens": sum(row["tokens"] for row in timed),
        "loss": rows[-1]["loss"],
        "peak": rows[-1]["peak"],
    }
    print(json.dumps(measured))


def _train_ours(job: Job) -> list[dict]:
    from mlx_openelm.finetuning.recipe import FinetuneRecipe
    from mlx_openelm.finetuning.run import finetune

    _disable(job.without)
    recipe = FinetuneRecipe(
        data=job.data,
        model=job.model,
        adapter_path=job.out,
        rank=RANK,
        scale=SCALE,
        template="raw",
        iters=job.steps,
        batch_size=BATCH,
        learning_rate=RATE,
        schedule="constant",
        warmup_steps=0,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        clip_norm=0.0,
        grad_checkpoint=job.checkpoint,
        steps_per_report=1,
        steps_per_eval=job.steps,
        val_batches=1,
        save_every=job.steps,
    )
    rows: list[dict] = []
    seen = {"seconds": 0.0, "tokens": 0}

    def note(event) -> None:
        if event["event"] == "step":
            rows.append(
                {
                    "seconds": event["seconds"] - seen["seconds"],
                    "tokens": event["tokens"] - seen["tokens"],
                    "loss": event["loss"],
                    "peak": event["peak_memory_bytes"],
                }
            )
            seen.update(seconds=event["seconds"], tokens=event["tokens"])

    finetune(recipe, force=True, offline=True, on_event=note)
    return rows


def _train_theirs(job: Job) -> list[dict]:
    import types

    import mlx.core as mx
    import numpy as np
    from mlx_lm import load, lora
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import load_dataset

    args = types.SimpleNamespace(**lora.CONFIG_DEFAULTS)
    args.model, args.data, args.adapter_path = job.model, job.data, job.out
    args.train, args.mask_prompt, args.num_layers = True, job.mask, -1
    args.lora_parameters = {"rank": RANK, "dropout": 0.0, "scale": SCALE}
    args.optimizer, args.learning_rate = "adamw", RATE
    args.optimizer_config = {"adamw": {"bias_correction": True}}
    args.batch_size, args.iters = BATCH, job.steps
    args.steps_per_report, args.steps_per_eval = 1, 10**9
    args.val_batches, args.save_every = 1, job.steps
    args.grad_checkpoint, args.resume_adapter_file = job.checkpoint, job.start
    rows: list[dict] = []
    trained = 0

    class Note(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            nonlocal trained
            rows.append(
                {
                    "seconds": 1 / info["iterations_per_second"],
                    "tokens": info["trained_tokens"] - trained - BATCH,
                    "loss": info["train_loss"],
                    "peak": mx.get_peak_memory(),
                }
            )
            trained = info["trained_tokens"]

    with open(os.devnull, "w") as null:  # mlx-lm prints a table
        stdout, sys.stdout = sys.stdout, null
        np.random.seed(args.seed)
        model, tokenizer = load(args.model)
        sets = load_dataset(args, tokenizer)
        mx.reset_peak_memory()
        lora.train_model(args, model, *sets[:2], training_callback=Note())
        sys.stdout = stdout
    return rows


def check_ids(model: str, data: str) -> None:
    """Exit if the ids or the masks of mlx-lm differ from ours."""
    import types

    from mlx_lm.tuner.datasets import load_dataset
    from mlx_lm.utils import load_tokenizer as load_their_tokenizer

    from mlx_openelm.finetuning.record_formats import supervised_formats
    from mlx_openelm.finetuning.record_samples import make_samples
    from mlx_openelm.finetuning.records import read_data
    from mlx_openelm.storage.loading import load_tokenizer
    from mlx_openelm.storage.model_folder import open_folder

    theirs = load_their_tokenizer(Path(model))
    args = types.SimpleNamespace(data=data, mask_prompt=True, train=True, test=False)
    dataset = load_dataset(args, theirs)[0]
    samples, _ = make_samples(
        read_data(Path(data), supervised_formats()).train,
        load_tokenizer(open_folder(Path(model))),
        template="raw",
        max_length=10**6,
    )
    for i, sample in enumerate(samples):
        ids, offset = dataset.process(dataset[i])
        ours = sample.tokens.tolist(), int(sample.loss_mask.argmax())
        if (ids, offset) != ours:
            sys.exit(f"{sample.place}: mlx-lm has {(ids, offset)}, not {ours}")


def write_start(model: str, file: str) -> None:
    """Write the initial adapter of our runs."""
    import mlx.core as mx

    import mlx_openelm
    from mlx_openelm.finetuning.trainable import (
        adapt,
        choose_modules,
        choose_ranks,
    )
    from mlx_openelm.training.arrays import trained_tensors

    network, _ = mlx_openelm.load(model)
    adapt(network, "lora", choose_ranks(choose_modules(network), RANK), scale=SCALE)
    mx.save_safetensors(file, trained_tensors(network))


def score(model: str, adapter: str, data: str) -> None:
    """Print the loss of valid.jsonl, in nats per target token, as JSON."""
    import mlx_openelm
    from mlx_openelm.finetuning.batches import collate
    from mlx_openelm.finetuning.losses import batch_losses
    from mlx_openelm.finetuning.record_formats import supervised_formats
    from mlx_openelm.finetuning.record_samples import make_samples
    from mlx_openelm.finetuning.records import read_data

    network, tokenizer = mlx_openelm.load(model, adapter_path=adapter or None)
    dataset = read_data(Path(data), supervised_formats()).valid
    samples, table = make_samples(dataset, tokenizer, template="raw", max_length=2048)
    total = 0.0
    for sample in samples:
        total += batch_losses(network, collate([sample]), gradient=False).sum().item()
    print(json.dumps({"loss": total / table.targets}))


def _disable(part: str) -> None:
    """Replace an optimization of our loop by plain code."""
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np

    from mlx_openelm.finetuning import losses as objective
    from mlx_openelm.finetuning import objectives
    from mlx_openelm.model import openelm, token_layout
    from mlx_openelm.model.likelihood import token_losses
    from mlx_openelm.model.lora import adapted_weight

    def losses(model, batch, *, z_loss: float = 0.0, gradient: bool = True):
        positions = batch.positions
        if part in ("padding", "all"):  # pad to the longest, a multiple of 32
            longest = 32 * -(-max(batch.lengths) // 32)
            starts = np.cumsum([0, *batch.lengths[:-1]])
            tokens = np.zeros((len(batch.lengths), longest), np.int32)
            for row, start, length in zip(tokens, starts, batch.lengths, strict=True):
                row[:length] = batch.tokens[start : start + length]
            positions = positions + batch.sequence * longest - starts[batch.sequence]
            hidden = model.transformer(mx.array(tokens))
            hidden = hidden.reshape(-1, hidden.shape[-1])
        else:
            tokens = mx.array(batch.tokens)[None]
            layout = token_layout.Sequences(batch.lengths)
            hidden = model.transformer(tokens, layout=layout)[0]
        at, targets = mx.array(positions), mx.array(batch.targets)
        if part in ("masking", "all"):  # logits and loss at every position
            every = mx.zeros(len(hidden), targets.dtype)
            every[at] = targets
            return of_rows(hidden, model, every, gradient)[at]
        return of_rows(hidden[at], model, targets, gradient)

    def of_rows(rows, model, targets, gradient):
        if part in ("kernels", "all"):
            return nn.losses.cross_entropy(model.head(rows), targets)
        head = adapted_weight(model.head_module)
        return token_losses(rows, head, targets, gradient=gradient)

    if part:
        objective.batch_losses = objectives.batch_losses = losses
    if part in ("kernels", "all"):
        openelm.swiglu = lambda gate, up: nn.silu(gate) * up
        token_layout.attend = lambda queries, keys, values, mask: (
            mx.fast.scaled_dot_product_attention(
                queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=mask
            )
        )


# Data and models ---------------------------------------------------------------------


def write_data(source: Path, folder: Path, records: int, *, valid: int = 4) -> Path:
    """Write the first records of GSM8K for training, the last ones for validation."""
    folder.mkdir()
    lines = source.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if len(line) <= LONGEST]
    for name, part in (
        ("train", lines[:records]),
        ("valid", lines[len(lines) - valid :]),
    ):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for line in part:
                fields = json.loads(line)
                record = {
                    "prompt": fields["question"] + "\n",
                    "completion": fields["answer"],
                }
                file.write(json.dumps(record) + "\n")
    return folder


def write_texts(source: Path, folder: Path, model: Path, tokens: int) -> Path:
    """Write texts of slightly fewer than `tokens` tokens, BOS and EOS included."""
    from mlx_openelm.storage.loading import load_tokenizer
    from mlx_openelm.storage.model_folder import open_folder

    tokenizer = load_tokenizer(open_folder(model))
    words = source.read_text(encoding="utf-8").split(" ")
    folder.mkdir()
    for name, records in (("train", BATCH), ("valid", BATCH)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(records):
                count = tokens
                while len(tokenizer.encode(" ".join(words[:count]))) >= tokens:
                    count -= 1 + count // 100
                file.write(json.dumps({"text": " ".join(words[:count])}) + "\n")
                words = words[count:]
    return folder


def add_template(folder: Path) -> Path:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = TEMPLATE
    path.write_text(json.dumps(config))
    return folder


def make_model(scratch: Path, name: str, tokenizer: Path) -> Path:
    """Write a model folder in float32: the demo, or synthetic weights."""
    import mlx_openelm  # noqa: F401 - loads OpenBLAS
    from converters.conversion.run import convert
    from converters.formats.pt_writer import TensorToWrite, write_pt
    from mlx_openelm.config import OpenELMConfig
    from mlx_openelm.storage.hub import demo_folder

    folder = scratch / name
    if name == "demo":
        convert(demo_folder(), folder, dtype="float32", receipt=False)
        return add_template(folder)
    import mlx.core as mx

    if name == "270M":
        config = OpenELMConfig.preset("270M")
    else:
        demo = OpenELMConfig.from_file(demo_folder() / "config.json")
        config = replace(demo, vocab_size=32000, max_context_length=2048)
    mx.random.seed(7)

    def tensor(shape: tuple[int, ...]) -> TensorToWrite:
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        return TensorToWrite(
            shape, mx.float32, lambda: mx.random.normal(shape, scale=scale)
        )

    source = scratch / f"{name}.pt"
    write_pt(source, {n: tensor(s) for n, s in config.tensor_shapes().items()})
    convert(source, folder, dtype="float32", receipt=False, tokenizer=str(tokenizer))
    source.unlink()
    return add_template(folder)


# Side by side ------------------------------------------------------------------------


def run(code: str, *arguments: str, blas: bool = True) -> dict:
    """Run code with this module in a new process; return the JSON that it prints."""
    first = "import mlx_openelm; " if blas else ""  # loads OpenBLAS
    code = (
        f"import sys; sys.path.insert(0, sys.argv[1]); {first}import finetuning; {code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def run_job(engine: str, job: Job) -> dict:
    code = "finetuning.train(sys.argv[2], finetuning.Job(**json.loads(sys.argv[3])))"
    described = json.dumps(asdict(job))
    return run(f"import json; {code}", engine, described, blas=engine != STOCK)


class Table:
    """Prints rows and records them."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        print(f"{'what':<44} {'ours':>10} {'theirs':>10}  {'ratio':>6}  target")

    def add(self, what: str, pairs: list[tuple[float, float]], target: str) -> None:
        """Add a row; pairs are ours and theirs of each round."""
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        self.rows.append(
            {
                "what": what,
                "ours": ours,
                "theirs": theirs,
                "ratio": ratio,
                "ratios": [a / b for a, b in pairs],
                "reach": target,
                "load": os.getloadavg()[0],
            }
        )
        print(f"{what:<44} {ours:10.3f} {theirs:10.3f}  {ratio:6.2f}  {target}")
        sys.stdout.flush()


class Benchmark:
    """The models, the data and the table of results."""

    def __init__(self, scratch: Path, source: Path, tokenizer: Path, rounds: int):
        self.scratch, self.source, self.tokenizer = scratch, source, tokenizer
        self.rounds, self.table = rounds, Table()

    def model(self, name: str) -> str:
        folder = self.scratch / name
        if not folder.is_dir():
            make_model(self.scratch, name, self.tokenizer)
            run("finetuning.check_ids(*sys.argv[2:])", str(folder), self.data(4))
        return str(folder)

    def data(self, batches: int, *, valid: int = BATCH) -> str:
        folder = self.scratch / f"data-{batches}-{valid}"
        if not folder.is_dir():
            write_data(self.source, folder, batches * BATCH, valid=valid)
        return str(folder)

    def job(self, model: str, batches: int, **changes) -> Job:
        job = Job(
            model=self.model(model),
            data=self.data(batches),
            out=str(self.scratch / "out"),
            steps=2 * batches,
            warm=batches,
        )
        return replace(job, **changes)

    def compare(
        self,
        what: str,
        job: Job,
        other: str,
        theirs: Job,
        target: str,
        rounds: int = 0,
    ) -> None:
        """Compare trained tokens per second, in alternating order."""
        pairs = []
        for round_ in range(rounds or self.rounds):
            sides = [(OURS, job), (other, theirs)]
            results = [run_job(*side) for side in sides[:: 1 - 2 * (round_ % 2)]]
            first, second = results[:: 1 - 2 * (round_ % 2)]
            assert first["tokens"] == second["tokens"], (first, second)
            rates = [x["tokens"] / x["seconds"] for x in (first, second)]
            pairs.append((rates[0], rates[1]))
        self.table.add(what, pairs, target)

    def speed(self) -> None:
        for model, name, batches, target in (
            ("demo32k", "demo shape, 32000 pieces", 4, "2.0"),
            ("demo", "demo", 6, "1.4"),
            ("270M", "270M", 2, "1.25"),
        ):
            job = self.job(model, batches)
            rounds = min(self.rounds, 2) if model == "270M" else self.rounds
            self.compare(f"tokens/s, {name}", job, THEIRS, job, target, rounds)

    def stock(self) -> None:
        job = self.job("demo", 2)
        self.compare("tokens/s, demo, stock mlx-lm", job, STOCK, job, "9", 1)

    def parts(self) -> None:
        for model, name in (("demo32k", "32000 pieces"), ("demo", "demo")):
            job = self.job(model, 4)
            for part in ("padding", "masking", "kernels", "all"):
                other = replace(job, without=part)
                what = f"tokens/s, {name}, {WITHOUT[part]}"
                self.compare(what, job, OURS, other, "", 2)

    def quantized(self) -> None:
        packed = self.scratch / "demo32k-4bit"
        plain = self.job("demo32k", 4)
        if not packed.is_dir():
            from converters.conversion.run import convert

            convert(plain.model, packed, bits=4, receipt=False)
        other = replace(plain, model=str(packed))
        self.compare("tokens/s, 4 bits over float32", other, OURS, plain, "0.5", 2)

    def memory(self) -> None:
        model = self.model("demo32k")
        data = write_texts(self.source, self.scratch / "long", Path(model), 2048)
        for checkpoint, name, target in (
            (False, "peak GB, 2048 tokens x 4", "at most 0.3"),
            (True, "  with gradient checkpointing", "at most 0.35"),
        ):
            job = Job(
                model,
                str(data),
                str(self.scratch / "out"),
                steps=1,
                warm=0,
                mask=False,
                checkpoint=checkpoint,
            )
            peaks = [run_job(engine, job)["peak"] / 1e9 for engine in (OURS, THEIRS)]
            self.table.add(name, [(peaks[0], peaks[1])], target)

    def loss(self) -> None:
        """Compare the loss of longer runs on held-out records."""
        data = self.data(24, valid=64)
        for model, name, steps in (
            ("demo", "demo", 48),
            ("demo32k", "32000 pieces", 24),
        ):
            job = self.job(model, 4, data=data, steps=steps, warm=0)
            losses = []
            initial = str(self.scratch / "start.safetensors")
            run("finetuning.write_start(*sys.argv[2:])", job.model, initial)
            for engine in (OURS, THEIRS):
                run_job(engine, replace(job, start=initial))
                code = "finetuning.score(*sys.argv[2:])"
                losses.append(run(code, job.model, job.out, job.data)["loss"])
            what = f"held-out loss after {steps} steps, {name}"
            self.table.add(what, [(losses[0], losses[1])], "at most 1")

    def start(self) -> None:
        model, data = self.model("demo"), self.data(6)
        everything = self.data(1500)
        for name, chosen in (
            ("start to first step, s, 24 records", data),
            ("start to first step, s, 6000 records", everything),
        ):
            pairs = []
            for round_ in range(self.rounds + 1):
                pair = (self.time_our_start(model, chosen), 0.0)
                pair = (pair[0], self.time_their_start(model, chosen))
                if round_:  # the first is a warm-up
                    pairs.append(pair)
            self.table.add(name, pairs, "at most 0.5")

    def time_our_start(self, model: str, data: str) -> float:
        out = self.scratch / "first"
        command = [str(Path(sys.executable).parent / "mlx-openelm"), "lora", "--force"]
        command += ["--model", model, "--data", data, "--adapter-path", str(out)]
        command += ["--rank", str(RANK), "--iters", "1", "--val-batches", "1"]
        return time_until(command, out / "metrics.jsonl", '"event": "step"')

    def time_their_start(self, model: str, data: str) -> float:
        out = self.scratch / "first"
        code = (
            "import sys, mlx_openelm; sys.argv[0] = 'mlx_lm.lora'; "
            "from mlx_lm.lora import main; main()"
        )
        command = [sys.executable, "-c", code, "--train", "--mask-prompt"]
        command += ["--model", model, "--data", data, "--adapter-path", str(out)]
        command += ["--iters", "1", "--val-batches", "1", "--save-every", "1"]
        command += ["--num-layers", "-1"]
        return time_until(command, out / "0000001_adapters.safetensors", "")


WITHOUT = {
    "padding": "with rows padded to one length",
    "masking": "with the head at every position",
    "kernels": "with plain attention, SwiGLU and loss",
    "all": "with all of these",
}


def time_until(command: list[str], file: Path, text: str) -> float:
    """Return the seconds from the start of the process until the file has the text."""
    shutil.rmtree(file.parent, ignore_errors=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        if file.is_file() and text in file.read_text(errors="replace"):
            seconds = time.perf_counter() - started
            process.communicate()
            return seconds
        time.sleep(0.002)
    sys.exit(f"the process made no step: {process.communicate()[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Llama's model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(STEPS))
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--scratch", type=Path, help="keep models and data here")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # use cached bytecode
    with tempfile.TemporaryDirectory() as name:
        scratch = options.scratch or Path(name)
        benchmark = Benchmark(scratch, options.data, options.tokenizer, options.rounds)
        for step in options.only.split(","):
            getattr(benchmark, step)()
        if options.json:
            rows = {"machine": machine(), "rows": benchmark.table.rows}
            options.json.write_text(json.dumps(rows, indent=2) + "\n")


def machine() -> dict:
    import mlx_openelm  # noqa: F401 - loads OpenBLAS
    from mlx_openelm.training.state import describe_arithmetic

    return describe_arithmetic()


if __name__ == "__main__":
    main()
