"""Adapters as GGUF files: what llama.cpp reads, and what it cannot hold.

`tests/promises/test_llama_cpp.py` runs one in llama.cpp.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call, expect_error
from models import (
    LINEARS,
    SCALED,
    TABLE,
    make_factors,
    weights_of,
    write_mlx_lm_adapter,
    write_peft_folder,
)

from converters.conversion.run import convert
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.storage.shards import write_json

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

NAMES = {  # of llama.cpp, by ours; the gate comes before the up projection
    "attn.qkv_proj": ["attn_qkv"],
    "attn.out_proj": ["attn_output"],
    "ffn.proj_1": ["ffn_gate", "ffn_up"],
    "ffn.proj_2": ["ffn_down"],
}


def factors(modules: tuple[str, ...] = LINEARS, **options: Any) -> dict[str, Any]:
    return make_factors(weights_of(SCALED), modules, **options)


def read(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    return reader, {tensor.name: tensor.data for tensor in reader.tensors}


def updates(path: Path) -> dict[str, np.ndarray]:
    """Return what llama.cpp adds: alpha / rank * B A, or B A if alpha is 0."""
    reader, tensors = read(path)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            b = tensors[name.removesuffix("a") + "b"]
            scale = alpha / b.shape[1] if alpha else 1.0
            found[name.removesuffix(".weight.lora_a")] = scale * b @ a
    assert len(tensors) == 2 * len(found)
    return found


def expected(scales: dict[str, float], parts: dict[str, Any]) -> dict[str, np.ndarray]:
    wanted = {}
    for module, factor in parts.items():
        _, layer, *inner = module.split(".")
        names = NAMES[".".join(inner)]
        update = scales[module] * factor["B"] @ factor["A"]
        for name, rows in zip(names, np.split(update, len(names)), strict=True):
            wanted[f"blk.{layer}.{name}"] = rows
    return wanted


def check(actual: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert actual.keys() == wanted.keys()
    for name, update in wanted.items():
        np.testing.assert_allclose(actual[name], update, rtol=1e-5, atol=1e-6)


def test_it_has_the_keys_and_names_of_llama_cpp(tmp_path: Path) -> None:
    parts = factors()
    source = write_mlx_lm_adapter(tmp_path / "source", parts, scale=2.0)
    report = convert(source, tmp_path / "a.gguf", to="gguf")
    assert (report.to, report.rank, report.notes) == ("gguf", 4, ())
    reader, _ = read(report.path)
    keys = ("general.type", "general.architecture", "adapter.type")
    assert [reader.get_field(key).contents() for key in keys] == [
        *("adapter", "openelm", "lora")
    ]
    check(updates(report.path), expected(dict.fromkeys(parts, 2.0), parts))


def test_differing_ranks_and_alphas_have_the_same_effect(tmp_path: Path) -> None:
    parts = factors()
    for i, factor in enumerate(parts.values()):
        rank = 1 + i % 4
        factor["A"], factor["B"] = factor["A"][:rank], factor["B"][:, :rank].copy()
    source = write_peft_folder(tmp_path / "source", parts)
    raw = read_mapping(source / "adapter_config.json")
    ranks = {f"transformer.{m}": len(f["A"]) for m, f in parts.items()}
    alphas = {f"transformer.{m}": 3 + i % 5 for i, m in enumerate(parts)}
    changed = {"rank_pattern": ranks, "alpha_pattern": alphas}
    write_json(source / "adapter_config.json", raw | changed)
    report = convert(source, tmp_path / "a.gguf", to="gguf")
    assert any("into lora_b: llama.cpp has one alpha" in n for n in report.notes)
    scales = {m: alphas[f"transformer.{m}"] / len(f["A"]) for m, f in parts.items()}
    check(updates(report.path), expected(scales, parts))


def test_a_scale_of_zero_stays_zero(tmp_path: Path) -> None:
    """Llama.cpp takes an alpha of 0 as a scale of 1."""
    source = write_mlx_lm_adapter(tmp_path / "source", factors(), scale=0.0)
    report = convert(source, tmp_path / "a.gguf", to="gguf")
    assert not any(update.any() for update in updates(report.path).values())


@pytest.mark.parametrize(
    ("modules", "dora", "reason"),
    [
        (LINEARS, True, "source is DoRA, which llama.cpp does not support"),
        ((TABLE, *LINEARS), False, "source adapts the embedding, which llama.cpp"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_one_error(
    tmp_path: Path, modules: tuple[str, ...], dora: bool, reason: str
) -> None:
    write = write_mlx_lm_adapter if dora else write_peft_folder
    source = write(tmp_path / "source", factors(modules, dora=dora))
    args = ("convert", source, "--to", "gguf", "--mlx-path", tmp_path / "a.gguf")
    expect_error(tmp_path, *args, message=[reason, "with --merge"])


def test_the_file_must_end_in_gguf(tmp_path: Path) -> None:
    source = write_mlx_lm_adapter(tmp_path / "source", factors())
    args = ("convert", source, "--to", "gguf", "--mlx-path", tmp_path / "a")
    expect_error(tmp_path, *args, message="writes a .gguf file")


def test_the_next_command_and_the_template_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_mlx_lm_adapter(tmp_path / "source", factors())
    raw = read_mapping(source / "adapter_config.json")
    described = raw | {"mlx_openelm": {"template": "alpaca"}}
    write_json(source / "adapter_config.json", described)
    result = call("convert", source, "--to", "gguf")
    assert result.stdout == "source.gguf\n"
    assert "trained with the template alpaca" in result.stderr
    assert "llama-cli -m BASE.gguf --lora source.gguf" in result.stderr
