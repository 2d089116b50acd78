"""What every part of report.html is made of: the page around it, tables, pictures.

One file without a script and without an outside request: styles are inline, pictures are data
URIs, and a content security policy forbids the rest.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2129; --soft: #5d6470; --rule: #e3e0d8;
  --sighted: #1b6f8f; --blind: #b4552d; --none: #7a6aa8; --level: #8a8f98;
  --good: #1f7a45; --good-paper: #e4f3e9; --bad: #b3361f; --bad-paper: #fbe9e4;
  --run0: #1b6f8f; --run1: #b4552d; --run2: #7a4fa3; --run3: #2f7d46;
  --run4: #a3832a; --run5: #b03a6b; --run6: #4a5a6e; --run7: #7c4a2d; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181d; --card: #1d2127; --ink: #e8e6e1; --soft: #a2a8b2; --rule: #323842;
  --sighted: #63bddd; --blind: #ee9068; --none: #b5a6e0; --level: #858c98;
  --good: #7fd3a0; --good-paper: #1c3527; --bad: #f39a85; --bad-paper: #412620;
  --run0: #63bddd; --run1: #ee9068; --run2: #c3a2ec; --run3: #7fd3a0;
  --run4: #e2c567; --run5: #f08bb4; --run6: #aab8c8; --run7: #c99a78; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; margin: 0 0 .4rem;
  letter-spacing: -.02em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3.2rem 0 .5rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0 0 .3rem; } section > h3 { margin-top: 2rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.15rem; margin: 1.1rem 0; }
.soft, figcaption, caption, .note { color: var(--soft); font-size: .9rem; }
.figures { display: grid; gap: .8rem; margin: 1.6rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.figure { background: var(--card); border: 1px solid var(--rule); border-radius: .7rem;
  padding: .9rem 1rem; }
.figure dt { color: var(--soft); font-size: .85rem; line-height: 1.3; }
.figure dd { margin: 0; font-size: 2rem; font-weight: 650; letter-spacing: -.02em;
  line-height: 1.25; font-variant-numeric: tabular-nums; }
.figure dd.small { font-size: .8rem; font-weight: 400; letter-spacing: 0; color: var(--soft); }
.figure.sighted dd:first-of-type { color: var(--sighted); }
.figure.blind dd:first-of-type { color: var(--blind); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .93rem; }
caption { text-align: left; padding-bottom: .5rem; } caption span { display: block; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts th { width: 11rem; vertical-align: top; }
th, td { text-align: right; padding: .42rem .7rem; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; white-space: normal; }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; vertical-align: bottom; }
tbody th { font-weight: 500; }
tr.total th, tr.total td { font-weight: 700; border-top: 2px solid var(--ink); }
td small { color: var(--soft); font-weight: 400; }
dl.words { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem;
  margin: 1rem 0; max-width: 46rem; }
dl.words dt { font-weight: 650; } dl.words dd { margin: 0; }
.grid { display: grid; gap: 1.2rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.panel { background: var(--card); border: 1px solid var(--rule); border-radius: .7rem;
  padding: 1rem; margin: 0; min-width: 0; }
.fitting { max-width: 46rem; margin: 1.2rem 0; }
svg.chart { display: block; width: 100%; height: auto; font-family: inherit; }
.rule { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 11px; }
.tick.strong { fill: var(--ink); font-size: 12.5px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.train { stroke: var(--level); stroke-width: 1.6; } .line.held { stroke: var(--sighted); }
.line.level { stroke: var(--blind); stroke-width: 1.4; stroke-dasharray: 5 4; }
.dot.held, .dot.sighted { fill: var(--sighted); } .dot.blind { fill: var(--blind); }
.dot.none { fill: var(--none); }
.whisker { stroke-width: 2.5; stroke-linecap: round; opacity: .55; }
.whisker.sighted { stroke: var(--sighted); } .whisker.blind { stroke: var(--blind); }
.whisker.none { stroke: var(--none); }
.prior { stroke: var(--ink); stroke-width: 2; }
.area { fill: var(--sighted); opacity: .8; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0;
  margin: .6rem 0; font-size: .9rem; color: var(--soft); }
.key li::before { content: ""; display: inline-block; width: .75rem; height: .75rem;
  border-radius: 50%; margin-right: .45rem; vertical-align: -.05rem; background: var(--level); }
.key .sighted::before, .key .held::before { background: var(--sighted); }
.key .blind::before { background: var(--blind); } .key .none::before { background: var(--none); }
.key .bar::before { width: 3px; border-radius: 0; background: var(--ink); }
.key .level::before { height: 0; border-radius: 0; border-top: 2px dashed var(--blind);
  background: none; width: 1.1rem; vertical-align: .25rem; }
.key .train::before, .key .line::before { height: 3px; border-radius: 0; vertical-align: .22rem; }
.run0 { --own: var(--run0); } .run1 { --own: var(--run1); } .run2 { --own: var(--run2); }
.run3 { --own: var(--run3); } .run4 { --own: var(--run4); } .run5 { --own: var(--run5); }
.run6 { --own: var(--run6); } .run7 { --own: var(--run7); }
.line[class*=" run"] { stroke: var(--own); } .dot[class*=" run"] { fill: var(--own); }
.line.train[class*=" run"] { stroke-width: 1.1; opacity: .5; }
.key [class*=" run"]::before { background: var(--own); }
.value { display: inline-block; min-width: 6rem; white-space: normal; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; border-radius: .35rem;
  background: var(--rule); }
img.pixels { image-rendering: pixelated; }
.scene { display: flex; gap: 1rem; align-items: flex-start; }
.scene img { width: 8rem; flex: none; }
.scene .said { line-height: 2.15; margin: 0; }
.word { border-radius: .35rem; padding: .12rem .4rem; font-weight: 600; white-space: nowrap; }
.word.right { color: var(--good); background: var(--good-paper); }
.word.wrong { color: var(--bad); background: var(--bad-paper); }
.word small { font-weight: 400; }
.word s { font-weight: 400; opacity: .85; }
.strip { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: .6rem; }
.strip figure { margin: 0; } .strip img { width: 100%; }
.strip figcaption { font-size: .78rem; line-height: 1.3; margin-top: .3rem; }
.strip .right img, .shown .right { outline: 3px solid var(--good); outline-offset: 1px; }
.strip .right figcaption { color: var(--good); font-weight: 600; }
.strip.three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.stack { display: grid; gap: 1rem; margin: 1rem 0; }
.asked { font-weight: 600; margin: 0 0 .6rem; line-height: 1.35; }
.shown { display: flex; gap: .6rem; flex: none; } .answered { flex: 1; min-width: 0; }
.scene.two { flex-wrap: wrap; } .scene.two .answered { flex-basis: 13rem; }
.bars { list-style: none; margin: 0; padding: 0; font-size: .9rem; }
.bars li { display: grid; gap: .5rem; align-items: center; padding: .12rem 0;
  grid-template-columns: minmax(5rem, 1fr) minmax(4rem, 1fr) 2.8rem; }
.bars .track { height: .7rem; border-radius: .2rem; background: var(--rule); overflow: hidden; }
.bars .track span { display: block; height: 100%; background: var(--level); }
.bars .right { color: var(--good); font-weight: 600; }
.bars .right .track span { background: var(--good); }
.bars small { text-align: right; font-variant-numeric: tabular-nums; }
.swatches { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0;
  margin: .6rem 0; font-size: .9rem; }
.swatches span { display: inline-block; width: .9rem; height: .9rem; border-radius: .2rem;
  margin-right: .45rem; vertical-align: -.1rem; border: 1px solid var(--rule); }
.codes { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .6rem; }
.codes figure { margin: 0; } .codes img { width: 100%; }
.codes img + img { margin-top: .35rem; }
details { border-top: 1px solid var(--rule); padding: .6rem 0; }
summary { cursor: pointer; font-weight: 550; }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.45; background: var(--card);
  border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem 1rem; }
footer { margin-top: 4rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 34rem) {
  main { padding: 1.5rem 1rem 3rem; } .scene img { width: 5.5rem; }
  .strip { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .scene.two { display: block; } .scene.two .shown { margin-bottom: .6rem; }
  dl.words { grid-template-columns: 1fr; gap: 0; } dl.words dd { margin-bottom: .6rem; }
  th, td { padding: .42rem .5rem; } th:first-child { min-width: 5.5rem; }
  .tick { font-size: 15px; } .tick.strong { font-size: 17px; }
  td small { display: block; } caption span { max-width: 88vw; }
  .codes { grid-template-columns: repeat(4, minmax(0, 1fr)); } }
@media print { .panel, .figure { break-inside: avoid; } }
"""

