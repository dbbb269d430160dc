"""The files of a fine-tuning run that stay the same from its start.

A run is a folder, an adapter folder from the first save on:

    adapter_config.json, adapters.safetensors    the adapter, as mlx-lm reads it
    best/, average/       the same of the least validation loss; of the last N saves
    recipe.yaml           every option, resolved; runs the same again
    data.json             what was found in the data
    metrics.jsonl         an event a line
    state.safetensors     all that `resume` needs
    report.html           the run as a page, rewritten during the run
    tensorboard/          with `report_to` tensorboard
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from mlx_openelm.finetuning.preparation import Prepared
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.adapter_folder import AdapterConfig, write_config
from mlx_openelm.storage.base_check import fingerprint_base
from mlx_openelm.storage.shards import write_json
from mlx_openelm.storage.staging import replaced_file
from mlx_openelm.training.arrays import trained_tensors
from mlx_openelm.version import __version__

RECIPE, PAGE, TABLE = "recipe.yaml", "report.html", "data.json"


def write_start(staging: Path, prepared: Prepared, model: OpenELM) -> None:
    """Write what does not change in the run."""
    recipe = prepared.recipe
    ranks = {
        name.removesuffix(".lora_a"): array.shape[-1]
        for name, array in trained_tensors(model).items()
        if name.endswith(".lora_a")
    }
    L = len(model.layers)
    write_config(
        staging,
        AdapterConfig(
            method=recipe.fine_tune_type,  # type: ignore[arg-type] # the recipe checked it
            num_layers=L if recipe.num_layers == -1 else recipe.num_layers,
            keys=_spell_keys(ranks),
            rank=max(ranks.values(), default=0),
            scale=recipe.scale,
            dropout=recipe.dropout,
            base=recipe.model,
            metadata={
                "version": __version__,
                "template": recipe.template,
                "base": {"name": recipe.model, "sketch": fingerprint_base(model)},
                "data": {"digest": prepared.table.digest},
            },
        ),
    )
    write_text(staging / RECIPE, recipe.to_yaml())
    write_json(staging / TABLE, dataclasses.asdict(prepared.table))


def _spell_keys(paths: Iterable[str]) -> tuple[str, ...]:
    """Return mlx-lm's keys: paths in a block where the last blocks all have them."""
    keys: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        inside = ".".join(parts[3:]) if ".layers." in path else path
        keys[inside] = None
    return tuple(keys)


def write_text(path: Path, text: str) -> None:
    """Replace a file; until the new one is whole the old one stays."""
    with replaced_file(path) as part:
        part.write_text(text, encoding="utf-8")
