"""The adapters in a run's folder: the last one, the best, and the mean of the last N.

adapters.safetensors           the last save
0000100_adapters.safetensors   snapshots for the mean, with mlx-lm's names
best/, average/                adapter folders
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_openelm.storage.adapter_folder import CONFIG, WEIGHTS, save_tensors
from mlx_openelm.storage.staging import replaced_file

AVERAGE = "average"

Tensors = Mapping[str, mx.array]


def replace_weights(folder: Path, tensors: Tensors) -> None:
    """Replace the folder's adapter atomically.

    Raises:
        OSError: the adapter cannot be written.
    """
    with replaced_file(folder / WEIGHTS) as path:
        save_tensors(path, tensors, format="mlx")


def replace_copy(run: Path, name: str, tensors: Tensors) -> None:
    """Write or replace an adapter folder in a run; raises as `replace_weights`."""
    folder = run / name
    folder.mkdir(exist_ok=True)
    with replaced_file(folder / CONFIG) as path:
        path.write_bytes((run / CONFIG).read_bytes())
    replace_weights(folder, tensors)


def save_snapshot(run: Path, step: int, tensors: Tensors, *, keep: int) -> None:
    """Save the adapter of a step, and delete all but the last `keep` snapshots.

    Raises:
        OSError: the adapter cannot be written.
    """
    with replaced_file(run / f"{step:07d}_{WEIGHTS}") as path:
        save_tensors(path, tensors, format="mlx")
    for old in _find_snapshots(run)[:-keep]:
        old.unlink()


def write_average(run: Path) -> None:
    """Write the mean of the snapshots; raises as `replace_weights`."""
    means: dict[str, Any] = {}
    files = _find_snapshots(run)
    if not files:
        return
    for path in files:
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        for name, array in arrays.items():
            part = np.array(array.astype(mx.float32), np.float64) / len(files)
            means[name] = means[name] + part if name in means else part
    tensors = {n: mx.array(mean.astype(np.float32)) for n, mean in means.items()}
    replace_copy(run, AVERAGE, tensors)


def _find_snapshots(run: Path) -> list[Path]:
    return sorted(run.glob(f"[0-9]*_{WEIGHTS}"))
