import re

import pytest

from mlx_openelm.evaluation.published_scores import (
    PUBLISHED_SCORES,
    find_other_scores,
    find_published_scores,
    published_name,
)

ROWS = [
    pytest.param(suite, row, id=f"{suite} {row.model} {row.method or ''}")
    for suite, table in PUBLISHED_SCORES.items()
    for row in (*table.own, *table.others)
]
ZERO_SHOT = PUBLISHED_SCORES["zero-shot"].columns
PER_TABLE = {"zero-shot": (8, 6), "openllm": (8, 12), "llm360": (8, 4), "peft": (8, 0)}


def read_sheet(shared, heading):
    """Yield the cells and the numbers of each row of the tables below a heading."""
    text = (shared / "facts" / "openelm.md").read_text()
    section = re.split(r"\n##", text.split(heading, 1)[1])[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and re.search(r"\d\.\d", line):
            yield cells, re.findall(r"(?<![\w.])\d\d\.\d{1,2}(?![\dBT.])", line)


@pytest.mark.parametrize(("suite", "row"), ROWS)
def test_a_row_is_complete_and_its_average_is_the_mean(suite, row):
    assert len(row.values) == len(PUBLISHED_SCORES[suite].columns)
    assert row.source
    values = [value for value in row.values if value is not None]
    if row.without_sciq is not None:
        rest = [v for c, v in zip(ZERO_SHOT, row.values, strict=True) if c != "SciQ"]
        assert row.without_sciq == pytest.approx(sum(rest) / len(rest), abs=0.00501)
    if len(values) < len(row.values):
        return
    assert all(0 < value < 100 for value in values)
    mean = sum(values) / len(values)
    assert (abs(row.average - mean) > 0.00501) == bool(row.average_note), mean
    if row.average_note:
        numbers = re.findall(r"\d+\.\d+", row.average_note)
        assert numbers == [f"{row.average:.2f}", f"{mean:.3f}"]


def test_three_averages_differ_from_their_rows_beyond_rounding():
    """450M OpenLLM, 3B-Instruct LLM360 and MobiLlama 0.5B (facts/pretraining.md)."""
    noted = [
        (suite, row.model)
        for suite, table in PUBLISHED_SCORES.items()
        for row in (*table.own, *table.others)
        if row.average_note
    ]
    assert noted == [
        ("openllm", "OpenELM-450M"),
        ("llm360", "OpenELM-3B-Instruct"),
        ("llm360", "MobiLlama 0.50B"),
    ]


def test_averages_without_sciq_equal_the_sheet(shared):
    sheet = {}
    for cells, _ in read_sheet(shared, "(a) zero-shot"):
        sheet.setdefault(f"{cells[0]} {cells[1]}", cells[-1])
    for row in PUBLISHED_SCORES["zero-shot"].others:
        assert f"{row.without_sciq:.2f}" == sheet[row.model]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("hf:allenai/OLMo-1B-hf", "OLMo 1.18B"),
        ("models/OLMo-1B", "OLMo 1.18B"),
        ("MBZUAI/MobiLlama-1B/", "MobiLlama 1.26B"),
        ("hf:EleutherAI/pythia-1.4b", "Pythia 1.40B"),
        ("allenai/OLMo-7B", None),
        ("demo", None),
    ],
)
def test_other_models_are_found_by_their_names(name, published):
    assert published_name(name) == published
    rows = [find_other_scores(suite, published or "") for suite in PUBLISHED_SCORES]
    assert any(rows) == (published is not None)


@pytest.mark.parametrize(("suite", "counts"), PER_TABLE.items())
def test_every_published_size_is_included(suite, counts):
    table = PUBLISHED_SCORES[suite]
    assert (len(table.own), len(table.others)) == counts
    assert len({(row.model, row.method) for row in table.own}) == 8


@pytest.mark.parametrize(
    ("suite", "heading"),
    [
        ("zero-shot", "### 7.2"),
        ("openllm", "### 7.3"),
        ("llm360", "### 7.4"),
        ("peft", "### 4.6"),
    ],
)
def test_scores_of_openelm_equal_the_sheet(shared, suite, heading):
    sheet = [numbers for _, numbers in read_sheet(shared, heading)]
    rows = PUBLISHED_SCORES[suite].own
    for numbers, row in zip(sheet[: len(rows)], rows, strict=True):
        values = [f"{value:.2f}" for value in row.values]
        if row.note:  # "26.69 (or 26.68)"
            numbers.remove("26.68")
        assert numbers[: len(values) + 1] == [*values, f"{row.average:.2f}"]


def test_scores_of_other_models_equal_the_sheet(shared):
    sheet = {}
    for cells, numbers in read_sheet(shared, "### 7.5"):
        if len(cells) > 2:
            sheet.setdefault(f"{cells[0]} {cells[1]}", []).append(numbers)
    for suite in ("zero-shot", "openllm", "llm360"):
        for row in PUBLISHED_SCORES[suite].others:
            if row.verified:
                continue  # averages in a sentence
            values = [v for v in row.values if v is not None]
            as_numbers = [list(map(float, n[: len(values)])) for n in sheet[row.model]]
            assert values in as_numbers, row.model


def test_rows_from_memory_are_not_verified():
    for suite in ("zero-shot", "openllm", "llm360"):
        table = PUBLISHED_SCORES[suite]
        assert all(row.verified for row in table.own)
        assert all(
            row.verified == (row.source == "arXiv 2404.14619, table 1")
            for row in table.others
        )
    read = [row for row in PUBLISHED_SCORES["peft"].own if row.verified]
    assert [(row.model, row.method) for row in read] == [("OpenELM-270M", "lora")]


@pytest.mark.parametrize(
    ("model", "average"),
    [
        (("zero-shot", "OpenELM-1_1B", False, None), 63.44),
        (("zero-shot", "OpenELM-1_1B", True, None), 65.50),
        (("openllm", "OpenELM-1_1B", False, None), 45.93),  # the paper's, of table 1
        (("llm360", "OpenELM-1_1B", False, None), 51.68),
        (("peft", "OpenELM-450M", False, "dora"), 41.31),
        (("peft", "OpenELM-450M", False, None), None),
        (("zero-shot", "OpenELM-450M", False, "lora"), None),
        (("zero-shot", "OpenELM", False, None), None),
    ],
)
def test_a_model_has_its_published_row(model, average):
    suite, size, instruct, method = model
    row = find_published_scores(suite, size, instruct=instruct, method=method)
    assert (row and row.average) == average
