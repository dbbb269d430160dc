"""CSS of the report of a fine-tuning run; charts have theirs in `report_charts`."""

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
