"""One run as one page: `report.html`, made from the logs in its workdir.

The page is a single file without scripts and without the network: style and
plots (SVG) are inline, and it reads as well in the dark and on a phone. To add
a plot, add a row to `PLOTS`. A run that did not log what a row needs gets a
note instead of the plot.

    python -m dppo_jax.report --workdir=DIR
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
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
        'Between the learner (pi) and the sampler (mu), on sampled tokens. '
        'First update: same weights on both sides, so numerics alone, the '
        'training-inference mismatch. All updates: mean. Max: the largest '
        'pi - mu.',
        {
            'on_policy/prob_gap_mean': 'first update',
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
_NUM_CURVE_COLORS = 6
_INK = {name: light for name, (light, _) in _COLORS.items()}


def write_report(
    workdir: str | os.PathLike[str], *, title: str | None = None
) -> Path:
  """Writes `workdir/report.html` and returns its path.

  Reads metrics.jsonl, samples.jsonl, config.json and masked_tokens.json, and
  leaves out what is not there.

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
      _masked_tokens(_read_json(workdir / 'masked_tokens.json')),
      _samples(metrics.read_samples(workdir)),
      _config(config),
  ]
  page = _PAGE.substitute(
      title=_escape(title), style=_style(), body='\n'.join(filter(None, body))
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
      _tile('Wall time', _number(minutes) + ' min' if minutes else ''),
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
  figures, notes = [], []
  for plot in PLOTS:
    lines = _lines(plot, rows)
    drawn = {line.pattern for line in lines}
    missing = [key for key in plot.curves if key not in drawn]
    if lines:
      thresholds = _thresholds(config) if plot.threshold else []
      span = rows[0]['step'], max(rows[-1]['step'], rows[0]['step'] + 1)
      figures.append(_figure(plot, lines, missing, thresholds, span))
    else:
      keys = ', '.join(f'<code>{_escape(key)}</code>' for key in missing)
      notes.append(f'<li>{_escape(plot.title)}: {keys}</li>')
  text = f'<section class="plots">{"".join(figures)}</section>'
  if notes:
    text += (
        f'<details class="note"><summary>{len(notes)} of {len(PLOTS)} plots '
        'left out: this run did not log their keys</summary>'
        f'<ul>{"".join(notes)}</ul></details>'
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
      f'<td class="number">{count:,}</td><td class="bar"><i style="background:'
      f'var(--c{color});width:{100 * count / most:.1f}%"></i></td></tr>'
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
                label.replace('*', key[len(pattern) - 1 :]),
                f'c{len(lines) % _NUM_CURVE_COLORS}',
                np.array([row['step'] for row in logged]),
                values,
                values if plot.markers else _smooth(values),
            )
        )
  return lines


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
    plot: Plot,
    lines: list[_Line],
    missing: list[str],
    thresholds: list[float],
    span: tuple[float, float],
) -> str:
  """Title, legend with last values, drawing and caption."""
  svg, note = _draw(plot, lines, thresholds, span)
  caption = ' '.join(filter(None, [plot.caption, note]))
  if missing:
    caption += f' Not logged: {", ".join(missing)}.'
  unit = f' <span class="note">{_escape(plot.unit)}</span>' if plot.unit else ''
  legend = [
      f'<span><i class="swatch" style="background:var(--{line.color})"></i>'
      f'{_escape(line.label)} <b>{_number(_last(line.smooth))}</b></span>'
      for line in lines
  ]
  legend += [
      f'<span><i class="dash"></i>threshold <b>{threshold:g}</b></span>'
      for threshold in thresholds
  ]
  return (
      f'<figure><h2>{_escape(plot.title)}{unit}</h2>'
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
  # Slow to import.
  from matplotlib import figure
  from matplotlib import style
  from matplotlib import ticker

  options = {
      'font.size': 11,
      'path.simplify_threshold': 1.0,  # Pixels: keeps pages of long runs small.
      'svg.fonttype': 'none',  # Text stays text, in the font of the page.
      'svg.hashsalt': plot.title,  # The same ids each time.
  }
  with style.context(['default', options]):
    canvas = figure.Figure(figsize=(5, 2.6), dpi=72)
    axes = canvas.add_axes((0.12, 0.12, 0.86, 0.85), frameon=False)
    axes.set_xlim(span)
    if plot.stacked:
      note = _draw_areas(axes, lines, plot.unit)
    else:
      note = _draw_lines(axes, lines, thresholds, plot)
    axes.grid(axis='y', color=_INK['rule'])
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.tick_params(length=0, labelcolor=_INK['soft'])
    if axes.get_yscale() == 'linear':
      axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_formatter(lambda value, _: _plain(f'{value:.6g}'))
    file = io.StringIO()
    canvas.savefig(file, format='svg', transparent=True, metadata=_NO_METADATA)
  return _inline(file.getvalue(), plot.title), note


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
    # A single point makes no line, and two or three look like many.
    few = plot.markers or np.isfinite(line.values).sum() < 10
    options = {'markersize': 4.5, 'marker': 'o' if few else None}
    if line.smooth is not line.values:
      axes.plot(line.steps, raw, color=ink, linewidth=1, alpha=0.3)
    axes.plot(
        line.steps, smooth, color=ink, linewidth=2, clip_on=False, **options
    )
  for threshold in thresholds:
    axes.axhline(threshold, color=_INK['bad'], linewidth=1, linestyle='--')
  if floor < 0 and 0 <= values.min() < 0.6 * values.max():
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
    bins = np.array_split(values, min(len(values), _MAX_BINS))
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
  if len(steps) < 10 or totals.max() < 2 * limit:
    return ''
  axes.set_ylim(top=limit)
  worst = totals.argmax()
  return f'Cut off: {totals[worst]:.3g} {plot.unit} at step {steps[worst]}.'


def _inline(svg: str, title: str) -> str:
  """Makes part of a page of what was a file: own ids, the page's colors."""
  svg = svg[svg.index('<svg') :]
  for pattern, replacement in (
      (r'<style.*?</style>', ''),  # Would be the style of the whole page.
      (r' (xmlns(:xlink)?|version|width|height)="[^"]*"(?=[^<]*viewBox)', ''),
      (r' xmlns(:xlink)?="[^"]*"| version="1.1"', ''),
      (r'xlink:href=', 'href='),
      (r'font-family: [^;]*; ', ''),
      (r'(\bid="|href="#|url\(#)', rf'\g<1>{_slug(title)}-'),
      (r'^<svg', f'<svg role="img" aria-label="{_escape(title)}"'),
  ):
    svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
  for name, ink in _INK.items():
    svg = svg.replace(ink, f'var(--{name})')
  return svg


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
