"""One of several processes that pre-train together; a script for test_..._processes."""

import json
import os
import sys
from pathlib import Path

from converters.pretraining.recipe import PretrainRecipe
from converters.pretraining.run import pretrain
from mlx_openelm.errors import OpenELMError
from mlx_openelm.recipe_loader import make_recipe


def main(jobs: Path) -> None:
    for job in json.loads(jobs.read_text()):
        os.environ["MASTER_PORT"] = str(job["port"])
        found = job["recipe"]
        own = job["files"].get(f"rank{os.environ['RANK']}")
        if own is not None:
            found["data"]["train"] = [own]
        recipe = make_recipe(PretrainRecipe, found, "the job")
        try:
            pretrain(recipe, resume=job["resume"])
            print("done", flush=True)
        except OpenELMError as error:
            print(error, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
