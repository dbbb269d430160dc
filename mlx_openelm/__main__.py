"""`python -m mlx_openelm` is the same program as `mlx-openelm`."""

from mlx_openelm.cli import main

main()
