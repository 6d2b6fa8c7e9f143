"""Draws a figure for each setting, prints the tables of README.md.

python experiments/stability/plot.py
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
from experiments.stability import sweep

FAMILIES = {
    'no mask': ('PG-IS', 'CISPO'),
    'ratio clip': ('GRPO clip-higher', 'MiniRL', 'MiniRL-TIS'),
    'DPPO and R2VPO': (
        'DPPO binary TV', 'DPPO binary KL', 'DPPO top-K TV', 'DPPO top-K KL',
        'R2VPO',
    ),
}
ABLATIONS = {
    'anchor': (
        'DPPO binary TV', 'DPPO binary KL', 'DPPO binary TV, recomputed',
        'DPPO binary KL, recomputed',
    ),
    'minimal masks': (
        'PG-IS', 'mask 0.5', 'mask 0.8', 'mask 0.5, recomputed',
    ),
    'truncated weights': ('PG-IS', 'CISPO', 'MiniRL', 'MiniRL-TIS'),
}
PANELS = (
    ('reward', 'reward'),
    ('accuracy', 'held-out accuracy'),
    ('gap_mean', 'mean |pi - mu|'),
    ('gap_max', 'max of pi - mu'),
    ('gap_min', 'min of pi - mu'),
)


def draw(curves, setting, families, path):
  """A row for each panel, a column for each family; y shared in a row."""
  families = {
      name: found
      for name, methods in families.items()
      if (found := [x for x in methods if (setting, x) in curves])
  }
  fig = figure.Figure(
      figsize=(3.7 * len(families), 2.0 * len(PANELS)), layout='constrained'
  )
  rows = fig.subplots(
      len(PANELS), len(families), sharex=True, sharey='row', squeeze=False
  )
  for axes_of_row, (column, title) in zip(rows, PANELS):
    axes_of_row[0].set_ylabel(title, fontsize=9)
    for axes, methods in zip(axes_of_row, families.values()):
      for style, method in enumerate(methods):
        runs = list(curves[setting, method].values())
        figures.band(
            axes, runs[0]['step'], [x[column] for x in runs], style=style,
            label=method,
        )
      figures.clean(axes)
  for axes, name in zip(rows[0], families):
    legend = axes.legend(
        title=name, title_fontsize=10, frameon=False, fontsize=7.5, ncols=2,
        loc='lower left', bbox_to_anchor=(-0.02, 1), borderaxespad=0,
    )
    legend.set_alignment('left')
  for axes in rows[-1]:
    axes.set_xlabel('step', fontsize=9)
  fig.savefig(path, dpi=120)


def main():
  rows = sweep_lib.results(sweep.SWEEP)
  curves, results = stability.curves(rows), stability.summarize(rows)
  for setting in results:
    draw(curves, setting, FAMILIES, sweep.HERE / f'{setting}.png')
    if any(x in results[setting] for x in ABLATIONS['anchor'][2:]):
      draw(curves, setting, ABLATIONS, sweep.HERE / f'{setting}_ablations.png')
  print(stability.as_markdown(results))


if __name__ == '__main__':
  main()
