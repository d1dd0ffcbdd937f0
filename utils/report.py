"""One page that a researcher sends to a colleague: tables, figures and each run's configuration.

    write(Path("report.html"), {"Test split": markdown}, drawings, evaluated)

The page is one file: its figures are inside it, it has no scripts, and its content security
policy lets a browser load nothing from anywhere. It reads on a telephone and on paper. Whatever
comes from a checkpoint, a data set or a path is untrusted and shown as text.
"""

import base64
import hashlib
import html
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from utils import tables
from utils.checkpoint import write_text
from utils.errors import InputError
from utils.inference import Evaluated
from utils.plots import Drawing
from utils.run_folder import read_json

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid #0072b2; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; white-space: nowrap; overflow-wrap: normal;
  border-bottom: 1px solid #ccc; }
td { vertical-align: top; } td.long { white-space: normal; min-width: 22rem; }
td:first-child, th:first-child { padding-left: 0; }
thead th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }
tbody tr:hover { background: #f2f6f9; }
figure { margin: 1.5rem 0 2.5rem; }
figure img { display: block; width: 100%; height: auto; }
figure img.column { max-width: 26rem; }
figure img.page { min-width: 38rem; max-width: 54rem; }
figcaption { max-width: 54rem; font-size: .875rem; color: #444; margin-top: .5rem; }
pre, code { font: .8125rem/1.45 ui-monospace, Consolas, monospace; }
pre { margin: 0; padding: .75rem; background: #f5f5f5; white-space: pre-wrap; }
details { border-top: 1px solid #ccc; padding: .4rem 0; }
summary { cursor: pointer; }
@media print { details > * { display: block; } .scroll { overflow: visible; }
  figure { break-inside: avoid; } figure img.page { min-width: 0; } }
"""


def write(
    path: Path,
    texts: Mapping[str, str],
    drawings: Sequence[Drawing],
    evaluated: Sequence[Evaluated],
) -> None:
    """Writes the page.

    texts: what stands under each heading, in Markdown of paragraphs, pipe tables and **bold**,
    which is what utils/tables.py makes. Raises InputError if the page cannot be written.
    """
    sections = [_section(heading, _markdown(text)) for heading, text in texts.items()]
    sections.append(_section("Figures", "".join(map(_figure, drawings))) if drawings else "")
    sections.append(_section("Configuration of each run", "".join(map(_run, evaluated))))
    # A style sheet that is known by its hash: text that slipped into the page could not be one.
    digest = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Calibration report</title>
<style>{CSS}</style>
</head>
<body>
<h1>Calibration report</h1>
<p>{len(evaluated)} trained networks, made with torch {escape(torch.__version__)} by</p>
<pre>{escape(command)}</pre>
{"".join(sections)}
</body>
</html>
"""
    write_text(path, page)


def escape(text: object) -> str:
    """As text of the page, wherever in it; what UTF-8 cannot say, a path's odd bytes, as "?"."""
    return html.escape(str(text).encode("utf-8", "replace").decode())


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}</section>\n"


def _inline(text: object) -> str:
    """Markdown's **bold** and backslash escapes; everything else is text."""
    text = re.sub(r"(?<!\\)\*\*(.+?)(?<!\\)\*\*", r"<strong>\1</strong>", escape(text))
    return re.sub(r"\\([^\w\s]|_)", r"\1", text)


def _scrolling(content: str, name: str) -> str:
    """A box that scrolls sideways in itself, by keyboard too, so that the page never does."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">'
        f"{content}</div>\n"
    )


def _markdown(text: str) -> str:
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if all(line.startswith("|") for line in lines):
            # The second row only rules off the heading.
            parts.append(_table([_cells(line) for line in lines[:1] + lines[2:]]))
        else:
            parts.append(f"<p>{_inline(' '.join(lines))}</p>\n")
    return "".join(parts)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _table(rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in rows[0])
    body = "".join("<tr>" + "".join(map(_data, row)) + "</tr>\n" for row in rows[1:])
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return _scrolling(table, "table")


def _data(cell: str) -> str:
    kind = ' class="long"' if len(cell) > 70 else ""
    return f"<td{kind}>{_inline(cell)}</td>"


def _figure(drawing: Drawing) -> str:
    data = base64.b64encode(drawing.png.read_bytes()).decode()
    # Bytes 16 to 24 of a PNG are its width and height in pixels, here of 300 an inch.
    width, height = (int.from_bytes(drawing.png.read_bytes()[i : i + 4]) for i in (16, 20))
    kind = "page" if width > 300 * 4 else "column"
    image = (
        f'<img class="{kind}" width="{width}" height="{height}" alt="{escape(drawing.title)}" '
        f'src="data:image/png;base64,{data}">'
    )
    caption = f"<strong>{escape(drawing.title)}.</strong> {escape(drawing.caption)}"
    return (
        f"<figure>\n{_scrolling(image, drawing.title)}<figcaption>{caption}</figcaption>\n"
        "</figure>\n"
    )


def _run(run: Evaluated) -> str:
    """What is known of a run: from its checkpoint, and from the config.json beside it."""
    about = {
        "checkpoint": str(run.path),
        "SHA-256 of the weights": run.weights_hash,
        "model": run.model_name,
        "training": run.training,
        "data": run.data,
        "teacher": run.teacher,
        "temperature": run.temperature,
        "warnings": run.warnings,
        "environment": _environment(run.path.with_name("config.json")),
    }
    setting = tables.setting(run.training["method"], run.training["requested"])
    name = f"{run.data['dataset']}, {run.model_name}: {setting}, seed {run.training['seed']}"
    text = json.dumps(about, indent=2, ensure_ascii=False, default=str)
    return f"<details>\n<summary>{escape(name)}</summary>\n<pre>{escape(text)}</pre>\n</details>\n"


def _environment(config: Path) -> object:
    try:
        return read_json(config)["environment"]
    except (InputError, KeyError):
        return "unknown: no readable config.json beside the checkpoint"
