"""Run commands of one checkout and read their normalised results."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from checkout_scenarios import INPUTS

Files = dict[str, bytes]  # by name, or by "stdout of COMMAND"
Process = subprocess.Popen[bytes]

TIMEOUT_S = 600

_SPEEDS = (
    *("prompt_tps", "generation_tps", "time_to_first_token_s", "peak_memory_bytes"),
    *("seconds", "tokens_per_second"),
)
VARYING = {  # file name -> JSON keys whose numbers are not compared
    "stdout": _SPEEDS,
    "answers.jsonl": _SPEEDS,
    "metrics.jsonl": (*_SPEEDS, "memory_bytes", "seconds_left"),
    "state.safetensors": ("seconds", "reported", "peak_memory"),
}
BINARY = (".pt", ".gguf", ".model", ".png")


class CheckError(Exception):
    """A command failed, or was not stopped in time, so the check has no result."""


@dataclass(frozen=True)
class Side:
    """A checkout, and the folder in which its commands run."""

    name: str
    checkout: Path
    folder: Path

    def inside(self, name: str) -> "Side":
        """Return the side in a new folder with the inputs.

        Both sides use the same path in turn, so that no path and no hash of a file that
        contains a path differs.
        """
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file, text in INPUTS.items():
            (folder / file).write_text(text)
        return replace(self, folder=folder)

    def environment(self) -> dict[str, str]:
        ours = {
            "PYTHONPATH": str(self.checkout),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.folder / ".hub"),
            "COLUMNS": "100",
        }
        if sys.platform == "linux":
            ours["MLX_DISABLE_COMPILE"] = "1"
        others = ("MLX_", "PYTHON", "HF_", "OMP_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        return kept | ours

    def start(self, command: str) -> Process:
        environment = self.environment()
        if command.startswith(("pretrain", "grow")):
            environment["OMP_NUM_THREADS"] = "1"  # faster for a small model
        return subprocess.Popen(
            [sys.executable, "-m", "mlx_openelm", *shlex.split(command)],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, command: str, status: int = 0) -> bytes:
        """Return stdout, or stderr if the expected exit status is not 0."""
        with ended(self.start(command)) as process:
            out, err = process.communicate(timeout=TIMEOUT_S)
        if process.returncode != status:
            raise CheckError(
                f"{self.name}: {command!r} exited with {process.returncode}: "
                f"{last_line(err)}"
            )
        return err if status else out

    def stop(self, command: str, ready: Callable[[Path], bool], by: int) -> None:
        """Start a command and send it a signal as soon as `ready` allows."""
        deadline = time.monotonic() + TIMEOUT_S
        with ended(self.start(command)) as process:
            while process.poll() is None and not ready(self.folder):
                if time.monotonic() > deadline:
                    raise CheckError(
                        f"{self.name}: {command!r} never became ready to be stopped"
                    )
                time.sleep(0.002)
            process.send_signal(by)
            _, err = process.communicate(timeout=TIMEOUT_S)
        if process.returncode == 0 or not ready(self.folder):
            raise CheckError(
                f"{self.name}: {command!r} ended before it was stopped: "
                f"{last_line(err)}"
            )

    def read_results(self) -> Files:
        """Return the normalised content of all files except the inputs."""
        paths = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        named = {path.relative_to(self.folder).as_posix(): path for path in paths}
        return {
            name: self.normalise(path.name, path.read_bytes())
            for name, path in named.items()
            if name not in INPUTS
        }

    def normalise(self, name: str, content: bytes) -> bytes:
        """Replace the varying parts of a file, or of a command's output ("stdout")."""
        if name.endswith(BINARY):
            return content
        if name.endswith(".safetensors"):
            header, tensors = split_safetensors(content)
            header = self._mask(name, header).rstrip()
            return len(header).to_bytes(8, "little") + header + tensors
        content = self._mask(name, content)
        if name == "report.html":
            lines = re.sub(rb"-?\d[\d.,]*", b"#", content).splitlines()
            return b"\n".join(dict.fromkeys(lines))
        return content

    def _mask(self, name: str, content: bytes) -> bytes:
        content = content.replace(os.fsencode(self.checkout), b"<checkout>")
        keys = "|".join(VARYING.get(name, ()))
        number = rb'(\\?"(?:%s)\\?": )-?\d[-+.\de]*' % keys.encode()
        return re.sub(number, rb"\1#", content) if keys else content


@contextlib.contextmanager
def ended(process: Process) -> Iterator[Process]:
    """Kill the process at the end of the block if it is still running."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def last_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or ["no message"])[-1]


def split_safetensors(content: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]
