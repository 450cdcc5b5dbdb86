"""A self-contained HTML page with tables and figures, which needs no network."""

import base64
import html
from collections.abc import Sequence
from typing import Literal


def page(title: str, sections: Sequence[str]) -> str:
    """Returns a complete page; `sections` are HTML, the title is plain text."""
    return _TEMPLATE.format(title=html.escape(title), body="\n".join(sections))


def paragraph(text: str) -> str:
    """Returns a paragraph with plain text."""
    return f"<p>{html.escape(text)}</p>"


def figure(data: bytes, media_type: str, caption: str) -> str:
    """Returns a picture (`image/png`, `image/svg+xml`) with its caption, which is plain text."""
    encoded = base64.b64encode(data).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:{media_type};base64,{encoded}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def table(
    caption: str,
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    bold: Sequence[Sequence[bool]] | None = None,
    kind: str = "numbers",
    left: Literal[1, 2] = 2,
) -> str:
    """Returns a table of plain texts.

    Args:
      caption: above the table.
      header: a text per column.
      lines: rows of texts.
      bold: which cells are bold; default: none.
      kind: `numbers`, aligned on the right, with only the header wrapped; or `text`.
      left: in a table of numbers, how many of the first columns are aligned on the left.
    """
    head = "".join(f"<th>{html.escape(column)}</th>" for column in header)
    body = []
    for row, line in enumerate(lines):
        cells = [
            f"<td><b>{html.escape(text)}</b></td>"
            if bold is not None and bold[row][column]
            else f"<td>{html.escape(text)}</td>"
            for column, text in enumerate(line)
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<p class="caption">{html.escape(caption)}</p>'
        f'<table class="{kind} left-{left}" aria-label="{html.escape(caption)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: .4rem 0 1.5rem; font-variant-numeric: tabular-nums; }}
.caption {{ font-weight: 600; margin: 1.5rem 0 0; }}
th, td {{ padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd;
  font-weight: normal; vertical-align: top; }}
thead th {{ border-bottom: 2px solid #222; }}
.numbers th, .numbers td {{ text-align: right; vertical-align: bottom; }}
.numbers td {{ white-space: nowrap; }}
.numbers.left-1 :is(th, td):nth-child(1), .numbers.left-2 :is(th, td):nth-child(-n+2) {{
  text-align: left; }}
.text {{ font-size: .9rem; }}
.text td:nth-last-child(-n+3) {{ white-space: nowrap; }}
figure {{ margin: 2rem 0; }}
figure img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #555; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
