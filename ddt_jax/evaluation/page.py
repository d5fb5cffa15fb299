"""One HTML file that stands alone: styles and script inside, pictures as data, no request to anywhere.

It is made for a phone as for a wide screen: charts and samples flow in a grid, tables scroll inside their own box, and
everything works with a thumb. A browser without JavaScript shows all but the movement of sliders.
"""

from collections.abc import Sequence
from html import escape

_SHOWN = 16  # samples that are not folded away
_WORD = 32  # letters of a word that a table may break: a hash, a path

# default-src 'none': a browser would refuse to fetch anything, whatever slipped into the page.
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #262a30; --faint: #5a606b; --paper: #fff; --line: #e2e5ea; --box: #f6f7f9;
  --right: #237a4b; --wrong: #b83227; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e6ea; --faint: #9aa1ad; --paper: #16181c; --line: #31353c; --box: #1e2126;
    --right: #5fc98d; --wrong: #ff8375; }}
  .chip, .chart polyline, .chart circle, .chart rect {{ filter: brightness(1.45); }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 0 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; margin: 1.2rem 0 .3rem; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-top: 1px solid var(--line); padding-top: 1rem;
  scroll-margin-top: 4.5rem; }}
nav + h2 {{ border-top: 0; margin-top: .4rem; }}
h3 {{ font-size: 1rem; margin: 1.4rem 0 .4rem; }}
nav {{ position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line); padding: .5rem 0;
  overflow-x: auto; white-space: nowrap; z-index: 1; }}
nav a {{ display: inline-block; padding: .3rem .9rem .3rem 0; color: inherit; }}
nav .runs {{ font-size: .85rem; }} .runs > span {{ margin-right: .9rem; }}
.faint {{ color: var(--faint); }}
.chip {{ display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }}
.flow {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }}
.samples {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem .8rem; }}
.samples figure {{ margin: 0; font-size: .85rem; line-height: 1.35; }} .samples + details {{ margin-top: .6rem; }}
.samples img {{ width: 100%; image-rendering: pixelated; border: 1px solid var(--line); display: block; }}
.right {{ color: var(--right); }} .wrong {{ color: var(--wrong); }} .mark {{ display: block; font-weight: 600; }}
.table {{ overflow-x: auto; margin-bottom: .6rem; }}
table {{ border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }}
td.long {{ overflow-wrap: anywhere; min-width: 14rem; }}
/* What a row is about stays when its cells scroll, and breaks rather than filling a phone. */
th:first-child, td:first-child {{ position: sticky; left: 0; background: var(--paper); padding-left: 0;
  overflow-wrap: anywhere; min-width: 8rem; max-width: min(44vw, 22rem); }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.chart {{ width: 100%; height: auto; display: block; background: var(--box); border-radius: 6px; }}
.chart text {{ font: 11px system-ui, sans-serif; fill: var(--faint); }}
.chart .title {{ font-size: 13px; fill: var(--ink); }}
.chart .bad {{ font-size: 14px; fill: var(--wrong); }}
.chart .grid {{ stroke: var(--line); }} .chart .base {{ stroke: var(--faint); }}
.chart .limit {{ stroke: var(--faint); stroke-dasharray: 2 3; }}
.sheet {{ max-width: 100%; height: auto; }}
.layers {{ overflow-x: auto; margin-bottom: 1rem; }}
/* Eight pictures in a row: on a phone they scroll rather than shrink to thumbnails. */
.layers img {{ display: block; image-rendering: pixelated; width: clamp(40rem, 100%, 60rem); height: auto; }}
.layers img.off {{ display: none; }}
.layers .faint {{ margin: .3rem 0 .1rem; position: sticky; left: 0; width: max-content; }}
input[type=range] {{ width: min(28rem, 100%); height: 2.2rem; accent-color: #2563a8; }}
output {{ font-weight: 600; }}
summary {{ cursor: pointer; padding: .3rem 0; }}
</style>
</head>
<body>
"""

_TAIL = """<script>
for (const box of document.querySelectorAll(".progressive")) {
  const slider = box.querySelector("input"), said = box.querySelector("output");
  const layers = [...box.querySelectorAll("img[data-label]")];
  const show = () => layers.forEach((layer, i) => {
    layer.classList.toggle("off", i != slider.value);
    if (i == slider.value) said.textContent = layer.dataset.label;
  });
  slider.addEventListener("input", show);
  show();
}
</script>
</body>
</html>
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]], legend: str = "") -> str:
    """The file.

    Args:
      lead: HTML below the title.
      sections: (heading, HTML), of which empty ones are left out.
      legend: HTML that stays in sight with the links: which colour is what.
    """
    shown = [(heading, body) for heading, body in sections if body]
    links = "".join(f'<a href="#{_anchor(heading)}">{escape(heading)}</a>' for heading, _ in shown)
    parts = [_HEAD.format(title=escape(title)), f"<h1>{escape(title)}</h1>\n{lead}\n<nav>{links}{legend}</nav>\n"]
    parts += [f'<h2 id="{_anchor(heading)}">{escape(heading)}</h2>\n{body}\n' for heading, body in shown]
    return "".join([*parts, _TAIL])


