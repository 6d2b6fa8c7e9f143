"""One run as one page: `report.html`, made from the logs in its workdir.

The page is a single file without scripts and without the network: style and
plots (SVG) are inline, and it reads as well in the dark and on a phone. To add
a plot, add a row to `PLOTS`. A run that did not log what a row needs gets a
note instead of the plot.

    python -m dppo_jax.report --workdir=DIR
"""

import argparse
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import html
import json
import math
import os
from pathlib import Path
import string
from typing import Any

import numpy as np

from dppo_jax import metrics


@dataclasses.dataclass(frozen=True)
class Curve:
  """One metric in a plot. A key that ends in * draws every key it matches."""

  key: str
  label: str = ''  # What the key has in place of * where empty.
  markers: bool = False  # Few points, each drawn as it is; never smoothed.


@dataclasses.dataclass(frozen=True)
class Plot:
  """One plot: its title, how to read it, its curves."""

  title: str
  caption: str
  curves: tuple[Curve, ...]
  unit: str = ''
  log: bool = False  # Where the values span more than a decade.
  stacked: bool = False
  threshold: bool = False  # Draws the config's divergence thresholds.


PLOTS = (
    Plot(
        'Reward',
        'Mean reward of the sampled completions.',
        (Curve('reward/mean', 'mean'),),
    ),
    Plot(
        'Held-out accuracy',
        'avg@k: mean of k attempts. pass@k: one of k is right.',
        (
            Curve('eval/avg@*', markers=True),
            Curve('eval/pass@*', markers=True),
        ),
    ),
    Plot(
        'Divergence',
        'Of the trained from the sampling policy, over tokens; only tokens '
        'above the threshold can be masked.',
        (Curve('divergence/mean', 'mean'), Curve('divergence/max', 'max')),
        log=True,
        threshold=True,
    ),
    Plot(
        'Masked tokens',
        'Share of the tokens of that sign of the advantage A that are outside '
        'the trust region and moving further out.',
        (
            Curve('mask/positive', 'A > 0'),
            Curve('mask/negative', 'A < 0'),
        ),
    ),
    Plot(
        'Training-inference mismatch',
        '|pi - mu| of sampled tokens under the same weights, between the '
        'learner and the sampler: numerics alone.',
        (
            Curve('mismatch/prob_gap_mean', 'mean'),
            Curve('mismatch/prob_gap_max', 'max'),
        ),
        log=True,
    ),
    Plot(
        'Entropy',
        'Mean entropy of the policy per sampled token.',
        (Curve('entropy/mean', 'mean'),),
        unit='nats',
    ),
    Plot(
        'Completion length',
        'Mean number of sampled tokens.',
        (Curve('completion/length_mean', 'mean'),),
        unit='tokens',
    ),
    Plot(
        'Truncated completions',
        'Share that met the length limit before an end token.',
        (Curve('completion/truncated', 'truncated'),),
    ),
    Plot(
        'Step time',
        'Where a step spends its time.',
        (
            Curve('time/learn_s', 'learn'),
            Curve('time/sample_s', 'sample'),
            Curve('time/score_s', 'score'),
        ),
        unit='s',
        stacked=True,
    ),
    Plot(
        'Gradient norm',
        'Before clipping.',
        (Curve('optimizer/grad_norm', 'norm'),),
        log=True,
    ),
)

# A reward above this shows a sample as correct: right for rewards in {0, 1},
# in {-1, 1}, and for small bonuses that are not for the answer.
CORRECT_ABOVE = 0.5
MAX_SAMPLES = 12  # Per step shown.
MAX_MASKED_TOKENS = 15  # Per sign of the advantage.
MAX_POINTS = 400  # Per curve: what the eye can tell apart in a small plot.


