"""Every command's flags, which scripts rely on."""

import pytest
import typer
from commands import call

from mlx_openelm.cli.main import app

FLAGS = {
    "": "--version --install-completion --show-completion",
    "generate": (
        "--no-tuning "
        "-p --prompt --model --adapter-path -m --max-tokens --min-tokens --temp "
        "--top-p --top-k --min-p --repetition-penalty --presence-penalty "
        "--frequency-penalty --repetition-context "
        "--no-repeat-ngram --logit-bias --stop --stop-loops --logprobs --template "
        "--system --lookup --draft-model --prompt-cache --kv-bits --kv-group-size "
        "--max-kv-size --prompts-file --output --batch-size --force --no-stream "
        "--json-schema --regex "
        "--seed --json --quiet --offline"
    ),
    "chat": (
        "--no-tuning "
        "--model --adapter-path -m --max-tokens --min-tokens --temp --top-p "
        "--top-k --min-p --repetition-penalty --presence-penalty "
        "--frequency-penalty --repetition-context "
        "--no-repeat-ngram --logit-bias --stop --stop-loops --template --system "
        "--lookup --draft-model --kv-bits --kv-group-size --seed --json --quiet "
        "--offline"
    ),
    "convert": (
        "--hf-path --model --mlx-path --to --dtype --allow-overflow -q --quantize "
        "--q-bits --q-group-size --q-mode --q-embed-bits --q-keep --dequantize "
        "--learn --teacher-bits --teacher-cache --seed --calibration --no-receipt "
        "--merge --adapter-out --average --weights --tokenizer --revision "
        "--upload-repo --public --force --json --quiet --offline"
    ),
    "fuse": (
        "--adapter-path --save-path --model --dequantize -q --quantize --q-bits "
        "--q-group-size --learn --teacher-cache --upload-repo --public --force --json "
        "--quiet --offline"
    ),
    "verify": "--against --json --quiet --offline",
    "inspect": "--context --json --quiet --offline",
    "selfcheck": "--tune --seconds --json --quiet",
    "parity": "--num-tokens --seed --json --quiet",
    "evaluate": (
        "--text --tasks --suite --model --adapter-path --compare --checkpoints "
        "--tokenizer --window --limit --num-fewshot --batch-size --include-path "
        "--tasks-dir --output --csv --picture --force --json --quiet --offline"
    ),
    "bench": (
        "--model --size --bits --protocol --batch --context --prompt-tokens -m "
        "--max-tokens --rounds --adapter-path --chart --against "
        "--json --quiet --offline"
    ),
    "lora": (
        "--no-tuning "
        "--data --model --adapter-path -c --recipe --fine-tune-type --objective "
        "--num-layers --rank --scale --dropout --keys --adapt-embedding "
        "--repair-text --prompt-key "
        "--completion-key --template --mask-prompt --no-mask-prompt --turns "
        "--max-seq-length --max-prompt-length --pack --epochs --iters "
        "--batch-size --grad-accumulation-steps --optimizer --learning-rate "
        "--schedule --warmup-steps --weight-decay --clip-norm --z-loss --dpo-loss "
        "--dpo-beta --grad-checkpoint --seed --steps-per-report --steps-per-eval "
        "--val-batches --save-every --patience --average-last --sample-prompt "
        "--report-to --memory-limit --test --resume --dry-run --fit --upload-repo "
        "--public --force --json --quiet --offline --teacher --distill-weight "
        "--temperature --teacher-cache --teacher-top-k --quantize-aware --rslora "
        "--lora-plus-ratio --neftune-noise --orpo-weight"
    ),
    "pretrain": (
        "-c --recipe --data --init --output --steps --seed --resume --dry-run "
        "--devices --report-to --export --compare-log --check-data --json --quiet"
    ),
    "grow": (
        "--width --ffn --noise-db --seed -o --output --tokenizer --revision "
        "--force --json --quiet --offline"
    ),
    "serve": (
        "--no-tuning --model --adapter-path --host --port --api-key --allowed-origins "
        "--template -m --max-tokens --temp --top-p --top-k --min-p "
        "--repetition-penalty --seed --decode-concurrency --prompt-concurrency "
        "--prompt-cache-size --log-level --quiet --offline --adapter "
        "--prompt-cache-bytes --max-queue --request-timeout"
    ),
    "recipes": "",
    "recipes list": "--json",
    "recipes show": "",
    "recipes copy": "",
}  # "": the program itself


def list_commands(command, name=""):
    """Yield each command and subcommand with its name."""
    yield name, command
    for part, subcommand in getattr(command, "commands", {}).items():
        yield from list_commands(subcommand, f"{name} {part}".strip())


def test_every_command_has_exactly_its_flags():
    actual = {
        name: {
            flag
            for parameter in command.params
            for flag in (*parameter.opts, *parameter.secondary_opts)
            if flag.startswith("-")
        }
        for name, command in list_commands(typer.main.get_command(app))
    }
    assert actual == {name: set(flags.split()) for name, flags in FLAGS.items()}


@pytest.mark.parametrize("name", FLAGS)
def test_help_lists_every_flag(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = call(*name.split(), "--help")
    assert result.exit_code == 0
    shown = result.stdout.replace(",", " ").split()
    assert {*FLAGS[name].split(), "-h", "--help"} <= {*shown}
    assert call(*name.split(), "-h").stdout == result.stdout
