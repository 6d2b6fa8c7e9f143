"""Draws `numerics.png`, `clipped.png` and `curves.png`; prints the tables.

python experiments/clipping/plot.py
"""

import json
import pathlib
import sys

from matplotlib import figure
import numpy as np

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.clipping import sweep
from experiments.lib import figures
from experiments.lib import stability
from experiments.lib import sweep as sweep_lib
from experiments.lib import table

CLIP = (0.8, 1.28)


def columns_of(rows, names):
  return [np.array([float(row[name]) for row in rows]) for name in names]


def draw_numerics(rows):
  """Ratio and total variation by probability, a column for each numerics."""
  fig = figure.Figure(figsize=(11, 5.4), layout='constrained')
  kinds = list(sweep.NUMERICS)
  panels = fig.subplots(2, len(kinds), sharex=True, sharey='row')
  for kind, (above, below) in zip(kinds, panels.T):
    mu, ratio, variation = columns_of(
        [row for row in rows if row['numerics'] == kind],
        ('mu', 'ratio', 'variation'),
    )
    above.scatter(
        mu, ratio, s=5, color=figures.COLORS[0], alpha=0.4, linewidth=0
    )
    for limit in CLIP:
      above.axhline(limit, color=figures.INK, linestyle='--', linewidth=1)
    below.scatter(
        mu, variation, s=5, color=figures.COLORS[1], alpha=0.4, linewidth=0
    )
    below.axhline(0.15, color=figures.INK, linestyle='--', linewidth=1)
    above.set_title(kind, fontsize=10, loc='left')
    below.set_xlabel('mu of the sampled token', fontsize=9)
    above.set_yscale('log')
    below.set_yscale('log')
    above.set_xscale('log')
    for axes in (above, below):
      figures.clean(axes)
  panels[0][0].set_ylabel('pi / mu', fontsize=9)
  panels[1][0].set_ylabel('total variation (top 20)', fontsize=9)
  panels[0][0].text(
      0.02, CLIP[1] * 1.03, 'clip 0.8 to 1.28', fontsize=7.5,
      color=figures.INK, transform=panels[0][0].get_yaxis_transform(),
  )
  panels[1][0].text(
      0.02, 0.17, 'threshold 0.15', fontsize=7.5, color=figures.INK,
      transform=panels[1][0].get_yaxis_transform(),
  )
  fig.savefig(sweep.HERE / 'numerics.png', dpi=120)


def draw_clipped(rows, summary):
  """Which tokens are dropped, beside which are kept."""
  fig = figure.Figure(figsize=(11, 3.6), layout='constrained')
  cloud, gaps, words = fig.subplots(1, 3)
  for style, kind in enumerate(('kept', 'A > 0', 'A < 0')):
    chosen = [row for row in rows if row['kind'] == kind]
    mu, gap, entropy = columns_of(chosen, ('mu', 'gap', 'entropy'))
    color = (figures.INK, *figures.COLORS)[style]
    label = kind if kind == 'kept' else f'dropped, {kind}'
    cloud.scatter(
        mu, entropy, s=7, alpha=0.45, color=color, linewidth=0, label=label
    )
    gaps.plot(
        np.sort(np.abs(gap)), np.linspace(0, 1, len(gap)),
        figures.STYLES[style], color=color, label=label,
    )
  cloud.set_xscale('log')
  cloud.set_xlabel('mu of the token', fontsize=9)
  cloud.set_ylabel('entropy where it stands, nats', fontsize=9)
  cloud.legend(frameon=False, fontsize=8)
  gaps.axvline(0.15, color=figures.INK, linestyle='--', linewidth=1)
  gaps.set_xlabel('|pi - mu| (dashed: threshold of DPPO)', fontsize=9)
  gaps.set_ylabel('share of tokens', fontsize=9)
  found = [
      (x['token'], sign, x['dropped'])
      for sign, tokens in summary['most_frequent'].items()
      for x in tokens[:8]
  ]
  places = np.arange(len(found))[::-1]
  words.barh(
      places, [x[2] for x in found],
      color=[figures.COLORS[0 if x[1] == 'A > 0' else 1] for x in found],
  )
  words.set_yticks(
      places, [f'{x[0]!r}  {x[1]}' for x in found], fontsize=7.5
  )
  words.set_xlabel('times dropped', fontsize=9)
  for axes in (cloud, gaps, words):
    figures.clean(axes)
  fig.savefig(sweep.HERE / 'clipped.png', dpi=120)


def draw_curves(rows):
  """Learning curves of the relaxed clips."""
  curves = stability.curves(rows)
  panels = (
      ('accuracy', 'held-out accuracy'), ('masked', 'share of tokens dropped'),
      ('entropy', 'entropy, nats'),
  )
  fig = figure.Figure(figsize=(11, 3.4), layout='constrained')
  for axes, (column, title) in zip(fig.subplots(1, 3), panels):
    for style, method in enumerate(sweep.METHODS):
      for (_, name), seeds in curves.items():
        if name == method:
          runs = list(seeds.values())
          figures.band(
              axes, runs[0]['step'], [x[column] for x in runs], style=style,
              label=method,
          )
    axes.set_title(title, fontsize=10, loc='left')
    axes.set_xlabel('step', fontsize=9)
    figures.clean(axes)
  fig.axes[0].legend(frameon=False, fontsize=8)
  fig.savefig(sweep.HERE / 'curves.png', dpi=120)


def print_tables(numerics, clipped, results):
  print(figures.markdown(
      ['numerics', 'mu', 'tokens', 'outside 0.8 to 1.28',
       '99 % of abs(r - 1)', '99 % of TV', 'largest TV'],
      [
          [kind, group, f'{x["tokens"]}', f'{x["outside_clip"]:.2%}',
           f'{x["ratio_gap_q99"]:.3f}', f'{x["variation_q99"]:.4f}',
           f'{x["variation_max"]:.4f}']
          for kind in sweep.NUMERICS
          for group, x in numerics[kind].items()
      ],
  ))
  print()
  print(figures.markdown(
      ['tokens', 'number', 'median mu', 'mu < 0.1', 'mean entropy',
       'median abs(pi - mu)', 'within 0.15'],
      [
          [kind, f'{x["tokens"]}', f'{x["mu_median"]:.3f}',
           f'{x["mu_below_0.1"]:.1%}', f'{x["entropy_mean"]:.2f}',
           f'{x["gap_abs_median"]:.4f}', f'{x["gap_within_0.15"]:.1%}']
          for kind, x in clipped['kinds'].items()
      ],
  ))
  print()
  print(stability.as_markdown(results))


def main():
  load = lambda name: json.loads((sweep.HERE / name).read_text())
  rows = sweep_lib.results(sweep.SWEEP)
  draw_numerics(table.read(sweep.HERE / 'numerics.csv'))
  draw_clipped(table.read(sweep.HERE / 'clipped.csv'), load('clipped.json'))
  draw_curves(rows)
  print_tables(
      load('numerics.json'), load('clipped.json'), stability.summarize(rows)
  )


if __name__ == '__main__':
  main()
