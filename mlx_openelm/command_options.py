"""Options that many commands have."""

from importlib.util import find_spec
from typing import Annotated

import typer

from mlx_openelm.errors import OpenELMError

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Nothing but the answer.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the random numbers.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a model that is there.")]


def need_torch() -> None:
    """Raise OpenELMError where PyTorch is not installed."""
    if find_spec("torch") is None:
        raise OpenELMError(
            "This command needs PyTorch, which is not installed; "
            "in the checkout, pip install -e '.[torch]'."
        )
