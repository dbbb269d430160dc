"""The report of a fine-tuning run: texts, markup, and layout in a browser."""

import dataclasses
import math
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from browser import find_browser, started

from mlx_openelm.finetuning.report.content import TrainingRun, describe_run
from mlx_openelm.finetuning.report.history import (
    describe_end,
    describe_result,
    read_history,
)
from mlx_openelm.reporting.charts import LARGE, RIGHT
from mlx_openelm.reporting.training_report import render_training_report

EVIL = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>\"'&\x00\x1b"


@pytest.fixture(scope="module", autouse=True)
def without_drawings():
    """Overridden: here the reports are complete."""


def step(number, loss=2.0, **more):
    return {"event": "step", "step": number, "loss": loss, **more}


def validation(number, loss, *, best=False):
    return {"event": "eval", "step": number, "loss": loss, "tokens": 9, "best": best}


def usual_events(steps=600, every=10):
    """Rows of a run with a skipped batch, a resume, and two prompts."""
    rows = [validation(0, 2.9, best=True)]
    for prompt in ("Once", "The king <i>"):
        rows.append({"event": "sample", "step": 0, "prompt": prompt, "text": " a the"})
    for n in range(every, steps + 1, every):
        rows.append(
            step(
                n,
                None if n == 170 else 2.3 + 0.6 * math.exp(-n / 120),
                epoch=n / 200,
                learning_rate=3e-4 * (0.5 + 0.5 * math.cos(math.pi * n / steps)),
                grad_norm=None if n == 170 else 0.5 + (n % 70) / 100,
                tokens=400 * n,
                tokens_per_second=800.0 + n % 30,
                memory_bytes=123_000_000 + 1000 * n,
                peak_memory_bytes=456_000_000,
                seconds=0.4 * n,
            )
        )
        if n % (steps // 6) == 0:
            loss = 2.4 + 0.5 * math.exp(-n / 120) + max(0, n - 400) * 1e-3
            rows.append(validation(n, loss, best=n <= 400))
        if n == 250:
            rows.append({"event": "save", "step": n})
            rows.append({"event": "resume", "step": n})
    rows.append(
        {"event": "skip", "step": 170, "loss": None, "samples": ["<u>.jsonl:1"]}
    )
    for prompt in ("Once", "The king <i>"):
        row = {"event": "sample", "step": steps, "prompt": prompt}
        rows.append({**row, "text": f" upon a time{EVIL}\n\n  there was one."})
    return [*rows, {"event": "end", "step": steps, "reason": "done"}]


SPLIT = {
    "file": f"stories/{'a-rather-long-name-of-a-file' * 3}{EVIL}.jsonl",
    "format": "text",
    "fields": ["text"],
    "digest": "0123456789abcdef" * 4,
    "records": 12345,
    "tokens": 345678,
    "edges": [0, 64, 128, 256, 512],
    "lengths": [12, 140, 700, 0],
    "median": 240,
    "spelt_eos": 1,
    "something_new": None,
}
RUN = TrainingRun(
    name=f"oz{EVIL}",
    model="demo",
    facts={"method": "LoRA, rank 16", "trainable": "221,184 of 6,296,832 (3.5 %)"},
    events=usual_events(),
    data={
        "template": EVIL,
        "digest": "0123456789abcdef" * 4,
        "train": SPLIT,
        "valid": SPLIT,
        "test": None,
        "warnings": [f"3 records are odd: {EVIL}."],
    },
    recipe=f"model: demo\nname: {EVIL}\n" + "long" * 100,
    commands=[("Write with it:", "mlx-openelm generate --adapter-path " + "x" * 200)],
    likelihood=True,
)
NOTHING = TrainingRun("", "", {}, [], {}, "", (), likelihood=True)
RUNS = {
    "usual": RUN,
    "thousands of steps": dataclasses.replace(RUN, events=usual_events(20_000, 1)),
    "preferences": dataclasses.replace(
        RUN,
        events=[step(n, accuracy=n / 40, margin=n - 9) for n in range(1, 41)],
        likelihood=False,
    ),
    "one step": dataclasses.replace(NOTHING, events=[step(1, learning_rate=1e-4)]),
    "nothing finite": dataclasses.replace(NOTHING, events=[step(1, None)]),
    "nothing": NOTHING,
    "diverged": dataclasses.replace(
        NOTHING,
        events=[step(n, 10.0**n, grad_norm=10.0 ** (2 * n)) for n in range(1, 150, 5)],
    ),
    "strange rows": TrainingRun(
        *("n", "m", {}),
        [{}, {"event": "step"}, step(3, math.inf), step(4, "x"), {"event": "skip"}],
        {"train": {"lengths": [1], "edges": 3}, "x": [1, {"a": 2}], "valid": {}},
        *("r", (), True),
    ),
}


def render_page(run):
    return render_training_report(describe_run(run))


# Texts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (
            [validation(0, 2.5, best=True), validation(9, 2.0, best=True)],
            "Validation loss fell from 2.500 to 2.000 nats per token "
            "(perplexity 12.18 to 7.39), best at step 9.",
        ),
        (
            [validation(0, 2.5), validation(5, 2.0), validation(9, 2.2)],
            "Validation loss fell from 2.500 to 2.000 nats per token "
            "(perplexity 12.18 to 7.39), best at step 5.",
        ),
        (
            [validation(0, 2.0, best=True), validation(9, 2.25)],
            "Validation loss did not fall: 2.000 nats per token at step 0, 2.250 at "
            "step 9.",
        ),
        (
            [validation(0, 2.0, best=True), validation(9, None)],
            "Validation loss 2.000 nats per token (perplexity 7.39), measured once, at "
            "step 0.",
        ),
        (
            [step(1, 3.0), step(2, math.nan), step(3, 2.0)],
            "Training loss from 3.000 to 2.000 nats per token (perplexity 20.09 to "
            "7.39); nothing was validated.",
        ),
        ([step(1, None)], "No loss was recorded."),
        ([], "No loss was recorded."),
    ],
)
def test_the_headline_is_the_result(events, expected):
    assert describe_result(read_history(events, likelihood=True)) == expected


