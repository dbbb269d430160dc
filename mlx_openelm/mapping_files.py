"""Reads JSON and YAML files."""

from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import NOT_JSON, check_depth, parse_json, read_text
from mlx_openelm.message_parts import cannot_access


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file that holds one mapping.

    Raises:
        OpenELMError: the file is missing, not JSON or YAML, or not a mapping.
    """
    try:
        text = read_text(path, NOT_JSON)
    except (OSError, ValueError) as error:
        raise OpenELMError(cannot_access(path, error)) from error
    try:
        if path.suffix == ".json":
            value = parse_json(text)
        else:
            import yaml

            value = yaml.safe_load(text)
            check_depth(value)
    except RecursionError as error:
        raise OpenELMError(
            f"{path} cannot be parsed: it is nested too deeply."
        ) from error
    except Exception as error:  # the parsers' errors have no common base
        reason = " ".join(str(error).split())  # YAML's has several lines
        raise OpenELMError(f"{path} cannot be parsed: {reason}.") from error
    if not isinstance(value, dict):
        raise OpenELMError(f"{path} holds a {type(value).__name__}, not a mapping.")
    return value