def write_report(
    workdir: str | os.PathLike[str], *, title: str | None = None
) -> Path:
  """Writes `workdir/report.html` and returns its path.

  Reads metrics.jsonl, samples.jsonl, config.json and masked_tokens.json, and
  leaves out what is not there.

  Args:
    workdir: directory of the run.
    title: heading of the page; by default the config's or directory's name.
  """
  workdir = Path(workdir)
  rows = metrics.read(workdir)
  config = _read_json(workdir / 'config.json')
  title = title or str(config.get('name') or workdir.resolve().name)
  body = [
      _header(title, rows, config),
      _plots(rows, config),
      _masked_tokens(_read_json(workdir / 'masked_tokens.json')),
      _samples(metrics.read_samples(workdir)),
      _config(config),
  ]
  page = _PAGE.substitute(
      title=_escape(title), style=_STYLE, body='\n'.join(filter(None, body))
  )
  path = workdir / 'report.html'
  # Completions may hold half a surrogate pair, which UTF-8 cannot.
  path.write_text(page, encoding='utf-8', errors='replace')
  return path


# --- Sections of the page ---------------------------------------------------


def _header(title: str, rows: list[dict], config: dict) -> str:
  """Title, headline numbers, and where the run comes from."""
  run = _as_dict(config.get('run'))
  tiles = [
      _accuracy_tile(rows),
      _tile('Reward', _before_after(rows, 'reward/mean', '{:.3f}')),
      _tile('Steps', f'{rows[-1]["step"]:,}' if rows else '0'),
      _tile('Time in steps', _duration(_total_seconds(rows))),
      _tile('Device', run.get('device')),
  ]
  names = [_name(config.get(key)) for key in ('algorithm', 'divergence')]
  threshold = ' / '.join(f'{t:g}' for t in _thresholds(config))
  subtitle = ' · '.join(filter(None, [*names, threshold and f'δ {threshold}']))
  return '\n'.join([
      '<header>',
      f'<h1>{_escape(title)}</h1>',
      f'<p class="subtitle">{_escape(subtitle)}</p>' if subtitle else '',
      f'<div class="tiles">{"".join(filter(None, tiles))}</div>',
      _provenance(run),
      '</header>',
  ])


def _provenance(run: dict) -> str:
  """Command, commit and versions, as far as known."""
  lines = []
  if run.get('command'):
    lines.append(f'<pre class="command">{_escape(run["command"])}</pre>')
  facts = [f'commit {str(run["commit"])[:12]}'] if run.get('commit') else []
  facts += [f'{k} {v}' for k, v in _as_dict(run.get('versions')).items()]
  if facts:
    lines.append(f'<p class="note">{_escape(" · ".join(facts))}</p>')
  return '\n'.join(lines)


def _accuracy_tile(rows: list[dict]) -> str:
  """The first held-out accuracy that the run has, before and after."""
  keys = _matching('eval/avg@*', rows) or _matching('eval/pass@*', rows)
  if not keys:
    return ''
  values = _values(rows, keys[0])
  values = values[np.isfinite(values)]
  if not len(values):
    return ''
  text = f'{values[-1]:.1%}'
  if len(values) > 1:
    text = f'{values[0]:.1%} → {text}'
  label = f'Held-out {keys[0].removeprefix("eval/")}'
  return _tile(label, text, strong=True)


