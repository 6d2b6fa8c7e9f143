"""Draws `curves.png` from `arithmetic.csv` and `reasoning_gym.csv`.

    python experiments/smollm2/plot.py [--runs=FOLDER]

With --runs it first collects the runs FOLDER/arithmetic/seed0, ... and
FOLDER/reasoning_gym/seed0, ... into these files, a row for each step.
"""

import collections
import csv
import pathlib

from absl import app
from absl import flags
from matplotlib import figure

from dppo_jax import metrics

_RUNS = flags.DEFINE_string('runs', '', 'Folder of the runs to collect.')

HERE = pathlib.Path(__file__).parent
TASKS = {
    'arithmetic': 'One-digit sums',
    'reasoning_gym': 'reasoning-gym',
}
COLUMNS = (
    'reward/mean', 'eval/avg@8', 'eval/pass@8', 'eval/length_mean',
    'entropy/mean', 'divergence/mean', 'divergence/max',
    'on_policy/log_ratio_max', 'optimizer/grad_norm', 'time/step_s',
    'time/learn_s', 'time/sample_s', 'time/eval_s', 'time/compile_s',
)


def collect(task, runs):
  with open(HERE / f'{task}.csv', 'w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['seed', 'step', *COLUMNS])
    for run in sorted(runs.glob('seed*')):
      for row in metrics.read(run):
        values = [row.get(column, '') for column in COLUMNS]
        writer.writerow([run.name.removeprefix('seed'), row['step'], *(
            f'{x:.6g}' if isinstance(x, float) else x for x in values
        )])


def read(task):
  """{seed: {column: {step: value}}}."""
  table = collections.defaultdict(lambda: collections.defaultdict(dict))
  with open(HERE / f'{task}.csv', newline='') as file:
    for row in csv.DictReader(file):
      for column in COLUMNS:
        if row[column]:
          table[row['seed']][column][int(row['step'])] = float(row[column])
  return table


def draw():
  """A row of panels for each task, a colour for each seed."""
  panels = (
      ('right held-out answers (avg@8)', 'eval/avg@8', 'o-'),
      ('right answers while training', 'reward/mean', '-'),
      ('entropy of a token, nats', 'entropy/mean', '-'),
  )
  fig = figure.Figure(figsize=(11, 5.8), layout='constrained')
  for row, (task, name) in zip(fig.subplots(2, 3), TASKS.items()):
    table = sorted(read(task).items())
    for axes, (title, column, style) in zip(row, panels):
      for number, (seed, columns) in enumerate(table):
        steps, values = zip(*sorted(columns[column].items()))
        axes.plot(
            steps, values, style, color=f'C{number}', label=f'seed {seed}',
            linewidth=1.4, markersize=4,
        )
      axes.set_ylim(0, None if column == 'entropy/mean' else 1.02)
      axes.set_title(f'{name}: {title}', fontsize=9, loc='left')
      axes.set_xlabel('step (64 completions)', fontsize=9)
      axes.spines[['top', 'right']].set_visible(False)
      axes.grid(axis='y', alpha=0.25)
  fig.axes[0].legend(frameon=False, fontsize=8, loc='lower right')
  fig.savefig(HERE / 'curves.png', dpi=130)


def main(_):
  if _RUNS.value:
    for task in TASKS:
      collect(task, pathlib.Path(_RUNS.value, task))
  draw()


if __name__ == '__main__':
  app.run(main)
