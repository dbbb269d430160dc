"""One of the processes of a distributed pre-training; a script for tests."""

import json
import os
import sys
from pathlib import Path

from reports import draw_nothing

from converters.pretraining.recipe import PretrainRecipe
from converters.pretraining.run import pretrain
from mlx_openelm.errors import OpenELMError
from mlx_openelm.recipe_loader import make_recipe


def main(jobs: Path) -> None:
    for job in json.loads(jobs.read_text()):
        os.environ["MASTER_PORT"] = str(job["port"])
        values = job["recipe"]
        file = job["files"].get(f"rank{os.environ['RANK']}")
        if file is not None:
            values["data"]["train"] = [file]
        recipe = make_recipe(PretrainRecipe, values, "the job")
        try:
            pretrain(recipe, resume=job["resume"])
            print("done", flush=True)
        except OpenELMError as error:
            print(error, flush=True)


if __name__ == "__main__":
    draw_nothing()
    main(Path(sys.argv[1]))
