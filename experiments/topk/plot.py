"""Draws `tightness.png` and `curves.png`, prints the tables of README.md.

python experiments/topk/plot.py
"""

import pathlib
import sys

from matplotlib import figure

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.lib import figures
from experiments.lib import stability
from experiments.lib import sweep as sweep_lib
from experiments.lib import table
from experiments.topk import sweep

PANELS = (
    ('bound', 'share of the full divergence'),
    ('found', 'share of the full mask that is found'),
    ('mass_mean', 'mass of the top K'),
)
# A share of fewer tokens says nothing.
FEW = 20


def number(text):
  return float(text) if text else float('nan')


def draw_tightness(rows):
  """By K, a line for each pair of policies; binary stands at the left."""
  names = ['binary', *map(str, sweep.KS)]
  fig = figure.Figure(figsize=(11, 5.8), layout='constrained')
  policies = list(dict.fromkeys(row['policies'] for row in rows))
  for kind, line in zip(sweep.THRESHOLDS, fig.subplots(2, 3, sharex=True)):
    for axes, (column, title) in zip(line, PANELS):
      for style, policy in enumerate(policies):
        values = {
            row['partition']: number(row[column])
            for row in rows
            if row['policies'] == policy and row['kind'] == kind
            if column != 'found' or int(row['outside']) >= FEW
        }
        axes.plot(
            [names.index(x) for x in values], list(values.values()),
            marker='o', markersize=4, linestyle=figures.STYLES[style],
            color=figures.COLORS[style], label=policy,
        )
      axes.set_title(f'{kind.upper()}: {title}', fontsize=9, loc='left')
      axes.set_xticks(range(len(names)), names, fontsize=8)
      axes.set_ylim(None, 1.03)
      figures.clean(axes)
    line[0].set_xlabel('')
  for axes in fig.axes[3:]:
    axes.set_xlabel('K', fontsize=9)
  fig.axes[0].legend(frameon=False, fontsize=8, loc='lower right')
  fig.savefig(sweep.HERE / 'tightness.png', dpi=120)


def draw_curves(rows):
  """Learning curves, a row for each kind of divergence."""
  curves = stability.curves(rows)
  panels = (
      ('accuracy', 'held-out accuracy'), ('masked', 'share of tokens dropped'),
  )
  fig = figure.Figure(figsize=(9, 5.8), layout='constrained')
  for kind, line in zip(sweep.SETTINGS, fig.subplots(2, 2, sharex=True)):
    for axes, (column, title) in zip(line, panels):
      methods = [name for setting, name in curves if setting == kind]
      for style, method in enumerate(methods):
        runs = list(curves[kind, method].values())
        figures.band(
            axes, runs[0]['step'], [x[column] for x in runs], style=style,
            label=method,
        )
      axes.set_title(f'{kind.upper()}: {title}', fontsize=9, loc='left')
      figures.clean(axes)
    line[0].legend(frameon=False, fontsize=8, loc='lower right')
  for axes in fig.axes[2:]:
    axes.set_xlabel('step', fontsize=9)
  fig.savefig(sweep.HERE / 'curves.png', dpi=120)


def main():
  tight = table.read(sweep.HERE / 'tightness.csv')
  rows = sweep_lib.results(sweep.SWEEP)
  draw_tightness(tight)
  draw_curves(rows)
  names = ['policies', 'kind', 'partition', 'tokens', 'bound', 'outside',
           'found', 'mass_mean', 'mass_q01']
  print(figures.markdown(names, [[row[x] for x in names] for row in tight]))
  print()
  print(stability.as_markdown(stability.summarize(rows)))


if __name__ == '__main__':
  main()
