"""Is a model folder whole, and is it what it says it is?"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.conversion.merging import open_sources
from converters.conversion.options import ConversionOptions, Progress
from converters.conversion.plan import ConversionPlan
from converters.conversion.provenance import hash_file
from converters.formats.sources import ModelSource, locate
from converters.formats.tensor_readers import read_safetensor
from mlx_openelm.config import pad_vocabulary
from mlx_openelm.errors import OpenELMError
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.storage.loading import load_tokenizer, stored_dtype
from mlx_openelm.storage.model_folder import (
    INDEX,
    ModelFolder,
    is_finite,
    open_folder,
    unpacks_to_finite,
)
from mlx_openelm.storage.tokenizer_finder import (
    JSON_FILE,
    MODEL_FILE,
    verify_same,
    verify_tokenizer,
)
from mlx_openelm.tensor_names import to_folder, to_module


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One thing that was looked at, and what is wrong with it (nothing: it holds)."""

    name: str
    passed: bool
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found."""

    path: Path
    size: str
    checks: tuple[CheckResult, ...]
    passed: bool

    def describe_problems(self) -> str:
        """Return the first problem, and how many more there are."""
        first, *others = [p for check in self.checks for p in check.problems]
        return f"{first} (and {len(others)} more)" if others else first


def verify(
    path: Path,
    *,
    against: Sequence[str] = (),
    offline: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Verification:
    """Check a model folder's files, weights and tokenizer.

    Args:
        against: what it was made from (several, if averaged): every tensor is made
            again and compared bit for bit.

    Raises:
        OpenELMError: it cannot even be opened: no config, a damaged or missing file,
            tensors that are not those of the config.
    """
    folder = open_folder(path)
    found = {
        "index and shapes": _check_index(folder),
        "weights are numbers": _check_numbers(folder, on_progress),
        "hashes": _check_hashes(folder),
        "tokenizer": _check_tokenizer(folder),
    }
    if against:
        name = f"equal to {' '.join(against)}"
        found[name] = _compare(folder, against, offline, on_progress)
    checks = tuple(
        CheckResult(n, not wrong, tuple(wrong)) for n, wrong in found.items()
    )
    passed = all(check.passed for check in checks)
    return Verification(path, folder.config.size_name, checks, passed)


def _check_index(folder: ModelFolder) -> list[str]:
    """Files that the index names are there (`open_folder` saw to it); and the rest?"""
    index = folder.path / INDEX
    if not index.is_file():
        return []  # a single file needs none
    found = read_mapping(index)
    problems = []
    weight_map = found["weight_map"]
    strays = {file.name for file in folder.path.glob("model*.safetensors")}
    strays -= set(weight_map.values())
    problems += [
        f"{name} is in no index, but mlx-lm loads it" for name in sorted(strays)
    ]
    for name, tensor in folder.tensors.items():
        if weight_map.get(name) != tensor.file.name:
            problems.append(
                f"the index says {name} is in {weight_map.get(name)}; it is in "
                f"{tensor.file.name}"
            )
    problems += [
        f"the index names {name}, which is in no file"
        for name in sorted(weight_map.keys() - folder.tensors.keys())
    ]
    return problems


def _check_numbers(
    folder: ModelFolder, on_progress: Callable[[Progress], None]
) -> list[str]:
    problems, dtype = [], stored_dtype(folder)
    names = folder.config.tensor_shapes()
    for done, name in enumerate(names, start=1):
        parts, packing = _read_parts(folder, name), folder.packings.get(name)
        if packing is None:
            finite = is_finite(parts["weight"])
        else:
            finite = unpacks_to_finite(packing, parts, dtype)
        if not finite:
            problems.append(f"{to_folder(name)} holds NaN or infinity")
        on_progress(Progress(done, len(names), "tensors"))
    return problems


def _read_parts(folder: ModelFolder, name: str) -> dict[str, mx.array]:
    """Read a tensor (CoreNet name), a packed one in parts, by suffix."""
    module, parts = to_module(name), {}
    for suffix in ("weight", "scales", "biases"):
        if stored := folder.tensors.get(f"{module}.{suffix}"):
            parts[suffix] = read_safetensor(stored.file, f"{module}.{suffix}")
    return parts


def _check_hashes(folder: ModelFolder) -> list[str]:
    """Compare weights and tokenizer with what their converter noted of them."""
    noted = folder.metadata.get("files")
    if not isinstance(noted, dict):
        return []
    problems = []
    for name, digest in noted.items():
        file = folder.path / str(name)
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif hash_file(file) != digest:
            problems.append(f"{name} is not what the converter wrote")
    return problems


def _check_tokenizer(folder: ModelFolder) -> list[str]:
    files = [folder.path / name for name in (MODEL_FILE, JSON_FILE)]
    if _noted_options(folder).get("tokenizer") == "none" and not any(
        file.exists() for file in files
    ):
        return []
    try:
        tokenizer = load_tokenizer(folder)
        verify_tokenizer(tokenizer, folder.config.vocab_size)
        if files[1].is_file():  # what mlx-lm reads
            verify_same(files[1].read_text(encoding="utf-8"), tokenizer)
    except (OpenELMError, OSError, UnicodeDecodeError) as error:
        return [str(error).rstrip(".")]
    return []


def _compare(
    folder: ModelFolder,
    against: Sequence[str],
    offline: bool,
    on_progress: Callable[[Progress], None],
) -> list[str]:
    options = _options(folder)
    paths = [locate(name, offline=offline) for name in against]
    source, _ = open_sources(paths, options, offline=offline)
    problems = _compare_configs(source, folder)
    if problems:
        return problems
    plan = ConversionPlan(source, folder.config, stored_dtype(folder), folder.packings)
    names = folder.config.tensor_shapes()
    for done, name in enumerate(names, start=1):
        found = _read_parts(folder, name)
        for part_name, expected in plan.parts(name).items():
            if not mx.array_equal(found[part_name.rpartition(".")[2]], expected):
                problems.append(f"{part_name} differs")
        on_progress(Progress(done, len(names), "tensors"))
    return problems


def _noted_options(folder: ModelFolder) -> dict[str, Any]:
    noted = folder.metadata.get("options")
    return noted if isinstance(noted, dict) else {}


def _options(folder: ModelFolder) -> ConversionOptions:
    """How the folder says that it was made of its source."""
    noted = _noted_options(folder)
    base = noted.get("base")
    return ConversionOptions(
        merge=noted.get("merge") is True,
        apart=noted.get("apart") is True,
        average=noted.get("average") is True,
        base=base if isinstance(base, str) else None,
    )


def _compare_configs(source: ModelSource, folder: ModelFolder) -> list[str]:
    expected, found = asdict(source.config), asdict(folder.config)
    if pad_vocabulary(found["vocab_size"]) == expected["vocab_size"]:
        expected["vocab_size"] = found["vocab_size"]  # rows for padding were cut
    return [
        f"{key} is {found[key]}, the source's {expected[key]}"
        for key in expected
        if found[key] != expected[key]
    ]
