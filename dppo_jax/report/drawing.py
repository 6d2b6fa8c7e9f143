"""Curves and points as figures of a page: SVG in the colors of the page."""

from collections.abc import Callable, Sequence
import dataclasses
import io
import math
import re
from typing import Any, NamedTuple
import zlib

import numpy as np

from dppo_jax.report import page
from dppo_jax.report import plots

# Names that CSS and matplotlib share.
_DASHES = ('solid', 'dashed', 'dotted')
_ENOUGH = 1_000  # Points of a curve,
_BINS = 200  # and of an area.
NUM_STYLES = page.NUM_CURVE_COLORS * len(_DASHES)

_INK = {name: light for name, (light, _) in page.COLORS.items()}


@dataclasses.dataclass(frozen=True)
class Line:
  """A curve as it is drawn; NaN is a gap."""

  label: str
  color: str  # One of `page.COLORS`.
  steps: np.ndarray  # [n]
  values: np.ndarray  # [n], drawn thick.
  last: float  # Where it ends, for the legend; NaN if that is not known.
  # Smallest positive value that was logged: no logarithmic axis goes below it,
  # where smoothing would take it.
  least: float
  dash: str = 'solid'
  # (steps, values) of curves that it sums up, drawn thin.
  faint: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
  # [n] lowest and [n] highest, drawn as a band.
  band: tuple[np.ndarray, ...] = ()

  def numbers(self) -> np.ndarray:
    """Everything that is drawn."""
    parts = [self.values, *self.band, *(values for _, values in self.faint)]
    return np.concatenate(parts)


class Threshold(NamedTuple):
  """A level that is drawn across."""

  value: float
  label: str = 'threshold'
  color: str = 'bad'


