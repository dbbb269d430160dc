"""Kills a training run before each of its disk operations, and resumes it.

This is a script because it forks; the parent computes nothing. An audit hook, called
for each open, rename and removal, kills the child with SIGKILL.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from pretrainings import small_recipe, streamed_data
from reports import draw_nothing

from converters.pretraining.checkpoints import AVERAGE, Resume
from converters.pretraining.recipe import PretrainRecipe
from converters.pretraining.run import pretrain


def run(recipe: PretrainRecipe, *, resume: Resume, steps: int | None = None) -> bool:
    """Train in a child that is killed after `steps` steps; return whether it was."""
    child = os.fork()
    if child == 0:
        left = steps

        def kill_in_time(event: str, args: tuple) -> None:
            nonlocal left
            if left is None or event not in ("open", "os.rename", "os.remove"):
                return
            writes = event != "open" or any(m in str(args[1]) for m in "wa+x")
            if writes and str(args[0]).startswith(recipe.output):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(kill_in_time)
            pretrain(recipe, resume=resume)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def curve(recipe: PretrainRecipe) -> list[tuple]:
    """The metrics of every step and evaluation that do not depend on the clock."""
    lines = (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()
    return [
        (r["event"], r["step"], r.get("loss"), r.get("bits_per_byte"), r.get("tokens"))
        for r in map(json.loads, lines)
        if r["event"] in ("trained", "evaluated")
    ]


def main(folder: Path) -> None:
    draw_nothing()
    recipe = replace(
        small_recipe(folder), steps=3, save_every=2, eval_every=2, report_every=2
    )
    recipe = replace(recipe, keep_last=1, average_last=1, keep_states=1)
    recipe = replace(recipe, data=streamed_data(folder))
    heldout = (str(folder / "heldout.txt"),)
    recipe = replace(recipe, data=replace(recipe.data, heldout=heldout))
    whole = replace(recipe, output=str(folder / "whole"))
    assert not run(whole, resume=False)
    expected = torch.load(Path(whole.output) / AVERAGE, weights_only=True)
    kills = 0
    while True:
        killed = replace(recipe, output=str(folder / f"killed-{kills}"))
        if not run(killed, resume=False, steps=kills):
            break
        output = Path(killed.output)
        assert not run(killed, resume="auto")
        weights = torch.load(output / AVERAGE, weights_only=True)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert curve(killed) == curve(whole), (curve(killed), curve(whole))
        assert not list(output.glob(".checkpoint*")), list(output.glob(".checkpoint*"))
        kills += 1
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
