"""The page around the sections: one file of HTML, without scripts or network.

Style is inline, and it reads as well in the dark and on a phone.
"""

from collections.abc import Iterable, Sequence
import html
import math
from pathlib import Path
import re
import string
from typing import Any

from dppo_jax.report import plots
from dppo_jax.report import runs

# Color: (light scheme, dark scheme). A plot is drawn in the light ones, which
# then become CSS variables: each must be unlike all others. Those of curves
# stay apart for the color-blind, by a distance in Lab that the test measures.
COLORS = {
    'page': ('#f6f7f9', '#14171c'),
    'card': ('#ffffff', '#1d2128'),
    'text': ('#1c2128', '#e4e7ec'),
    'soft': ('#667080', '#97a1b0'),
    'rule': ('#e3e6ea', '#313742'),
    'good': ('#1a7f4b', '#4cc38a'),
    'bad': ('#c2412d', '#f2705c'),
    'c0': ('#245bda', '#a9c6fb'),
    'c1': ('#d78214', '#c27a1e'),
    'c2': ('#36ad98', '#3fe3b5'),
    'c3': ('#983f8f', '#b157ee'),
    'c4': ('#952348', '#cc3263'),
    'c5': ('#63550a', '#ebe05a'),
}
NUM_CURVE_COLORS = 6  # c0 to c5.

_TEMPLATE = Path(__file__).parents[1] / 'assets' / 'report' / 'page.html'


def write(path: Path, *, title: str, body: Iterable[str]) -> Path:
  """Writes a page of these sections, already HTML, and returns its path."""
  light, dark = (
      ' '.join(f'--{name}: {inks[i]};' for name, inks in COLORS.items())
      for i in range(2)
  )
  page = string.Template(_TEMPLATE.read_text(encoding='utf-8')).substitute(
      title=escape(title), light=light, dark=dark, body='\n'.join(body)
  )
  # Completions may hold half a surrogate pair, which UTF-8 cannot.
  path.write_text(page, encoding='utf-8', errors='replace')
  return path


def header(title: str, subtitle: str, tiles: Sequence[str], text: str) -> str:
  """Heading, a line below it, headline numbers, and HTML below those."""
  numbers = f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ''
  return (
      f'<header><h1>{escape(title)}</h1>'
      f'<p class="note">{escape(subtitle)}</p>{numbers}{text}</header>'
  )


def tile(label: str, value: str | None, kind: str = '') -> str:
  """A headline number; nothing without one."""
  if not value:
    return ''
  return (
      f'<div class="tile {kind}"><div class="value">{escape(value)}</div>'
      f'<div class="note">{escape(label)}</div></div>'
  )


def note(text: str) -> str:
  """A line of small print."""
  return f'<div class="note">{escape(text)}</div>'


def line_sample(color: str, dash: str) -> str:
  """A piece of a line, as the key of a legend."""
  return f'<i class="line" style="border-top:3px {dash} var(--{color})"></i>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table, which scrolls if it is wider than a page; all cells are HTML.

  The first cell of a row is its name.
  """
  heads = ''.join(f'<th>{cell}</th>' for cell in head)
  body = ''.join(
      f'<tr><th>{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
      for first, *rest in rows
  )
  return (
      '<div class="scroll"><table class="facts">'
      f'<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
  )


def not_plotted(left_out: Sequence[plots.Plot], who: str) -> str:
  """Names the plots that `who` logged nothing for, and their keys."""
  if not left_out:
    return ''
  items = ''.join(
      f'<li>{escape(plot.title)}: '
      + ', '.join(f'<code>{key}</code>' for key in plot.curves)
      + '</li>'
      for plot in left_out
  )
  return (
      f'<details class="note"><summary>Not plotted: {len(left_out)} of '
      f'{len(plots.PLOTS)} plots, whose keys {who} did not log</summary>'
      f'<ul>{items}</ul></details>'
  )


def reward(sample: dict) -> str:
  """The reward of a sample as a number, and whether it is right."""
  value, kind = sample.get('reward'), runs.verdict(sample)
  mark = {'correct': '✓', 'partly': '~', 'wrong': '✗'}[kind]
  return (
      f'<b>{"nan" if value is None else f"{value:g}"}</b> '
      f'<span class="verdict">{mark} {kind}</span>'
  )


def number(value: float) -> str:
  """Three digits, or all of those before the point: 0.00214, 12,345."""
  if not math.isfinite(value):
    return '–'
  return f'{value:,.0f}' if 1e3 <= abs(value) < 1e7 else plain(f'{value:.3g}')


def plain(text: str) -> str:
  """1e-08 as 1e-8."""
  return re.sub(r'e([+-])0?', lambda match: 'e' + match[1].strip('+'), text)


def escape(value: Any) -> str:
  """Any value as text of HTML, or of an attribute."""
  return html.escape('' if value is None else str(value), quote=True)