def test_the_headline_of_preferences_has_no_unit_and_no_perplexity():
    events = [step(1, accuracy=0.5), validation(0, 0.75), validation(1, 0.5)]
    expected = "Validation loss fell from 0.750 to 0.500, best at step 1."
    assert describe_result(read_history(events, likelihood=False)) == expected


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("done", "All 1,600 steps were trained."),
        ("patience", "Stopped early, at step 1,600: no better validation loss."),
        ("interrupted", "Interrupted at step 1,600; --resume continues from there."),
    ],
)
def test_the_end_has_the_reason(reason, expected):
    end = {"event": "end", "step": 1600, "reason": reason}
    assert describe_end(read_history([step(1600), end], likelihood=True)) == expected


def test_steps_repeated_after_a_kill_count_once():
    killed = [step(10), step(20, 9.0), validation(20, 1.0, best=True)]
    killed.append({"event": "skip", "step": 15, "samples": []})
    resumed = [
        {"event": "resume", "step": 10},
        step(20),
        validation(20, 1.5, best=True),
    ]
    history = read_history([*killed, *resumed], likelihood=True)
    assert [row["loss"] for row in history.steps] == [2.0, 2.0]
    assert [row["loss"] for row in history.evals] == [1.5]
    assert (history.skips, history.resumed) == ([], [10])
    expected = "the run is in progress, or was killed after step 20. Resumed once."
    assert describe_end(history) == f"No end was recorded: {expected}"


def test_samples_are_from_before_training_and_the_best_step():
    texts = {0: "before", 5: "best", 9: "last"}
    rows = [
        {"event": "sample", "step": n, "prompt": "Once ", "text": text}
        for n, text in texts.items()
    ]
    rows += [validation(0, 3.0), validation(5, 2.0, best=True), validation(9, 2.5)]
    page = render_page(dataclasses.replace(RUN, events=rows))
    shown = re.findall(r"<figcaption>([^<]*)</figcaption><blockquote>(.*?)</b", page)
    assert shown == [
        ("Before training", "<b>Once "),
        ("After 5 steps, the best", "<b>Once "),
    ]
    assert "</b>best</blockquote>" in page
    assert "</b>last</blockquote>" not in page


# Its markup ----------------------------------------------------------------------


