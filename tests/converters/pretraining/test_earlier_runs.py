"""Runs that an earlier version started, whose recipes had `weight`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

from pretrainings import read_losses, small_recipe, streamed_data  # noqa: E402

from converters.pretraining.checkpoints import LAST, RECIPE  # noqa: E402
from converters.pretraining.recipe import CorpusRecipe  # noqa: E402
from converters.pretraining.run import pretrain  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402


def age(output: Path, loader: dict | None = None) -> None:
    """Change a run's files to those of the earlier version."""
    recipe = json.loads((output / RECIPE).read_text())
    for key in ("mixture", "readers"):
        del recipe["data"][key]
    for corpus in recipe["data"]["corpora"]:
        for key in ("name", "source", "token_share"):
            del corpus[key]
        corpus["weight"] = 1.0
    (output / RECIPE).write_text(json.dumps(recipe))
    state = torch.load(output / LAST, weights_only=True)
    resume = json.loads(state["resume"])
    resume["loader"] = loader or {**resume["loader"], "lanes": []}
    state["resume"] = json.dumps(resume)
    torch.save(state, output / LAST)
    for checksum in output.glob(f"{LAST}*sha256*"):
        checksum.unlink()


def test_packed_text_resumes(tmp_path):
    recipe = small_recipe(tmp_path)
    files = (recipe.data.train, recipe.data.heldout)
    corpora = tuple(map(CorpusRecipe, files))
    data = replace(recipe.data, train=(), corpora=corpora, heldout=())
    recipe = replace(recipe, data=data, steps=8)
    whole = replace(recipe, output=str(tmp_path / "whole"))
    pretrain(whole)

    class Cut(Exception):
        pass

    def cut(event):
        if type(event).__name__ == "Saved" and event.step == 4:
            raise Cut

    with pytest.raises(Cut):
        pretrain(recipe, on_event=cut)
    age(Path(recipe.output))
    pretrain(recipe, resume=True)
    assert read_losses(recipe.output)[-4:] == read_losses(whole.output)[-4:]


def test_streamed_text_is_refused_with_the_command_for_a_new_run(tmp_path):
    recipe = small_recipe(tmp_path)
    data = streamed_data(tmp_path)
    data = replace(data, train=(), corpora=(CorpusRecipe(data.train),))
    recipe = replace(recipe, data=data, steps=4)
    pretrain(recipe)
    lanes = [{"lane": i, "drawn": 4, "places": [[0] * 6]} for i in range(4)]
    age(Path(recipe.output), {"form": "lanes", "data": "x", "seed": 0, "lanes": lanes})
    command = r"mlx-openelm pretrain -c RECIPE --init .*\.pt --output NEW"
    with pytest.raises(OpenELMError, match=command):
        pretrain(recipe, resume=True)
