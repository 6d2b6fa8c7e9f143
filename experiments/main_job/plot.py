"""Draws `curves.png` and prints the table of README.md from `runs.csv`.

python experiments/main_job/plot.py
"""

import pathlib
import sys

from matplotlib import figure

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.lib import figures
from experiments.lib import table
from experiments.main_job import sweep


def draw(runs):
  """Three panels of the main run: its seeds, their mean and its band."""
  panels = (
      ('Held-out accuracy (avg@8)', 'eval/avg@8', 'o', False),
      ('Divergence, largest of a step', 'divergence/max', '', True),
      ('mean |pi - mu|', 'mismatch/prob_gap_mean', '', True),
  )
  fig = figure.Figure(figsize=(11, 3.2), layout='constrained')
  for axes, (title, column, marker, log) in zip(fig.subplots(1, 3), panels):
    figures.runs(
        axes, {seed: x[column] for seed, x in runs.items()}, marker=marker
    )
    if log:
      axes.set_yscale('log')
    else:
      axes.set_ylim(0, 1)
    if column == 'divergence/max':
      axes.axhline(0.2, color=figures.INK, linestyle='--', linewidth=1)
      axes.text(84, 0.23, 'threshold', color=figures.INK, fontsize=8)
    axes.set_title(title, fontsize=10, loc='left')
    axes.set_xlabel('step', fontsize=9)
    figures.clean(axes)
  fig.axes[0].legend(frameon=False, fontsize=8)
  fig.savefig(sweep.HERE / 'curves.png', dpi=130)


def print_table(results):
  """Held-out accuracy before and after, mean over seeds and their spread."""
  print(figures.markdown(
      ['config', 'seeds', 'before', 'after', f'steps to {sweep.TARGET}'],
      [
          [
              f'`{config}`', str(x['seeds']), f'{x["before"]:.3f}',
              f'{x["after"]:.3f}' + (x['seeds'] > 1) * (
                  f' ({x["after_min"]:.3f} to {x["after_max"]:.3f})'
              ),
              ', '.join(map(str, x['steps_to_target'])),
          ]
          for config, x in results.items()
      ],
  ))


def main():
  rows = table.read(sweep.HERE / 'runs.csv')
  draw(sweep.curves(rows)[sweep.MAIN])
  print_table(sweep.summarize(rows))


if __name__ == '__main__':
  main()
