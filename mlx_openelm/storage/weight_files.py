"""The choice of a folder's weight files, by their names.

A folder can hold more than one set of weights: a model that was saved twice, or in two
formats. As in transformers, the single file comes before shards with an index, and
safetensors before .bin files. (mlx-lm loads every model*.safetensors.)
"""

import fnmatch
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import list_names

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How a folder or a repository stores weights.

    Attributes:
        config: the file that describes the weights.
        single: the name of a file with all weights.
        pattern: matches all weight files.
        index: maps the tensors to shards.
    """

    config: str
    single: str
    pattern: str
    index: str = ""

    def choose(self, names: Collection[str]) -> list[str]:
        """Return the weight files among `names`: the single file, else the shards."""
        if self.single in names:
            return [self.single]
        return sorted(fnmatch.filter(names, self.pattern))


def _one_file(config: str, name: str) -> WeightLayout:
    return WeightLayout(config, name, name)


SAFETENSORS = WeightLayout(CONFIG, "model.safetensors", "model*.safetensors", INDEX)
APPLE_MLX = _one_file(CONFIG, "weights.safetensors")  # of Apple's own MLX folders
BIN = WeightLayout(
    CONFIG, "pytorch_model.bin", "pytorch_model*.bin", "pytorch_model.bin.index.json"
)
MLX_ADAPTER = _one_file(ADAPTER_CONFIG, "adapters.safetensors")
PEFT_ADAPTER = _one_file(ADAPTER_CONFIG, "adapter_model.safetensors")
PEFT_BIN = _one_file(ADAPTER_CONFIG, "adapter_model.bin")

MODEL_LAYOUTS = (SAFETENSORS, APPLE_MLX, BIN)
LAYOUTS = (*MODEL_LAYOUTS, MLX_ADAPTER, PEFT_ADAPTER, PEFT_BIN)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a folder.

    Attributes:
        unused: names of other weight files and of an index that describes those.
    """

    layout: WeightLayout
    files: tuple[Path, ...]
    unused: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """A note for the user on files that are not used."""
        if not self.unused:
            return ()
        used = list_names((file.name for file in self.files), most=3, quoted=False)
        unused = list_names(self.unused, most=3, quoted=False)
        return (
            f"{self.files[0].parent} holds more than one set of weights: using {used}, "
            f"not {unused}.",
        )


def find_weight_files(
    path: Path, layouts: Sequence[WeightLayout] = (SAFETENSORS,)
) -> WeightFiles:
    """Return the weight files of the first of `layouts` that a folder has.

    Raises:
        OpenELMError: there are none, or shards of the index are missing.
    """
    names = _list_files(path)
    layout = next((one for one in layouts if one.choose(names)), layouts[0])
    chosen = layout.choose(names)
    indexed: set[str] = set()  # files that the index names
    if layout.index in names:
        indexed = _read_indexed(path / layout.index, needed=chosen != [layout.single])
    if indexed and chosen != [layout.single]:
        # Only names of files in this folder pass, so no name leads out of it.
        if missing := sorted(indexed - set(chosen)):
            raise OpenELMError(
                f"{path} is incomplete: {list_names(missing, quoted=False)} of its "
                "index is missing; download or convert it again."
            )
        chosen = [name for name in chosen if name in indexed]
    if not chosen:
        raise OpenELMError(_describe_absence(path, layout, names))
    described = [one for one in LAYOUTS if one.config in names]
    others = {n for one in described for n in fnmatch.filter(names, one.pattern)}
    if not indexed <= set(chosen):
        others.add(layout.index)
    unused = tuple(sorted(others - set(chosen)))
    return WeightFiles(layout, tuple(path / name for name in chosen), unused)


def is_adapter(path: Path) -> bool:
    """Return whether a folder is an adapter, not a model.

    Some trainers write the base's config.json next to an adapter.
    """
    return (path / ADAPTER_CONFIG).is_file() and not holds_model(path)


def holds_model(path: Path) -> bool:
    """Return whether a folder has the config and the weights of a model."""
    names = _list_files(path)
    return CONFIG in names and any(layout.choose(names) for layout in MODEL_LAYOUTS)


def read_index(path: Path) -> dict[str, str]:
    """Return the file name of every tensor in an index.

    Raises:
        OpenELMError: it cannot be read, or has no weight_map.
    """
    weight_map = read_mapping(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise OpenELMError(
            f"{path} has no weight_map, or an empty one; download or convert it again."
        )
    return {name: str(file) for name, file in weight_map.items()}


def _read_indexed(path: Path, *, needed: bool) -> set[str]:
    try:
        return set(read_index(path).values())
    except OpenELMError:
        if needed:
            raise
        return set()


def _list_files(path: Path) -> list[str]:
    names = []
    for entry in sorted(path.iterdir()):
        if entry.is_file():
            names.append(entry.name)
        elif entry.is_symlink() and any(
            fnmatch.fnmatch(entry.name, one.pattern) for one in LAYOUTS
        ):
            raise OpenELMError(
                f"{entry} is a link to a missing file, {entry.readlink()}; download "
                "or copy it again."
            )
    return names


def _describe_absence(path: Path, layout: WeightLayout, names: Collection[str]) -> str:
    absent = f"{path} holds no {layout.pattern}"
    command = f"`mlx-openelm convert {shlex.quote(str(path))}`"
    for other in MODEL_LAYOUTS:
        if found := other.choose(names):
            listed = list_names(found, most=3, quoted=False)
            return f"{absent}, only {listed}; {command} makes a model folder of it."
    if checkpoints := [n for n in names if n.endswith(".pt") and n[0] != "."]:
        first = path / checkpoints[0]  # of a training run, or grown
        return (
            f"{absent}, only {list_names(checkpoints, quoted=False)}; convert one of "
            f"them, for example with `mlx-openelm convert {shlex.quote(str(first))}`."
        )
    return f"{absent}; download or copy its weights, or pass another folder."
