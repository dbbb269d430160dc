"""Checks derived from the declaration of an option."""

from dataclasses import dataclass

import numpy as np
import pytest

from mlx_openelm.errors import OpenELMError
from mlx_openelm.options import check_options, option


@dataclass(frozen=True)
class Options:
    steps: int = option(3, least=1, most=10)
    rate: float | None = option(None, least=0.0)
    kind: str = option("a", choices=("a", "b"))
    rank: int | str = option(16)
    length: int = option(8, least=1, most=2**31 - 1)
    temp: float = option(0.0, least=0, most=1e6)
    free: tuple[str, ...] = ()


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 1},
        {"steps": np.int64(10)},
        {"rate": 0},
        {"rate": np.float32(0.5)},
        {"rate": 1e300},
        {"kind": "b"},
        {"rank": "auto:16"},
    ],
)
def test_allowed_values_pass(values):
    check_options(Options(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "`steps` is 0; it must be from 1 to 10."),
        ({"steps": 11}, "`steps` is 11; it must be from 1 to 10."),
        ({"steps": 2.0}, "`steps` is 2.0; it must be a whole number."),
        ({"steps": True}, "`steps` is True; it must be a whole number."),
        ({"rate": -1e-9}, "`rate` is -1e-09; it must be 0 or more."),
        ({"rate": float("nan")}, "`rate` is nan; it must be 0 or more."),
        ({"length": 0}, "`length` is 0; it must be 1 or more."),
        ({"length": 2**31}, "`length` is 2147483648; it must be at most 2147483647."),
        ({"temp": -1.0}, "`temp` is -1.0; it must be 0 or more."),
        ({"temp": 2e6}, "`temp` is 2000000.0; it must be at most 1000000."),
        ({"rate": "fast"}, "`rate` is 'fast'; it must be a number."),
        ({"kind": "c"}, "`kind` is 'c'; choose a, b."),
    ],
)
def test_other_values_are_refused(values, message):
    with pytest.raises(OpenELMError) as error:
        check_options(Options(**values))
    assert str(error.value) == message
