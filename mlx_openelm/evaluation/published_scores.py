"""Published scores of OpenELM and other models, in percent.

`source` names where a row was published. Rows quoted from memory are not `verified`:
their averages agree with their values to rounding, and every value is a whole number of
right answers of its test set, except where a note says otherwise.
"""

import re
from dataclasses import dataclass

CARD = "model card of apple/OpenELM"
PEFT_README = "CoreNet, README-peft.md"
PAPER_1 = "arXiv 2404.14619, table 1"
PAPER_4 = "arXiv 2404.14619, table 4"
OWN_TOKENS = "1.5T"
PAPER_PEFT = "arXiv 2404.14619, table of adapters"


@dataclass(frozen=True, slots=True)
class PublishedScores:
    """One model's row of a table.

    Attributes:
        model: "OpenELM-1_1B-Instruct", with the configuration's spelling of the size,
            or another model's name and size.
        values: percent, in the order of the table's columns; None: not published.
        average: as published, or the mean of all values; None if one is missing.
        tokens: pre-training tokens, as published, or "".
        method: of an adapter: lora or dora.
        average_note: how `average` differs from the values, beyond rounding, or "".
        without_sciq: the average of the zero-shot tasks but SciQ, the only one that the
            paper has for some models.
    """

    model: str
    values: tuple[float | None, ...]
    average: float | None
    source: str
    verified: bool
    tokens: str = ""
    method: str | None = None
    note: str = ""
    average_note: str = ""
    without_sciq: float | None = None


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A suite's published scores: OpenELM's own rows, and others' for reference."""

    columns: tuple[str, ...]
    own: tuple[PublishedScores, ...]
    others: tuple[PublishedScores, ...]


def find_published_scores(
    suite: str, size_name: str, *, instruct: bool, method: str | None = None
) -> PublishedScores | None:
    """Return the published row of a model, or None.

    Args:
        suite: zero-shot, openllm, llm360 or peft.
        size_name: as in a configuration: "OpenELM-270M".
        method: of the model's adapter: lora, dora or full; None without one.
    """
    name = f"{size_name}-Instruct" if instruct else size_name
    rows = PUBLISHED_SCORES[suite].own
    return next((r for r in rows if (r.model, r.method) == (name, method)), None)


def published_name(name: str) -> str | None:
    """Return the name in the tables of a model that is not an OpenELM, or None.

    Args:
        name: a folder or a Hub id, also with `hf:`.
    """
    last = re.split(r"[/:]", name.rstrip("/"))[-1].lower().removesuffix("-hf")
    return _OTHER_NAMES.get(last)


def find_other_scores(suite: str, name: str) -> PublishedScores | None:
    """Return the published row of a model that is not an OpenELM, or None."""
    rows = PUBLISHED_SCORES[suite].others
    return next((row for row in rows if row.model == name), None)


_OTHER_NAMES = {  # by the last part of the Hub id
    "olmo-1b": "OLMo 1.18B",
    "mobillama-05b": "MobiLlama 0.50B",
    "mobillama-08b": "MobiLlama 0.80B",
    "mobillama-1b": "MobiLlama 1.26B",
    "tinyllama-1.1b-intermediate-step-1431k-3t": "TinyLlama 1.10B",
    "open_lm_1b": "OpenLM 1.00B",
    "cerebras-gpt-256m": "Cerebras-GPT 0.26B",
    "opt-350m": "OPT 0.35B",
    "opt-1.3b": "OPT 1.3B",
    "pythia-410m": "Pythia 0.41B",
    "pythia-1.4b": "Pythia 1.40B",
}


def _own(
    model: str, average: float, *values: float, average_note: str = ""
) -> PublishedScores:
    return PublishedScores(
        *(f"OpenELM-{model}", values, average, CARD, True, OWN_TOKENS),
        average_note=average_note,
    )


def _other(
    model: str,
    tokens: str,
    average: float | None,
    *values: float | None,
    without_sciq: float | None = None,
    average_note: str = "",
) -> PublishedScores:
    return PublishedScores(
        *(model, values, average, PAPER_4, False, tokens),
        average_note=average_note,
        without_sciq=without_sciq,
    )


def _differs(published: float, mean: float) -> str:
    """Return the note of an average that is not the mean of its row, rounded."""
    return f"published average {published:.2f}, the mean of the row is {mean:.3f}"


def _average_only(model: str, tokens: str, average: float) -> PublishedScores:
    return PublishedScores(model, (None,) * 5, average, PAPER_1, True, tokens)


def _adapted(
    model: str,
    method: str,
    average: float,
    *values: float,
    verified: bool = False,
    note: str = "",
) -> PublishedScores:
    source = PEFT_README if verified else PAPER_PEFT
    name = f"OpenELM-{model}"
    return PublishedScores(
        name, values, average, source, verified, method=method, note=note
    )


