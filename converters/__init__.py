"""Conversion between model formats, and pre-training in PyTorch."""

from mlx_openelm import openblas as openblas  # must come before mlx.core
