"""CSS of the report of a fine-tuning run; that of the charts is in `report_charts`."""

PAGE_STYLE}{CHART_STYLE}</style></head><body><main>",
        f"<header><h1>{_safe(title)}</h1>",
        f'<p class="result">{_safe(describe_result(history))}</p>',
        f"<p>{_safe(describe_end(history))}</p></header>",
        _render_facts(run.facts),
        *_render_charts(history),
        *_render_skipped(history),
        *_render_samples(history),
        *_render_data(run.data),
        *_render_commands(run.commands),
        *_render_recipe(run.recipe),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


# What happened -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """The rows by kind; what a killed run did and a resumed one did again, once."""

    steps: Sequence[Event]
    evals: Sequence[Event]
    samples: Sequence[Event]
    skips: Sequence[Event]
    resumed: Sequence[float]  # after which steps
    best: Event | None  # of the evaluations
    end: Event | None
    last_step: float
    preferences: bool  # the loss is of pairs of answers, not of tokens


def read_history(events: Iterable[Event]) -> History:
    """Sort the rows; going on from step S undoes what is there of later steps."""
    rows: list[Event] = []
    for event in events:
        if event.get("event") == "resume":
            rows = [r for r in rows if _step(r) <= _step(event)]
            rows = [r for r in rows if r.get("event") != "end"]
        rows.append(event)
    kinds: dict[str, list[Event]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("event")), []).append(row)
    steps, evals = kinds.get("step", []), kinds.get("eval", [])
    known = [row for row in evals if _number(row, "loss") is not None]
    called_best = [row for row in known if row.get("best") is True]
    lowest = min(known, key=lambda row: _number(row, "loss") or 0.0, default=None)
    return History(
        steps=steps,
        evals=evals,
        samples=kinds.get("sample", []),
        skips=kinds.get("skip", []),
        resumed=[_step(row) for row in kinds.get("resume", [])],
        best=called_best[-1] if called_best else lowest,
        end=kinds["end"][-1] if "end" in kinds else None,
        last_step=max((_step(row) for row in rows), default=0.0),
        preferences=any("accuracy" in row for row in steps),
    )


def describe_result(history: History) -> str:
    """Say in one sentence what the run has gained."""
    measured = _points(history.evals, "loss")
    known = [(step, loss) for step, loss in measured if loss is not None]
    kind = "Validation loss"
    if not known:
        measured = _points(history.steps, "loss")
        known = [(step, loss) for step, loss in measured if loss is not None]
        kind = "Training loss"
    if not known:
        return "No loss was recorded."
    unit = "" if history.preferences else " nats per token"
    (first, before), (last, after) = known[0], known[-1]
    if len(known) == 1:
        return (
            f"{kind} {before:.3f}{unit}{_perplexities(history, before)}, measured "
            f"once, at step {first:,.0f}."
        )
    if kind == "Training loss":
        return (
            f"{kind} from {before:.3f} to {after:.3f}{unit}"
            f"{_perplexities(history, before, after)}; nothing was validated."
        )
    assert history.best is not None
    best, lowest = _step(history.best), _number(history.best, "loss") or 0.0
    if best == first or lowest >= before:
        return (
            f"{kind} did not fall: {before:.3f}{unit} at step {first:,.0f}, "
            f"{after:.3f} at step {last:,.0f}."
        )
    return (
        f"{kind} fell from {before:.3f} to {lowest:.3f}{unit}"
        f"{_perplexities(history, before, lowest)}, best at step {best:,.0f}."
    )


def _perplexities(history: History, *losses: float) -> str:
    if history.preferences:
        return ""
    values = [math.exp(min(loss, 700.0)) for loss in losses]
    shown = [f"{v:.2f}" if v < 1000 else f"{v:.2e}" for v in values]
    return f" (perplexity {' to '.join(shown)})"


def describe_end(history: History) -> str:
    """Say how the run ended, and what came in between."""
    step = f"{history.last_step:,.0f}"
    reason = None if history.end is None else str(history.end.get("reason"))
    said = {
        None: f"No end is on record: it is running still, or was killed after step "
        f"{step}.",
        "done": f"All {step} steps were trained.",
        "patience": f"Stopped early, at step {step}: the validation loss fell no more.",
        "interrupted": f"Interrupted at step {step}; --resume goes on from there.",
    }.get(reason, f"Ended at step {step}: {reason}.")
    if history.resumed:
        said += f" Resumed {_times(len(history.resumed))}."
    if history.skips:
        said += f" Skipped batches: {len(history.skips):,}."
    return said


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


