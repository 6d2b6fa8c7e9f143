"""One run as one page: `report.html` in its workdir.

A run that did not log what a plot needs gets a note instead of the plot.
"""

from collections.abc import Sequence
import json
import os
from pathlib import Path

import numpy as np

from dppo_jax import metrics
from dppo_jax.report import drawing
from dppo_jax.report import groups
from dppo_jax.report import page
from dppo_jax.report import plots
from dppo_jax.report import runs

MAX_SAMPLES = 12  # Per step shown.
MAX_MASKED_TOKENS = 15  # Per sign of the advantage.


def write_report(
    workdir: str | os.PathLike[str],
    *,
    title: str | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Path:
  """Writes the page of a run and returns its path.

  Reads metrics.jsonl, samples.jsonl, config.json, masked_tokens.json and
  scatter.json, and leaves out what is not there.

  Args:
    workdir: directory of the run.
    title: heading of the page; by default the directory's name.
    output: file to write; by default `workdir/report.html`.

  Raises:
    ValueError: a file of the run is damaged.
  """
  run = runs.read(workdir)
  title = title or run.workdir.resolve().name
  body = [
      _header(title, run),
      _plots(run),
      _scatter(run.points),
      _masked_tokens(run.masked_tokens),
      _samples(run),
      _config(run.config),
  ]
  path = Path(output) if output else run.workdir / 'report.html'
  return page.write(path, title=title, body=body)


def _header(title: str, run: runs.Run) -> str:
  """Title, headline numbers, and where the run comes from."""
  log, config = run.log, run.config
  described = runs.as_dict(config.get('run'))
  speeds = runs.finite(log, 'tokens/s')
  minutes = runs.wall_minutes(log)
  tiles = [
      _accuracy_tile(log),
      page.tile('Reward', _before_after(runs.finite(log, 'reward/mean'))),
      page.tile('Steps', f'{max(log.steps, default=0):,}'),
      page.tile('Tokens/s', f'{np.median(speeds):,.0f}' if len(speeds) else ''),
      page.tile('Wall time', f'{minutes:,.1f} min' if minutes else ''),
      page.tile('Device', described.get('device')),
  ]
  facts = {
      'algorithm': runs.name(config.get('algorithm')),
      'divergence': runs.name(config.get('divergence')),
      'threshold': ' / '.join(f'{t:g}' for t in runs.thresholds(config)),
  }
  if facts['algorithm'] in title:
    del facts['algorithm']
  subtitle = ' · '.join(f'{k} {v}' for k, v in facts.items() if v)
  before = groups.provenance(run).get('before', '')
  return page.header(title, subtitle, tiles, _provenance(described, before))


def _provenance(run: dict, before: str) -> str:
  """Command, commit and versions, as far as known, also of earlier starts."""
  text = ''
  if run.get('command'):
    text = f'<pre class="command">{page.escape(run["command"])}</pre>'
  facts = [f'commit {str(run["commit"])[:12]}'] if run.get('commit') else []
  facts += [f'{k} {v}' for k, v in runs.as_dict(run.get('versions')).items()]
  facts += [f'earlier starts: {before}'] if before else []
  return text + f'<p class="note">{page.escape(" · ".join(facts))}</p>'


def _accuracy_tile(log: metrics.Columns) -> str:
  """Held-out accuracy before and after."""
  key = runs.accuracy_key([log])
  values = runs.finite(log, key)
  ends = values[[0, -1]] if len(values) > 1 else values
  text = ' → '.join(f'{value:.1%}' for value in ends)
  return page.tile(f'Held-out {key.removeprefix("eval/")}', text, 'strong')


def _before_after(values: np.ndarray) -> str:
  """Means over the first and the last tenth of the run."""
  if not len(values):
    return ''
  end = runs.last_tenth(values)
  return f'{values[: len(end)].mean():.3f} → {end.mean():.3f}'


def _plots(run: runs.Run) -> str:
  figures, left_out = [], []
  for plot in plots.PLOTS:
    figure = _figure(plot, run)
    if figure:
      figures.append(figure)
    else:
      left_out.append(plot)
  return (
      f'<section class="plots">{"".join(figures)}</section>'
      f'{page.not_plotted(left_out, "this run")}'
  )


def _figure(plot: plots.Plot, run: runs.Run) -> str:
  """All curves of a plot in one figure, nothing if it has none."""
  lines: list[drawing.Line] = []
  missing = []
  for pattern in plot.curves:
    keys = runs.matching(pattern, [run.log])
    missing += [] if keys else [pattern]
    for key in keys:
      color = f'c{len(lines) % page.NUM_CURVE_COLORS}'
      lines.append(_line(plot, plot.label(pattern, key), color, run.log, key))
  if not lines:
    return ''
  note = f' Not logged: {", ".join(missing)}.' if missing else ''
  levels = runs.thresholds(run.config) if plot.threshold else []
  return drawing.curves(
      plot,
      lines,
      title=plot.title,
      caption=plot.caption + note,
      steps=drawing.span(run.log.steps[[0, -1]].tolist()),
      thresholds=[drawing.Threshold(level) for level in levels],
      stacked=plot.stacked,
  )


def _line(
    plot: plots.Plot, label: str, color: str, log: metrics.Columns, key: str
) -> drawing.Line:
  """A key as it was logged, thin, and smoothed."""
  steps, raw = runs.series(log, key)
  smooth = raw if plot.markers else drawing.smooth(raw, len(raw))
  faint = () if smooth is raw or plot.stacked else ((steps, raw),)
  return drawing.Line(
      label,
      color,
      steps,
      raw if plot.stacked else smooth,  # Areas show what was logged.
      last=drawing.last(smooth),
      least=drawing.least(raw),
      faint=faint,
  )


def _scatter(points: list[list[float]]) -> str:
  """Ratio and total variation of tokens against mu (Fig. 2 of the paper)."""
  if not points:
    return ''
  mu, ratio, gap, dropped = np.array(points, np.float64).T
  figures = [
      drawing.scatter(title, caption, mu=mu, values=values, dropped=dropped > 0)
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
      f'<tr><td><code>{page.escape(repr(token))}</code></td>'
      f'<td class="number">{count:,}</td><td class="bar"><i style="background:'
      f'var(--{color});width:{count / most:.1%}"></i></td></tr>'
      for token, count in counts
  )
  caption = f'<caption>{page.escape(title)}</caption>'
  return rows and f'<table class="tokens">{caption}{rows}</table>'


def _samples(run: runs.Run) -> str:
  """Completions of the first and of the last step that has some."""
  text = ''
  for step in dict.fromkeys(run.sampled[:1] + run.sampled[-1:]):
    rows = runs.samples(run, step)
    shown = rows[:MAX_SAMPLES]
    more = f', the first {len(shown)} shown' if len(shown) < len(rows) else ''
    names = ('Prompt', 'Completion', 'Answer', 'Reward')
    text += (
        f'<h3>Step {step} <span class="note">'
        f'{[*map(runs.verdict, rows)].count("correct")} of '
        f'{len(rows)} correct{more}</span></h3><table class="samples"><thead>'
        f'<tr>{"".join(f"<th>{name}</th>" for name in names)}</tr></thead>'
        f'<tbody>{"".join(map(_sample_row, shown))}</tbody></table>'
    )
  return text and f'<section><h2>Samples</h2>{text}</section>'


def _sample_row(row: dict) -> str:
  cells = ''.join(
      f'<td data-label="{name}">'
      f'<div>{page.escape(row.get(name.lower()))}</div></td>'
      for name in ('Prompt', 'Completion', 'Answer')
  )
  return (
      f'<tr class="{runs.verdict(row)}">{cells}<td data-label="Reward">'
      f'{page.reward(row)} '
      f'<span class="note">{page.escape(row.get("split"))}</span></td></tr>'
  )


def _config(config: dict) -> str:
  if not config:
    return ''
  text = json.dumps(config, indent=2, ensure_ascii=False)
  return (
      '<section><details><summary>Full config</summary>'
      f'<pre>{page.escape(text)}</pre></details></section>'
  )
