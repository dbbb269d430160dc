"""llama.cpp's server on a GGUF file, in a process of its own (`make llama-cpp`).

Run as a script in that environment, it serves a file until its standard input closes.
"""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = Path(os.environ.get("MLX_OPENELM_LLAMA_CPP", ROOT / ".venv-llama-cpp"))
PYTHON = ENVIRONMENT / "bin" / "python"
CONTEXT = 512

Post = Callable[[str, Any], Any]


@contextmanager
def serving_gguf(path: Path, adapter: Path | None = None) -> Iterator[Post]:
    """Serve a model, with an adapter; yields a function that posts JSON to a path.

    Keys and values are float32, as ours.
    """
    command = [str(PYTHON), __file__, str(path), *([str(adapter)] if adapter else [])]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(where: str, body: Any) -> Any:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}{where}", data, headers)
        with opener.open(request, timeout=300) as reply:
            return json.load(reply)

    try:
        assert url, "llama.cpp did not start"
        yield post
    finally:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-3000:]


def greedy(
    post: Post, prompt: list[int], num_tokens: int, *, num_probs: int
) -> tuple[list[int], list[dict[int, float]]]:
    """Return the tokens of an answer, and the best log-probabilities by token."""
    reply = post(
        "/completion",
        {
            "prompt": prompt,
            "n_predict": num_tokens,
            "n_probs": num_probs,
            "temperature": 0,
            "cache_prompt": False,
        },
    )
    steps = reply["completion_probabilities"]
    return [step["id"] for step in steps], [
        {top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in steps
    ]


def _serve(path: str, *adapters: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.port = CONTEXT, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    attention = xllamacpp.llama_flash_attn_type
    params.flash_attn_type = attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.use_jinja, params.warmup = True, False
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(a, 1.0) for a in adapters]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