def style(i: int) -> tuple[str, str]:
  """Color and dash of line number i < NUM_STYLES; neighbors differ in both."""
  colors = page.NUM_CURVE_COLORS
  return f'c{i % colors}', _DASHES[(i + i // colors) % len(_DASHES)]


def smooth(values: np.ndarray, num_points: int) -> np.ndarray:
  """A Gaussian mean over about a twentieth of the run, unless it is short.

  Args:
    values: [n]; NaN counts for nothing.
    num_points: of the whole run, of which this may be a part.
  """
  if num_points < 30:
    return values
  # Means of several points stand for a run of more than a plot can show: all
  # with all would take minutes for 100,000.
  stride = max(1, num_points // _ENOUGH)
  sigma = num_points / 50 / stride
  finite = np.isfinite(values)
  starts = np.arange(0, len(values), stride)
  totals = np.add.reduceat(np.where(finite, values, 0.0), starts)
  counts = np.add.reduceat(finite.astype(np.float64), starts)
  # Not beyond the curve, which would lengthen the result.
  reach = min(math.ceil(3 * sigma), (len(starts) - 1) // 2)
  kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
  total = np.convolve(totals, kernel, mode='same')
  weight = np.convolve(counts, kernel, mode='same')
  # The kernel never reaches zero, so the weight is zero only in long gaps.
  means = np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan)
  middles = starts + (stride - 1) / 2
  return means if stride == 1 else np.interp(
      np.arange(len(values)), middles, means
  )


def last(values: np.ndarray) -> float:
  """The last finite value, NaN if there is none."""
  finite = values[np.isfinite(values)]
  return float(finite[-1]) if len(finite) else math.nan


def least(values: np.ndarray) -> float:
  """The smallest positive finite value, infinite if there is none."""
  positive = values[np.isfinite(values) & (values > 0)]
  return float(np.min(positive, initial=math.inf))


def span(steps: Sequence[int]) -> tuple[int, int]:
  """First and last step of an x axis, at least one apart."""
  first = min(steps)
  return first, max(first + 1, *steps)


def curves(
    plot: plots.Plot,
    lines: Sequence[Line],
    *,
    title: str,
    caption: str,
    steps: tuple[int, int],
    thresholds: Sequence[Threshold] = (),
    stacked: bool = False,
) -> str:
  """A figure: title, legend with last values, drawing and caption.

  All plots share the x axis, so that what happens at once stands at one place.

  Args:
    plot: says how the curves are drawn.
    lines: at least one with a finite value.
    title: of the figure, unlike all others of the page.
    caption: below the drawing.
    steps: first and last of the x axis.
    thresholds: levels to draw.
    stacked: areas on top of each other instead of lines.
  """

  def paint(axes):
    axes.set_xlim(steps)
    if stacked:
      note = _draw_areas(axes, plot, lines)
    else:
      note = _draw_lines(axes, plot, lines, thresholds)
    _draw_grid(axes, 'step')
    return note

  svg, note = _svg(title, paint)
  legend = [
      f'<span>{page.line_sample(line.color, line.dash)}'
      f'{page.escape(line.label)} '
      f'<b>{page.number(line.last)}</b></span>'
      for line in lines
  ]
  legend += [
      f'<span><i class="dash" style="border-color:var(--{color})"></i>'
      f'{page.escape(label)} <b>{value:g}</b></span>'
      for value, label, color in thresholds
  ]
  return _figure(title, legend, svg, f'{caption} {note}'.strip(), plot.unit)


def scatter(
    title: str,
    caption: str,
    *,
    mu: np.ndarray,
    values: np.ndarray,
    dropped: np.ndarray,
    top: float | None = None,
) -> str:
  """A figure of tokens against their probability under the sampler.

  Args:
    title: of the figure, unlike all others of the page.
    caption: below the drawing.
    mu: [n] probability of the token when it was sampled.
    values: [n] what is drawn against it.
    dropped: [n] bool; the trust region gave the token no gradient.
    top: end of the y axis, points above it are counted in the caption; where
      the values end by default.
  """

  def paint(axes):
    axes.set_xlim(0, 1.02)
    for chosen, color in ((~dropped, 'c0'), (dropped, 'c1')):
      axes.plot(
          mu[chosen], values[chosen], 'o', color=_INK[color], markersize=3,
          alpha=0.6, markeredgewidth=0,
      )
    if top is not None:
      axes.set_ylim(-0.05 * top, 1.05 * top)
    _draw_grid(axes, 'mu')

  svg, _ = _svg(title, paint)
  above = 0 if top is None else int(np.sum(values > 1.05 * top))
  if above:
    caption += f' Above the axis: {above}, up to {page.number(values.max())}.'
  legend = [
      f'<span><i class="swatch" style="background:var(--{color})"></i>'
      f'{label} <b>{int(count)}</b></span>'
      for label, color, count in (
          ('kept', 'c0', np.sum(~dropped)), ('dropped', 'c1', np.sum(dropped))
      )
  ]
  return _figure(title, legend, svg, caption)


def _figure(
    title: str, legend: Sequence[str], svg: str, caption: str, unit: str = ''
) -> str:
  return (
      f'<figure><h2>{page.escape(title)} <span class="note">'
      f'{page.escape(unit)}</span></h2>'
      f'<div class="legend">{"".join(legend)}</div>'
      f'{svg}<figcaption>{page.escape(caption)}</figcaption></figure>'
  )


def _svg(title: str, paint: Callable[[Any], Any]) -> tuple[str, Any]:
  """An SVG element with what `paint(axes)` drew, and what it returned."""
  # Slow to import.
  from matplotlib import figure
  from matplotlib import style

  options = {
      'font.size': 11,
      'path.simplify_threshold': 1.0,  # Pixels: keeps pages of long runs small.
      'svg.fonttype': 'none',  # Text stays text, in the font of the page.
      'svg.hashsalt': title,  # The same page each time.
  }
  with style.context(['default', options]):
    canvas = figure.Figure(figsize=(5, 2.6), dpi=72)
    axes = canvas.add_axes((0.12, 0.12, 0.86, 0.85), frameon=False)
    painted = paint(axes)
    file = io.StringIO()
    no_metadata = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    canvas.savefig(file, format='svg', transparent=True, metadata=no_metadata)
  return _inline(file.getvalue(), title), painted


def _draw_grid(axes: Any, label: str) -> None:
  """About five round numbers on each axis, and lines across for those of y."""
  from matplotlib import ticker

  axes.grid(axis='y', color=_INK['rule'])
  axes.set_axisbelow(True)
  axes.minorticks_off()
  axes.tick_params(length=0, pad=5, labelcolor=_INK['soft'])
  corner = {'xy': (0, 0), 'xycoords': 'axes fraction', 'ha': 'right'}
  offset = {'xytext': (-10, -13), 'textcoords': 'offset points'}
  axes.annotate(label, **corner, **offset, color=_INK['soft'])
  rounded: dict[str, Any] = {'nbins': 5, 'steps': [1, 2, 5, 10]}
  whole = label == 'step'
  axes.xaxis.set_major_locator(ticker.MaxNLocator(**rounded, integer=whole))
  low, high = axes.get_ylim()
  if axes.get_yscale() == 'linear':
    axes.yaxis.set_major_locator(ticker.MaxNLocator(**rounded))
  elif high < 100 * low:
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter(lambda value, _: page.plain(f'{value:.6g}'))


def _draw_lines(
    axes: Any,
    plot: plots.Plot,
    lines: Sequence[Line],
    thresholds: Sequence[Threshold],
) -> str:
  """Each curve thick, and what it sums up thin or as a band."""
  values = np.concatenate(
      [line.numbers() for line in lines] + [[t.value for t in thresholds]]
  )
  values = values[np.isfinite(values)]
  least = min([line.least for line in lines] + [t.value for t in thresholds])
  floor, note = -math.inf, ''
  if plot.log and values.max() > 10 * least:
    floor = 0.8 * least
    axes.set_yscale('log')
    axes.set_ylim(floor, 1.25 * values.max())
    if values.min() <= 0:
      note = 'A value of 0 or less lies on the lower edge.'

  def draw(steps, values, **options):
    # A single point makes no line, and two or three look like many.
    few = np.isfinite(values).sum() < (50 if plot.markers else 10)
    size = 2 + 1.5 * options['linewidth']
    dots = {'marker': 'o' if few else '', 'markersize': size}
    axes.plot(steps, np.maximum(values, floor), **dots, **options)

  for line in lines:
    ink = _INK[line.color]
    if line.band:
      steps, *edges = _envelope(line.steps, *line.band)
      low, high = (np.maximum(edge, floor) for edge in edges)
      axes.fill_between(steps, low, high, color=ink, alpha=0.15, linewidth=0)
    for steps, thin in line.faint:
      width = 1 if len(thin) < 1000 else 0.5
      draw(steps, thin, color=ink, linewidth=width, alpha=0.3)
    draw(
        line.steps, line.values, color=ink, linewidth=2, clip_on=False,
        linestyle=line.dash,
    )
  for threshold in thresholds:
    ink = _INK[threshold.color]
    axes.axhline(threshold.value, color=ink, linewidth=1, linestyle='--')
  if floor < 0 and 0 <= values.min() <= 0.6 * values.max():
    axes.set_ylim(bottom=0)
  if plot.stacked:
    note = _cut_off(axes, plot, *_all_points(lines))
  return note


def _envelope(
    steps: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, ...]:
  """A band of no more points than can be seen, around all of a long one.

  Of lines matplotlib leaves out what cannot be seen, of areas nothing: those of
  20,000 steps made a page of 29 MB.
  """
  if len(steps) <= 2 * _BINS:
    return steps, low, high
  starts = np.linspace(0, len(steps), _BINS, endpoint=False).astype(int)
  middles = np.add.reduceat(steps, starts) / np.diff(starts, append=len(steps))
  middles[[0, -1]] = steps[[0, -1]]
  return (
      middles, np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts)
  )


def _all_points(lines: Sequence[Line]) -> tuple[np.ndarray, np.ndarray]:
  """Steps and finite values of everything that is drawn but the bands."""
  points = [(line.steps, line.values) for line in lines]
  points += [seed for line in lines for seed in line.faint]
  steps, values = (np.concatenate(part) for part in zip(*points))
  return steps[np.isfinite(values)], values[np.isfinite(values)]


def _draw_areas(axes: Any, plot: plots.Plot, lines: Sequence[Line]) -> str:
  """Curves on top of each other, interpolated where one has no value."""
  steps = np.unique(np.concatenate([line.steps for line in lines]))
  parts = []
  for line in lines:
    known = np.isfinite(line.values)
    parts.append(np.interp(steps, line.steps[known], line.values[known]))

  def binned(values: np.ndarray) -> np.ndarray:
    bins = np.array_split(values, min(len(values), _BINS))
    return np.array([part.mean() for part in bins])

  axes.stackplot(
      binned(steps),
      [binned(part) for part in parts],
      colors=[_INK[line.color] for line in lines],
      alpha=0.75,
      linewidth=0,
  )
  axes.set_ylim(bottom=0)
  return _cut_off(axes, plot, steps, np.sum(parts, axis=0))


def _cut_off(
    axes: Any, plot: plots.Plot, steps: np.ndarray, totals: np.ndarray
) -> str:
  """Ends the y axis below times far from all others, and says so."""
  # The first step may compile, for minutes: it would flatten all others.
  limit = 1.5 * np.quantile(totals, 0.9)
  if len(steps) < 10 or totals.max() <= 2 * limit:
    return ''
  axes.set_ylim(top=limit)
  worst = totals.argmax()
  return f'Cut off: {totals[worst]:.3g} {plot.unit} at step {steps[worst]}.'


def _inline(svg: str, title: str) -> str:
  """Makes part of a page of what was a file: own ids, the page's colors."""
  svg = svg[svg.index('<svg') :]
  # Titles that differ in punctuation alone must not share their ids.
  prefix = f'p{zlib.crc32(title.encode("utf-8", "replace")):08x}'
  label = page.escape(title)
  for pattern, replacement in (
      (r'<style.*?</style>', ''),  # Would be the style of the whole page.
      (r' (xmlns|xmlns:xlink|version)="[^"]*"', ''),
      (r' (width|height)="[\d.]+pt"', ''),
      (r'xlink:href=', 'href='),
      (r'font-family: [^;]*; ', ''),
      (r'(\bid="|href="#|url\(#)', rf'\g<1>{prefix}-'),
  ):
    svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
  # A hundredth of a pixel is enough, and half of a page is coordinates.
  svg = re.sub(
      r' (d|x|y)="[^"]*"',
      lambda attribute: re.sub(r'(\.\d\d)\d+', r'\1', attribute[0]),
      svg,
  )
  # No pattern: a title may hold a backslash.
  svg = svg.replace('<svg', f'<svg role="img" aria-label="{label}"', 1)
  for name, ink in _INK.items():
    svg = svg.replace(ink, f'var(--{name})')
  return svg
