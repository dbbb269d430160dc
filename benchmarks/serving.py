"""Speed of the server, compared with mlx_lm.server on the same weights.

    python benchmarks/serving.py [--rounds 3] [--only start,tokens,large,...]

Both servers run in processes of their own, in turn, with float32 weights and OpenBLAS
(which mlx-lm gets from us: without it, it is slower still). The client uses threads and
whole answers. Each figure is the ratio of medians. "270M" is the released shape with
random weights; without --tokenizer it has the demo's 4,096 rows of the embedding.

start   from the start of the process to the first answer
tokens  tokens per second with 1, 8 and 32 clients, demo, prompts of 20 to 300 tokens,
        answers of 16 to 128
large   the same with 8 clients and the 270M shape
short   270M shape: time to the first token of a short request while prompts of 1,500
        tokens are read
shared  270M shape: 8 chats with a common system prompt of 1,000 tokens
json    demo: tokens per second of JSON-schema rows against free rows (ours)
memory  demo: memory after 200 and 2,000 mixed requests (ours)
"""

import argparse
import http.client
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

TEXT = Path(__file__).parent.parent / "README.md"
WORDS = TEXT.read_text().split()
OURS, THEIRS = "mlx-openelm", "mlx_lm.server"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "town": {"type": "string", "maxLength": 40},
    },
    "required": ["name", "age", "town"],
    "additionalProperties": False,
}


