"""The version of mlx-openelm."""

__version__ = "0.2.0"
