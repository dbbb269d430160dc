import numpy as np
import pytest

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.layerwise_scaling import SHAPES, interpolate_multipliers

TIES = [((0.5, 0.55), 3), ((0.5, 0.75), 11), ((0.2, 1.5), 5)]


def test_multipliers_are_rounded_as_by_numpy():
    """CoreNet rounds each element of numpy's linspace to two decimals."""
    numbers = np.random.default_rng(0)
    shapes = [
        (
            (numbers.integers(1, 80) / 20, numbers.integers(1, 160) / 20),
            int(numbers.integers(1, 60)),
        )
        for _ in range(3000)
    ]
    fine = [((n / 1000, 2.0), int(n % 7 + 1)) for n in numbers.integers(1, 4000, 300)]
    for pair, layers in TIES + shapes + fine:
        first, last = (float(m) for m in pair)
        expected = [round(m, 2) for m in np.linspace(first, last, layers)]
        assert interpolate_multipliers((first, last), layers) == expected


def test_a_tie_is_rounded_to_the_even_hundredth():
    assert interpolate_multipliers((0.5, 0.55), 3) == [0.5, 0.52, 0.55]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("layerwise", [0.5, 1.0, 1.5, 2.0, 2.5]),
        ("reverse", [2.5, 2.0, 1.5, 1.0, 0.5]),
        ("crown", [0.5, 1.5, 2.5, 1.5, 0.5]),
        ("frame", [2.5, 1.5, 0.5, 1.5, 2.5]),
    ],
)
def test_shapes_move_the_widest_layers(shape, expected):
    assert interpolate_multipliers((0.5, 2.5), 5, shape) == expected
    places = {"layerwise": [0, 1], "reverse": [0, 1], "crown": [0, 0.5, 1]}
    xs = places.get(shape, [0, 0.5, 1])
    ys = [expected[round(x * 4)] for x in xs]
    by_numpy = np.interp(np.linspace(0, 1, 5), xs, ys)
    np.testing.assert_allclose(expected, by_numpy)
    assert interpolate_multipliers(1.5, 5, shape) == [1.5] * 5  # only pairs have one


def test_shapes_have_equal_parameters():
    """Also with an even number of layers: the benchmark compares them at equal cost."""
    sizes = {
        shape: OpenELMConfig.scaled(
            num_layers=12,
            model_dim=128,
            head_dim=16,
            num_gqa_groups=1,
            ffn_dim_divisor=16,
            shape=shape,
        ).num_parameters
        for shape in SHAPES
    }
    assert len(set(sizes.values())) == 1, sizes