_ZERO_SHOT = PublishedTable(
    ("ARC-c", "ARC-e", "BoolQ", "HellaSwag", "PIQA", "SciQ", "WinoGrande"),
    own=(
        _own("270M", 54.37, 26.45, 45.08, 53.98, 46.71, 69.75, 84.70, 53.91),
        _own("270M-Instruct", 55.11, 30.55, 46.68, 48.56, 52.07, 70.78, 84.40, 52.72),
        _own("450M", 57.56, 27.56, 48.06, 55.78, 53.97, 72.31, 87.20, 58.01),
        _own("450M-Instruct", 59.95, 30.38, 50.00, 60.37, 59.34, 72.63, 88.00, 58.96),
        _own("1_1B", 63.44, 32.34, 55.43, 63.58, 64.81, 75.57, 90.60, 61.72),
        _own("1_1B-Instruct", 65.50, 37.97, 52.23, 70.00, 71.20, 75.03, 89.30, 62.75),
        _own("3B", 67.39, 35.58, 59.89, 67.40, 72.44, 78.24, 92.70, 65.51),
        _own("3B-Instruct", 69.15, 39.42, 61.74, 68.17, 76.36, 79.00, 92.50, 66.85),
    ),
    others=(
        _other(
            *("MobiLlama 0.50B", "1.3T", 55.34),
            *(26.62, 46.04, 55.72, 51.06, 71.11, 83.60, 53.20),
            without_sciq=50.63,
        ),
        _other(
            *("TinyLlama 1.10B", "3.0T", None),
            *(30.12, 55.25, 57.83, 59.20, 73.29, None, 59.12),
            without_sciq=55.80,
        ),
        _other(
            *("OpenLM 1.00B", "1.6T", None),
            *(31.00, 56.00, 65.00, 61.00, 74.00, None, 60.00),
            without_sciq=57.83,
        ),
        _other(
            *("MobiLlama 0.80B", "1.3T", 58.00),
            *(28.84, 49.62, 60.03, 52.45, 73.18, 85.90, 55.96),
            without_sciq=53.35,
        ),
        _other(
            *("MobiLlama 1.26B", "1.3T", 62.04),
            *(31.91, 56.65, 60.34, 62.18, 74.81, 89.10, 59.27),
            without_sciq=57.53,
        ),
        _other(
            *("OLMo 1.18B", "3.0T", 62.16),
            *(31.06, 57.28, 61.74, 62.92, 75.14, 87.00, 59.98),
            without_sciq=58.02,
        ),
    ),
)

_OPENLLM = PublishedTable(
    ("ARC-c", "HellaSwag", "MMLU", "TruthfulQA", "WinoGrande"),
    own=(
        _own("270M", 38.72, 27.65, 47.15, 25.72, 39.24, 53.83),
        _own("270M-Instruct", 40.54, 32.51, 51.58, 26.70, 38.72, 53.20),
        _own(
            *("450M", 41.50, 30.20, 53.86, 26.01, 40.18, 57.22),
            average_note=_differs(41.50, 41.494),
        ),
        _own("450M-Instruct", 43.41, 33.53, 59.31, 25.41, 40.48, 58.33),
        _own("1_1B", 45.93, 36.69, 65.71, 27.05, 36.98, 63.22),
        _own("1_1B-Instruct", 49.94, 41.55, 71.83, 25.65, 45.95, 64.72),
        _own("3B", 48.90, 42.24, 73.28, 26.76, 34.98, 67.25),
        _own("3B-Instruct", 51.22, 47.70, 76.87, 24.80, 38.76, 67.96),
    ),
    others=(
        _average_only("OPT 1.3B", "0.2T", 41.49),
        _average_only("Pythia 1.4B", "0.3T", 41.83),
        _average_only("MobiLlama 1.3B", "1.3T", 43.55),
        _average_only("OLMo 1.2B", "3.0T", 43.57),
        _other(
            *("Cerebras-GPT 0.26B", "5.1B", 35.26), *(22.01, 28.99, 26.83, 45.98, 52.49)
        ),
        _other(*("OPT 0.35B", "0.2T", 35.95), *(23.55, 36.73, 26.02, 40.83, 52.64)),
        _other(*("Pythia 0.41B", "0.3T", 37.49), *(24.83, 41.29, 25.99, 40.95, 54.38)),
        _other(
            *("MobiLlama 0.50B", "1.3T", 40.44), *(29.52, 52.75, 26.09, 37.55, 56.27)
        ),
        _other(
            *("MobiLlama 0.80B", "1.3T", 40.95), *(30.63, 54.17, 25.2, 38.41, 56.35)
        ),
        _other(*("Pythia 1.40B", "0.3T", 41.83), *(32.68, 54.96, 25.56, 38.66, 57.30)),
        _other(
            *("MobiLlama 1.26B", "1.3T", 43.55), *(34.64, 63.27, 23.87, 35.19, 60.77)
        ),
        _other(*("OLMo 1.18B", "3.0T", 43.57), *(34.47, 63.81, 26.16, 32.94, 60.46)),
    ),
)

