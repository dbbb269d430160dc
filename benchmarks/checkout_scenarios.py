"""Commands and inputs that `compare_checkouts.py` runs on both checkouts."""

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Scenario:
    """Commands that both sides run; their files and output are compared.

    Attributes:
        status: the expected exit status; if it is not 0, stderr is compared.
        needs: a module; the scenario is skipped without it.
        quick: part of --quick.
    """

    name: str
    commands: tuple[str, ...]
    status: int = 0
    needs: str = "mlx"
    quick: bool = True


@dataclass(frozen=True)
class Resume:
    """A command that is stopped under OLD and repeated under NEW.

    Attributes:
        ready: takes the working folder and returns whether to stop now.
        by: the signal.
        flag: added to the repeated command.
        before: commands that prepare the folder, under OLD.
        kept: name of a file that exists at the stop and must be reused.
        ignored: names of files that depend on the interruption.
    """

    name: str
    command: str
    ready: Callable[[Path], bool]
    kept: str = ""
    by: int = signal.SIGKILL
    flag: str = ""
    before: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    needs: str = "mlx"
    quick: bool = True


def holds(name: str, text: bytes, times: int = 1) -> Callable[[Path], bool]:
    """Return a condition: the file contains the text at least `times` times."""

    def look(folder: Path) -> bool:
        path = folder / name
        return path.is_file() and path.read_bytes().count(text) >= times

    return look


def exists(pattern: str) -> Callable[[Path], bool]:
    """Return a condition: a non-empty file matches the pattern."""
    return lambda folder: any(path.stat().st_size for path in folder.glob(pattern))


# Inputs ----------------------------------------------------------------------------

TEXT = (
    "Once upon a time there was a king who had three daughters. The eldest said: I "
    "love you more than gold! The youngest wept, for she had nothing to say.\n\n"
    "Don't go into the wood, said the old woman; the wolf is there -- and 1234 more. "
) * 8
RECIPE = """\
output: run
model: {num_layers: 2, model_dim: 32, head_dim: 16, num_gqa_groups: 1,
        ffn_dim_divisor: 16, max_context_length: 32}
data: {train: [train.txt], heldout: [heldout.txt], packing: true}
tokenizer: {vocab_size: 300}
optimizer: {name: muon, learning_rate: 5.0e-3, warmup_steps: 4}
steps: 12
batch_size: 4
report_every: 1
eval_every: 6
save_every: 4
eval_window: 16
average_last: 2
"""


