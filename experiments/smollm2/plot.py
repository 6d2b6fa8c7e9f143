"""Draws `curves.png` and prints the table of README.md from the two files.

python experiments/smollm2/plot.py
"""

import pathlib
import sys

from matplotlib import figure

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.lib import figures
from experiments.lib import table
from experiments.smollm2 import sweep

NAMES = {'arithmetic': 'One-digit sums', 'reasoning_gym': 'reasoning-gym'}
PANELS = (
    ('right held-out answers (avg@8)', 'eval/avg@8', 'o'),
    ('right answers while training', 'reward/mean', ''),
    ('entropy of a token, nats', 'entropy/mean', ''),
)


def draw(tasks):
  """A row of panels for each task: its seeds, their mean and its band."""
  fig = figure.Figure(figsize=(11, 5.8), layout='constrained')
  for row, (task, seeds) in zip(fig.subplots(2, 3), tasks.items()):
    for axes, (title, column, marker) in zip(row, PANELS):
      figures.runs(
          axes, {seed: x[column] for seed, x in seeds.items()}, marker=marker
      )
      axes.set_ylim(0, None if column == 'entropy/mean' else 1.02)
      axes.set_title(f'{NAMES[task]}: {title}', fontsize=9, loc='left')
      axes.set_xlabel('step (64 completions)', fontsize=9)
      figures.clean(axes)
  fig.axes[0].legend(frameon=False, fontsize=8, loc='lower right')
  fig.savefig(sweep.HERE / 'curves.png', dpi=130)


def print_table(tasks):
  """Held-out accuracy of every run at every evaluation."""
  header, rows = [], []
  for task, seeds in tasks.items():
    for seed, columns in seeds.items():
      accuracy = columns['eval/avg@8']
      header = [str(step) for step in accuracy]
      rows.append([task, seed, *(f'{x:.3f}' for x in accuracy.values())])
  print(figures.markdown(['task', 'seed', *header], rows))


def main():
  tasks = {
      task: sweep.curves(table.read(sweep.HERE / f'{task}.csv'))
      for task in sweep.TASKS
  }
  draw(tasks)
  print_table(tasks)


if __name__ == '__main__':
  main()
