"""The summary of `fuse`: whether the adapter's effect is preserved."""

from dataclasses import replace
from pathlib import Path

import pytest

from converters.conversion.fusing import FusionProof, FusionReport
from mlx_openelm.cli.console import Console
from mlx_openelm.cli.views.conversion import show_fused

PROOF = FusionProof("a text", 256, 0.01, 1.0, 0.9)
REPORT = FusionReport(
    path=Path("out"),
    adapter="tuned",
    base="demo",
    method="lora",
    size="OpenELM",
    num_parameters=1000,
    dtype="bfloat16",
    bits=4,
    bits_per_weight=4.5,
    num_bytes=600,
    template=None,
    proof=PROOF,
    learned=None,
    notes=(),
    seconds=1.0,
)


@pytest.mark.parametrize(
    ("kl_adapter", "expected"),
    [
        (1.0, "The adapter's effect is preserved: mean KL"),
        (0.001, "trained with this rounding, which changes its effect: mean KL"),
    ],
)
def test_only_a_small_divergence_preserves_the_effect(capsys, kl_adapter, expected):
    report = replace(REPORT, proof=replace(PROOF, kl_adapter=kl_adapter))
    show_fused(Console(), report)
    assert expected in " ".join(capsys.readouterr().err.split())
