"""Quantized sources in formats without quantized weights."""

import pytest
from commands import make_source
from models import SCALED

from converters.conversion.run import convert


@pytest.mark.parametrize("to", ["mlx", "hf", "corenet"])
def test_the_note_advises_only_what_the_format_supports(tmp_path, to):
    source = make_source(tmp_path / "source", config=SCALED)
    packed = convert(
        source, tmp_path / "packed", bits=4, group_size=32, receipt=False
    ).path
    target = tmp_path / ("made.pt" if to == "corenet" else "made")
    notes = convert(packed, target, to=to, dequantize=to == "mlx").notes
    (note,) = (note for note in notes if note.startswith("Dequantized "))
    assert note.endswith(" tensors; use `bits` to quantize again.") == (to == "mlx")
