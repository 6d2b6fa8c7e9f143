"""Several runs as one page: groups of seeds, side by side."""

from collections.abc import Callable, Sequence
import math
import os
from pathlib import Path
from typing import NamedTuple

from absl import logging
import numpy as np

from dppo_jax import metrics
from dppo_jax.report import clouds
from dppo_jax.report import drawing
from dppo_jax.report import groups as groups_lib
from dppo_jax.report import page
from dppo_jax.report import plots
from dppo_jax.report import runs as runs_lib
from dppo_jax.report import side_by_side
from dppo_jax.report.groups import Group
from dppo_jax.report.runs import Run

MAX_KEYS = 4  # Figures for the keys that one pattern matches.


def write_comparison(
    directories: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> Path:
  """Writes a page that compares runs and returns its path.

  Args:
    directories: workdirs of runs, or directories that hold some, at any depth.
    output: file to write.
    title: heading of the page; by default the names of the groups.

  Raises:
    ValueError: a directory holds no run, a run has no config or no step, two
      cannot be told apart, there are more groups than line styles, or a file
      is damaged.
  """
  runs, waiting = _read(directories)
  groups = groups_lib.of(runs)
  if len(groups) > drawing.NUM_STYLES:
    raise ValueError(
        f'{len(groups)} groups of runs are more than the {drawing.NUM_STYLES} '
        'that lines can tell apart; pass fewer directories.'
    )
  title = title or _title(groups)
  body = [
      page.header(title, _method(groups), [], _notes(groups, waiting)),
      _results(groups),
      _differences(groups),
      _shared(groups),
      _curves(groups),
      clouds.section(groups),
      side_by_side.section(groups),
      _list(groups),
  ]
  return page.write(Path(output), title=title, body=body)


def _read(
    directories: Sequence[str | os.PathLike[str]],
) -> tuple[list[Run], list[Path]]:
  """Runs, and workdirs within the directories where no step is logged yet."""
  runs, waiting = [], []
  for directory in map(Path, directories):
    for workdir in groups_lib.find(directory):
      run = runs_lib.read(workdir)
      if len(run.log.steps):
        runs.append(run)
      elif workdir != directory:  # Of a sweep that goes on.
        logging.warning('Left out, no step logged yet: %s', workdir)
        waiting.append(workdir)
      else:
        raise ValueError(
            f'{workdir} has logged no step yet: its metrics.jsonl is empty. '
            'Leave it out, or wait.'
        )
  if not runs:
    raise ValueError(f'None of {len(waiting)} runs has logged a step yet.')
  return runs, waiting


def _logs(groups: Sequence[Group]) -> list[metrics.Columns]:
  return [run.log for group in groups for run in group.runs]


def _last_step(run: Run) -> int:
  return int(run.log.steps[-1])


# --- What is said of all ----------------------------------------------------


def _title(groups: Sequence[Group]) -> str:
  names = [group.name for group in groups]
  if len(names) > 4:
    names = [*names[:3], f'{len(names) - 3} more']
  return ' / '.join(names)


def _method(groups: Sequence[Group]) -> str:
  """What all groups have in common, as far as one line holds it."""
  common = groups_lib.shared([
      group.settings | {'algorithm': groups_lib.algorithm(group.settings)}
      for group in groups
  ])
  facts = {
      part: common.get(part, common.get(f'{part}.name'))
      for part in ('algorithm', 'divergence', 'loss', 'model', 'task')
  }
  levels = [runs_lib.thresholds(group.runs[0].config) for group in groups]
  alike = all(each == levels[0] for each in levels)
  if facts['divergence'] and levels[0] and alike:
    numbers = ' / '.join(f'{level:g}' for level in levels[0])
    facts['divergence'] += f', threshold {numbers}'
  text = ' · '.join(f'{part} {value}' for part, value in facts.items() if value)
  return text and f'Shared by all: {text}'


def _subtitle(groups: Sequence[Group]) -> str:
  counts = {
      'group': len(groups), 'run': sum(len(group.runs) for group in groups)
  }
  text = ', '.join(f'{n} {word}{"s" * (n > 1)}' for word, n in counts.items())
  return f'{text}. Runs whose configs differ by their seed alone are a group.'


def _notes(groups: Sequence[Group], waiting: Sequence[Path]) -> str:
  """What is the same for all runs' machines and code, and what is missing."""
  known = [groups_lib.provenance(run) for g in groups for run in g.runs]
  differing = groups_lib.differing(known)
  notes = [
      _subtitle(groups),
      ' · '.join(
          f'{name.removeprefix("versions.")} {value}'
          for name, value in known[0].items()
          if name not in differing
      )
  ]
  for group in groups:
    ends = [_last_step(run) for run in group.runs]
    early = ' and '.join(
        f'{seed} at step {end}'
        for seed, end in zip(group.seeds, ends, strict=True)
        if end < max(ends)
    )
    if early:
      notes.append(
          f'{group.name}: the last step is {max(ends)}, but of seed {early}; '
          'the mean and range of its curves end there too.'
      )
  notes += [f'Left out, no step logged yet: {path}' for path in waiting]
  return ''.join(
      f'<p class="note">{page.escape(note)}</p>' for note in notes if note
  )


def _list(groups: Sequence[Group]) -> str:
  """Every run with its workdir, folded."""
  cells = [
      [
          page.escape(text)
          for text in (group.name, seed, _last_step(run), run.workdir)
      ]
      for group in groups
      for seed, run in zip(group.seeds, group.runs, strict=True)
  ]
  table = page.table(['Group', 'Seed', 'Last step', 'Directory'], cells)
  return (
      f'<section><details><summary>All {len(cells)} runs</summary>{table}'
      '</details></section>'
  )


# --- Tables -----------------------------------------------------------------


class _Column(NamedTuple):
  """A number of a run, NaN if it is not known, and how it is written."""

  name: str
  measure: Callable[[Run], float]
  form: str


_CAPTION = (
    'Mean over seeds, below it the lowest and the highest. Masked: share of '
    'tokens that the trust region drops, mean of all steps. Minutes: '
    'compilation, steps and evaluations.'
)


def _results(groups: Sequence[Group]) -> str:
  """What each group reached: a row a group, mean and range over seeds."""
  key = runs_lib.accuracy_key(_logs(groups))
  columns = [
      _Column('Last step', _last_step, ',.0f'),
      *_accuracies(key),
      _Column(
          'Reward, last tenth',
          lambda run: _mean(runs_lib.last_tenth(_of(run, 'reward/mean'))),
          '.3f',
      ),
      _Column('Masked', lambda run: _mean(_of(run, 'mask/fraction')), '.2%'),
      _Column('Skipped updates', _total('optimizer/skipped'), ',.0f'),
      _Column('Tokens sampled', _total('tokens/sampled'), ',.0f'),
      _Column('Minutes', lambda run: runs_lib.wall_minutes(run.log), ',.1f'),
  ]
  cells = [
      [name, str(len(group.runs))]
      + [
          _mean_and_range([column.measure(run) for run in group.runs], column)
          for column in columns
      ]
      for name, group in zip(_marked_names(groups), groups, strict=True)
  ]
  names = (page.escape(column.name) for column in columns)
  table = page.table(['Group', 'Seeds', *names], cells)
  accuracy = (
      f' Held-out {key.removeprefix("eval/")}: the best of a run is the '
      'highest of its own evaluations, which chance favors; best - final is '
      'how far it has fallen since.'
      if key
      else ' No held-out accuracy is logged.'
  )
  return (
      f'<section><h2>Results</h2>{table}'
      f'<p class="note">{page.escape(_CAPTION + accuracy)}</p></section>'
  )


def _accuracies(key: str) -> list[_Column]:
  """Held-out accuracy before training, at its best and in the end."""
  if not key:
    return []
  values = lambda run: _of(run, key)
  best = lambda run: max(values(run), default=math.nan)
  final = lambda run: drawing.last(values(run))
  return [
      _Column(
          f'{key.removeprefix("eval/")}, first',
          lambda run: next(iter(values(run)), math.nan),
          '.3f',
      ),
      _Column('best', best, '.3f'),
      _Column('final', final, '.3f'),
      _Column('best - final', lambda run: best(run) - final(run), '.3f'),
  ]


def _of(run: Run, key: str) -> np.ndarray:
  return runs_lib.finite(run.log, key)


def _mean(values: np.ndarray) -> float:
  return float(np.mean(values)) if len(values) else math.nan


def _total(key: str) -> Callable[[Run], float]:
  """Over all steps of a run."""
  return lambda run: sum(_of(run, key)) if len(_of(run, key)) else math.nan


def _mean_and_range(values: Sequence[float], column: _Column) -> str:
  """A cell: the mean, and below it the range if it is one."""
  known = int(np.isfinite(values).sum())
  if known < len(values):
    return '–' + (page.note(f'{known} of {len(values)} seeds') if known else '')
  mean, low, high = (
      format(f(values), column.form) for f in (np.mean, np.min, np.max)
  )
  below = page.note(f'{low} to {high}') if low != high else ''
  return f'<b>{mean}</b>{below}'


def _differences(groups: Sequence[Group]) -> str:
  """Every setting that is not the same everywhere: a row each."""
  settings = [group.settings for group in groups]
  rows = {
      field: [each.get(field, '–') for each in settings]
      for field in groups_lib.differing(settings)
  }
  # Unlike settings, these may differ within a group.
  known = [[groups_lib.provenance(r) for r in group.runs] for group in groups]
  for field in groups_lib.differing(sum(known, [])):
    rows[field] = [
        ' / '.join(sorted({each.get(field, '–') for each in part}))
        for part in known
    ]
  if not rows:
    return ''
  cells = [
      [f'<code>{page.escape(field)}</code>', *map(page.escape, values)]
      for field, values in rows.items()
  ]
  table = page.table(['Setting', *_marked_names(groups)], cells)
  return f'<section><h2>What differs</h2>{table}</section>'


def _shared(groups: Sequence[Group]) -> str:
  """Every setting that all groups have, folded."""
  common = groups_lib.shared([group.settings for group in groups])
  if not common:
    return ''
  cells = [
      [f'<code>{page.escape(field)}</code>', page.escape(value)]
      for field, value in common.items()
  ]
  table = page.table(['Setting', 'Every group'], cells)
  return (
      f'<section><details><summary>Shared settings, {len(common)}</summary>'
      f'{table}</details></section>'
  )


def _marked_names(groups: Sequence[Group]) -> list[str]:
  """The names, each behind a sample of its line."""
  return [
      page.line_sample(*drawing.style(i)) + page.escape(group.name)
      for i, group in enumerate(groups)
  ]


# --- Curves -----------------------------------------------------------------


def _curves(groups: Sequence[Group]) -> str:
  figures, left_out = [], []
  for plot in plots.PLOTS:
    drawn = [
        figure
        for pattern in plot.curves
        for figure in _figures(plot, pattern, groups)
    ]
    figures += drawn
    left_out += [] if drawn else [plot]
  note = (
      'Thick: the mean over the seeds of a group, at steps where each has a '
      'value; the legend has its end. Band: their range, lowest to highest. '
      'Thin: each seed. Curves of 30 points and more are smoothed, seed by '
      'seed, over about a twentieth of the run, but for held-out accuracy.'
  )
  return (
      f'<section><h2>Curves</h2><p class="note">{note}</p>'
      f'<div class="plots">{"".join(figures)}</div>'
      f'{page.not_plotted(left_out, "these runs")}</section>'
  )


def _figures(
    plot: plots.Plot, pattern: str, groups: Sequence[Group]
) -> list[str]:
  """A figure for each logged key, with a line for each group."""
  keys = runs_lib.matching(pattern, _logs(groups))
  note = ''
  if len(keys) > MAX_KEYS:
    chosen = np.linspace(0, len(keys) - 1, MAX_KEYS).round().astype(int)
    note = f' {MAX_KEYS} of {len(keys)} such plots are drawn.'
    keys = [keys[i] for i in chosen]
  alone = [*plot.curves] == [pattern] and '*' not in pattern
  figures = []
  for key in keys:
    label = '' if alone else f': {plot.label(pattern, key)}'
    figures.append(_figure(plot, key, plot.title + label, note, groups))
  return figures


def _figure(
    plot: plots.Plot, key: str, title: str, note: str, groups: Sequence[Group]
) -> str:
  lines, missing = [], []
  for i, group in enumerate(groups):
    logged = [run for run in group.runs if len(_of(run, key))]
    if logged:
      lines.append(_line(plot, key, group.name, i, logged))
    if len(logged) < len(group.runs):
      without = f' ({len(group.runs) - len(logged)} of {len(group.runs)} seeds)'
      missing.append(group.name + (without if logged else ''))
  if missing:
    note += f' Not logged: {", ".join(missing)}.'
  units = dict.fromkeys(g.settings.get('divergence.name', '–') for g in groups)
  if 'divergence' in key and len(units) > 1:
    note += f' Not in one unit: {", ".join(units)}.'
  return drawing.curves(
      plot,
      lines,
      title=title,
      caption=plot.caption + note,
      steps=drawing.span(
          [int(x) for log in _logs(groups) for x in log.steps[[0, -1]]]
      ),
      thresholds=_thresholds(groups) if plot.threshold else (),
  )


def _line(
    plot: plots.Plot, key: str, name: str, i: int, logged: Sequence[Run]
) -> drawing.Line:
  """Mean, range and seeds of a key in group number i."""
  seeds = [runs_lib.series(run.log, key) for run in logged]
  least = min(drawing.least(values) for _, values in seeds)
  if not plot.markers:
    longest = max(len(steps) for steps, _ in seeds)
    seeds = [(s, drawing.smooth(values, longest)) for s, values in seeds]
  curve = groups_lib.curve(seeds)
  several = len(seeds) > 1
  color, dash = drawing.style(i)
  return drawing.Line(
      name,
      color,
      curve.steps,
      curve.mean,
      last=drawing.last(curve.mean),
      least=least,
      dash=dash,
      faint=tuple(seeds) if several else (),
      band=(curve.low, curve.high) if several else (),
  )


def _thresholds(groups: Sequence[Group]) -> list[drawing.Threshold]:
  """Those of each group in its color, or the one that all have."""
  levels = [runs_lib.thresholds(group.runs[0].config) for group in groups]
  if all(each == levels[0] for each in levels):
    return [drawing.Threshold(value) for value in levels[0]]
  return [
      drawing.Threshold(value, f'threshold, {group.name}', drawing.style(i)[0])
      for i, group in enumerate(groups)
      for value in levels[i]
  ]
