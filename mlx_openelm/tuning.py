"""How work is given to the device: settings that change speed and memory alone.

`selfcheck --tune` measures them and stores those that win, with the machine that they
are for, in a file of the user. This module does not import mlx: the environment
variables must be set before it.
"""

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import parse_json, read_json

Environment = Mapping[str, str]
AHEAD, STAGED, ONE_BY_ONE = "ahead", "staged", "one by one"
QUEUES = (AHEAD, STAGED, ONE_BY_ONE)
VARIABLES = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
ENVIRONMENT = "environment"  # key of a run's saved state
FILE_VARIABLE = "MLX_OPENELM_TUNING"  # environment variable: another file
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Tuning:
    """Settings of generation and training. None: the default of the device.

    Attributes:
        queue: when a decode step is handed to the device: "ahead", before the token
            of the step before it is read; "staged", up to the keys and values of the
            first layer before, and the rest after; "one by one", after.
        compiled: whether decode steps are compiled.
        prefill_chunk: tokens of a prompt in one forward pass.
        compiled_training: whether training steps are compiled.
        wired: whether memory is wired (macOS).
        environment: variables that MLX reads when it starts.
    """

    queue: str = AHEAD
    compiled: bool | None = None
    prefill_chunk: int | None = None
    compiled_training: bool | None = None
    wired: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


DEFAULT = Tuning()


def tuning_file() -> Path:
    """Return the file of this user's settings."""
    if named := os.environ.get(FILE_VARIABLE):
        return Path(named)
    parent = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(parent) / "mlx-openelm" / "tuning.json"


def describe_host() -> dict[str, str]:
    """Return what the settings depend on, as far as it is known without mlx."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "name": platform.node(),
        "mlx": version("mlx"),
    }


def read_tuning(
    path: Path | None = None, on_note: Callable[[str], None] = lambda note: None
) -> Tuning | None:
    """Return the stored settings; None if there are none for this machine.

    Args:
        on_note: receives the reason why a file is not used.

    Raises:
        OpenELMError: the file is damaged.
    """
    path = path or tuning_file()
    if not path.is_file():
        return None
    try:
        stored = read_json(path)
        if stored["format"] != _FORMAT or stored["host"] != describe_host():
            on_note(
                f"The settings in {path} are those of another machine or version of "
                "MLX, and are not used; run `selfcheck` with `tune` again."
            )
            return None
        return _checked(stored["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OpenELMError(
            f"The settings of this machine in {path} are damaged; run `selfcheck` "
            "with `tune` again, or delete the file."
        ) from error


def environment_of_run(state: Path) -> dict[str, str]:
    """Return the variables that a saved training run was started with."""
    import safetensors

    try:
        with safetensors.safe_open(state, framework="numpy") as opened:
            run = parse_json(opened.metadata()["state"])["run"]
        stored = run.get(ENVIRONMENT, {})
        return dict(stored) if _are_variables(stored) else {}
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError),
        safetensors.SafetensorError,
    ):
        return {}  # whoever reads the state reports what is wrong


def _are_variables(environment: Mapping[str, Any]) -> bool:
    """Return whether these are variables that MLX reads, with numbers as texts."""
    return set(environment) <= set(VARIABLES) and all(
        isinstance(value, str) and value.isascii() and value.isdecimal()
        for value in environment.values()
    )


def _checked(settings: Mapping[str, Any]) -> Tuning:
    tuning = Tuning(**settings)
    chunk, environment = tuning.prefill_chunk, tuning.environment
    flags = tuning.compiled, tuning.compiled_training
    if (
        tuning.queue not in QUEUES
        or not (chunk is None or (type(chunk) is int and chunk > 0))
        or not all(flag is None or type(flag) is bool for flag in flags)
        or type(tuning.wired) is not bool
        or not isinstance(environment, dict)
        or not _are_variables(environment)
    ):
        raise ValueError(settings)
    return tuning


def as_stored(tuning: Tuning) -> dict[str, Any]:
    """Return the content of the file for these settings on this machine."""
    return {
        "format": _FORMAT,
        "host": describe_host(),
        "settings": dataclasses.asdict(tuning),
    }


def start_tuned(
    *,
    ignored: bool = False,
    variables: Environment | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Tuning:
    """Return the settings for this process, and set its environment variables.

    A variable that is set already is kept. Call it before mlx is imported.

    Args:
        variables: the environment of a run to resume, instead of this machine's.
        on_note: see `read_tuning`.
    """
    tuning = (None if ignored else read_tuning(on_note=on_note)) or DEFAULT
    environment = tuning.environment if variables is None else variables
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    return tuning


def current_environment() -> dict[str, str]:
    """Return the variables of this process that MLX reads."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
