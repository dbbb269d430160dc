"""The adapters in a run's folder: the last one, the best, and the mean of the last N.

adapters.safetensors           the last save
0000100_adapters.safetensors   those that the mean is made of, named as by mlx-lm
best/, average/                adapter folders of their own
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
    """Replace the folder's adapter; until the new one is whole the old one stays.

    Raises:
        OSError: the disk refuses.
    """
    with replaced_file(folder / WEIGHTS) as path:
        save_tensors(path, tensors, format="mlx")


def replace_copy(run: Path, name: str, tensors: Tensors) -> None:
    """Write, or replace, an adapter folder in a run's; errors as `replace_weights`."""
    folder = run / name
    folder.mkdir(exist_ok=True)
    with replaced_file(folder / CONFIG) as path:
        path.write_bytes((run / CONFIG).read_bytes())
    replace_weights(folder, tensors)


def keep(run: Path, step: int, tensors: Tensors, *, most: int) -> None:
    """Keep an adapter under its step's name, and of these the last `most`.

    Raises:
        OSError: the disk refuses.
    """
    with replaced_file(run / f"{step:07d}_{WEIGHTS}") as path:
        save_tensors(path, tensors, format="mlx")
    for old in _kept(run)[:-most]:
        old.unlink()


def write_average(run: Path) -> None:
    """Write the mean of the kept adapters; errors as `replace_weights`."""
    means: dict[str, Any] = {}
    files = _kept(run)
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


def _kept(run: Path) -> list[Path]:
    return sorted(run.glob(f"[0-9]*_{WEIGHTS}"))