# Its parts -----------------------------------------------------------------------


def _render_facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    items = "".join(
        f"<div><dt>{_safe(name)}</dt><dd>{_safe(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{items}</dl>'


def _render_charts(history: History) -> Iterable[str]:
    drawn = _draw_loss(history)
    if drawn:
        yield f"<section><h2>Loss</h2>{drawn}</section>"
    small = [chart for chart in _draw_small(history) if chart]
    if small:
        yield '<section><h2>Along the way</h2><div class="small">'
        yield from small
        yield "</div></section>"
    if history.steps or history.evals:
        yield _render_numbers(history)


def _draw_loss(history: History) -> str:
    training = _points(history.steps, "loss")
    lines = _with_mean(Line("training", training, "first"))
    best = None if history.best is None else int(_step(history.best))
    validation = _points(history.evals, "loss")
    if validation:
        lines.append(Line("validation", validation, "second", dotted=True, best=best))
    unit = "" if history.preferences else ", nats per token"
    chart = Chart(
        title=f"Loss{unit}",
        lines=lines,
        last_step=history.last_step,
        format=_show_figure,
        marks=_find_marks(history),
    )
    return draw(chart, "loss").replace('class="chart"', 'class="chart large"', 1)


def _with_mean(line: Line) -> list[Line]:
    """Return the line, faint and with its running mean where it has many points."""
    if len(line.points) < SMOOTH_FROM:
        return [line]
    width = max(5, len(line.points) // 40)
    faint = dataclasses.replace(line, style=f"{line.style} faint")
    mean = Line(
        name=f"mean of {width} reports",
        points=smooth(line.points, width),
        style=line.style,
        read=False,
    )
    return [faint, mean]


def _find_marks(history: History) -> list[Mark]:
    times = "" if len(history.resumed) == 1 else f" ({len(history.resumed)} times)"
    return [
        Mark(f"resumed{times}", history.resumed, "resumed"),
        Mark("batch skipped", [_step(row) for row in history.skips], "skipped"),
    ]


def _draw_small(history: History) -> Iterable[str]:
    for key, title, form, from_zero in (
        ("accuracy", "Chosen answer preferred, share of pairs", _show_share, True),
        ("margin", "Margin of the chosen answer", _show_figure, False),
        ("learning_rate", "Learning rate", _show_figure, True),
        ("grad_norm", "Gradient norm", _show_figure, False),
        ("tokens_per_second", "Trained tokens per second", _show_count, True),
    ):
        lines = [Line("training", _points(history.steps, key), "first")]
        validation = _points(history.evals, key)
        if any(value is not None for _, value in validation):
            lines.append(Line("validation", validation, "second", dotted=True))
        yield draw(Chart(title, lines, history.last_step, form, (), from_zero), key)
    memory = [
        Line("held", _points(history.steps, "memory_bytes"), "first"),
        Line("most in use", _points(history.steps, "peak_memory_bytes"), "second"),
    ]
    lines = [line for line in memory if any(y is not None for _, y in line.points)]
    chart = Chart("Memory", lines, history.last_step, _show_bytes, from_zero=True)
    yield draw(chart, "memory")


def _render_numbers(history: History) -> str:
    """Return the charts' values as a table, for those who do not see the charts."""
    rows: dict[float, dict[str, Any]] = {}
    for row in history.evals:
        rows[_step(row)] = {"validation": row.get("loss"), "tokens": row.get("tokens")}
    for row in history.steps:
        rows.setdefault(_step(row), {}).update(row)
    steps = sorted(rows)
    every = math.ceil(len(steps) / MOST_ROWS)
    columns = [c for c in _COLUMNS if any(c[0] in row for row in rows.values())]
    head = "".join(f'<th scope="col">{title}</th>' for _, title, _ in columns)
    body = []
    for step in steps[::every]:
        values = [(_number(rows[step], key), form) for key, _, form in columns]
        cells = "".join(
            f"<td>{'' if v is None else form(v)}</td>" for v, form in values
        )
        body.append(f'<tr><th scope="row">{step:,.0f}</th>{cells}</tr>')
    said = f", every {_ordinal(every)} step of metrics.jsonl" if every > 1 else ""
    return (
        f"<details><summary>The charts in numbers{said}</summary>"
        '<section class="wide" tabindex="0" aria-label="The numbers">'
        '<table class="numbers"><thead><tr><th scope="col">step</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></section></details>"
    )


def _ordinal(number: int) -> str:
    special = {1: "st", 2: "nd", 3: "rd"} if number % 100 // 10 != 1 else {}
    return f"{number}{special.get(number % 10, 'th')}"


def _render_skipped(history: History) -> Iterable[str]:
    if not history.skips:
        return
    yield (
        "<section><h2>Skipped batches</h2><p>Their loss or gradient was not finite, so "
        "nothing was learnt from them.</p><ul>"
    )
    for row in history.skips[:MOST_SKIPPED]:
        samples = row.get("samples")
        names = [str(n) for n in samples] if isinstance(samples, list | tuple) else []
        shown = ", ".join(f"<code>{_safe(name)}</code>" for name in names)
        yield f"<li>step {_step(row):,.0f}: {shown or 'no samples on record'}</li>"
    if len(history.skips) > MOST_SKIPPED:
        yield f"<li>and {len(history.skips) - MOST_SKIPPED:,} more</li>"
    yield "</ul></section>"


def _render_samples(history: History) -> Iterable[str]:
    prompts: dict[str, list[Event]] = {}
    for row in history.samples:
        prompts.setdefault(str(row.get("prompt", "")), []).append(row)
    if not prompts:
        return
    yield "<section><h2>Samples</h2>"
    best = None if history.best is None else _step(history.best)
    for prompt, rows in prompts.items():
        last = next((r for r in rows[1:] if _step(r) == best), rows[-1])
        yield '<div class="pair">'
        for row in [rows[0]] if last is rows[0] else [rows[0], last]:
            yield _render_sample(prompt, row, best)
        yield "</div>"
    yield "</section>"


def _render_sample(prompt: str, row: Event, best: float | None) -> str:
    step = _step(row)
    when = f"After {step:,.0f} steps" if step else "Before training"
    if step == best and step:
        when += ", the best"
    return (
        f"<figure><figcaption>{when}</figcaption><blockquote>"
        f"<b>{_safe(prompt)}</b>{_safe(str(row.get('text', '')))}</blockquote></figure>"
    )


def _render_commands(commands: Sequence[tuple[str, str]]) -> Iterable[str]:
    if commands:
        yield "<section><h2>Use it</h2>"
        for what, line in commands:
            yield f"<p>{_safe(what)}</p><pre><code>{_safe(line)}</code></pre>"
        yield "</section>"


def _render_recipe(recipe: str) -> Iterable[str]:
    if recipe:
        yield (
            "<section><h2>Recipe</h2><p>All options, resolved: saved as "
            "<code>recipe.yaml</code>, it runs the same again.</p>"
            f"<pre><code>{_safe(recipe)}</code></pre></section>"
        )


# The data ------------------------------------------------------------------------

_FACTS = {  # of a split, in the order to show; what is not named here comes behind
    "file": "file",
    "format": "format",
    "fields": "fields",
    "records": "records",
    "samples": "samples",
    "tokens": "tokens",
    "targets": "tokens that count",
    "lengths": "lengths in tokens",
    "shortest": "shortest",
    "median": "median",
    "longest": "longest",
    "cut": "cut at the end",
    "prompt_cut": "prompt cut",
    "nothing_to_learn": "nothing to learn",
    "spelt_eos": "with </s> in a text",
    "duplicates": "duplicates",
    "in_train": "in train too",
}


def _render_data(data: Mapping[str, Any]) -> Iterable[str]:
    """Show the splits side by side, and whatever else is there by its name."""
    splits = {name: facts for name, facts in data.items() if isinstance(facts, Mapping)}
    warnings = data.get("warnings") or ()
    rest = {
        name: value
        for name, value in data.items()
        if name not in (*splits, "warnings") and value is not None
    }
    if not data:
        return
    yield "<section><h2>Data</h2>"
    if isinstance(warnings, list | tuple) and warnings:
        yield "<ul>"
        yield from (f"<li>{_safe(warning)}</li>" for warning in warnings)
        yield "</ul>"
    if rest:
        yield '<dl class="facts">'
        for name, value in rest.items():
            shown = _safe(_show_value(name, value))
            yield f"<div><dt>{_safe(_name(name))}</dt><dd>{shown}</dd></div>"
        yield "</dl>"
    if splits:
        yield from _render_splits(splits)
    yield "</section>"


def _render_splits(splits: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    there = dict.fromkeys(fact for facts in splits.values() for fact in facts)
    there.pop("edges", None)  # they are those of the lengths
    shown = [fact for fact in _FACTS if fact in there]
    shown += [fact for fact in there if fact not in _FACTS]
    head = "".join(f'<th scope="col">{_safe(name)}</th>' for name in splits)
    yield f'<table class="data"><thead><tr><td></td>{head}</tr></thead><tbody>'
    for fact in shown:
        cells = "".join(f"<td>{_render_fact(s, fact)}</td>" for s in splits.values())
        name = _safe(_FACTS.get(fact, _name(fact)))
        yield f'<tr><th scope="row">{name}</th>{cells}</tr>'
    yield "</tbody></table>"


def _render_fact(split: Mapping[str, Any], fact: str) -> str:
    bars = _read_histogram(split) if fact == "lengths" else []
    return _draw_bars(bars) if bars else _safe(_show_value(fact, split.get(fact)))


def _read_histogram(split: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return the lengths' ranges and counts, if they are what `SplitTable` says."""
    edges, counts = split.get("edges"), split.get("lengths")
    if not (isinstance(edges, list | tuple) and isinstance(counts, list | tuple)):
        return []
    if len(edges) != len(counts) + 1 or not counts:
        return []
    if not all(isinstance(value, int) and value >= 0 for value in (*edges, *counts)):
        return []
    ranges = [f"{a + 1:,} to {b:,}" for a, b in pairwise(edges)]
    return list(zip(ranges, counts, strict=True))


def _name(key: object) -> str:
    return str(key).replace("_", " ")


def _show_value(name: str, value: object) -> str:
    if name == "digest":
        return str(value)[:12]
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_show_value("", part) for part in value) or "none"
    return str(value)


def _draw_bars(bars: Sequence[tuple[str, int]]) -> str:
    most, width = max(count for _, count in bars) or 1, 100 / len(bars)
    drawn = []
    for i, (label, count) in enumerate(bars):
        height = 100 * count / most
        drawn.append(
            f'<g><rect class="air" x="{i * width:.2f}%" y="0" width="{width:.2f}%" '
            f'height="100%"/><rect x="{i * width:.2f}%" y="{100 - height:.2f}%" '
            f'width="{width * 0.85:.2f}%" height="{height:.2f}%"/>'
            f"<title>{_safe(label)}: {count:,.0f}</title></g>"
        )
    told = "; ".join(f"{label}: {count:,.0f}" for label, count in bars)
    first, last = bars[0][0].split(" ")[0], bars[-1][0].split(" ")[-1]
    return (
        f'<svg class="bars" role="img" aria-label="{_safe(told)}">'
        f"{''.join(drawn)}</svg>"
        f'<span class="ends"><span>{first}</span><span>{last}</span></span>'
    )


# Values --------------------------------------------------------------------------


def _number(row: Event, key: str) -> float | None:
    """Return a value that can be drawn, else None: not there, NaN, infinite."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None


def _step(row: Event) -> float:
    return _number(row, "step") or 0.0


def _points(rows: Sequence[Event], key: str) -> list[Point]:
    return sorted(
        ((_step(row), _number(row, key)) for row in rows), key=lambda point: point[0]
    )


def _show_figure(value: float) -> str:
    return f"{value:.5g}"


def _show_share(value: float) -> str:
    return f"{100 * value:.4g} %"


def _show_count(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _show_bytes(value: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.0f} B"


# The columns of the table of numbers.
_COLUMNS: Sequence[tuple[str, str, Callable[[float], str]]] = (
    ("epoch", "epoch", lambda v: f"{v:.2f}"),
    ("loss", "loss", lambda v: f"{v:.4f}"),
    ("validation", "validation", lambda v: f"{v:.4f}"),
    ("accuracy", "accuracy", _show_share),
    ("margin", "margin", _show_figure),
    ("learning_rate", "learning rate", _show_figure),
    ("grad_norm", "gradient norm", _show_figure),
    ("tokens", "tokens", _show_count),
    ("tokens_per_second", "tokens/s", _show_count),
    ("memory_bytes", "memory", _show_bytes),
    ("peak_memory_bytes", "peak", _show_bytes),
    ("seconds", "seconds", lambda v: f"{v:,.1f}"),
)


_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def _safe(text: object) -> str:
    """Escape; what HTML or UTF-8 cannot hold becomes the replacement character."""
    return html.escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(text)))


# How it looks --------------------------------------------------------------------

PAGE_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1b1f24; --muted: #57606a;
  --rule: #e3e6ea; --panel: #f5f7f9;
  --blue: #1f66b5; --orange: #b8480b; --red: #c4212f; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171b; --text: #e4e8ed; --muted: #9ba6b2; --rule: #2c323a;
    --panel: #1d2127; --blue: #6cb0ff; --orange: #ff9a55; --red: #ff7d85; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans",
  sans-serif; font-size: 16px; -webkit-text-size-adjust: 100%; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.1rem; font-weight: 500; color: var(--muted); margin: 0 0 0.75rem; }
h1, h2, p, dd, li, td, th, blockquote { overflow-wrap: anywhere; }
.result { font-size: clamp(1.3rem, 3.6vw, 1.8rem); line-height: 1.3; font-weight: 600;
  margin: 0 0 0.5rem; text-wrap: balance; }
header p:last-child { margin: 0; color: var(--muted); }
section { margin-top: 2.75rem; }
h2 + .facts { margin-top: 0; }
h2 { font-size: 1.15rem; margin: 0 0 1rem; padding-bottom: 0.35rem;
  border-bottom: 1px solid var(--rule); }
.facts { display: grid; gap: 0.9rem 1.5rem; margin: 1.75rem 0 0;
  grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
dt { color: var(--muted); font-size: 0.85rem; }
dd { margin: 0; }
.small { display: grid; gap: 0.5rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
pre { margin: 0.35rem 0 1.25rem; padding: 0.8rem 1rem; background: var(--panel);
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
pre, code { font: 0.85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
section > p { margin: 0; }
.pair { display: grid; gap: 1rem; margin-bottom: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.pair figure { margin: 0; padding: 0.8rem 1rem; background: var(--panel);
  border-radius: 6px; }
.pair figcaption { color: var(--muted); font-size: 0.85rem; margin-bottom: 0.3rem; }
blockquote { margin: 0; white-space: pre-wrap; unicode-bidi: isolate; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
table.data { margin-top: 1rem; }
th, td { padding: 0.35rem 0.75rem 0.35rem 0; text-align: left; vertical-align: top; }
tbody tr { border-top: 1px solid var(--rule); }
.data { table-layout: fixed; }
.data tr > :first-child { width: 30%; }
tbody th { font-weight: 400; color: var(--muted); }
.numbers { font-size: 0.85rem; }
.numbers th, .numbers td { text-align: right; white-space: nowrap;
  padding: 0.2rem 0 0.2rem 1.25rem; }
.wide { overflow: auto; max-height: 28rem; margin: 0.75rem 0 0; }
details { margin-top: 1.5rem; }
summary { cursor: pointer; color: var(--muted); }
.bars { display: block; width: 100%; max-width: 15rem; height: 48px;
  border-bottom: 1px solid var(--muted); }
.bars rect { fill: var(--blue); }
.bars .air { fill: transparent; }
.ends { display: flex; justify-content: space-between; max-width: 15rem; gap: 0.5rem;
  color: var(--muted); font-size: 0.75rem; }
@media (max-width: 36rem) {
  main { padding: 1rem 0.9rem 3rem; }
  .facts { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
  .data { font-size: 0.85rem; }
  .chart.large > svg { height: 260px; }
}
@media print {
  main { max-width: none; padding: 0; }
  figure, .pair, tr, .facts { break-inside: avoid; }
  h2 { break-after: avoid; }
  pre, .pair figure { border: 1px solid var(--rule); }
}
"""
