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
        ({"rate": "fast"}, "`rate` is 'fast'; it must be a number."),
        ({"kind": "c"}, "`kind` is 'c'; choose a, b."),
    ],
)
def test_other_values_are_refused(values, message):
    with pytest.raises(OpenELMError) as error:
        check_options(Options(**values))
    assert str(error.value) == message