class Tags(HTMLParser):
    """Collects the elements; fails if the tags are not nested correctly."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.references = [], set()
        self.counts, self.ids = Counter(), Counter()

    def handle_starttag(self, tag, attrs):
        self.counts[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag, attrs):
        self.counts[tag] += 1
        self._note(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _note(self, attrs):
        assert len(dict(attrs)) == len(attrs)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.ids.update(value for name, value in attrs if name == "id")
        for name, value in attrs:
            if name == "aria-labelledby":
                self.references.update(value.split())


@pytest.mark.parametrize("name", RUNS)
def test_the_markup_is_valid_and_the_texts_are_escaped(name):
    page = render_page(RUNS[name])
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    assert (
        tags.counts.keys() & {"script", "img", "i\n", "u", "iframe", "object"} == set()
    )
    assert set(tags.ids.values()) <= {1}
    assert tags.references <= tags.ids.keys()
    assert page.encode() == page.encode("utf-8", "strict")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert not re.search(r"https?:|url\(|@import", page)
    assert "nan" not in re.sub(r"<[^>]*>", "", page).split()


def drawn_lines(markup):
    """The `d` of each path of each line of a chart, by line."""
    groups = re.findall(r'<g class="line [^"]*">(.*?)</g>', markup)
    return [re.findall(r' d="(.*?)"', group) for group in groups]


def test_thousands_of_steps_make_a_page_of_less_than_half_a_megabyte():
    page = render_page(RUNS["thousands of steps"])
    assert len(page) < 500_000
    lines = [d for line in drawn_lines(page) for d in line]
    assert max(line.count("L") for line in lines) <= 1000


def test_a_value_that_is_not_finite_leaves_a_gap():
    line = [
        step(1),
        step(2),
        step(3, None),
        step(4),
        step(5),
        step(6, math.nan),
        step(7),
    ]
    page = render_page(dataclasses.replace(RUN, events=line))
    loss = page.split('id="loss"')[1].split("</svg>")[0]
    drawn = drawn_lines(loss)[0][0]
    assert [stretch.count("L") for stretch in drawn.split("M")[1:]] == [1, 1, 0]
    [dots] = re.findall(r'<g class="dots">(.*?)</g>', loss)
    [lone] = re.findall(r'<use [^>]*\bx="([0-9.]+)"', dots)
    assert float(lone) == LARGE[0] - RIGHT


# In a browser --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    path = find_browser()
    if path is None:
        pytest.skip("needs a Chromium or Chrome on the PATH")
    with started(path, tmp_path_factory.mktemp("profile")) as browser:
        yield browser.new_page()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, run in RUNS.items():
        (folder / f"{name}.html").write_text(render_page(run), encoding="utf-8")
    return folder


# Texts whose box leaves the window, or is cut by their element's own. What may be
# scrolled is left out; so are the texts that appear under the pointer, but for width.
OVERFLOWING = """
[...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.wide, details:not([open]) > :not(summary)')) return false;
  const box = e.getBoundingClientRect();
  if (box.width === 0) return false;
  const clipped = e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0
    && !(e instanceof SVGElement);
  return clipped || box.right > innerWidth + 0.5 || box.left < -0.5;
}).map(e => e.outerHTML.slice(0, 150))
"""

# Lines and dots that leave the plotting area of their chart, and charts without a size.
MISPLACED = """
[...document.querySelectorAll('.chart svg')].flatMap(svg => {
  if (svg.getBoundingClientRect().width === 0) return [];
  const bands = [...svg.querySelectorAll('.band rect')]
    .map(e => e.getBoundingClientRect());
  const left = bands[0].left, right = bands[bands.length - 1].right;
  const top = bands[0].top, bottom = bands[0].bottom;
  const wrong = right - left < 200 || bottom - top < 100 ? ['no size'] : [];
  for (const e of svg.querySelectorAll('.line path, .dots use, .mark path')) {
    const box = e.getBoundingClientRect(), air = e.matches('use') ? 6 : 1.5;
    if (box.left < left - air || box.right > right + air ||
        box.top < top - air || box.bottom > bottom + air)
      wrong.push(e.outerHTML.slice(0, 150));
  }
  return wrong;
})
"""

# The contrast of every text and every line with its background, as WCAG defines it.
CONTRASTS = """
(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = parse(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const background = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (parse(c)[3] !== 0) return c; } return 'rgb(255, 255, 255)'; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05); };
  const contrasts = [];
  for (const e of document.querySelectorAll('body *')) {
    const style = getComputedStyle(e);
    if ([...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) &&
        !['title', 'desc'].includes(e.tagName)) {
      const color = e instanceof SVGElement ? style.fill : style.color;
      contrasts.push([ratio(color, background(e)), 4.5, e.outerHTML.slice(0, 99)]);
    } else if (e.matches('.line path, .mark path')) {
      contrasts.push([ratio(style.stroke, background(e)), 3, e.outerHTML.slice(0, 99)]);
    }
  }
  return contrasts;
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", RUNS)
def test_the_page_fits_and_nothing_in_it_runs_or_is_loaded(
    name, width, scheme, tab, pages
):
    path = pages / f"{name}.html"
    tab.open(path, width=width, scheme=scheme)
    assert tab.errors == []
    assert tab.requests == [path.as_uri()]
    assert tab.evaluate("window.ran") is None
    assert tab.evaluate("document.querySelectorAll('script, img').length") == 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(OVERFLOWING) == []
    assert tab.evaluate(MISPLACED) == []
    contrasts = tab.evaluate(CONTRASTS)
    assert [what for what in contrasts if what[0] < what[1]] == []
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")


def test_all_charts_of_a_run_are_drawn(tab, pages):
    tab.open(pages / "usual.html")
    names = tab.evaluate("[...document.querySelectorAll('.chart')].map(e => e.id)")
    assert names == [
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "memory",
    ]
    tab.open(pages / "preferences.html")
    names = tab.evaluate("[...document.querySelectorAll('.chart')].map(e => e.id)")
    assert names == ["loss", "accuracy", "margin"]