_LLM360 = PublishedTable(
    (
        *("ARC-c", "CrowS-Pairs", "HellaSwag", "MMLU"),
        *("PIQA", "RACE", "TruthfulQA", "WinoGrande"),
    ),
    own=(
        _own("270M", 45.13, 27.65, 66.79, 47.15, 25.72, 69.75, 30.91, 39.24, 53.83),
        _own(
            *("270M-Instruct", 46.66),
            *(32.51, 66.01, 51.58, 26.70, 70.78, 33.78, 38.72, 53.20),
        ),
        _own("450M", 47.69, 30.20, 68.63, 53.86, 26.01, 72.31, 33.11, 40.18, 57.22),
        _own(
            *("450M-Instruct", 49.25),
            *(33.53, 67.44, 59.31, 25.41, 72.63, 36.84, 40.48, 58.33),
        ),
        _own("1_1B", 51.68, 36.69, 71.74, 65.71, 27.05, 75.57, 36.46, 36.98, 63.22),
        _own(
            *("1_1B-Instruct", 54.40),
            *(41.55, 71.02, 71.83, 25.65, 75.03, 39.43, 45.95, 64.72),
        ),
        _own("3B", 54.35, 42.24, 73.29, 73.28, 26.76, 78.24, 38.76, 34.98, 67.25),
        _own(
            *("3B-Instruct", 55.73),
            *(47.70, 72.33, 76.87, 24.80, 79.00, 38.47, 38.76, 67.96),
            average_note=_differs(55.73, 55.736),
        ),
    ),
    others=(
        _other(
            *("MobiLlama 0.50B", "", 46.37),
            *(29.52, 65.47, 52.75, 26.09, 71.11, 32.15, 37.55, 56.27),
            average_note=_differs(46.37, 46.364),
        ),
        _other(
            *("MobiLlama 0.80B", "", 47.23),
            *(30.63, 66.25, 54.17, 25.2, 73.18, 33.68, 38.41, 56.35),
        ),
        _other(
            *("MobiLlama 1.26B", "", 49.73),
            *(34.64, 70.24, 63.27, 23.87, 74.81, 35.02, 35.19, 60.77),
        ),
        _other(
            *("OLMo 1.18B", "", 49.96),
            *(34.47, 69.95, 63.81, 26.16, 75.14, 36.75, 32.94, 60.46),
        ),
    ),
)

_PEFT = PublishedTable(
    (
        *("ARC-c", "ARC-e", "BoolQ", "HellaSwag"),
        *("PIQA", "SIQA", "WinoGrande", "OBQA"),
    ),
    own=(
        _adapted(
            *("270M", "lora", 38.51),
            *(24.57, 26.60, 62.14, 24.84, 50.05, 42.02, 49.88, 28.00),
            verified=True,
        ),
        _adapted(
            *("270M", "dora", 38.52),
            *(24.57, 26.69, 62.14, 24.84, 50.05, 42.02, 49.88, 28.00),
            note="ARC-e: 26.69 or 26.68; with 2376 questions only 26.68 is possible",
        ),
        _adapted(
            *("450M", "lora", 41.60),
            *(28.67, 29.88, 62.29, 25.85, 52.39, 49.59, 50.91, 33.20),
        ),
        _adapted(
            *("450M", "dora", 41.31),
            *(28.33, 30.39, 62.26, 25.12, 52.29, 49.28, 50.83, 32.00),
        ),
        _adapted(
            *("1_1B", "lora", 63.60),
            *(45.14, 61.11, 61.77, 77.95, 72.31, 69.70, 61.64, 59.20),
        ),
        _adapted(
            *("1_1B", "dora", 63.68),
            *(44.11, 61.49, 61.68, 78.92, 71.38, 69.04, 64.01, 58.80),
        ),
        _adapted(
            *("3B", "lora", 65.80),
            *(46.93, 66.25, 62.48, 81.22, 75.19, 70.62, 65.51, 58.20),
        ),
        _adapted(
            *("3B", "dora", 65.59),
            *(46.50, 66.46, 62.35, 80.84, 75.73, 70.83, 63.77, 58.20),
        ),
    ),
    others=(),
)

PUBLISHED_SCORES = {
    "zero-shot": _ZERO_SHOT,
    "openllm": _OPENLLM,
    "llm360": _LLM360,
    "peft": _PEFT,
}
