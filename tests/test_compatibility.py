"""Which tools open a shape: their rules, and mlx-lm itself."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import call, make_source
from mlx.utils import tree_flatten
from models import SCALED, UNEVEN, published_config

from mlx_openelm.compatibility import check_tools, describe_closed
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.layerwise_scaling import (
    FFN_MULTIPLIERS,
    QKV_MULTIPLIERS,
    make_divisible,
)
from mlx_openelm.storage.hub import demo_folder
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.tensor_names import to_folder

TOOLS = ["mlx-lm", "LM Studio", "mlx-swift", "llama.cpp", "transformers"]
RELEASED = ("270M", "450M", "1.1B", "3B")
DEMO = open_folder(demo_folder()).config


def closed(config: OpenELMConfig, **changes: Any) -> dict[str, str]:
    """Return the notes of the tools that do not open it."""
    checked = check_tools(config, config.to_dict() | changes)
    assert list(checked) == TOOLS
    return {tool: how.note for tool, how in checked.items() if not how.opens}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_shapes_open_everywhere(name: str) -> None:
    config = OpenELMConfig.preset(name)
    assert closed(config) == {}
    assert describe_closed(config) == ""


@pytest.mark.parametrize("num_layers", [5, 9, 13])
@pytest.mark.parametrize("model_dim", [1024, 3072])
def test_mlx_swift_rounds_half_a_hundredth_up(num_layers: int, model_dim: int) -> None:
    config = OpenELMConfig.scaled(
        num_layers=num_layers, model_dim=model_dim, head_dim=64
    )
    assert [*closed(config)] == ["mlx-swift"]
    other = OpenELMConfig.scaled(num_layers=num_layers, model_dim=1280, head_dim=64)
    assert closed(other) == {}


def swift_in_decimals(num_layers: int, model_dim: int) -> tuple[list[int], list[int]]:
    """Return its heads and FFN widths computed with integers, as thousandths."""
    lists = []
    for (first, last), divisor in ((QKV_MULTIPLIERS, 256), (FFN_MULTIPLIERS, 256)):
        steps = num_layers - 1
        hundredths = [
            (int(200 * (first * (steps - i) + last * i)) + steps) // (2 * steps)
            for i in range(num_layers)
        ]
        lists.append([make_divisible(h * model_dim / 100, divisor) for h in hundredths])
    return [width // 64 for width in lists[0]], lists[1]


def test_mlx_swift_is_predicted_as_by_exact_arithmetic() -> None:
    """Float32 differs from exact arithmetic only where a width lies between two."""
    rng = random.Random(0)
    differing = 0
    for _ in range(300):
        layers, width = rng.randint(2, 48), 256 * rng.randint(2, 12)
        config = OpenELMConfig.scaled(num_layers=layers, model_dim=width, head_dim=64)
        heads, ffn_dims = swift_in_decimals(layers, width)
        same = (heads, ffn_dims) == ([*config.num_query_heads], [*config.ffn_dims])
        differing += same != ("mlx-swift" not in closed(config))
    assert differing <= 3


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (DEMO, "it computes 4 query heads in layer 0, which has 2"),
        (replace(DEMO, rms_norm_eps=1e-5), "its RMSNorm eps is 1e-05"),
        (replace(DEMO, rope_freq_constant=5e5), "and its RoPE base 500000"),
        (
            replace(DEMO, share_input_output_layers=False),
            "it has an untied output head",
        ),
        (OpenELMConfig.preset("gpt-test"), "it has one layer"),
    ],
)
def test_what_mlx_swift_does_not_open_is_named(
    config: OpenELMConfig, note: str
) -> None:
    assert note in closed(config)["mlx-swift"]
    assert note in describe_closed(config)


def test_an_untied_head_does_not_open_in_llama_cpp() -> None:
    untied = replace(OpenELMConfig.preset("270M"), share_input_output_layers=False)
    assert [*closed(untied)] == ["mlx-swift", "llama.cpp"]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"num_query_heads": 4}, "num_query_heads in config.json is not a list"),
        ({"ffn_multipliers": ["x"] * 3}, "ffn_multipliers in config.json is not a"),
        ({"ffn_dim_divisor": None}, "config.json lacks ffn_dim_divisor"),
        ({"ffn_multipliers": [0.5, 4.0, 2.0]}, "it computes an FFN width of"),
        ({"ffn_multipliers": [0.5]}, "config.json has 1 layer of 3"),
        ({"model_type": "other"}, "model_type in config.json is not openelm"),
    ],
)
def test_configs_that_mlx_lm_does_not_read_are_named(
    changes: dict[str, Any], note: str
) -> None:
    found = closed(UNEVEN, **changes)
    assert note in found["mlx-lm"]
    assert found["LM Studio"] == found["mlx-lm"]


@pytest.mark.interop
def test_mlx_lm_itself_agrees() -> None:
    """On the shapes of its parameters, for configs of ours and of others."""
    from mlx_lm.models.openelm import Model, ModelArgs

    rng = random.Random(1)
    opened = []
    for _ in range(60):
        layers = rng.randint(1, 5)
        config = OpenELMConfig(
            model_dim=rng.choice((48, 64, 80)),
            head_dim=16,
            num_query_heads=tuple(rng.choice((2, 4)) for _ in range(layers)),
            num_kv_heads=tuple(rng.choice((1, 2)) for _ in range(layers)),
            ffn_dims=tuple(8 * rng.randint(1, 30) for _ in range(layers)),
            vocab_size=32,
            share_input_output_layers=rng.random() < 0.5,
        )
        stored = rng.choice((config.to_dict(), published_config(config)))
        stored["ffn_dim_divisor"] = rng.choice((stored["ffn_dim_divisor"], 64, 8))
        model = Model(ModelArgs.from_dict(stored))
        actual = {n: a.shape for n, a in tree_flatten(model.parameters())}
        wanted = {to_folder(n): s for n, s in config.tensor_shapes().items()}
        assert check_tools(config, stored)["mlx-lm"].opens == (actual == wanted)
        opened.append(actual == wanted)
    assert {*opened} == {True, False}


# The commands --------------------------------------------------------------------


def test_inspect_shows_the_tools(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", config=SCALED)
    (source / "tokenizer.model").unlink()
    shown = json.loads(call("inspect", source, "--json").stdout)["opens_in"]
    assert shown["mlx-lm"] == {"opens": False, "note": "the folder has no tokenizer"}
    result = call("inspect", demo_folder())
    assert "mlx-lm: yes\n" in result.stdout.replace(" ", "").replace(":", ": ")
    assert "mlx-swift: no, it computes 4 query heads in layer 0" in result.stdout
    assert "llama.cpp: yes, after `mlx-openelm convert --to gguf`" in result.stdout


def test_mixed_bits_need_a_recent_lm_studio(tmp_path: Path) -> None:
    for bits, note in ((8, ""), (4, "engines of 5 August 2026 or later")):
        target = tmp_path / str(bits)
        args = ("convert", "demo", "--q-bits", bits, "--no-receipt")
        assert call(*args, "--mlx-path", target).exit_code == 0
        shown = json.loads(call("inspect", target, "--json").stdout)["opens_in"]
        assert shown["LM Studio"] == {"opens": True, "note": note}


@pytest.mark.parametrize("to", ["mlx", "hf"])
def test_convert_names_the_tools_that_do_not_open_a_shape(
    tmp_path: Path, to: str
) -> None:
    source = make_source(tmp_path / "source", config=SCALED)
    result = call("convert", source, "--mlx-path", tmp_path / to, "--to", to)
    assert "This shape does not open in mlx-swift (it computes" in result.stderr


def test_a_dry_run_of_pretraining_names_them(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for layers, opens in ((5, False), (16, True)):
        recipe = tmp_path / f"{layers}.yaml"
        recipe.write_text(
            f"model: {{num_layers: {layers}, model_dim: 1024, head_dim: 64}}\n"
            "data: {train: [none.txt]}\n"
        )
        args = ("pretrain", "--recipe", recipe, "--dry-run")
        result = call(*args)
        assert result.exit_code == 0, result.stderr
        assert ("does not open in mlx-swift" in result.stderr) is not opens
        shown = json.loads(call(*args, "--json").stdout)
        assert (shown["plan"]["closed"] == "") is opens
