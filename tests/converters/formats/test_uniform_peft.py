"""PEFT adapters with one rank and alpha where that is exact; mlx-swift needs it."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import LINEARS, SCALED, make_factors, weights_of, write_peft_folder
from safetensors.numpy import load_file

from converters.conversion.run import convert
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.storage.shards import write_json

CONFIG = "adapter_config.json"
IGNORED = "which mlx-swift ignores in a PEFT adapter"


def write(
    folder: Path, ranks: list[int], alphas: list[float], *, dora: bool = False
) -> Path:
    """Write a PEFT adapter whose modules take these settings in turn."""
    parts = make_factors(weights_of(SCALED), LINEARS, dora=dora)
    settings = {}
    for i, (name, factor) in enumerate(parts.items()):
        rank, alpha = ranks[i % len(ranks)], alphas[i % len(alphas)]
        factor["A"] = factor["A"][:rank]
        factor["B"] = np.ascontiguousarray(factor["B"][:, :rank])
        settings[f"transformer.{name}"] = (rank, alpha)
    write_peft_folder(folder, parts)
    patterns = {
        "rank_pattern": {path: rank for path, (rank, _) in settings.items()},
        "alpha_pattern": {path: alpha for path, (_, alpha) in settings.items()},
    }
    write_json(folder / CONFIG, read_mapping(folder / CONFIG) | patterns)
    return folder


def effects(folder: Path, *, as_swift: bool = False) -> dict[str, np.ndarray]:
    """Return what is added to each weight; `as_swift` ignores the patterns."""
    config = read_mapping(folder / CONFIG)
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank, alpha = config["r"], config["lora_alpha"]
        if not as_swift:
            rank = config["rank_pattern"].get(path, rank)
            alpha = config["alpha_pattern"].get(path, alpha)
            assert len(a) == rank
        b = tensors[name.replace("lora_A", "lora_B")]
        found[path] = np.float32(alpha / rank) * (b @ a)
    return found


def exported(source: Path) -> tuple[Path, tuple[str, ...]]:
    report = convert(source, source.parent / "out", to="peft")
    return Path(report.path), report.notes


def check(actual: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert actual.keys() == wanted.keys()
    for path, effect in wanted.items():
        np.testing.assert_allclose(actual[path], effect, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ([4, 2, 1], [8, 4, 2]),  # one scale, different ranks
        ([4], [8, 16, 2, 1]),  # scales that differ by powers of two
        ([2, 4], [6, 24]),
    ],
)
def test_they_are_written_uniform_where_that_is_exact(
    tmp_path: Path, ranks: list[int], alphas: list[float]
) -> None:
    source = write(tmp_path / "source", ranks, alphas)
    path, notes = exported(source)
    config = read_mapping(path / CONFIG)
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {}, {})
    check(effects(path, as_swift=True), effects(source))
    assert any("all modules with rank 4, with exactly the same" in n for n in notes)
    assert not any(IGNORED in note for note in notes)


@pytest.mark.parametrize(
    ("ranks", "alphas"), [([4], [8, 12]), ([4, 3], [8]), ([4, 2], [10, 3])]
)
def test_otherwise_patterns_are_written_and_a_note_says_so(
    tmp_path: Path, ranks: list[int], alphas: list[float]
) -> None:
    source = write(tmp_path / "source", ranks, alphas)
    path, notes = exported(source)
    config = read_mapping(path / CONFIG)
    assert config["rank_pattern"] or config["alpha_pattern"]
    check(effects(path), effects(source))
    assert any(IGNORED in note for note in notes)


def test_equal_settings_are_kept_without_a_note(tmp_path: Path) -> None:
    source = write(tmp_path / "source", [4], [8])
    path, notes = exported(source)
    assert notes == ()
    before, after = (load_file(f / "adapter_model.safetensors") for f in (source, path))
    assert all(np.array_equal(before[name], after[name]) for name in after)


def test_dora_in_a_peft_adapter_is_named(tmp_path: Path) -> None:
    _, notes = exported(write(tmp_path / "source", [4], [8], dora=True))
    assert any("mlx-swift does not load DoRA from a PEFT adapter" in n for n in notes)


@pytest.mark.parametrize("dora", [False, True])
def test_ours_have_one_rank_and_scale(tmp_path: Path, dora: bool) -> None:
    """So that mlx-swift and mlx-lm load them."""
    source = write(tmp_path / "source", [4, 2, 3], [8, 5], dora=dora)
    path = Path(convert(source, tmp_path / "ours").path)
    config = read_mapping(path / CONFIG)["lora_parameters"]
    arrays = mx.load(str(path / "adapters.safetensors"))
    assert isinstance(arrays, dict)
    for module, effect in effects(source).items():
        a, b = arrays[f"{module}.lora_a"], arrays[f"{module}.lora_b"]
        assert a.shape[1] == config["rank"]
        ours = np.array(config["scale"] * (a @ b)).T
        np.testing.assert_allclose(ours, effect, rtol=1e-5, atol=1e-6)
