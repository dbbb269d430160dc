"""Kills a writer before every single thing that it does to the disk, and runs it again.

A script, for it forks, and a fork of a process that has computed with MLX hangs. Python
announces each step (open, rename, mkdir, ...) to an audit hook: there the child dies,
as by SIGKILL. What must hold after each death is asserted here, and the number of
deaths is printed.
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
    """Write a folder of three shards; the value decides what they hold."""
    with staged_folder(target, force=force, job={"value": value}) as folder:
        with ShardWriter(folder, LAYOUT, shard_bytes=2000) as writer:
            for i, (name, tensor) in enumerate(LAYOUT.items()):
                if name not in writer.whole:
                    writer.add(name, mx.full(tensor.shape, value + i, tensor.dtype))
            writer.close(6000)
        write_json(folder / "config.json", {"value": value})


def run(target: Path, *, value: int, force: bool, steps: int | None = None) -> bool:
    """Write in a child, which dies before its step of that number; was there one?"""
    child = os.fork()
    if child == 0:
        left = steps

        def die_in_time(event: str, args: tuple) -> None:
            nonlocal left
            if left is not None and event in STEPS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(die_in_time)
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


def die(place: Path, steps: int, *, force: bool, again: bool) -> tuple[bool, int]:
    """Die once; return whether there was such a step, and how many shards were whole.

    Args:
        again: run the same job again even if the death came too late to hinder it.
    """
    old, new, target = place / "old", place / "new", place / "into" / "out"
    target.parent.mkdir()
    if force:
        shutil.copytree(old, target)
    killed = run(target, value=11, force=force, steps=steps)
    is_new = target.exists() and contents(target) == contents(new)
    if force:
        assert is_new or contents(target) == contents(old)
    else:
        assert is_new or not target.exists()
    whole = {}
    for part in target.parent.glob(".out.*.part"):
        whole = inodes(part)
    if again or not is_new:
        assert not run(target, value=11, force=force)
        assert contents(target) == contents(new)
        assert inodes(target).items() >= whole.items()  # not one is written again
    shutil.rmtree(target)
    assert not run(target, value=1, force=False)  # another job for the same place
    assert contents(target) == contents(old)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    shutil.rmtree(target.parent)
    return killed, len(whole)


def main(place: Path, *, force: bool) -> None:
    assert not run(place / "old", value=1, force=False)
    assert not run(place / "new", value=11, force=False)
    assert len(inodes(place / "new")) == NUM_SHARDS
    steps, killed, went_on = 0, True, set()
    while killed:
        for again in {False, force}:
            killed, whole = die(place, steps, force=force, again=again)
            went_on.add(whole)
        steps += 1
    assert went_on == set(range(NUM_SHARDS + 1))
    print(steps)


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # a kill, unlike a power cut, loses no write
    main(Path(sys.argv[1]), force=sys.argv[2] == "force")
