"""Draws `curves.png` and prints the table of README.md from `results.csv`.

python experiments/main_job/plot.py
"""

import collections
import csv
import pathlib

from matplotlib import figure
import numpy as np

HERE = pathlib.Path(__file__).parent
MAIN = 'tv_topk'
INK = '#667085'


def read():
  """{config: {seed: {column: {step: value}}}}."""
  table = collections.defaultdict(
      lambda: collections.defaultdict(lambda: collections.defaultdict(dict))
  )
  with open(HERE / 'results.csv', newline='') as file:
    for row in csv.DictReader(file):
      config, seed = row.pop('config'), row.pop('seed')
      step = int(row.pop('step'))
      for column, value in row.items():
        if value:
          table[config][seed][column][step] = float(value)
  return table


def draw(runs):
  """Three panels of the main run, a line a seed."""
  panels = (
      ('Held-out accuracy (avg@8)', 'eval/avg@8', 'o-', False),
      ('Divergence, largest of a step', 'divergence/max', '-', True),
      ('mean |pi - mu|', 'mismatch/prob_gap_mean', '-', True),
  )
  fig = figure.Figure(figsize=(11, 3.2), layout='constrained')
  for axes, (title, column, style, log) in zip(fig.subplots(1, 3), panels):
    for number, (seed, columns) in enumerate(sorted(runs.items())):
      steps, values = zip(*sorted(columns[column].items()))
      axes.plot(
          steps, values, style, color=f'C{number}', label=f'seed {seed}',
          linewidth=1.4, markersize=4,
      )
    if log:
      axes.set_yscale('log')
    else:
      axes.set_ylim(0, 1)
    if column == 'divergence/max':
      axes.axhline(0.2, color=INK, linestyle='--', linewidth=1)
      axes.text(84, 0.23, 'threshold', color=INK, fontsize=8)
    axes.set_title(title, fontsize=10, loc='left')
    axes.set_xlabel('step', fontsize=9)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', alpha=0.25)
  fig.axes[0].legend(frameon=False, fontsize=8)
  fig.savefig(HERE / 'curves.png', dpi=130)


def print_table(table):
  """Held-out accuracy before and after, mean over seeds and their spread."""
  print('| config | seeds | before | after | steps to 0.9 |')
  print('|---|---|---|---|---|')
  for config, runs in table.items():
    curves = [columns['eval/avg@8'] for columns in runs.values()]
    before = [curve[min(curve)] for curve in curves]
    after = [curve[max(curve)] for curve in curves]
    reached = [
        min((s for s, v in curve.items() if v >= 0.9), default=None)
        for curve in curves
    ]
    print(
        f'| `{config}` | {len(curves)} | {np.mean(before):.3f} | '
        f'{np.mean(after):.3f} ({min(after):.3f} to {max(after):.3f}) | '
        f'{", ".join(str(s) for s in reached)} |'
    )


if __name__ == '__main__':
  results = read()
  draw(results[MAIN])
  print_table(results)
