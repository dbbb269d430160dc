"""Examples at the end of each command's --help: at most 76 characters a line."""

from collections.abc import Mapping

PROMPT = "Once upon a time"  # of the commands that are proposed after a command
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "generate": (
        "mlx-openelm generate 'Once upon a time' --max-tokens 100 --temp 0.7",
        "mlx-openelm generate --model OpenELM-270M-Instruct-mlx 'What is MLX?'",
        "mlx-openelm generate --prompts-file prompts.txt --output answers.jsonl",
    ),
    "chat": (
        "mlx-openelm chat --model OpenELM-1_1B-Instruct-mlx --temp 0.7",
        "mlx-openelm chat --adapter-path adapters/examples",
    ),
    "serve": (
        "mlx-openelm serve --model OpenELM-1_1B-Instruct-mlx",
        "mlx-openelm serve --adapter-path adapters/examples --port 9000",
    ),
    "convert": (
        "mlx-openelm convert apple/OpenELM-270M-Instruct -q",
        "mlx-openelm convert checkpoint.pt --tokenizer tokenizer.model",
        "mlx-openelm convert adapters/examples --merge --mlx-path merged",
    ),
    "fuse": (
        "mlx-openelm fuse --adapter-path adapters/examples --save-path fused",
        "mlx-openelm fuse --adapter-path adapters/qlora --save-path full --dequantize",
    ),
    "verify": (
        "mlx-openelm verify OpenELM-270M-mlx",
        "mlx-openelm verify OpenELM-270M-mlx --against apple/OpenELM-270M",
    ),
    "inspect": (
        "mlx-openelm inspect demo",
        "mlx-openelm inspect apple/OpenELM-3B --context 1024",
    ),
    "selfcheck": (
        "mlx-openelm selfcheck",
        "mlx-openelm selfcheck --json > selfcheck.json",
        "mlx-openelm selfcheck --tune",
    ),
    "parity": (
        "mlx-openelm parity demo",
        "mlx-openelm parity checkpoint.pt --num-tokens 256",
    ),
    "evaluate": (
        "mlx-openelm evaluate --text book.txt --model OpenELM-270M-mlx",
        "mlx-openelm evaluate --tasks questions.json --compare adapters/examples",
        "mlx-openelm evaluate --suite zero-shot --model OpenELM-270M-mlx",
    ),
    "bench": (
        "mlx-openelm bench",
        "mlx-openelm bench --size 270M --bits 16,8,4 --chart speed.svg",
        "mlx-openelm bench --against mlx-lm --rounds 5",
    ),
    "lora": (
        "mlx-openelm lora --data examples.jsonl --model OpenELM-270M-mlx",
        "mlx-openelm lora --data examples.jsonl --dry-run",
        "mlx-openelm lora --recipe lora/small-mac --data examples.jsonl",
    ),
    "pretrain": (
        "mlx-openelm pretrain --recipe pretrain/stories --data 'texts/*.txt'",
        "mlx-openelm pretrain --recipe pretrain/openelm-270m --dry-run",
    ),
    "grow": (
        "mlx-openelm grow demo --width 2 --noise-db 10",
        "mlx-openelm grow checkpoint.pt --width 2 --ffn 3 --output grown",
    ),
    "recipes": (
        "mlx-openelm recipes",
        "mlx-openelm recipes copy lora/small-mac mine.yaml",
    ),
    "recipes list": ("mlx-openelm recipes list --json",),
    "recipes show": ("mlx-openelm recipes show lora/small-mac",),
    "recipes copy": (
        "mlx-openelm recipes copy lora/small-mac",
        "mlx-openelm recipes copy lora/small-mac mine.yaml",
    ),
    "": (
        "mlx-openelm generate 'Once upon a time'",
        "mlx-openelm convert apple/OpenELM-270M-Instruct -q",
        "mlx-openelm lora --data examples.jsonl --model OpenELM-270M-mlx",
    ),
}


def show_examples(name: str) -> str:
    """Return the end of a command's --help; "" is the program itself."""
    return "\n".join(("Examples:", *EXAMPLES[name]))
