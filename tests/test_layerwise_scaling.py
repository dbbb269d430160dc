import numpy as np

from mlx_openelm.layerwise_scaling import interpolate_multipliers

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
    for pair, layers in TIES + shapes:
        first, last = (float(m) for m in pair)
        expected = [round(m, 2) for m in np.linspace(first, last, layers)]
        assert interpolate_multipliers((first, last), layers) == expected


def test_a_tie_is_rounded_to_the_even_hundredth():
    assert interpolate_multipliers((0.5, 0.55), 3) == [0.5, 0.52, 0.55]
