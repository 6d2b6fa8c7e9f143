"""One run as one page: `report.html`, made from the logs in its workdir.

The page is a single file without scripts and without the network: style and
plots (SVG) are inline, and it reads as well in the dark and on a phone. To add
a plot, add a row to `PLOTS`. A run that did not log what a row needs gets a
note instead of the plot.

    python -m dppo_jax.report --workdir=DIR
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import fnmatch
import html
import io
import json
import math
import os
from pathlib import Path
import re
import string
from typing import Any

import numpy as np

from dppo_jax import metrics


@dataclasses.dataclass(frozen=True)
class Plot:
  """One plot: its title, how to read it, its curves.

  `curves` has the label of each logged key. A key that ends in * draws every
  key it matches, and the * of its label is what the * of the key stood for.
  """

  title: str
  caption: str
  curves: Mapping[str, str]
  unit: str = ''
  log: bool = False  # Where the values span more than a decade.
  markers: bool = False  # Few points, each drawn as it is; never smoothed.
  stacked: bool = False
  threshold: bool = False  # Draws the config's divergence thresholds.


PLOTS = (
    Plot(
        'Reward',
        'Mean reward of the sampled completions.',
        {'reward/mean': 'mean'},
    ),
    Plot(
        'Held-out accuracy',
        'avg@k: mean of k attempts. pass@k: one of k is right.',
        {'eval/avg@*': 'avg@*', 'eval/pass@*': 'pass@*'},
        markers=True,
    ),
    Plot(
        'Divergence',
        'Of the trained from the sampling policy, over tokens; only tokens '
        'above the threshold can be masked.',
        {'divergence/mean': 'mean', 'divergence/max': 'max'},
        log=True,
        threshold=True,
    ),
    Plot(
        'Masked tokens',
        'Share of the tokens of that sign of the advantage A that are outside '
        'the trust region and moving further out.',
        {'mask/positive': 'A > 0', 'mask/negative': 'A < 0'},
    ),
    Plot(
        'Policy gap |pi - mu|',
        'Means over sampled tokens, pi of the learner, mu of the sampler. '
        'Age 0: same weights on both sides, so numerics alone, the '
        'training-inference mismatch. Max: the largest pi - mu of all updates.',
        {
            'on_policy/prob_gap_mean': 'age 0',
            'mismatch/prob_gap_mean': 'all updates',
            'mismatch/prob_gap_max': 'max',
        },
        log=True,
    ),
    Plot(
        'Ratio',
        'How far r = pi / mu of sampled tokens is from 1. k3 = mean of '
        'r - 1 - log r estimates KL(mu || pi).',
        {'ratio/second_moment': 'E(r-1)^2', 'ratio/k3': 'k3'},
        log=True,
    ),
    Plot(
        'Constraint',
        'Mean of (r - 1)^2 as the constrained loss counts it, and share of '
        'tokens beyond the turning point, where the brake is stronger than '
        'the reward.',
        {
            'constraint/value': 'E(r-1)^2',
            'constraint/beyond_turning_point': 'beyond',
        },
        log=True,
    ),
    Plot(
        'Multiplier',
        'Price of the constraint: rises while it is violated.',
        {'dual/multiplier': 'mean', 'by_age/*/multiplier': 'age *'},
    ),
    Plot(
        'Replay',
        'Share of what is learned from that was sampled before, by tokens and '
        'by gradient: the sum of |factor of grad log pi|.',
        {
            'replay/token_share': 'tokens',
            'replay/gradient_share': 'gradient',
        },
    ),
    Plot(
        'Divergence by age',
        'Mean over tokens that were sampled so many optimizer updates ago.',
        {'by_age/*/divergence_mean': 'age *'},
        log=True,
    ),
    Plot(
        'Top-K mass',
        'Probability of the explicit buckets under the sampling policy: the '
        'nearer to 1, the tighter the divergence.',
        {'topk/mass_mean': 'mean', 'topk/mass_min': 'min'},
    ),
    Plot(
        'Entropy',
        'Mean entropy of the policy per sampled token.',
        {'entropy/mean': 'mean'},
        unit='nats',
    ),
    Plot(
        'Completion length',
        'Mean number of sampled tokens.',
        {'completion/length_mean': 'mean'},
        unit='tokens',
    ),
    Plot(
        'Truncated completions',
        'Share that met the length limit before an end token.',
        {'completion/truncated': 'truncated'},
    ),
    Plot(
        'Step time',
        'Where a step spends its time.',
        {
            'time/learn_s': 'learn',
            'time/sample_s': 'sample',
            'time/score_s': 'score',
        },
        unit='s',
        stacked=True,
    ),
    Plot(
        'Gradient norm',
        'Before clipping.',
        {'optimizer/grad_norm': 'norm'},
        log=True,
    ),
)

# A reward above this shows a sample as correct: right for rewards in {0, 1},
# in {-1, 1}, and for small bonuses that are not for the answer.
CORRECT_ABOVE = 0.5
MAX_SAMPLES = 12  # Per step shown.
MAX_MASKED_TOKENS = 15  # Per sign of the advantage.

# Color: (light scheme, dark scheme). A plot is drawn in the light ones, which
# then become CSS variables: each must be unlike all others.
_COLORS = {
    'page': ('#f6f7f9', '#14171c'),
    'card': ('#ffffff', '#1d2128'),
    'text': ('#1c2128', '#e4e7ec'),
    'soft': ('#667080', '#97a1b0'),
    'rule': ('#e3e6ea', '#313742'),
    'good': ('#1a7f4b', '#4cc38a'),
    'bad': ('#c2412d', '#f2705c'),
    'c0': ('#2f6fdb', '#6ea3ff'),
    'c1': ('#e0812b', '#f2a65a'),
    'c2': ('#2a9d78', '#4fc3a1'),
    'c3': ('#8e5bd0', '#b794f6'),
    'c4': ('#c94f7c', '#ee86ab'),
    'c5': ('#7b8794', '#a0aab8'),
}
_NUM_CURVE_COLORS = 6  # c0 to c5.
_INK = {name: light for name, (light, _) in _COLORS.items()}


def write_report(
    workdir: str | os.PathLike[str], *, title: str | None = None
) -> Path:
  """Writes `workdir/report.html` and returns its path.

  Reads metrics.jsonl, samples.jsonl, config.json, masked_tokens.json and
  scatter.json, and leaves out what is not there.

  Args:
    workdir: directory of the run.
    title: heading of the page; by default the directory's name.
  """
  workdir = Path(workdir)
  rows = metrics.read(workdir)
  config = _read_json(workdir / 'config.json')
  title = title or workdir.resolve().name
  body = [
      _header(title, rows, config),
      _plots(rows, config),
      _scatter(_read_points(workdir / 'scatter.json')),
      _masked_tokens(_read_json(workdir / 'masked_tokens.json')),
      _samples(metrics.read_samples(workdir)),
      _config(config),
  ]
  light, dark = (
      ' '.join(f'--{name}: {inks[i]};' for name, inks in _COLORS.items())
      for i in range(2)
  )
  page = string.Template(_PAGE.read_text(encoding='utf-8')).substitute(
      title=_escape(title), light=light, dark=dark, body='\n'.join(body)
  )
  path = workdir / 'report.html'
  # Completions may hold half a surrogate pair, which UTF-8 cannot.
  path.write_text(page, encoding='utf-8', errors='replace')
  return path


# --- Sections of the page ---------------------------------------------------


def _header(title: str, rows: list[dict], config: dict) -> str:
  """Title, headline numbers, and where the run comes from."""
  run = _as_dict(config.get('run'))
  speeds = _finite(rows, 'tokens/s')
  minutes = _wall_minutes(rows)
  tiles = [
      _accuracy_tile(rows),
      _tile('Reward', _before_after(_finite(rows, 'reward/mean'))),
      _tile('Steps', f'{rows[-1]["step"]:,}' if rows else '0'),
      _tile('Tokens/s', f'{np.median(speeds):,.0f}' if len(speeds) else ''),
      _tile('Wall time', f'{minutes:,.1f} min' if minutes else ''),
      _tile('Device', run.get('device')),
  ]
  threshold = ' / '.join(f'{t:g}' for t in _thresholds(config))
  facts = {
      'algorithm': _name(config.get('algorithm')),
      'divergence': _name(config.get('divergence')),
      'threshold': threshold,
  }
  if facts['algorithm'] in title:
    del facts['algorithm']
  subtitle = ' · '.join(f'{k} {v}' for k, v in facts.items() if v)
  return (
      f'<header><h1>{_escape(title)}</h1>'
      f'<p class="note">{_escape(subtitle)}</p>'
      f'<div class="tiles">{"".join(tiles)}</div>{_provenance(run)}</header>'
  )


def _provenance(run: dict) -> str:
  """Command, commit and versions, as far as known."""
  text = ''
  if run.get('command'):
    text = f'<pre class="command">{_escape(run["command"])}</pre>'
  facts = [f'commit {str(run["commit"])[:12]}'] if run.get('commit') else []
  facts += [f'{k} {v}' for k, v in _as_dict(run.get('versions')).items()]
  return text + f'<p class="note">{_escape(" · ".join(facts))}</p>'


def _accuracy_tile(rows: list[dict]) -> str:
  """The first held-out accuracy that the run has, before and after."""
  for key in _matching('eval/avg@*', rows) + _matching('eval/pass@*', rows):
    values = _finite(rows, key)
    if len(values):
      ends = values[[0, -1]] if len(values) > 1 else values
      text = ' → '.join(f'{value:.1%}' for value in ends)
      return _tile(f'Held-out {key.removeprefix("eval/")}', text, 'strong')
  return ''


def _before_after(values: np.ndarray) -> str:
  """Means over the first and the last tenth of the run."""
  if not len(values):
    return ''
  n = max(1, len(values) // 10)
  return f'{values[:n].mean():.3f} → {values[-n:].mean():.3f}'


def _tile(label: str, value: str | None, kind: str = '') -> str:
  if not value:
    return ''
  return (
      f'<div class="tile {kind}"><div class="value">{_escape(value)}</div>'
      f'<div class="note">{_escape(label)}</div></div>'
  )


def _plots(rows: list[dict], config: dict) -> str:
  figures, left_out = [], []
  for plot in PLOTS:
    lines = _lines(plot, rows)
    if lines:
      figures.append(_figure(plot, lines, rows, config))
    else:
      keys = ', '.join(f'<code>{key}</code>' for key in plot.curves)
      left_out.append(f'<li>{_escape(plot.title)}: {keys}</li>')
  text = f'<section class="plots">{"".join(figures)}</section>'
  if left_out:
    text += (
        f'<details class="note"><summary>Not plotted: {len(left_out)} of '
        f'{len(PLOTS)} plots, whose keys this run did not log</summary>'
        f'<ul>{"".join(left_out)}</ul></details>'
    )
  return text


def _samples(samples: list[dict]) -> str:
  """Completions of the first and of the last step that has some."""
  text = ''
  steps = {row['step'] for row in samples}
  for step in sorted({min(steps), max(steps)}) if steps else ():
    rows = [row for row in samples if row['step'] == step]
    shown = rows[:MAX_SAMPLES]
    more = f', the first {len(shown)} shown' if len(shown) < len(rows) else ''
    names = ('Prompt', 'Completion', 'Answer', 'Reward')
    text += (
        f'<h3>Step {step} <span class="note">{sum(map(_is_correct, rows))} of '
        f'{len(rows)} correct{more}</span></h3><table class="samples"><thead>'
        f'<tr>{"".join(f"<th>{name}</th>" for name in names)}</tr></thead>'
        f'<tbody>{"".join(map(_sample_row, shown))}</tbody></table>'
    )
  return text and f'<section><h2>Samples</h2>{text}</section>'


def _sample_row(row: dict) -> str:
  kind, mark = ('correct', '✓') if _is_correct(row) else ('wrong', '✗')
  cells = ''.join(
      f'<td data-label="{name}">'
      f'<div>{_escape(row.get(name.lower()))}</div></td>'
      for name in ('Prompt', 'Completion', 'Answer')
  )
  reward = row.get('reward')
  return (
      f'<tr class="{kind}">{cells}<td data-label="Reward">'
      f'<b>{"nan" if reward is None else f"{reward:g}"}</b> '
      f'<span class="verdict">{mark} {kind}</span> '
      f'<span class="note">{_escape(row.get("split"))}</span></td></tr>'
  )


def _is_correct(row: dict) -> bool:
  return (row.get('reward') or 0) > CORRECT_ABOVE


def _masked_tokens(counts: dict) -> str:
  """Which tokens the trust region silences, by sign of the advantage."""
  tables = [
      _token_table('Advantage > 0', counts.get('positive') or [], 'c0'),
      _token_table('Advantage < 0', counts.get('negative') or [], 'c1'),
  ]
  if not any(tables):
    return ''
  return (
      '<section><h2>Most frequently masked tokens</h2>'
      f'<div class="pair">{"".join(tables)}</div></section>'
  )


def _token_table(title: str, counts: Sequence, color: str) -> str:
  counts = sorted(counts, key=lambda pair: -pair[1])[:MAX_MASKED_TOKENS]
  most = max([1] + [count for _, count in counts])
  rows = ''.join(
      # Spaces and line breaks are tokens too: shown as Python writes them.
      f'<tr><td><code>{_escape(repr(token))}</code></td>'
      f'<td class="number">{count:,}</td><td class="bar"><i style="background:'
      f'var(--{color});width:{count / most:.1%}"></i></td></tr>'
      for token, count in counts
  )
  caption = f'<caption>{_escape(title)}</caption>'
  return rows and f'<table class="tokens">{caption}{rows}</table>'


def _config(config: dict) -> str:
  if not config:
    return ''
  text = json.dumps(config, indent=2, ensure_ascii=False)
  return (
      '<section><details><summary>Full config</summary>'
      f'<pre>{_escape(text)}</pre></details></section>'
  )


# --- Plots ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Line:
  """A curve with its data; NaN is a gap. `color` counts within the plot."""

  pattern: str  # The key of `Plot.curves` that it comes from.
  label: str
  color: str
  steps: np.ndarray
  values: np.ndarray
  smooth: np.ndarray  # The values themselves where there is nothing to smooth.

  @property
  def last(self) -> float:
    """Where the run ends, as the plot shows it."""
    return float(self.smooth[np.isfinite(self.smooth)][-1])


def _lines(plot: Plot, rows: list[dict]) -> list[_Line]:
  lines: list[_Line] = []
  for pattern, label in plot.curves.items():
    for key in _matching(pattern, rows):
      logged = [row for row in rows if key in row]
      values = _values(logged, key)
      if np.isfinite(values).any():
        lines.append(
            _Line(
                pattern,
                label.replace('*', _star(pattern, key)),
                f'c{len(lines) % _NUM_CURVE_COLORS}',
                np.array([row['step'] for row in logged]),
                values,
                values if plot.markers else _smooth(values),
            )
        )
  return lines


def _star(pattern: str, key: str) -> str:
  """What the * of a pattern stands for in a key, if it has one."""
  before, _, after = pattern.partition('*')
  return key[len(before) : len(key) - len(after)]


def _smooth(values: np.ndarray) -> np.ndarray:
  """A Gaussian mean over about a twentieth of the run, unless it is short."""
  if len(values) < 30:
    return values
  sigma = len(values) / 50
  reach = math.ceil(3 * sigma)
  kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
  finite = np.isfinite(values)
  total = np.convolve(np.where(finite, values, 0.0), kernel, mode='same')
  weight = np.convolve(finite.astype(np.float64), kernel, mode='same')
  # The kernel never reaches zero, so the weight is zero only in long gaps.
  return np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan)


def _figure(
    plot: Plot, lines: list[_Line], rows: list[dict], config: dict
) -> str:
  """Title, legend with last values, drawing and caption."""
  thresholds = _thresholds(config) if plot.threshold else []
  span = rows[0]['step'], max(rows[-1]['step'], rows[0]['step'] + 1)
  svg, note = _draw(plot, lines, thresholds, span)
  caption = f'{plot.caption} {note}'.strip()
  drawn = {line.pattern for line in lines}
  missing = [key for key in plot.curves if key not in drawn]
  if missing:
    caption += f' Not logged: {", ".join(missing)}.'
  legend = [
      f'<span><i class="swatch" style="background:var(--{line.color})"></i>'
      f'{_escape(line.label)} <b>{_number(line.last)}</b></span>'
      for line in lines
  ]
  legend += [
      f'<span><i class="dash"></i>threshold <b>{threshold:g}</b></span>'
      for threshold in thresholds
  ]
  return (
      f'<figure><h2>{_escape(plot.title)} <span class="note">'
      f'{_escape(plot.unit)}</span></h2>'
      f'<div class="legend">{"".join(legend)}</div>'
      f'{svg}<figcaption>{_escape(caption)}</figcaption></figure>'
  )


def _draw(
    plot: Plot,
    lines: list[_Line],
    thresholds: list[float],
    span: tuple[float, float],
) -> tuple[str, str]:
  """An SVG element, and a note on what it could not show as it is.

  All plots share the x axis, so that what happens at once stands at one place.
  """

  def paint(axes):
    axes.set_xlim(span)
    if plot.stacked:
      note = _draw_areas(axes, plot, lines)
    else:
      note = _draw_lines(axes, plot, lines, thresholds)
    _draw_grid(axes, 'step')
    return note

  return _svg(plot.title, paint)


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


def _scatter(points: list[list[float]]) -> str:
  """Ratio and total variation of tokens against mu (Fig. 2 of the paper)."""
  if not points:
    return ''
  mu, ratio, gap, dropped = np.array(points, np.float64).T
  figures = [
      _scatter_figure(title, caption, mu, values, dropped > 0)
      for title, caption, values in (
          (
              'Ratio against mu',
              'pi / mu of tokens of the last step: half of them those that '
              'moved most, half spread evenly.',
              ratio,
          ),
          ('|pi - mu| against mu', 'Of the same tokens.', gap),
      )
  ]
  return (
      '<section><h2>Tokens of the last step</h2>'
      f'<div class="plots">{"".join(figures)}</div></section>'
  )


def _scatter_figure(title, caption, mu, values, dropped) -> str:
  def paint(axes):
    axes.set_xlim(0, 1.02)
    for chosen, color in ((~dropped, 'c0'), (dropped, 'c1')):
      axes.plot(
          mu[chosen], values[chosen], 'o', color=_INK[color], markersize=3,
          alpha=0.6, markeredgewidth=0,
      )
    _draw_grid(axes, 'mu')

  svg, _ = _svg(title, paint)
  legend = ''.join(
      f'<span><i class="swatch" style="background:var(--{color})"></i>'
      f'{label} <b>{int(count)}</b></span>'
      for label, color, count in (
          ('kept', 'c0', np.sum(~dropped)), ('dropped', 'c1', np.sum(dropped))
      )
  )
  return (
      f'<figure><h2>{_escape(title)}</h2><div class="legend">{legend}</div>'
      f'{svg}<figcaption>{_escape(caption)}</figcaption></figure>'
  )


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
    axis.set_major_formatter(lambda value, _: _plain(f'{value:.6g}'))


def _draw_lines(
    axes: Any, plot: Plot, lines: list[_Line], thresholds: list[float]
) -> str:
  """Each curve thin as it was logged and thick as it is smoothed."""
  values = np.concatenate([line.values for line in lines] + [thresholds])
  values = values[np.isfinite(values)]
  least = np.min(values[values > 0], initial=math.inf)
  floor, note = -math.inf, ''
  if plot.log and values.max() > 10 * least:
    floor = 0.8 * least
    axes.set_yscale('log')
    axes.set_ylim(floor, 1.25 * values.max())
    if values.min() <= 0:
      note = 'A value of 0 or less lies on the lower edge.'
  for line in lines:
    ink = _INK[line.color]
    raw, smooth = (np.maximum(y, floor) for y in (line.values, line.smooth))
    if line.smooth is not line.values:
      width = 1 if len(raw) < 1000 else 0.5
      axes.plot(line.steps, raw, color=ink, linewidth=width, alpha=0.3)
    # A single point makes no line, and two or three look like many.
    few = np.isfinite(raw).sum() < (50 if plot.markers else 10)
    dots = {'marker': 'o' if few else '', 'markersize': 5}
    axes.plot(line.steps, smooth, color=ink, linewidth=2, clip_on=False, **dots)
  for threshold in thresholds:
    axes.axhline(threshold, color=_INK['bad'], linewidth=1, linestyle='--')
  if floor < 0 and 0 <= values.min() <= 0.6 * values.max():
    axes.set_ylim(bottom=0)
  return note


def _draw_areas(axes: Any, plot: Plot, lines: list[_Line]) -> str:
  """Curves on top of each other, interpolated where one has no value."""
  steps = np.unique(np.concatenate([line.steps for line in lines]))
  parts = []
  for line in lines:
    known = np.isfinite(line.values)
    parts.append(np.interp(steps, line.steps[known], line.values[known]))
  totals = np.sum(parts, axis=0)

  def binned(values: np.ndarray) -> np.ndarray:
    bins = np.array_split(values, min(len(values), 200))
    return np.array([part.mean() for part in bins])

  axes.stackplot(
      binned(steps),
      [binned(part) for part in parts],
      colors=[_INK[line.color] for line in lines],
      alpha=0.75,
      linewidth=0,
  )
  axes.set_ylim(bottom=0)
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
  prefix = re.sub(r'\W+', '-', title.lower())
  for pattern, replacement in (
      (r'<style.*?</style>', ''),  # Would be the style of the whole page.
      (r' (xmlns|xmlns:xlink|version)="[^"]*"', ''),
      (r' (width|height)="[\d.]+pt"', ''),
      (r'xlink:href=', 'href='),
      (r'font-family: [^;]*; ', ''),
      (r'(\bid="|href="#|url\(#)', rf'\g<1>{prefix}-'),
      (r'^<svg', f'<svg role="img" aria-label="{_escape(title)}"'),
  ):
    svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
  for name, ink in _INK.items():
    svg = svg.replace(ink, f'var(--{name})')
  return svg


# --- Small helpers ----------------------------------------------------------


def _matching(pattern: str, rows: list[dict]) -> list[str]:
  """The logged keys that `pattern` means, pass@8 before pass@16."""
  known = {key for row in rows for key in row}
  found = fnmatch.filter(known, pattern)
  return sorted(found, key=lambda key: (len(key), key))


def _values(rows: list[dict], key: str) -> np.ndarray:
  """[number of rows] float64, NaN where a row has no finite such value."""
  values = np.array([row.get(key, math.nan) for row in rows], np.float64)
  return np.where(np.isfinite(values), values, math.nan)


def _finite(rows: list[dict], key: str) -> np.ndarray:
  values = _values(rows, key)
  return values[np.isfinite(values)]


def _thresholds(config: dict) -> list[float]:
  """One threshold, or two where they differ by the direction of the ratio."""
  divergence = _as_dict(config.get('divergence'))
  default = divergence.get('threshold')
  sides = (divergence.get(f'threshold_{side}') for side in ('low', 'high'))
  values = {default if side is None else side for side in sides}
  numbers = (v for v in values if isinstance(v, (int, float)))
  return sorted(float(v) for v in numbers if 0 < v < math.inf)


def _wall_minutes(rows: list[dict]) -> float:
  """Compilation, steps and evaluations.

  The time of a logged step stands for all steps since the one logged before.
  """
  per_step = _values(rows, 'time/step_s')
  timed = np.isfinite(per_step)
  steps = np.array([row['step'] for row in rows], np.float64)[timed]
  seconds = np.sum(np.diff(steps, prepend=0) * per_step[timed])
  for key in ('time/compile_s', 'time/eval_s'):
    seconds += np.sum(_finite(rows, key))
  return float(seconds) / 60


def _number(value: float) -> str:
  """Three digits, or all of those before the point: 0.00214, 12,345."""
  if not math.isfinite(value):
    return '–'
  return f'{value:,.0f}' if 1e3 <= abs(value) < 1e7 else _plain(f'{value:.3g}')


def _plain(text: str) -> str:
  """1e-08 as 1e-8."""
  return re.sub(r'e([+-])0?', lambda match: 'e' + match[1].strip('+'), text)


def _name(value: Any) -> str:
  """The name of a config entry that is a name or has one."""
  return str(value.get('name', '') if isinstance(value, dict) else value or '')


def _as_dict(value: Any) -> dict:
  return value if isinstance(value, dict) else {}


def _escape(value: Any) -> str:
  return html.escape('' if value is None else str(value), quote=True)


def _read_points(path: Path) -> list[list[float]]:
  return json.loads(path.read_text()) if path.exists() else []


def _read_json(path: Path) -> dict:
  if not path.exists():
    return {}
  return _as_dict(json.loads(path.read_text(encoding='utf-8')))


_PAGE = Path(__file__).parent / 'assets' / 'report' / 'page.html'


def main(argv: Sequence[str] | None = None) -> None:
  """Rewrites the report of a finished or running run."""
  # argparse, not absl: a module that defines flags cannot be imported next to
  # another that defines --workdir.
  parser = argparse.ArgumentParser(description='Writes workdir/report.html.')
  parser.add_argument('--workdir', required=True, help='directory of the run')
  parser.add_argument('--title', help='heading of the page')
  options = parser.parse_args(argv)
  if not Path(options.workdir).is_dir():
    parser.error(f'--workdir={options.workdir} is not a directory.')
  print(write_report(options.workdir, title=options.title))


if __name__ == '__main__':
  main()