def _before_after(rows: list[dict], key: str, form: str) -> str | None:
  """Means over the first and the last tenth of the run."""
  values = _values(rows, key)
  values = values[np.isfinite(values)]
  if not len(values):
    return None
  n = max(1, len(values) // 10)
  ends = (values[:n].mean(), values[-n:].mean())
  return ' → '.join(form.format(end) for end in ends)


def _tile(label: str, value: Any, *, strong: bool = False) -> str:
  if not value:
    return ''
  kind = 'tile strong' if strong else 'tile'
  return (
      f'<div class="{kind}"><div class="value">{_escape(value)}</div>'
      f'<div class="label">{_escape(label)}</div></div>'
  )


def _plots(rows: list[dict], config: dict) -> str:
  figures, notes = [], []
  for plot in PLOTS:
    missing = [c.key for c in plot.curves if not _drawable(rows, c.key)]
    if len(missing) == len(plot.curves):
      keys = ', '.join(f'<code>{_escape(key)}</code>' for key in missing)
      notes.append(f'<li>{_escape(plot.title)}: {keys}</li>')
    else:
      figures.append(_figure(plot, rows, config, missing))
  text = f'<section class="plots">{"".join(figures)}</section>'
  if notes:
    text += (
        '<section class="note missing"><p>Not plotted, because this run did '
        f'not log the key:</p><ul>{"".join(notes)}</ul></section>'
    )
  return text


def _samples(samples: list[dict]) -> str:
  """Completions of the first and of the last step that has some."""
  if not samples:
    return ''
  steps = [row['step'] for row in samples]
  ends = sorted({min(steps), max(steps)})
  groups = [
      _sample_group(step, [row for row in samples if row['step'] == step])
      for step in ends
  ]
  return f'<section><h2>Samples</h2>{"".join(groups)}</section>'


def _sample_group(step: int, rows: list[dict]) -> str:
  num_correct = sum(_is_correct(row) for row in rows)
  shown = rows[:MAX_SAMPLES]
  more = f', the first {len(shown)} shown' if len(shown) < len(rows) else ''
  head = ''.join(
      f'<th>{name}</th>'
      for name in ('Prompt', 'Completion', 'Answer', 'Reward')
  )
  return (
      f'<h3>Step {step} <span class="note">{num_correct} of {len(rows)} '
      f'correct{more}</span></h3><table class="samples"><thead><tr>{head}</tr>'
      f'</thead><tbody>{"".join(map(_sample_row, shown))}</tbody></table>'
  )


def _sample_row(row: dict) -> str:
  correct = _is_correct(row)
  reward = row.get('reward')
  score = 'nan' if reward is None else f'{reward:g}'
  split = f'<span class="note">{_escape(row.get("split", ""))}</span>'
  verdict = '✓ correct' if correct else '✗ wrong'
  return (
      f'<tr class="{"correct" if correct else "wrong"}">'
      f'<td data-label="Prompt"><div>{_escape(row.get("prompt"))}</div></td>'
      '<td data-label="Completion">'
      f'<div>{_escape(row.get("completion"))}</div></td>'
      f'<td data-label="Answer"><div>{_escape(row.get("answer"))}</div></td>'
      f'<td data-label="Reward"><b>{score}</b> '
      f'<span class="verdict">{verdict}</span> {split}</td></tr>'
  )


def _is_correct(row: dict) -> bool:
  return (row.get('reward') or 0) > CORRECT_ABOVE


def _masked_tokens(counts: dict) -> str:
  """Which tokens the trust region silences, by sign of the advantage."""
  tables = [
      _token_table('Advantage > 0', counts.get('positive') or [], 0),
      _token_table('Advantage < 0', counts.get('negative') or [], 1),
  ]
  if not any(tables):
    return ''
  return (
      '<section><h2>Most frequently masked tokens</h2>'
      f'<div class="pair">{"".join(tables)}</div></section>'
  )


def _token_table(title: str, counts: Sequence, color: int) -> str:
  if not counts:
    return ''
  counts = sorted(counts, key=lambda pair: -pair[1])[:MAX_MASKED_TOKENS]
  most = max(counts[0][1], 1)
  rows = ''.join(
      # Spaces and line breaks are tokens too: shown as Python writes them.
      f'<tr><td><code>{_escape(_visible(token))}</code></td>'
      f'<td class="number">{count:,}</td><td class="bar"><i class="bar{color}" '
      f'style="width:{100 * count / most:.1f}%"></i></td></tr>'
      for token, count in counts
  )
  caption = f'<caption>{_escape(title)}</caption>'
  return f'<table class="tokens">{caption}{rows}</table>'


def _config(config: dict) -> str:
  if not config:
    return ''
  text = json.dumps(config, indent=2, ensure_ascii=False)
  return (
      '<section><details><summary>Full config</summary>'
      f'<pre>{_escape(text)}</pre></details></section>'
  )


# --- Plots, as SVG ----------------------------------------------------------

_WIDTH, _HEIGHT = 420, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24


@dataclasses.dataclass(frozen=True)
class _Line:
  """A curve with its data; `color` counts within the plot."""

  label: str
  steps: np.ndarray
  values: np.ndarray
  color: int
  markers: bool


@dataclasses.dataclass(frozen=True)
class _Axes:
  """Maps data to the canvas; what lies outside is drawn on the border."""

  x_low: float
  x_high: float
  y_low: float
  y_high: float
  log: bool

  def x(self, steps) -> np.ndarray:
    share = (np.asarray(steps) - self.x_low) / (self.x_high - self.x_low)
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

  def y(self, values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    low, high = self.y_low, self.y_high
    if self.log:
      values = np.log(np.where(values > 0, values, np.nan))
      low, high = math.log(low), math.log(high)
    share = np.clip((values - low) / (high - low), 0, 1)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _figure(
    plot: Plot, rows: list[dict], config: dict, missing: list[str]
) -> str:
  """Title, legend with last values, drawing and caption."""
  lines = _lines(plot, rows)
  if plot.stacked:
    lines = _stack(lines)
  thresholds = _thresholds(config) if plot.threshold else []
  span = rows[0]['step'], rows[-1]['step']
  axes, cut = _axes(lines, thresholds, plot, span)
  draw = _areas if plot.stacked else _curves
  notes = [plot.caption, cut]
  if missing:
    notes.append(f'Not logged: {", ".join(missing)}.')
  unit = f' <span class="note">{_escape(plot.unit)}</span>' if plot.unit else ''
  return (
      f'<figure><h2>{_escape(plot.title)}{unit}</h2>'
      f'{_legend(plot, lines, thresholds)}'
      f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
      f'aria-label="{_escape(plot.title)}">'
      f'{_grid(axes)}{draw(lines, axes)}'
      f'{"".join(_threshold_line(t, axes) for t in thresholds)}</svg>'
      f'<figcaption>{_escape(" ".join(filter(None, notes)))}</figcaption>'
      '</figure>'
  )


def _lines(plot: Plot, rows: list[dict]) -> list[_Line]:
  lines: list[_Line] = []
  for curve in plot.curves:
    prefix = curve.key.removesuffix('*')
    family = prefix.rpartition('/')[2]
    for key in _matching(curve.key, rows):
      values = _values(rows, key)
      logged = np.array([key in row for row in rows])
      if not np.isfinite(values).any():
        continue
      label = curve.label or family + key.removeprefix(prefix)
      steps = np.array([row['step'] for row in rows])[logged]
      lines.append(
          _Line(label, steps, values[logged], len(lines), curve.markers)
      )
  return lines


def _stack(lines: list[_Line]) -> list[_Line]:
  """Adds to each line those before it, interpolated where one has no value."""
  steps = np.unique(np.concatenate([line.steps for line in lines]))
  total = np.zeros(len(steps))
  stacked = []
  for line in lines:
    finite = np.isfinite(line.values)
    total = total + np.interp(steps, line.steps[finite], line.values[finite])
    stacked.append(dataclasses.replace(line, steps=steps, values=total))
  return stacked


def _axes(
    lines: list[_Line],
    thresholds: list[float],
    plot: Plot,
    span: tuple[float, float],
) -> tuple[_Axes, str]:
  """Axes that hold the data, and a note on what they had to cut off.

  All plots share the x axis, so that what happens at once stands at one place.
  """
  values = np.concatenate([line.values for line in lines])
  values = values[np.isfinite(values)]
  if not plot.stacked:
    values = np.concatenate([values, thresholds])
  cut = ''
  if plot.stacked and len(lines[-1].values) >= 10:
    # The first step compiles, for minutes: it would flatten all others.
    totals = lines[-1].values
    limit = 1.5 * np.quantile(totals, 0.9)
    if totals.max() > 2 * limit:
      step = int(lines[-1].steps[totals.argmax()])
      cut = f'Cut off above: {totals.max():.3g} {plot.unit} at step {step}.'
      values = np.minimum(values, limit)
  y_low, y_high, log = _range(values, plot)
  return _Axes(span[0], max(span[1], span[0] + 1), y_low, y_high, log), cut


def _range(values: np.ndarray, plot: Plot) -> tuple[float, float, bool]:
  """Limits of the y axis, and whether it is logarithmic."""
  positive = values[values > 0]
  if plot.log and len(positive) and positive.max() > 10 * positive.min():
    return 0.8 * positive.min(), 1.25 * positive.max(), True
  low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
  if plot.stacked or 0 <= low < 0.6 * high:
    low = 0.0
  margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
  return (0.0 if low == 0 else low - margin), high + margin, False


def _grid(axes: _Axes) -> str:
  parts = []
  for value in _ticks(axes.y_low, axes.y_high, axes.log):
    y = float(axes.y(value))
    parts.append(
        f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" class="left">'
        f'{_short(value)}</text>'
    )
  for value in _ticks(axes.x_low, axes.x_high, False):
    if value == int(value):
      parts.append(
          f'<text x="{float(axes.x(value)):.1f}" y="{_HEIGHT - 7}" '
          f'class="below">{_short(value)}</text>'
      )
  x, y = _LEFT - 12, _HEIGHT - 7
  parts.append(f'<text x="{x}" y="{y}" class="left">step</text>')
  return ''.join(parts)


def _curves(lines: list[_Line], axes: _Axes) -> str:
  parts = []
  for line in lines:
    x, y = axes.x(line.steps), axes.y(line.values)
    smooth = None if line.markers else _smooth(line.values)
    kind = 'line' if smooth is None else 'raw'
    parts.append(f'<path class="{kind} c{line.color % 6}" d="{_path(x, y)}"/>')
    if smooth is not None:
      d = _path(x, axes.y(smooth))
      parts.append(f'<path class="line c{line.color % 6}" d="{d}"/>')
    # A single point makes no line.
    if line.markers or np.isfinite(y).sum() == 1:
      parts += [
          f'<circle class="f{line.color % 6}" '
          f'cx="{a:.1f}" cy="{b:.1f}" r="2.6">'
          f'<title>{_escape(line.label)} {value:.4g} at step {step}</title>'
          '</circle>'
          for a, b, value, step in zip(
              x, y, line.values, line.steps, strict=True
          )
          if math.isfinite(b)
      ]
  return ''.join(parts)


def _areas(lines: list[_Line], axes: _Axes) -> str:
  """Stacked lines, filled; a long run is averaged over short stretches."""
  num_bins = min(len(lines[0].steps), MAX_POINTS // 2)

  def binned(values: np.ndarray) -> np.ndarray:
    return np.array([part.mean() for part in np.array_split(values, num_bins)])

  parts = []
  x = binned(axes.x(lines[0].steps))
  below = np.full(num_bins, float(axes.y(0.0)))
  for line in lines:
    y = axes.y(binned(line.values))
    outline = np.concatenate([x, x[::-1]]), np.concatenate([y, below[::-1]])
    d = _path(*outline) + 'Z'
    parts.append(f'<path class="area f{line.color % 6}" d="{d}"/>')
    below = y
  return ''.join(parts)


def _threshold_line(threshold: float, axes: _Axes) -> str:
  y = float(axes.y(threshold))
  return f'<path class="threshold" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'


def _legend(plot: Plot, lines: list[_Line], thresholds: list[float]) -> str:
  """Labels with the values that the run ends at, and the thresholds."""
  items, below = [], 0.0
  for line in lines:
    smooth = None if line.markers else _smooth(line.values)
    values = line.values if smooth is None else smooth
    finite = values[np.isfinite(values)]
    last = float(finite[-1]) if len(finite) else math.nan
    shown = last - below if plot.stacked else last
    below = last
    items.append(
        f'<span><i class="swatch bar{line.color % 6}"></i>'
        f'{_escape(line.label)} <b>{_short(shown)}</b></span>'
    )
  items += [
      f'<span><i class="dash"></i>threshold <b>{threshold:g}</b></span>'
      for threshold in thresholds
  ]
  return f'<div class="legend">{"".join(items)}</div>'


def _path(x: np.ndarray, y: np.ndarray) -> str:
  """An SVG path with a gap wherever y is not finite."""
  parts, pen = [], 'M'
  for i in _thinned(y):
    if not math.isfinite(y[i]):
      pen = 'M'
      continue
    parts.append(f'{pen}{x[i]:.1f} {y[i]:.1f}')
    pen = 'L'
  return ''.join(parts)


def _thinned(y: np.ndarray) -> np.ndarray:
  """Indices of at most MAX_POINTS points: each bin's extremes, so none is lost.

  A gap counts as an extreme of its bin, and so do the two ends of the curve.
  """
  if len(y) <= MAX_POINTS:
    return np.arange(len(y))
  keep = {0, len(y) - 1}
  for part in np.array_split(np.arange(len(y)), MAX_POINTS // 2 - 1):
    keep |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
  return np.array(sorted(keep))


def _smooth(values: np.ndarray) -> np.ndarray | None:
  """A Gaussian mean over about a twentieth of the run, None if it is short."""
  if len(values) < 30:
    return None
  sigma = len(values) / 50
  reach = math.ceil(3 * sigma)
  kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
  finite = np.isfinite(values)
  total = np.convolve(np.where(finite, values, 0.0), kernel, mode='same')
  weight = np.convolve(finite.astype(np.float64), kernel, mode='same')
  # The kernel never reaches zero, so the weight is zero only in long gaps.
  return np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan)


def _ticks(low: float, high: float, log: bool) -> list[float]:
  """Round numbers in [low, high]: about five, or decades on a log axis."""
  if log:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 100 else (1, 2, 5)
    stride = 1 + len(powers) // 7
    candidates: Iterable[float] = (
        f * 10.0**p for p in powers[::stride] for f in factors
    )
  else:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(m * step for m in (1, 2, 5, 10) if 5 * m * step >= high - low)
    first = math.ceil(low / step)
    candidates = (i * step for i in range(first, first + 8))
  return [value for value in candidates if low <= value <= high]


# --- Small helpers ----------------------------------------------------------


def _matching(key: str, rows: list[dict]) -> list[str]:
  """The logged keys that `key` means, pass@8 before pass@16."""
  known = {name for row in rows for name in row}
  if not key.endswith('*'):
    return [key] if key in known else []
  found = (name for name in known if name.startswith(key[:-1]))
  return sorted(found, key=lambda name: (len(name), name))


def _drawable(rows: list[dict], key: str) -> bool:
  return any(
      np.isfinite(_values(rows, name)).any() for name in _matching(key, rows)
  )


def _values(rows: list[dict], key: str) -> np.ndarray:
  """[number of rows] float64, NaN where a row has no such key."""
  return np.array([row.get(key, math.nan) for row in rows], np.float64)


def _thresholds(config: dict) -> list[float]:
  """One threshold, or two where they differ by the direction of the ratio."""
  divergence = _as_dict(config.get('divergence'))
  default = divergence.get('threshold')
  sides = (divergence.get(f'threshold_{side}') for side in ('low', 'high'))
  values = {default if side is None else side for side in sides}
  numbers = (v for v in values if isinstance(v, (int, float)))
  return sorted(float(v) for v in numbers if 0 < v < math.inf)


def _total_seconds(rows: list[dict]) -> float:
  """Sum of the step times; a logged step stands for those since the last."""
  parts = [c.key for p in PLOTS if p.stacked for c in p.curves]
  seconds = _values(rows, 'time/step_s')
  if not np.isfinite(seconds).any():
    seconds = sum((_values(rows, key) for key in parts), np.zeros(len(rows)))
  logged = np.isfinite(seconds)
  steps = np.array([row['step'] for row in rows], np.float64)[logged]
  return float(np.sum(np.diff(steps, prepend=0.0) * seconds[logged]))


def _duration(seconds: float) -> str:
  if seconds <= 0:
    return ''
  if seconds < 120:
    return f'{seconds:.0f} s'
  if seconds < 7200:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'


def _short(value: float) -> str:
  """At most four characters of digits: 0.0021, 12k."""
  if not math.isfinite(value):
    return '–'
  if abs(value) >= 10_000:
    return f'{value / 1000:.3g}k'
  text = f'{value:.3g}'
  return text.replace('e-0', 'e-')


def _visible(token: Any) -> str:
  return repr(token) if isinstance(token, str) else str(token)


def _name(value: Any) -> str:
  """The name of a config entry that is a name or has one."""
  return str(value.get('name', '') if isinstance(value, dict) else value or '')


def _as_dict(value: Any) -> dict:
  return value if isinstance(value, dict) else {}


def _escape(value: Any) -> str:
  return html.escape('' if value is None else str(value), quote=True)


def _read_json(path: Path) -> dict:
  if not path.exists():
    return {}
  return _as_dict(json.loads(path.read_text(encoding='utf-8')))


_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --text: #1c2128; --soft: #667080;
  --rule: #e3e6ea; --good: #1a7f4b; --bad: #c2412d;
  --c0: #2f6fdb; --c1: #e0812b; --c2: #2a9d78; --c3: #8e5bd0; --c4: #c94f7c;
  --c5: #7b8794;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --card: #1d2128; --text: #e4e7ec; --soft: #97a1b0;
    --rule: #313742; --good: #4cc38a; --bad: #f2705c;
    --c0: #6ea3ff; --c1: #f2a65a; --c2: #4fc3a1; --c3: #b794f6; --c4: #ee86ab;
    --c5: #a0aab8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -.02em; }
h2 { font-size: 19px; margin: 40px 0 12px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 20px 0 8px; }
h1, td, code { overflow-wrap: anywhere; }
.subtitle { margin: 4px 0 0; color: var(--soft); }
.note { color: var(--soft); font-size: 13px; font-weight: 400; }
code, pre { font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre {
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 14px; margin: 8px 0; overflow-x: auto;
}
.command { white-space: pre-wrap; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 12px; }
.tile {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 10px 16px; flex: 1 1 auto;
}
.tile .value {
  font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums;
}
.tile.strong .value { color: var(--good); }
.tile .label { color: var(--soft); font-size: 12.5px; }
.plots {
  display: grid; gap: 16px; margin-top: 20px;
  grid-template-columns: repeat(auto-fill, minmax(min(350px, 100%), 1fr));
}
figure {
  display: flex; flex-direction: column; margin: 0; padding: 14px 16px 12px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
}
figure h2 { font-size: 15px; margin: 0; }
figure svg { width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 12.5px; line-height: 1.4; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0 14px; margin: 2px 0 6px;
  font-size: 12.5px; color: var(--soft);
}
.legend b { color: var(--text); font-variant-numeric: tabular-nums; }
.swatch {
  display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 5px;
}
.dash {
  display: inline-block; width: 14px; margin-right: 5px; vertical-align: middle;
  border-top: 2px dashed var(--bad);
}
svg text { fill: var(--soft); font-size: 11px; }
svg .left { text-anchor: end; }
svg .below { text-anchor: middle; }
.grid { stroke: var(--rule); fill: none; }
.threshold { stroke: var(--bad); stroke-dasharray: 5 4; fill: none; }
.line, .raw { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.line { stroke-width: 2; }
.raw { stroke-width: 1; opacity: .3; }
.area { opacity: .75; }
.missing ul { margin: 4px 0; padding-left: 20px; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: 6px 10px; vertical-align: top; }
tbody tr { border-top: 1px solid var(--rule); }
.samples { background: var(--card); border-radius: 10px; table-layout: fixed; }
.samples td:first-child { border-left: 3px solid var(--c5); }
.samples .correct td:first-child { border-left-color: var(--good); }
.samples .wrong td:first-child { border-left-color: var(--bad); }
.samples th:nth-child(3) { width: 12%; }
.samples th:nth-child(4) { width: 13%; }
.samples td div { white-space: pre-wrap; max-height: 15em; overflow-y: auto; }
.correct .verdict { color: var(--good); }
.wrong .verdict { color: var(--bad); }
.pair {
  display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(350px, 100%), 1fr));
}
.tokens { background: var(--card); border-radius: 10px; }
.tokens caption { text-align: left; padding: 4px 0; color: var(--soft); }
.tokens td { padding: 3px 10px; }
.tokens .number { text-align: right; font-variant-numeric: tabular-nums; }
.tokens .bar { width: 45%; vertical-align: middle; }
.tokens .bar i { display: block; height: 8px; border-radius: 4px; }
summary { cursor: pointer; font-weight: 600; margin-top: 32px; }
@media (max-width: 640px) {
  main { padding: 20px 12px 40px; }
  .samples thead { display: none; }
  .samples tr, .samples td { display: block; }
  .samples tr { padding: 8px 0; border-left: 3px solid var(--c5); }
  .samples tr.correct { border-left-color: var(--good); }
  .samples tr.wrong { border-left-color: var(--bad); }
  .samples td, .samples td:first-child { border: 0; padding: 3px 12px; }
  .samples td::before {
    content: attr(data-label); display: block; color: var(--soft);
    font-size: 11.5px;
  }
}
""" + ''.join(
    f'.c{i} {{ stroke: var(--c{i}); }} .f{i} {{ fill: var(--c{i}); }} '
    f'.bar{i} {{ background: var(--c{i}); }}\n'
    for i in range(6)
)


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
