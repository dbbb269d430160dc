"""Checks of decoding options, and the drafter, for `generate`, `chat` and `serve`."""

from typing import TYPE_CHECKING

import typer

from mlx_openelm.cli.derived_options import GivenOptions
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.options import DraftOptions, Sampling

if TYPE_CHECKING:
    from mlx_openelm.generation.drafters import Drafter
    from mlx_openelm.model.openelm import OpenELM
    from mlx_openelm.text.tokenizer import Tokenizer
    from mlx_openelm.tuning import Tuning


def check_sampling(given: GivenOptions) -> None:
    """Raise OpenELMError if a value is out of range, before a model is loaded."""
    Sampling.from_defaults({}, given)


def make_drafter(
    options: DraftOptions,
    model: "OpenELM",
    tokenizer: "Tokenizer",
    offline: bool,
    tuning: "Tuning",
) -> "Drafter | None":
    """Return the drafter of the options; None without speculative decoding."""
    lookup, draft_model = options.lookup, options.draft_model
    if lookup is None and draft_model is None:
        return None
    if lookup is not None and draft_model is not None:
        raise typer.BadParameter(
            "cannot be used with --draft-model", param_hint="--lookup"
        )
    from mlx_openelm.generation.drafters import LookupDrafter, ModelDrafter, check_draft

    if draft_model is not None and not draft_model.strip():
        raise OpenELMError("--draft-model is empty; give a model, or leave it out.")
    if draft_model is None:
        assert lookup is not None
        return LookupDrafter(lookup)
    from mlx_openelm.storage.loading import load

    smaller, its_tokenizer = load(draft_model, offline=offline)
    check_draft(model, tokenizer, smaller, its_tokenizer)
    return ModelDrafter(smaller, tuning=tuning)


def check_utf8(*texts: str) -> None:
    """Raise OpenELMError if a text cannot be encoded as UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # typed on a terminal with another encoding
            raise OpenELMError(
                f"{text!a} is not UTF-8 text: {error.reason}."
            ) from error
