"""Kills a writer before each of its disk operations, checks the result, and resumes.

This is a script because it forks, and a fork of a process that has used MLX hangs. An
audit hook, called for each operation (open, rename, mkdir, ...), kills the child with
SIGKILL. The number of kills is printed.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import mlx.core as mx

from mlx_openelm.storage.shards import ShardWriter, TensorLayout, write_json
from mlx_openelm.storage.staging import staged_folder

STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock"}
LAYOUT = {f"t{i}": TensorLayout(mx.uint8, (1000,)) for i in range(6)}
NUM_SHARDS = 3


def write(target: Path, *, value: int, force: bool = False) -> None:
    """Write a folder of three shards with contents derived from `value`."""
    with staged_folder(target, force=force, job={"value": value}) as folder:
        with ShardWriter(folder, LAYOUT, shard_bytes=2000) as writer:
            for i, (name, tensor) in enumerate(LAYOUT.items()):
                if name not in writer.whole:
                    writer.add(name, mx.full(tensor.shape, value + i, tensor.dtype))
            writer.close(6000)
        write_json(folder / "config.json", {"value": value})


def run(target: Path, *, value: int, force: bool, steps: int | None = None) -> bool:
    """Write in a child that is killed after `steps` steps; return whether it was."""
    child = os.fork()
    if child == 0:
        left = steps

        def kill_in_time(event: str, args: tuple) -> None:
            nonlocal left
            if left is not None and event in STEPS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(kill_in_time)
            write(target, value=value, force=force)
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    shards = folder.glob("model*.safetensors")
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in shards}


def kill_once(root: Path, steps: int, *, force: bool, again: bool) -> tuple[bool, int]:
    """Return whether a writer was killed, and the number of its complete shards.

    Args:
        again: repeat the job even if the killed run had completed the target.
    """
    old, new, target = root / "old", root / "new", root / "into" / "out"
    target.parent.mkdir()
    if force:
        shutil.copytree(old, target)
    killed = run(target, value=11, force=force, steps=steps)
    is_new = target.exists() and contents(target) == contents(new)
    if force:
        assert is_new or contents(target) == contents(old)
    else:
        assert is_new or not target.exists()
    complete = {}
    for part in target.parent.glob(".out.*.part"):
        complete = inodes(part)
    if again or not is_new:
        assert not run(target, value=11, force=force)
        assert contents(target) == contents(new)
        assert inodes(target).items() >= complete.items()  # none is written again
    shutil.rmtree(target)
    assert not run(target, value=1, force=False)  # another job for the same target
    assert contents(target) == contents(old)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    shutil.rmtree(target.parent)
    return killed, len(complete)


def main(root: Path, *, force: bool) -> None:
    assert not run(root / "old", value=1, force=False)
    assert not run(root / "new", value=11, force=False)
    assert len(inodes(root / "new")) == NUM_SHARDS
    steps, killed, counts = 0, True, set()
    while killed:
        for again in {False, force}:
            killed, count = kill_once(root, steps, force=force, again=again)
            counts.add(count)
        steps += 1
    assert counts == set(range(NUM_SHARDS + 1))
    print(steps)


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # a kill, unlike a power failure, loses no write
    main(Path(sys.argv[1]), force=sys.argv[2] == "force")
