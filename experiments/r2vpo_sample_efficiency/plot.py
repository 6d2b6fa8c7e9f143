"""Draws `curves.png` and `staleness.png`, prints the tables of README.md.

python experiments/r2vpo_sample_efficiency/plot.py
"""

import pathlib
import sys

from matplotlib import figure
import numpy as np

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.lib import figures
from experiments.lib import table
from experiments.r2vpo_sample_efficiency import sweep

LABELS = {
    'grpo': 'GRPO',
    'grpo_clip_higher': 'GRPO, clip-higher',
    'dppo_binary_tv': 'DPPO, binary TV',
    'r2vpo': 'R2VPO',
    'r2vpo_replay': 'R2VPO with replay',
}

def select(curves, method, staleness):
  """{seed: curve} of a method's runs."""
  return {
      job.seed: curve
      for job, curve in sorted(curves.items())
      if (job.method, job.staleness) == (method, staleness)
  }


def draw_curves(curves):
  """Held-out accuracy by rollouts, a band for each method."""
  fig = figure.Figure(figsize=(7.2, 4.2), layout='constrained')
  axes = fig.subplots()
  for number, (method, label) in enumerate(LABELS.items()):
    runs = list(select(curves, method, '0').values())
    rollouts = runs[0][0]
    accuracy = np.array([accuracy for _, accuracy in runs])
    axes.plot(
        rollouts, accuracy.mean(axis=0), color=f'C{number}', label=label,
        linewidth=1.6,
    )
    axes.fill_between(
        rollouts, *figures.interval(accuracy), color=f'C{number}', alpha=0.18,
        linewidth=0,
    )
  axes.axhline(sweep.TARGET, color='#667085', linestyle='--', linewidth=1)
  axes.set_xlabel('rollouts sampled')
  axes.set_ylabel('held-out accuracy (avg@4)')
  axes.legend(frameon=False, fontsize=9)
  figures.clean(axes)
  fig.savefig(sweep.HERE / 'curves.png', dpi=130)


def draw_staleness(curves):
  """Accuracy by staleness: a point for each run, the mean's interval."""
  fig = figure.Figure(figsize=(7.2, 3.6), layout='constrained')
  axes = fig.subplots()
  ages = sorted({job.staleness for job in curves}, key=int)
  for number, (method, label) in enumerate(LABELS.items()):
    shift = (number - (len(LABELS) - 1) / 2) * 0.13
    for place, staleness in enumerate(ages):
      runs = select(curves, method, staleness).values()
      ends = [sweep.accuracy_at_half(method, curve) for curve in runs]
      axes.scatter(
          [place + shift] * len(ends), ends, s=14, color=f'C{number}',
          label=label if not place else None,
      )
      axes.hlines(
          np.mean(ends), place + shift - 0.05, place + shift + 0.05,
          color=f'C{number}',
      )
      axes.vlines(
          place + shift, *figures.interval(ends), color=f'C{number}',
          alpha=0.35, linewidth=5,
      )
  axes.set_xticks(range(len(ages)), [f'{x} steps' for x in ages])
  axes.set_xlabel('staleness')
  axes.set_ylabel('held-out accuracy after half the steps')
  axes.legend(frameon=False, fontsize=8, loc='lower left')
  figures.clean(axes)
  fig.savefig(sweep.HERE / 'staleness.png', dpi=130)


def print_tables(curves):
  """Rollouts to the target, and accuracy at the end by staleness."""
  needed = {
      method: np.array([
          sweep.rollouts_to_target(x)
          for x in select(curves, method, '0').values()
      ])
      for method in LABELS
  }
  rates = {job.method: job.learning_rate for job in curves}
  baseline = np.median(needed['grpo'])
  print('| method | learning rate | rollouts to 0.9: median | all seeds | '
        'relative to GRPO |\n|---|---|---|---|---|')
  for method, label in LABELS.items():
    each = ', '.join(
        f'{x:.0f}' if np.isfinite(x) else 'never'
        for x in sorted(needed[method])
    )
    median = np.median(needed[method])
    print(
        f'| {label} | {rates[method]} | '
        f'{f"{median:.0f}" if np.isfinite(median) else "never"} | {each} | '
        f'{median / baseline:.2f} |'
    )
  ages = sorted({job.staleness for job in curves}, key=int)
  print('\n| method |', ' | '.join(f'staleness {x}' for x in ages), '|')
  print('|---' * (1 + len(ages)) + '|')
  for method, label in LABELS.items():
    cells = []
    for staleness in ages:
      runs = select(curves, method, staleness).values()
      ends = [sweep.accuracy_at_half(method, curve) for curve in runs]
      low, high = figures.interval(ends)
      cells.append(f'{np.mean(ends):.3f} ({low:.3f} to {high:.3f})')
    print(f'| {label} |', ' | '.join(cells), '|')


def main():
  curves = sweep.curves(table.read(sweep.RUNS))
  draw_curves(curves)
  draw_staleness(curves)
  print_tables(curves)


if __name__ == '__main__':
  main()
