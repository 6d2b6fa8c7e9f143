"""Draws `curves.png` and prints the tables of README.md.

python experiments/real_model/plot.py
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
from experiments.lib import table
from experiments.real_model import sweep

PANELS = (
    ('accuracy', 'held-out accuracy, avg@8'),
    ('reward', 'right answers while training'),
    ('entropy', 'entropy of a token, nats'),
    ('gap_mean', 'mean |pi - mu| after the updates'),
    ('masked', 'share of tokens masked'),
    ('multiplier', "R2VPO's multiplier"),
)


def draw(curves, methods, path):
  """A panel for each column: runs, their mean, its bootstrapped interval."""
  fig = figure.Figure(figsize=(10.5, 5.6), layout='constrained')
  for axes, (column, title) in zip(fig.subplots(2, 3).flat, PANELS):
    for style, method in enumerate(methods):
      runs = curves[method].values()
      steps = next(iter(runs))['step']
      values = np.array([x[column] for x in runs])
      measured = np.isfinite(values).all(axis=0)
      if not measured.any():
        continue
      steps, values = steps[measured], values[:, measured]
      axes.plot(
          steps, values.T, color=figures.COLORS[style], linewidth=0.6,
          alpha=0.5,
      )
      figures.band(axes, steps, values, style=style, label=method)
    axes.set_title(title, fontsize=9, loc='left')
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel('step (64 completions, 4 updates)', fontsize=8)
    figures.clean(axes)
  fig.axes[0].legend(frameon=False, fontsize=8)
  fig.savefig(path, dpi=130)


def evaluations(curves):
  """Held-out accuracy of every run at every evaluation."""
  rows, header = [], []
  for method, seeds in curves.items():
    for seed, run in seeds.items():
      found = np.isfinite(run['accuracy'])
      header = [f'{step:.0f}' for step in run['step'][found]]
      rows.append(
          [method, seed, *(f'{x:.3f}' for x in run['accuracy'][found])]
      )
  return figures.markdown(['method', 'seed', *header], rows)


def main():
  rows = table.read(sweep.HERE / 'runs.csv')
  every = stability.curves(rows)
  for rate in sorted({rate for rate, _ in every}):
    curves = {
        method: every[rate, method]
        for method in sweep.METHODS
        if (rate, method) in every
    }
    draw(curves, list(curves), sweep.HERE / 'curves.png')
    print(f'Rate {rate}:\n\n{evaluations(curves)}')


if __name__ == '__main__':
  main()
