"""`python -m mlx_openelm` is the same program as `mlx-openelm`."""

import signal

if __name__ == "__main__":  # until `main` runs nothing is lost, and Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from mlx_openelm.cli import main

if __name__ == "__main__":
    main()
