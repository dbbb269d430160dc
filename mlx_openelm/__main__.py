"""Where the program starts, as `mlx-openelm` and as `python -m mlx_openelm`."""

import signal


def run() -> None:
    """Start the command line; until it runs nothing is lost, and Ctrl-C is silent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mlx_openelm.cli.main import main

    main()


if __name__ == "__main__":
    run()
