"""Run and fine-tune OpenELM, Apple's small open language models, on MLX.

    from mlx_openelm import load, stream, Sampling

    model, tokenizer = load("demo")
    for piece in stream(model, tokenizer, "Once upon a time", Sampling(max_tokens=100)):
        print(piece.text, end="")

Names are imported on first use, so that `import mlx_openelm` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mlx_openelm import openblas as openblas  # must come before mlx.core
from mlx_openelm.version import __version__ as __version__

if TYPE_CHECKING:
    from converters.conversion.run import convert
    from mlx_openelm.config import OpenELMConfig
    from mlx_openelm.errors import OpenELMError
    from mlx_openelm.evaluation.texts import evaluate
    from mlx_openelm.finetuning.recipe import FinetuneRecipe
    from mlx_openelm.finetuning.run import finetune
    from mlx_openelm.generation.decoding import Context
    from mlx_openelm.generation.drafters import LookupDrafter, ModelDrafter
    from mlx_openelm.generation.options import Sampling
    from mlx_openelm.generation.streaming import generate, stream
    from mlx_openelm.storage.loading import load

_MODULES = {  # public name -> module
    "Context": "mlx_openelm.generation.decoding",
    "FinetuneRecipe": "mlx_openelm.finetuning.recipe",
    "LookupDrafter": "mlx_openelm.generation.drafters",
    "ModelDrafter": "mlx_openelm.generation.drafters",
    "OpenELMConfig": "mlx_openelm.config",
    "OpenELMError": "mlx_openelm.errors",
    "Sampling": "mlx_openelm.generation.options",
    "convert": "converters.conversion.run",
    "evaluate": "mlx_openelm.evaluation.texts",
    "finetune": "mlx_openelm.finetuning.run",
    "generate": "mlx_openelm.generation.streaming",
    "load": "mlx_openelm.storage.loading",
    "stream": "mlx_openelm.generation.streaming",
}

__all__ = [
    "Context",
    "FinetuneRecipe",
    "LookupDrafter",
    "ModelDrafter",
    "OpenELMConfig",
    "OpenELMError",
    "Sampling",
    "convert",
    "evaluate",
    "finetune",
    "generate",
    "load",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
