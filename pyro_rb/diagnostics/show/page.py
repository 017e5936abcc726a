# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Comparisons as HTML, for notebooks and as pages of their own."""

import io
from html import escape
from typing import Any, Callable, List, Optional, Sequence

from pyro_rb.diagnostics.compare.report import Comparison, LossResult
from pyro_rb.diagnostics.show.table import (
    LEGEND,
    heading,
    left_out,
    outline,
    ranking,
    remarks,
    state_cells,
    summary,
    trained,
)

# Colours are those of the surrounding page; what is marked keeps its contrast on both. Notebooks and
# nbsphinx have colours and stripes of their own for tables, which would not: hence the !important.
STYLE = """
.pyro-rb { line-height: 1.45; }
div.pyro-rb table { border-collapse: collapse; margin: 0.6em 0; font-variant-numeric: tabular-nums;
  color: inherit !important; table-layout: auto; }
div.pyro-rb tr { background: none !important; }
.pyro-rb .wide { overflow-x: auto; }
div.pyro-rb th, div.pyro-rb td { padding: 0.2em 0.6em; text-align: right; border: 0; white-space: nowrap;
  border-bottom: 1px solid rgba(128, 128, 128, 0.35); background: none; color: inherit; }
div.pyro-rb th:first-child, div.pyro-rb td:first-child,
div.pyro-rb th:last-child, div.pyro-rb td:last-child { text-align: left; }
.pyro-rb tr.best td { font-weight: bold; }
.pyro-rb tr.out td { opacity: 0.6; }
.pyro-rb .advice { border-left: 4px solid #2ba37a; padding: 0.3em 0.9em; margin: 0.8em 0; }
.pyro-rb .thin { border-color: #e07b1a; }
.pyro-rb .small { opacity: 0.8; font-size: 90%; }
.pyro-rb pre { white-space: pre-wrap; background: none; color: inherit; }
.pyro-rb svg { max-width: 100%; height: auto; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font-family: system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }}
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(comparisons: Sequence[Comparison]) -> str:
    """
    An HTML page that needs no other file.

    :param list comparisons: Results of :func:`~pyro_rb.diagnostics.compare.compare.compare`.
    :rtype: str

    **Example**

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro_rb import compare
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.))
    >>> result = compare(model, guide, "STLTrace_ELBO", train_steps=0, num_samples=40, progress=False)
    >>> page([result])[:15]
    '<!DOCTYPE html>'
    """
    body = "\n".join(section(comparison, style=False, figures=True) for comparison in comparisons)
    legend = f'<div class="pyro-rb small"><pre>{escape(LEGEND)}</pre></div>'
    title = escape("; ".join(comparison.title for comparison in comparisons))
    return PAGE.format(title=title, style=STYLE, body=f"{body}\n{legend}")


def section(comparison: Comparison, style: bool = True, figures: bool = False) -> str:
    """
    One comparison as part of a page.

    :param bool style: Whether to put the style sheet before it.
    :param bool figures: Whether to draw figures, if matplotlib is installed.
    :rtype: str
    """
    advice = comparison.recommendation
    kind = "advice" if advice.loss else "advice thin"
    parts = [f"<style>{STYLE}</style>"] if style else []
    parts += ['<div class="pyro-rb">', f"<h2>{escape(comparison.title)}</h2>"]
    text = " ".join([advice.sentence, *advice.caveats])
    parts.append(f'<p class="{kind}">{escape(text)}</p>')
    headers, ranked = ranking(comparison)
    if len(ranked) > 1:
        parts.append(_table(headers, ranked, ["best" if row[0] == advice.loss else "" for row in ranked]))
    for sentence, headers, rows in trained(comparison):
        parts += [f"<p>{escape(sentence)}</p>", *([_table(headers, rows, [""] * len(rows))] if rows else [])]
    if advice.usage:
        parts.append(f"<pre>{escape(advice.usage)}</pre>")
    for state in comparison.states:
        parts.append(f"<h3>{escape(heading(comparison, state))}</h3>")
        parts.append(f"<p>{escape(summary(state))}</p>")
        parts.append(_table(*state_cells(state), [_mark(result, advice.loss) for result in state.losses]))
        parts += [f'<p class="small">{escape(remark)}</p>' for remark in remarks(state)]
    notes = [*outline(comparison), left_out(comparison)]
    notes += [f"Note: {note}" for note in comparison.notes]
    parts += [f'<p class="small">{escape(note)}</p>' for note in notes if note]
    if figures:
        parts += _figures(comparison)
    return "\n".join([*parts, "</div>"])


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str]) -> str:
    """:param list marks: The class of each row, or an empty string."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = []
    for row, mark in zip(rows, marks):
        cells = "".join(f"<td>{escape(cell.strip())}</td>" for cell in row)
        body.append(f'<tr class="{mark}">{cells}</tr>' if mark else f"<tr>{cells}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _mark(result: LossResult, best: Optional[str]) -> str:
    return "out" if result.error or result.biased else "best" if result.name == best else ""


def simple_page(title: str, text: str, draw: Callable[[], Any], is_bad: bool = False) -> str:
    """A page of a text and a figure, if matplotlib is installed."""
    body = f'<div class="pyro-rb"><h2>{escape(title)}</h2>\n<p class="advice{" thin" * is_bad}">'
    body += escape(text).replace("\n", "<br>") + "</p>"
    try:
        body += _svg(draw())
    except ImportError:
        pass
    return PAGE.format(title=escape(title), style=STYLE, body=f"{body}</div>")


def _figures(comparison: Comparison) -> List[str]:
    kinds = ["efficiency", "parameters"]
    if len(comparison.states) > 1:
        kinds.append("training")
    if comparison.training:
        kinds.append("elbo")
    if comparison.race is not None:
        kinds.append("race")
    try:
        return [_svg(comparison.plot(kind=kind)) for kind in kinds]
    except ImportError:
        return []


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    return f"<div>{svg[svg.index('<svg') :]}</div>"
