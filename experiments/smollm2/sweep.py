"""Runs the two tasks and writes `arithmetic.csv` and `reasoning_gym.csv`.

    python experiments/smollm2/sweep.py

What is in the files is not run again, so the sweep may be stopped and started.
"""

import collections
from collections.abc import Mapping, Sequence
import functools
import pathlib
import sys
from typing import Any, NamedTuple

from absl import app
from absl import flags

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.lib import command
from experiments.lib import options

options.define('seeds')
_TASKS = flags.DEFINE_list('tasks', [], 'Only these; all if empty.')

HERE = pathlib.Path(__file__).parent
SEEDS = ('0', '1', '2')
TASKS = ('arithmetic', 'reasoning_gym')
COLUMNS = (
    'reward/mean', 'eval/avg@8', 'eval/pass@8', 'eval/length_mean',
    'entropy/mean', 'divergence/mean', 'divergence/max',
    'on_policy/log_ratio_max', 'optimizer/grad_norm', 'time/step_s',
    'time/learn_s', 'time/sample_s', 'time/eval_s', 'time/compile_s',
)


class Job(NamedTuple):
  """One run; its file tells the task."""

  seed: str


def command_of(job: Job, task: str) -> command.Command:
  return command.Command(
      config=f'configs/smollm2_{task}.py',
      flags={'seed': job.seed},
      columns={name: name for name in COLUMNS},
  )


def curves(
    rows: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, dict[int, float]]]:
  """{seed: {column: {step: value}}} of the rows of a task."""
  found = collections.defaultdict(lambda: collections.defaultdict(dict))
  for row in sorted(rows, key=lambda row: row['seed']):
    for column in COLUMNS:
      if row[column]:
        found[row['seed']][column][int(row['step'])] = float(row[column])
  return found


def summarize(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
  """{seed: {step: held-out accuracy}}."""
  return {
      seed: columns['eval/avg@8'] for seed, columns in curves(rows).items()
  }


def main(_):
  for task in options.chosen('tasks', _TASKS.value, TASKS):
    command.measure(
        [Job(seed) for seed in options.given('seeds') or SEEDS],
        functools.partial(command_of, task=task),
        HERE / f'{task}.csv',
        summarize=summarize,
        folder=task,
    )


if __name__ == '__main__':
  app.run(main)