PIXELATED_BELOW = 80
"""Pictures with fewer rows are enlarged without smoothing: their pixels are the point."""


def page(title: str, sections: Iterable[str]) -> str:
    """The whole document; `title` is plain text, sections are HTML."""
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def section(heading: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph."""
    return f"<p{_kind(kind)}>{escape(text)}</p>"


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, total: bool = False
) -> str:
    """Numbers. Cells are HTML; the first of a row is its header. `total` sets the last row apart.

    `head` may be empty: facts, one a row, that need no column names and read from the left.
    """
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    names = f"<thead><tr>{columns}</tr></thead>" if head else ""
    rows = list(rows)
    body = []
    for number, row in enumerate(rows):
        kind = "total" if total and number == len(rows) - 1 else ""
        cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
        body.append(f'<tr{_kind(kind)}><th scope="row">{row[0]}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table{_kind("" if head else "facts")}>'
        f"<caption><span>{escape(caption)}</span></caption>"
        f"{names}<tbody>{''.join(body)}</tbody></table></div>"
    )


def key(entries: Iterable[tuple[str, str]]) -> str:
    """The legend of a chart: (class, text)."""
    items = "".join(f"<li{_kind(kind)}>{escape(text)}</li>" for kind, text in entries)
    return f'<ul class="key">{items}</ul>'


def picture(pixels: np.ndarray, alt: str) -> str:
    """An <img> of (height, width, 3) uint8 as PNG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    height, width = pixels.shape[:2]
    kind = "pixels" if height < PIXELATED_BELOW else ""
    return (
        f'<img{_kind(kind)} alt="{escape(alt)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}">'
    )


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def with_interval(estimate: Mapping[str, float], *, signed: bool = False) -> str:
    """HTML: the value and, small, its interval; all as percentages."""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    sign = "+" if signed else ""
    return f"{value:{sign}.1f} % <small>[{low:{sign}.1f}, {high:{sign}.1f}]</small>"


def unseen(text: str) -> str:
    """Text for screen readers only."""
    return f'<span class="unseen">{escape(text)}</span>'


def _kind(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""