def _anchor(heading):
    return "".join(c if c.isalnum() else "-" for c in heading.lower())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text; columns behind the first whose cells look like numbers are set as such."""
    numeric = [i > 0 and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    kinds = [' class="n"' if n else "" for n in numeric]

    def cell(text, kind):
        long = ' class="long"' if any(len(word) > _WORD for word in text.split()) else ""
        return f"<td{kind or long}>{escape(text)}</td>"

    head = "".join(f"<th{kind}>{escape(text)}</th>" for text, kind in zip(header, kinds, strict=True))
    body = "\n".join(
        "<tr>" + "".join(cell(text, kind) for text, kind in zip(row, kinds, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _is_number(text):
    return not text or text == "–" or text.lstrip("-")[:1].isdigit()


def markdown(text: str) -> str:
    """The Markdown that our own verbs write: headings, tables, lists, paragraphs; headings two levels down."""
    parts, lines = [], [*text.splitlines(), ""]
    i = 0
    while i < len(lines):
        line = lines[i].strip()
        block = []
        kind = line[:1] if line[:1] in ("|", "-") else "text" if line else ""
        while kind and i < len(lines) and lines[i].strip() and (kind == "text" or lines[i].strip().startswith(kind)):
            if block and kind == "text" and lines[i].startswith(("|", "- ", "#")):
                break
            block.append(lines[i].strip())
            i += 1
            if kind == "text" and block[-1].startswith("#"):
                break
        if not kind:
            i += 1
        elif kind == "|":
            rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in block]
            parts.append(table(rows[0], [row + [""] * (len(rows[0]) - len(row)) for row in rows[2:]]))
        elif kind == "-":
            parts.append("<ul>" + "".join(f"<li>{escape(item[1:].strip())}</li>" for item in block) + "</ul>")
        elif block[0].startswith("#"):
            level = min(6, len(block[0]) - len(block[0].lstrip("#")) + 2)
            parts.append(f"<h{level}>{escape(block[0].lstrip('# '))}</h{level}>")
        else:
            parts.append(f"<p>{escape(' '.join(block))}</p>")
    return "\n".join(parts)


def folded(summary: str, body: str, unfolded: bool = False) -> str:
    """What is shown when it is asked for."""
    return (
        f"<details{' open' if unfolded else ''}><summary>{escape(summary)}</summary>\n{body}\n</details>"
        if body
        else ""
    )


def flow(parts: Sequence[str]) -> str:
    """Charts beside each other, as many as fit."""
    shown = [part for part in parts if part]
    return f'<div class="flow">\n{"".join(f"<div>{part}</div>" for part in shown)}\n</div>' if shown else ""


def samples(of: Sequence[tuple[str, str, bool | None]]) -> str:
    """(data URI, text, whether it is right or None) each; the first of them are shown, more are folded."""
    marks = {
        True: '<span class="right mark">✓ right</span>',
        False: '<span class="wrong mark">✗ wrong</span>',
        None: "",
    }
    figures = [
        f'<figure><img src="{uri}" alt="{escape(text)}"><figcaption>{marks[right]}{escape(text)}</figcaption></figure>'
        for uri, text, right in of
    ]

    def box(shown):
        return '<div class="samples">\n' + "\n".join(shown) + "\n</div>" if shown else ""

    return box(figures[:_SHOWN]) + folded(f"{len(figures) - _SHOWN} more", box(figures[_SHOWN:]))


def progressive(original: str, layers: Sequence[tuple[str, str]]) -> str:
    """A row of originals over one of reconstructions, with a slider over how much of them is shown.

    Args:
      original: data URI.
      layers: (label, data URI), the last one shown first.
    """
    last = len(layers) - 1
    pictures = "".join(
        f'<img src="{uri}" data-label="{escape(label)}" alt="{escape(label)}"{"" if i == last else " class=off"}>'
        for i, (label, uri) in enumerate(layers)
    )
    slider = f'<input type="range" min="0" max="{last}" value="{last}" step="1" aria-label="tokens shown">'
    said = f"<output>{escape(layers[last][0])}</output>"
    originals = f'<p class="faint">originals</p><img src="{original}" alt="originals">'
    shown = f'{originals}<p class="faint">reconstructions</p>{pictures}'
    return f'<div class="progressive"><p>{slider}<br>{said}</p><div class="layers">{shown}</div></div>'
