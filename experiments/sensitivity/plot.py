"""Draws `sensitivity.png`, prints the table of README.md.

python experiments/sensitivity/plot.py
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
from experiments.sensitivity import sweep

COLUMNS = 3


def draw(curves):
  """Final accuracy by threshold, a panel for each divergence."""
  algorithms = dict.fromkeys(name.split()[0] for _, name in curves)
  lines = -(-len(algorithms) // COLUMNS)
  fig = figure.Figure(figsize=(11, 2.8 * lines), layout='constrained')
  panels = fig.subplots(lines, COLUMNS, sharey=True).ravel()
  for axes, algorithm in zip(panels, algorithms):
    ends = {
        float(name.split()[1]): [
            stability.outcome(x['accuracy'])['final'] for x in seeds.values()
        ]
        for (_, name), seeds in curves.items()
        if name.split()[0] == algorithm
    }
    values = sorted(ends)
    for value in values:
      axes.scatter(
          [value] * len(ends[value]), ends[value], s=14, alpha=0.6,
          color=figures.COLORS[0], linewidth=0,
      )
    each = [ends[value] for value in values]
    bounds = np.transpose([figures.interval(x) for x in each])
    axes.plot(values, [np.mean(x) for x in each], color=figures.COLORS[0])
    axes.fill_between(
        values, *bounds, color=figures.COLORS[0], alpha=0.18, linewidth=0
    )
    axes.set_xscale('log')
    axes.set_xticks(values, [f'{x:g}' for x in values])
    axes.minorticks_off()
    axes.set_title(algorithm, fontsize=10, loc='left')
    figures.clean(axes)
  for axes in panels[-COLUMNS:]:
    axes.set_xlabel('threshold', fontsize=9)
  for axes in panels[::COLUMNS]:
    axes.set_ylabel('final held-out accuracy', fontsize=9)
  fig.savefig(sweep.HERE / 'sensitivity.png', dpi=120)


def main():
  rows = sweep_lib.results(sweep.SWEEP)
  draw(stability.curves(rows))
  print(stability.as_markdown(stability.summarize(rows)))


if __name__ == '__main__':
  main()
