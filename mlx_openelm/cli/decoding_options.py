"""The options of decoding, as generate, chat and serve have them, and their values."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_openelm.errors import OpenELMError

if TYPE_CHECKING:
    from mlx_openelm.generation.drafters import Drafter
    from mlx_openelm.model.openelm import OpenELM
    from mlx_openelm.text.tokenizer import Tokenizer

SAMPLING = "What is drawn"  # headings in --help
SPEED_AND_MEMORY = "Speed and memory"

MaxTokens = Annotated[
    int | None, typer.Option("-m", "--max-tokens", help="Default 256.")
]
MinTokens = Annotated[
    int | None,
    typer.Option(
        help="The model may not end it before so many.", rich_help_panel=SAMPLING
    ),
]
Temp = Annotated[
    float | None,
    typer.Option(help="Temperature; 0 is greedy.", rich_help_panel=SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Keep the likeliest of this mass.", rich_help_panel=SAMPLING),
]
TopK = Annotated[
    int | None, typer.Option(help="Keep the N likeliest.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Keep what is this likely beside the likeliest.", rich_help_panel=SAMPLING
    ),
]
Penalty = Annotated[
    float | None, typer.Option(help="Above 1: repeat less.", rich_help_panel=SAMPLING)
]
PenaltyContext = Annotated[
    int | None,
    typer.Option(
        help="Tokens that it looks back; default 256.", rich_help_panel=SAMPLING
    ),
]
NoRepeat = Annotated[
    int | None,
    typer.Option(
        "--no-repeat-ngram",
        help="No N tokens in a row come twice.",
        rich_help_panel=SAMPLING,
    ),
]
Bias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        help="ID=BIAS, added to a token's logit; repeatable.",
        rich_help_panel=SAMPLING,
    ),
]
StopText = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        help="A text that ends the answer; repeatable.",
        rich_help_panel=SAMPLING,
    ),
]
StopLoops = Annotated[
    int | None,
    typer.Option(
        help="End where the answer says one thing N times in a row.",
        rich_help_panel=SAMPLING,
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        help="With --json: each token's log-probability, the N likeliest.",
        rich_help_panel=SAMPLING,
    ),
]
Template = Annotated[
    str, typer.Option(help="auto, raw, instruct, alpaca or openelm-peft.")
]
System = Annotated[str, typer.Option(help="System text of the template.")]
Lookup = Annotated[
    int | None,
    typer.Option(
        help="Guess up to N tokens from an earlier place in the text.",
        rich_help_panel=SPEED_AND_MEMORY,
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        help="Let this smaller model guess; the same names as --model.",
        rich_help_panel=SPEED_AND_MEMORY,
    ),
]
KvBits = Annotated[
    int | None,
    typer.Option(
        help="Keep keys and values in 4 or 8 bits: less memory, slower.",
        rich_help_panel=SPEED_AND_MEMORY,
    ),
]
KvGroupSize = Annotated[
    int,
    typer.Option(
        help="Numbers that share a scale then; 32, 64 or 128.",
        rich_help_panel=SPEED_AND_MEMORY,
    ),
]
MaxKvSize = Annotated[
    int | None,
    typer.Option(
        help="Keep the first 4 and the newest tokens, N in all.",
        rich_help_panel=SPEED_AND_MEMORY,
    ),
]


def read_sampling_options(
    *, logit_bias: list[str] | None, stop: list[str] | None, **said: float | None
) -> dict[str, Any]:
    """Return the fields of `Sampling` that options set; None: left to the model.

    Raises:
        OpenELMError: a value is out of range.
    """
    from mlx_openelm.generation.sampling import Sampling

    found: dict[str, Any] = {
        **said,
        "logit_bias": _read_bias(logit_bias),
        "stop": tuple(stop) if stop else None,
    }
    Sampling.from_defaults({}, found)
    return found


def _read_bias(said: list[str] | None) -> tuple[tuple[int, float], ...] | None:
    if not said:
        return None
    pairs = []
    for pair in said:
        token, _, bias = pair.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError as error:
            raise OpenELMError(
                f"--logit-bias is {pair!r}; it must be ID=BIAS, 42=-5 say."
            ) from error
    return tuple(pairs)


def make_drafter(
    lookup: int | None,
    draft_model: str | None,
    model: "OpenELM",
    tokenizer: "Tokenizer",
    offline: bool,
) -> "Drafter | None":
    """Return the draft source of --lookup or --draft-model; None without either."""
    if lookup is None and draft_model is None:
        return None
    if lookup is not None and draft_model is not None:
        raise typer.BadParameter(
            "does not go with --draft-model", param_hint="--lookup"
        )
    from mlx_openelm.generation.drafters import LookupDrafter, ModelDrafter, check_draft

    if draft_model is not None and not draft_model.strip():
        raise OpenELMError("--draft-model is empty; say a model, or leave it out.")
    if draft_model is None:
        assert lookup is not None
        return LookupDrafter(lookup)
    from mlx_openelm.storage.loading import load

    smaller, its_tokenizer = load(draft_model, offline=offline)
    check_draft(model, tokenizer, smaller, its_tokenizer)
    return ModelDrafter(smaller)


def check_utf8(*texts: str) -> None:
    """Raise OpenELMError if an option's text cannot be encoded as UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a terminal of another encoding
            raise OpenELMError(
                f"{text!a} is not UTF-8 text: {error.reason}."
            ) from error