def test_a_point_is_drawn_at_its_value(tab, pages):
    """The point of the best validation loss, relative to the ticks."""
    tab.open(pages / "usual.html")
    positions = tab.evaluate("""
(() => {
  const svg = document.querySelector('#loss svg.if-wide');
  const middle = e => { const b = e.getBoundingClientRect();
    return [b.x + b.width / 2, b.y + b.height / 2]; };
  const ticks = [...svg.querySelectorAll('text')]
    .filter(e => /^[0-9.]+$/.test(e.textContent))
    .map(e => [Number(e.textContent), ...middle(e)]);
  const line = svg.querySelector('.line.orange path');
  const points = line.getAttribute('d').match(/[0-9.]+ [0-9.]+/g)
    .map(p => new DOMPoint(...p.split(' ').map(Number))
      .matrixTransform(svg.getScreenCTM()));
  return {ring: middle(svg.querySelector('.ring use')),
    x: ticks.filter(t => t[0] % 100 === 0), y: ticks.filter(t => t[0] % 100 !== 0),
    label: svg.querySelector('.best text').textContent,
    lowest: points.map(p => [p.x, p.y]).sort((a, b) => b[1] - a[1])[0]};
})()""")
    best = min(
        (r for r in usual_events() if r["event"] == "eval"), key=lambda r: r["loss"]
    )
    assert positions["label"] == f"best: {best['loss']:.5g} at step {best['step']}"
    assert positions["lowest"] == pytest.approx(positions["ring"], abs=0.5)
    for true, position, (first, *_, last), axis in (
        (best["step"], positions["ring"][0], positions["x"], 1),
        (best["loss"], positions["ring"][1], positions["y"], 2),
    ):
        share = (position - first[axis]) / (last[axis] - first[axis])
        read = first[0] + share * (last[0] - first[0])
        assert read == pytest.approx(true, rel=0.01)


def test_the_pointer_reads_the_values_of_a_step(tab, pages):
    tab.open(pages / "usual.html", width=390)
    shown = """[...document.querySelectorAll('#loss .if-narrow .band text')]
      .filter(e => getComputedStyle(e).visibility === 'visible')
      .map(e => [e.textContent, e.getBoundingClientRect().left])"""
    assert tab.evaluate(shown) == []
    tab.evaluate("document.querySelector('#loss').scrollIntoView()")
    x, y, width = tab.evaluate("""(() => {
      const bands = document.querySelectorAll('#loss .if-narrow .band rect');
      const first = bands[0].getBoundingClientRect();
      const last = bands[bands.length - 1].getBoundingClientRect();
      return [first.left, first.top, last.right - first.left]; })()""")
    tab.move_pointer(x + width / 2, y + 40)
    [(text, left)] = tab.evaluate(shown)
    rows = {
        row["step"]: row["loss"] for row in usual_events() if row["event"] == "step"
    }
    validated = 2.4 + 0.5 * math.exp(-300 / 120)
    expected = f"step 300 · training {rows[300]:.5g} · validation {validated:.5g}"
    assert text == expected
    assert left >= 0


def test_the_numbers_are_also_in_a_table(tab, pages):
    tab.open(pages / "usual.html", width=390)
    tab.evaluate("document.querySelector('details').open = true")
    cells = tab.evaluate("""[...document.querySelectorAll('.numbers tr')]
      .map(e => [...e.children].map(c => c.textContent))""")
    head, rows = cells[0], {row[0]: row for row in cells[1:]}
    assert head[:4] == ["step", "epoch", "loss", "validation"]
    assert rows["0"][3] == "2.9000"
    assert rows["10"][2] == f"{2.3 + 0.6 * math.exp(-10 / 120):.4f}"
    assert rows["170"][2] == ""
    assert len(rows) == 61
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_training_and_validation_data_have_a_table(pages, tab):
    tab.open(pages / "usual.html")
    rows = tab.evaluate("""[...document.querySelectorAll('.data tr')]
      .map(e => [...e.children].map(c => c.textContent))""")
    table = {name: values for name, *values in rows}
    assert table[""] == ["train", "valid"]
    assert table["tokens"] == ["345,678"] * 2
    assert table["something new"] == ["-"] * 2
    assert "edges" not in table
    bars = tab.evaluate("""[...document.querySelector('.bars').children]
      .map(e => [e.title, e.children[0].getBoundingClientRect().height])""")
    names = ["1 to 64: 12", "65 to 128: 140", "129 to 256: 700", "257 to 512: 0"]
    assert [name for name, _ in bars] == names
    heights = [height / bars[2][1] for _, height in bars]
    assert heights == pytest.approx([12 / 700, 140 / 700, 1, 0], abs=1e-3)
