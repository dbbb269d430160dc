"""The published evaluation suites: tasks, numbers of few-shot examples, and metrics.

The model card of apple/OpenELM calls the eight-task table "OpenLLM Leaderboard" and the
five-task table "LLM360"; the paper's averages show that these headings are swapped.
The names here are the paper's: `openllm` has five tasks, `llm360` eight.
"""

from dataclasses import dataclass
from pathlib import Path

from mlx_openelm.evaluation.published_scores import PUBLISHED_SCORES, PublishedTable

HARNESS = (
    "The authors ran lm-evaluation-harness of 2024-03-15 (commit dc90fec); this one is "
    "later. Whether it gives the same scores, and which metric a column reports, is "
    "unverified."
)
PEFT_HARNESS = (
    "The authors ran lm-evaluation-harness of 2024-04-18 (commit 3196e907) on these "
    "files; this scores them by the same rule without it. Whether both give the same "
    "scores is unverified."
)


@dataclass(frozen=True, slots=True)
class SuiteTask:
    """One column of a published table.

    Attributes:
        name: the column's heading.
        task: its name in the harness, or the stem of a local file.
    """

    name: str
    task: str
    num_fewshot: int
    metric: str


@dataclass(frozen=True, slots=True)
class Suite:
    """Tasks that are reported together.

    Attributes:
        local: whether its tasks are files in `tasks_dir` instead of the harness's.
        notes: remarks that are printed with its table.
    """

    name: str
    tasks: tuple[SuiteTask, ...]
    notes: tuple[str, ...]
    local: bool = False

    @property
    def published(self) -> PublishedTable:
        return PUBLISHED_SCORES[self.name]


_SHOTS = {  # tasks of the five- and the eight-task table, by the card's commands
    "ARC-c": SuiteTask("ARC-c", "arc_challenge", 25, "acc_norm"),
    "CrowS-Pairs": SuiteTask(
        "CrowS-Pairs", "crows_pairs_english", 25, "pct_stereotype"
    ),
    "HellaSwag": SuiteTask("HellaSwag", "hellaswag", 10, "acc_norm"),
    "MMLU": SuiteTask("MMLU", "mmlu", 5, "acc"),
    "PIQA": SuiteTask("PIQA", "piqa", 0, "acc_norm"),
    "RACE": SuiteTask("RACE", "race", 0, "acc"),
    "TruthfulQA": SuiteTask("TruthfulQA", "truthfulqa_mc2", 0, "acc"),
    "WinoGrande": SuiteTask("WinoGrande", "winogrande", 5, "acc"),
}

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "zero-shot",
            (
                SuiteTask("ARC-c", "arc_challenge", 0, "acc_norm"),
                SuiteTask("ARC-e", "arc_easy", 0, "acc_norm"),
                SuiteTask("BoolQ", "boolq", 0, "acc"),
                SuiteTask("HellaSwag", "hellaswag", 0, "acc_norm"),
                SuiteTask("PIQA", "piqa", 0, "acc_norm"),
                SuiteTask("SciQ", "sciq", 0, "acc"),
                SuiteTask("WinoGrande", "winogrande", 0, "acc"),
            ),
            (HARNESS,),
        ),
        Suite(
            "openllm",
            tuple(_SHOTS[name] for name in PUBLISHED_SCORES["openllm"].columns),
            (
                HARNESS,
                'The model card heads this table "LLM360": its two headings are '
                "swapped.",
            ),
        ),
        Suite(
            "llm360",
            tuple(_SHOTS[name] for name in PUBLISHED_SCORES["llm360"].columns),
            (
                HARNESS,
                'The model card heads this table "OpenLLM Leaderboard": its two '
                "headings are swapped.",
            ),
        ),
        Suite(
            "peft",
            (
                SuiteTask("ARC-c", "ARC-Challenge", 0, "acc"),
                SuiteTask("ARC-e", "ARC-Easy", 0, "acc"),
                SuiteTask("BoolQ", "boolq", 0, "acc"),
                SuiteTask("HellaSwag", "hellaswag", 0, "acc"),
                SuiteTask("PIQA", "piqa", 0, "acc"),
                SuiteTask("SIQA", "social_i_qa", 0, "acc"),
                SuiteTask("WinoGrande", "winogrande", 0, "acc"),
                SuiteTask("OBQA", "openbookqa", 0, "acc"),
            ),
            (PEFT_HARNESS,),
            local=True,
        ),
    )
}


def find_suite_file(folder: Path, task: SuiteTask) -> Path | None:
    """Return a task's file: TASK.json, or TASK/test.json as in LLM-Adapters."""
    places = (folder / f"{task.task}.json", folder / task.task / "test.json")
    return next((place for place in places if place.is_file()), None)
