"""The version of mlx-openelm."""

__version__ = "0.1.0"
