"""How long scales are learned: minutes, or a number of steps."""

import re
from dataclasses import dataclass

from mlx_openelm.errors import OpenELMError

_STEPS = re.compile(r"(\d{1,9}) ?steps?", re.ASCII)
_MINUTES = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class LearningAmount:
    """A number of steps, or minutes; the other is None."""

    steps: int | None
    minutes: float | None

    @classmethod
    def parse(cls, text: str) -> "LearningAmount":
        """Read "200steps" or "10" (minutes).

        Raises:
            OpenELMError: it is neither, or zero.
        """
        if (steps := _STEPS.fullmatch(text)) and int(steps[1]):
            return cls(int(steps[1]), None)
        if _MINUTES.fullmatch(text) and float(text):
            return cls(None, float(text))
        raise OpenELMError(
            f"`learn` is {text!r}; pass minutes (10), or a number of steps (200steps)."
        )