def _to_lines(records: list[dict[str, object]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


INPUTS = {
    "train.txt": TEXT * 2,
    "heldout.txt": TEXT[:600],
    "recipe.yaml": RECIPE,
    "data.jsonl": _to_lines(
        [
            {"prompt": f"Tell me of {i} kings.", "completion": f" {TEXT[i : 3 * i]}"}
            for i in range(10, 34)
        ]
    ),
    "pairs.jsonl": _to_lines(
        [
            {"prompt": f"The {i}:", "chosen": f" a king {i}", "rejected": f" {i * i}"}
            for i in range(16)
        ]
    ),
    "tasks.jsonl": _to_lines(
        [
            {
                "question": "Who wept?",
                "choices": ["the eldest", TEXT[i:30]],
                "answer": 0,
            }
            for i in range(24)
        ]
    ),
    "prompts.txt": "".join(f"{TEXT[i : i + 24].strip()}\n" for i in range(5, 25)),
}


# Commands --------------------------------------------------------------------------

LORA = "lora --data data.jsonl --adapter-path run --steps-per-report 1 --json"
SIX = "--iters 6 --save-every 3 --steps-per-eval 3"
LONG = "--iters 40 --save-every 5 --steps-per-eval 7 --seed 3"
PRETRAIN = "pretrain -c recipe.yaml"
ANSWERS = "generate --prompts-file prompts.txt --output answers.jsonl --batch-size 2"
COMMANDS = (
    *(
        "generate",
        "chat",
        "convert",
        "fuse",
        "verify",
        "inspect",
        "selfcheck",
        "parity",
    ),
    *("evaluate", "bench", "lora", "pretrain", "grow", "serve", "recipes"),
)

CHECKS: tuple[Scenario | Resume, ...] = (
    Scenario("help", ("--help", *(f"{name} --help" for name in COMMANDS))),
    Scenario(
        "errors",
        (
            "convert nowhere",
            "convert demo --to gguf --mlx-path out",
            "convert demo --q-bits 9",
            "generate --model nowhere -p a",
            "lora --data missing.jsonl",
            "lora --data heldout.txt",
            "evaluate --text missing.txt",
            "evaluate --tasks data.jsonl",
            "pretrain -c missing.yaml",
        ),
        status=1,
    ),
    Scenario("convert bf16", ("convert demo --mlx-path out",)),
    Scenario(
        "convert float32 to hf",
        (
            "convert demo --dtype float32 --mlx-path wide",
            "convert wide --to hf --mlx-path out --json",
        ),
    ),
    Scenario("convert 4 bits", ("convert demo -q --no-receipt --mlx-path out",)),
    Scenario(
        "convert 4 bits, receipt",
        ("convert demo -q --mlx-path out", "verify out", "inspect out --json"),
    ),
    Scenario(
        "convert auto bits",
        ("convert demo --q-bits auto:4.5 --q-group-size 32 --mlx-path out",),
        quick=False,
    ),
    Scenario(
        "convert mxfp4, dequantize",
        (
            "convert demo -q --q-mode mxfp4 --no-receipt --mlx-path packed",
            "convert packed --dequantize --mlx-path out",
        ),
        quick=False,
    ),
    Scenario(
        "convert corenet and back",
        (
            "convert demo --mlx-path source",
            "convert source --to corenet --mlx-path out.pt",
            "convert out.pt --mlx-path back --tokenizer source",
        ),
    ),
    Scenario(
        "convert gguf", ("convert demo --to gguf --mlx-path out.gguf",), 0, "gguf"
    ),
    Scenario(
        "lora, fuse, peft",
        (
            "convert demo --mlx-path source",
            f"{LORA} {SIX} --model source --average-last 2 --sample-prompt Once",
            "fuse --adapter-path run --save-path fused",
            "convert run --to peft --mlx-path peft",
            "generate --adapter-path run -p Once -m 8 --seed 1",
        ),
    ),
    Scenario("dora", (f"{LORA} {SIX} --fine-tune-type dora --keys attn.qkv_proj",)),
    Scenario("full", (f"{LORA} {SIX} --fine-tune-type full --pack --optimizer muon",)),
    Scenario(
        "dpo",
        (f"{LORA} {SIX} --objective dpo".replace("data.jsonl", "pairs.jsonl"),),
    ),
    Scenario("generate greedy", ("generate -p 'Once upon' -m 40 --temp 0",)),
    Scenario(
        "generate sampled", ("generate -p 'Once upon' -m 40 --temp 0.8 --seed 7",)
    ),
    Scenario(
        "generate lookup",
        ("generate -p 'The king, the king, the' -m 40 --temp 0 --lookup 4 --json",),
    ),
    Scenario(
        "generate logprobs and caches",
        (
            "generate -p 'Once upon' -m 20 --seed 1 --json --logprobs 3",
            "generate -p 'Once upon' -m 20 --seed 1 --kv-bits 8",
            "generate -p 'Once upon' -m 20 --seed 1 --max-kv-size 16",
            "generate -p 'Once upon' -m 20 --seed 1 --prompt-cache prompt.safetensors",
        ),
        quick=False,
    ),
    Scenario("generate --prompts-file", (f"{ANSWERS} -m 24 --seed 5",)),
    Scenario("evaluate --text", ("evaluate --text heldout.txt --json",)),
    Scenario(
        "evaluate --tasks",
        ("evaluate --tasks tasks.jsonl --output out --csv t.csv --picture t.svg",),
    ),
    Scenario(
        "pretrain, convert, grow",
        (
            PRETRAIN,
            "convert run/checkpoint_average.pt --mlx-path out",
            "grow run/checkpoint_average.pt --width 2 -o grown",
        ),
        needs="torch",
    ),
    Resume(
        "resume lora after Ctrl-C",
        f"{LORA} {LONG}",
        holds("run/metrics.jsonl", b'"save"'),
        "metrics.jsonl",
        signal.SIGINT,
        "--resume",
        ignored=("report.html",),
    ),
    Resume(
        "resume dora after kill",
        f"{LORA} {LONG} --fine-tune-type dora --grad-accumulation-steps 2",
        holds("run/metrics.jsonl", b'"save"', 3),
        "metrics.jsonl",
        flag="--resume",
        ignored=("report.html",),
        quick=False,
    ),
    Resume(
        "resume convert after kill",
        "convert source -q --mlx-path out",
        exists(".out.*.part/model.safetensors"),
        "model.safetensors",
        before=("convert demo --mlx-path source",),
    ),
    Resume(
        "resume --prompts-file after kill",
        f"{ANSWERS} -m 60 --seed 5 --model source",
        holds("answers.jsonl", b"\n", 3),
        "answers.jsonl",
        before=("convert demo --mlx-path source",),
    ),
    Resume(
        "resume evaluate after kill",
        "evaluate --tasks tasks.jsonl --output out --model source",
        exists("out/*/*"),
        before=("convert demo --mlx-path source",),
        quick=False,
    ),
    Resume(
        "resume pretrain after kill",
        f"{PRETRAIN} --steps 60",
        holds("run/metrics.jsonl", b'"saved"', 2),
        "metrics.jsonl",
        flag="--resume",
        needs="torch",
    ),
    Resume(
        "resume pretrain after Ctrl-C",
        f"{PRETRAIN} --steps 60",
        holds("run/metrics.jsonl", b'"saved"'),
        "metrics.jsonl",
        signal.SIGINT,
        "--resume",
        needs="torch",
        quick=False,
    ),
)
