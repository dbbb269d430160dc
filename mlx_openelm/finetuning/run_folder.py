"""The folder of a run, which is found before mlx is imported.

The environment of a run to resume is read from it; see `tuning`.
"""

from pathlib import Path

from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.records import DATA_SUFFIXES
from mlx_openelm.paths import user_path

DEFAULT_PARENT = Path("adapters")  # of runs without `adapter_path`


def run_folder(recipe: FinetuneRecipe) -> Path:
    """Return the folder of the run, by default named after the data."""
    path = user_path(recipe.adapter_path or default_folder(recipe.data))
    return path if path.name not in ("", "..") else path.resolve()


def default_folder(data: str) -> Path:
    """Return the folder of a run on this file or folder without `adapter_path`."""
    return DEFAULT_PARENT / stem(Path(data))


def stem(path: Path) -> str:
    """Return a file's or a folder's name without .jsonl, .parquet and so on."""
    name = user_path(path).absolute().resolve().name
    suffix = next((s for s in DATA_SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]
