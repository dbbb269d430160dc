"""Entry point of `mlx-openelm` and `python -m mlx_openelm`."""

import signal


def run() -> None:
    """Run the command line; Ctrl-C during its import exits without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mlx_openelm.cli.main import main

    main()


if __name__ == "__main__":
    run()
