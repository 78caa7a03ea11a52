"""The report as one HTML file that needs nothing else."""

import base64
from collections.abc import Sequence
from html import escape

from keras_iris.evaluation.panels import Plot
from keras_iris.evaluation.tables import Table

_STYLE = """
:root { color-scheme: light dark; --background: #fff; --ink: #1f2328;
  --muted: #59636e; --faint: #d5dae0; }
@media (prefers-color-scheme: dark) { :root { --background: #16191d;
  --ink: #e8eaed; --muted: #9aa4af; --faint: #383f47; } }
body { background: var(--background); color: var(--ink); max-width: 54rem;
  margin: 0 auto; padding: 2rem 1.25rem 4rem;
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, ul { max-width: 42rem; margin: .5rem 0; }
.muted, caption, figcaption { color: var(--muted); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; margin: .5rem 0; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: right;
  white-space: nowrap; vertical-align: top;
  font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 500;
  border-bottom: 1px solid var(--faint); }
.label { text-align: left; }
.settings td { white-space: normal; overflow-wrap: anywhere; }
figure { margin: .75rem 0; }
figcaption { max-width: 42rem; margin-top: .25rem; }
img { width: 100%; height: auto; display: block; }
details { margin-top: 2.5rem; }
summary { cursor: pointer; font-weight: 600; }
"""


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The whole page, from the HTML of its sections."""
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="muted">{escape(subtitle)}</p>
{body}
</body>
</html>
"""


def prose(title: str, paragraphs: Sequence[str]) -> str:
    """A section of text; paragraphs that begin with `"- "` are points."""
    parts = [f"<h2>{escape(title)}</h2>"]
    is_list = False
    for paragraph in paragraphs:
        is_point = paragraph.startswith("- ")
        if is_point != is_list:
            parts.append("<ul>" if is_point else "</ul>")
            is_list = is_point
        tag = "li" if is_point else "p"
        text = escape(paragraph.removeprefix("- "))
        parts.append(f"<{tag}>{text}</{tag}>")
    return "\n".join([*parts, "</ul>"] if is_list else parts)


def table_section(table: Table) -> str:
    """A section with a table; none where the table is empty."""
    if not table.rows:
        return ""
    return f"<h2>{escape(table.title)}</h2>\n{_table(table, '')}"


def settings_section(title: str, tables: Sequence[Table]) -> str:
    """A section of tables to open on demand; none where all are empty."""
    parts = [
        f"<h2>{escape(table.title)}</h2>\n{_table(table, 'settings')}"
        for table in tables
        if table.rows
    ]
    if not parts:
        return ""
    body = "\n".join(parts)
    return f"<details><summary>{escape(title)}</summary>\n{body}\n</details>"


def _table(table: Table, css_class: str) -> str:
    def row(cells: list[str], tag: str) -> str:
        classes = [' class="label"'] * table.num_labels
        classes += [""] * (len(cells) - table.num_labels)
        return "".join(
            f"<{tag}{css}>{escape(cell)}</{tag}>"
            for css, cell in zip(classes, cells, strict=True)
        )

    lines = [f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows]
    caption = f"<caption>{escape(table.note)}</caption>" if table.note else ""
    return (
        f'<div class="scroll"><table class="{css_class}">{caption}'
        f"<thead><tr>{row(table.header, 'th')}</tr></thead>\n<tbody>"
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def figure_section(plot: Plot, light: bytes, dark: bytes) -> str:
    """A section with a plot, as PNGs for light and for dark pages."""
    titles = [panel.title.replace("\n", ", ") for panel in plot.panels]
    alt = f"{plot.title} over training steps: {'; '.join(titles)}"
    return f"""<h2>{escape(plot.title)}</h2>
<figure>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{_data_url(dark)}">
<img alt="{escape(alt)}" src="{_data_url(light)}">
</picture>
<figcaption>{escape(plot.caption)}</figcaption>
</figure>"""


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
