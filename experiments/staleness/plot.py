"""Draws `staleness.png` and `curves.png`, prints the tables of README.md.

python experiments/staleness/plot.py
"""

import pathlib
import sys

from matplotlib import figure
import numpy as np

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.lib import figures
from experiments.lib import stability
from experiments.lib import sweep as sweep_lib
from experiments.staleness import sweep

FAMILIES = {
    'ratio': ('PG-IS', 'GRPO', 'GRPO clip-higher'),
    'DPPO': (
        'DPPO binary TV', 'DPPO binary KL', 'DPPO top-K TV', 'DPPO top-K KL',
    ),
    'variance of the ratio': ('R2VPO', 'R2VPO, limit 0.05'),
}


def finals(curves, age, method):
  """Final accuracy of each seed."""
  return [
      stability.outcome(x['accuracy'])['final']
      for x in curves[str(age), method].values()
  ]


def draw_ages(curves):
  """Final accuracy by age, a panel for each family, the best of all dotted."""
  fig = figure.Figure(figsize=(11, 3.6), layout='constrained')
  places = range(len(sweep.AGES))
  best = [
      max(np.mean(finals(curves, age, method)) for method in sweep.METHODS)
      for age in sweep.AGES
  ]
  panels = fig.subplots(1, len(FAMILIES), sharey=True)
  for axes, (family, methods) in zip(panels, FAMILIES.items()):
    for style, method in enumerate(methods):
      figures.band(
          axes, places,
          np.transpose([finals(curves, age, method) for age in sweep.AGES]),
          style=style, label=method,
      )
    axes.plot(
        places, best, color=figures.INK, linestyle=':', linewidth=1,
        label='best of all',
    )
    axes.set_xticks(places, map(str, sweep.AGES))
    axes.set_xlabel('age of a rollout, steps of 4 updates', fontsize=9)
    axes.set_title(family, fontsize=10, loc='left')
    axes.legend(frameon=False, fontsize=8, loc='lower left')
    figures.clean(axes)
  panels[0].set_ylabel('final held-out accuracy', fontsize=9)
  fig.savefig(sweep.HERE / 'staleness.png', dpi=120)


def draw_curves(curves):
  """Held-out accuracy by step, a row for each family, a column for each age."""
  fig = figure.Figure(figsize=(11, 7), layout='constrained')
  grid = fig.subplots(
      len(FAMILIES), len(sweep.AGES), sharex=True, sharey=True
  )
  for row, (family, methods) in zip(grid, FAMILIES.items()):
    for axes, age in zip(row, sweep.AGES):
      for style, method in enumerate(methods):
        runs = list(curves[str(age), method].values())
        figures.band(
            axes, runs[0]['step'], [x['accuracy'] for x in runs], style=style,
            label=method,
        )
      axes.set_title(f'{family}, {age} steps old', fontsize=9, loc='left')
      figures.clean(axes)
    row[0].set_ylabel('held-out accuracy', fontsize=9)
    row[0].legend(frameon=False, fontsize=7.5, loc='lower right')
  for axes in grid[-1]:
    axes.set_xlabel('step', fontsize=9)
  fig.savefig(sweep.HERE / 'curves.png', dpi=120)


def print_ages(curves):
  """The mean of the final accuracy and its interval, by method and age."""
  rows = []
  for method in sweep.METHODS:
    of_ages = [finals(curves, age, method) for age in sweep.AGES]
    rows.append([method, *(
        '{:.3f} ({:.3f} to {:.3f})'.format(np.mean(x), *figures.interval(x))
        for x in of_ages
    ), f'{np.mean(of_ages[-1]) - np.mean(of_ages[0]):+.3f}'])
  ages = sweep.AGES
  print(figures.markdown(
      ['method', 'fresh', *(f'{x} steps old' for x in ages[1:]),
       f'from fresh to {ages[-1]}'], rows,
  ))


def main():
  rows = sweep_lib.results(sweep.SWEEP)
  curves = stability.curves(rows)
  draw_ages(curves)
  draw_curves(curves)
  print_ages(curves)
  print(f'\n{stability.as_markdown(stability.summarize(rows))}')


if __name__ == '__main__':
  main()
