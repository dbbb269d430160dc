"""The files of a fine-tuning run that are written once, at its start.

A run is a folder. From the first save on it is an adapter folder:

    adapter_config.json, adapters.safetensors    the adapter, in mlx-lm's format
    best/, average/       adapters: lowest validation loss; mean of the last N saves
    recipe.yaml           all options, resolved; reproduces the run
    data.json             statistics of the data
    metrics.jsonl         events, one per line
    state.safetensors     the state that `resume` continues from
    report.html           the report, rewritten during the run
    tensorboard/          with `report_to` tensorboard
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from mlx_openelm.finetuning.preparation import Prepared
from mlx_openelm.model.lora import A_NAMES
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.adapter_folder import AdapterConfig, write_config
from mlx_openelm.storage.base_check import fingerprint_base
from mlx_openelm.storage.shards import write_json
from mlx_openelm.storage.staging import replaced_file
from mlx_openelm.training.arrays import trained_tensors
from mlx_openelm.version import __version__

RECIPE, PAGE, TABLE = "recipe.yaml", "report.html", "data.json"


def write_start(staging: Path, prepared: Prepared, model: OpenELM) -> None:
    """Write the config, recipe and data statistics of a new run."""
    recipe = prepared.recipe
    ranks = {
        path: array.shape[-1]
        for name, array in trained_tensors(model).items()
        for path, _, leaf in [name.rpartition(".")]
        if leaf in A_NAMES
    }
    L, aware = len(model.layers), recipe.quantize_aware
    write_config(
        staging,
        AdapterConfig(
            method=recipe.fine_tune_type,  # type: ignore[arg-type] # the recipe checked it
            num_layers=L if recipe.num_layers == -1 else recipe.num_layers,
            keys=_keys_in_block(ranks),
            rank=max(ranks.values(), default=0),
            scale=recipe.adapter_scale,
            dropout=recipe.dropout,
            base=recipe.model,
            metadata={
                "version": __version__,
                "template": recipe.template,
                "base": {"name": recipe.model, "sketch": fingerprint_base(model)},
                "data": {"digest": prepared.table.digest},
                **({"quantize_aware": aware} if aware is not None else {}),
            },
        ),
    )
    write_text(staging / RECIPE, recipe.to_yaml())
    write_json(staging / TABLE, dataclasses.asdict(prepared.table))


def _keys_in_block(paths: Iterable[str]) -> tuple[str, ...]:
    """Return mlx-lm's keys: paths relative to the block, or to the model outside it."""
    keys = (
        ".".join(path.split(".")[3:]) if ".layers." in path else path for path in paths
    )
    return tuple(dict.fromkeys(keys))


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically."""
    with replaced_file(path) as part:
        part.write_text(text, encoding="utf-8")