class Server:
    """A running server.

    Attributes:
        first_answer_s: from its start to its first answer.
        resets: connections that it has reset.
    """

    resets = 0

    def __init__(self, kind: str, folder: Path, *arguments: str) -> None:
        self.kind = kind
        port = str(random.randint(20000, 60000))
        run = "import runpy, sys; import mlx_openelm; "  # loads OpenBLAS, for both
        if kind == OURS:
            module = "mlx_openelm"
            options = ["serve", "--model", folder, "--port", port, "--quiet"]
        else:
            module = "mlx_lm.server"
            options = ["--model", folder, "--port", port, "--log-level", "ERROR"]
        started = time.perf_counter()
        code = (
            f"{run}sys.argv[0] = {module!r}; "
            f"runpy.run_module({module!r}, run_name='__main__')"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, options), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        self.url = f"http://127.0.0.1:{port}"
        while True:
            try:
                self.post({"prompt": "Once", "max_tokens": 1})
            except OSError:
                if self._process.poll() is not None:
                    raise RuntimeError(f"{kind} has ended") from None
                time.sleep(0.02)
            else:
                break
        self.first_answer_s = time.perf_counter() - started

    @property
    def memory(self) -> int:
        """Resident bytes of the process."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) * 1024

    def post(self, body: dict, path: str = "/v1/completions") -> dict:
        """Return the answer; a reset connection (mlx-lm, 32 clients) is repeated."""
        while True:
            connection = self._connect(body, path)
            try:
                answer = json.loads(connection.getresponse().read())
                break
            except ConnectionResetError:
                self.resets += 1
                if self.kind == OURS or self.resets > 100:
                    raise
        connection.close()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def time_to_first_token(self, body: dict, path: str = "/v1/completions") -> float:
        started = time.perf_counter()
        connection = self._connect({**body, "stream": True}, path)
        response = connection.getresponse()
        first = 0.0
        for line in response:
            if not first and line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                text = choices and (
                    choices[0].get("text") or choices[0].get("delta", {}).get("content")
                )
                first = time.perf_counter() - started if text else 0.0
        connection.close()
        return first or time.perf_counter() - started

    def _connect(self, body: dict, path: str) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port)
        head = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), head)
        return connection

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


@contextmanager
def serving(kind: str, folder: Path, *arguments: str) -> Iterator[Server]:
    server = Server(kind, folder, *arguments)
    try:
        yield server
    finally:
        server.stop()


def make_requests(count: int, tokenizer, seed: int, longest: int = 300) -> list[dict]:
    """Prompts of 20 to 300 tokens and answers of 16 to 128, without EOS."""
    chance = random.Random(seed)
    requests = []
    for _ in range(count):
        length = chance.randint(20, longest)
        ids = tokenizer.encode(" ".join(chance.choices(WORDS, k=length)))[:length]
        requests.append(
            {
                "prompt": tokenizer.decode(ids),
                "max_tokens": chance.randint(16, 128),
                "temperature": 0,
                "logit_bias": {str(tokenizer.eos_id): -100},
            }
        )
    return requests


def tokens_per_second(server: Server, requests: list[dict], clients: int) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(server.post, requests))
    taken = time.perf_counter() - started
    return sum(a["usage"]["completion_tokens"] for a in answers) / taken


def alternate(
    rounds: int, measure: Callable[[str, int], float]
) -> tuple[list[float], list[float]]:
    """Measure both servers in turn; return the values of each."""
    values: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for number in range(rounds):
        for kind in (OURS, THEIRS) if number % 2 else (THEIRS, OURS):
            values[kind].append(measure(kind, number))
    return values[OURS], values[THEIRS]


def report(name: str, ours: list[float], theirs: list[float], unit: str) -> None:
    a, b = statistics.median(ours), statistics.median(theirs)
    print(
        f"{name}: ours {a:.3g} {unit} ({min(ours):.3g} to {max(ours):.3g}), mlx-lm "
        f"{b:.3g} ({min(theirs):.3g} to {max(theirs):.3g}), ratio {a / b:.2f}",
        flush=True,
    )


def measure_start(folder: Path, rounds: int) -> None:
    def first_answer(kind: str, number: int) -> float:
        with serving(kind, folder) as server:
            return server.first_answer_s

    report("first answer", *alternate(rounds, first_answer), "s")


def measure_tokens(
    name: str, folder: Path, tokenizer, rounds: int, counts: list[tuple[int, int]]
) -> None:
    for clients, count in counts:

        def rate(kind: str, number: int, clients=clients, count=count) -> float:
            requests = make_requests(count, tokenizer, seed=number)
            with serving(kind, folder) as server:
                tokens_per_second(server, requests[: min(clients, 4)], clients)
                return tokens_per_second(server, requests, clients)

        both = alternate(rounds, rate)
        report(f"{name}, {clients} clients", *both, "tokens/s")


def measure_short(folder: Path, tokenizer, rounds: int) -> None:
    """Short requests while others of 1,500 tokens come one after another."""
    chance = random.Random(0)

    def long_prompt() -> str:
        ids = tokenizer.encode(" ".join(chance.choices(WORDS, k=3000)))[:1500]
        return tokenizer.decode(ids)

    def waits(kind: str) -> list[float]:
        stop = threading.Event()
        with serving(kind, folder) as server:

            def load() -> None:
                while not stop.is_set():
                    server.post({"prompt": long_prompt(), "max_tokens": 4})

            threads = [threading.Thread(target=load) for _ in range(2)]
            for thread in threads:
                thread.start()
            time.sleep(1)
            taken = []
            for number in range(6):
                body = {"prompt": f"{number} is a number", "max_tokens": 2}
                taken.append(server.time_to_first_token(body))
                time.sleep(0.5)
            stop.set()
            for thread in threads:
                thread.join()
        return taken

    ours, theirs = [], []
    for _ in range(rounds):
        theirs += waits(THEIRS)
        ours += waits(OURS)
    report("short request among long prompts", ours, theirs, "s")
    print(f"  worst: {max(ours):.2f} s and {max(theirs):.2f} s")


def measure_shared(folder: Path, tokenizer, rounds: int) -> None:
    """Eight chats with a system prompt of 1,000 tokens in common."""
    path = "/v1/completions"
    for kind in (OURS, THEIRS):
        firsts, others = [], []
        for number in range(rounds):
            chance = random.Random(number)
            ids = tokenizer.encode(" ".join(chance.choices(WORDS, k=2000)))[:1000]
            system = tokenizer.decode(ids)
            bodies = [
                {"prompt": f"{system}\nQuestion {i}: {WORDS[i]}?", "max_tokens": 4}
                for i in range(8)
            ]
            with serving(kind, folder) as server:
                firsts.append(server.time_to_first_token(bodies[0], path))
                others += [server.time_to_first_token(b, path) for b in bodies[1:]]
        first, rest = statistics.median(firsts), statistics.median(others)
        print(
            f"shared prefix, {kind}: first chat {first:.2f} s, second to eighth "
            f"{rest:.2f} s (median), {max(others):.2f} s (worst), ratio "
            f"{rest / first:.3f}",
            flush=True,
        )


def measure_json(folder: Path, tokenizer, rounds: int) -> None:
    """Rows with a JSON schema against free rows, 8 clients, ours."""
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    free, constrained = [], []
    with serving(OURS, folder) as server:
        for number in range(rounds + 1):
            requests = make_requests(24, tokenizer, number, longest=60)
            requests = [{**body, "temperature": 1} for body in requests]
            with_schema = [{**r, "response_format": form} for r in requests]
            rates = [tokens_per_second(server, r, 8) for r in (requests, with_schema)]
            if number:
                free.append(rates[0])
                constrained.append(rates[1])
    a, b = statistics.median(constrained), statistics.median(free)
    print(f"JSON schema: {a:.0f} tokens/s, free {b:.0f}, ratio {a / b:.2f}", flush=True)


def measure_memory(folder: Path, tokenizer) -> None:
    with serving(OURS, folder) as server:
        sizes = {}
        for count in (200, 1800):
            requests = make_requests(count, tokenizer, seed=count)
            tokens_per_second(server, [{**r, "max_tokens": 8} for r in requests], 16)
            time.sleep(1)  # unused memory is released when there are no requests
            sizes[count] = server.memory
    first, last = sizes.values()
    print(
        f"memory after 200 and 2,000 requests: {first / 1e6:.0f} and "
        f"{last / 1e6:.0f} MB, ratio {last / first:.3f}"
    )


def make_270m(folder: Path, tokenizer: Path | None) -> Path:
    """Write a folder of the 270M's layers with random weights."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_openelm.config import OpenELMConfig
    from mlx_openelm.model.openelm import OpenELM
    from mlx_openelm.storage.hub import demo_folder

    folder.mkdir()
    pieces = tokenizer or demo_folder()
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        if (pieces / name).exists():
            shutil.copy(pieces / name, folder)
    rows = 32000 if tokenizer else 4096
    config = OpenELMConfig.preset("270M", vocab_size=rows)
    mx.random.seed(0)
    weights = dict(tree_flatten(OpenELM(config).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="start,tokens,large,short,shared,json,memory")
    parser.add_argument("--tokenizer", type=Path, help="folder of Llama 2's, for 270M")
    options = parser.parse_args()
    only, rounds = options.only.split(","), options.rounds
    import mlx_openelm

    _, tokenizer = mlx_openelm.load("demo")
    with tempfile.TemporaryDirectory() as temporary:
        demo = Path(temporary) / "demo"
        mlx_openelm.convert("demo", demo, dtype="float32")
        if {"large", "short", "shared"} & set(only):
            large = make_270m(Path(temporary) / "270M", options.tokenizer)
            _, pieces = mlx_openelm.load(large)
        if "start" in only:
            measure_start(demo, rounds)
        if "tokens" in only:
            counts = [(1, 6), (8, 32), (32, 96)]
            measure_tokens("demo", demo, tokenizer, rounds, counts)
        if "large" in only:
            measure_tokens("270M", large, pieces, rounds, [(8, 16)])
        if "short" in only:
            measure_short(large, pieces, rounds)
        if "shared" in only:
            measure_shared(large, pieces, rounds)
        if "json" in only:
            measure_json(demo, tokenizer, rounds)
        if "memory" in only:
            measure_memory(demo, tokenizer)


if __name__ == "__main__":
    main()
