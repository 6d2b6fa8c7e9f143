"""Runs the configs of the algorithms and writes `runs.csv`; see README.md.

    python experiments/main_job/sweep.py

The default run has three seeds, the others one; `--seeds` and `--methods`
choose. What is in the file is not run again, so the sweep may be stopped and
started.
"""

import collections
from collections.abc import Mapping, Sequence
import pathlib
import sys
from typing import Any, NamedTuple

from absl import app
import numpy as np

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.lib import command
from experiments.lib import options

options.define('seeds', 'methods', 'file')

HERE = pathlib.Path(__file__).parent
MAIN = 'tv_topk'
SEEDS = {MAIN: ('0', '1', '2')}
METHODS = (
    MAIN, 'kl_topk', 'tv_binary', 'kl_binary', 'grpo', 'grpo_clip_higher',
    'cispo', 'pg_is',
)
TARGET = 0.9
COLUMNS = (
    'reward/mean', 'eval/avg@8', 'eval/pass@8', 'divergence/mean',
    'divergence/max', 'mismatch/prob_gap_mean', 'mask/fraction',
    'entropy/mean', 'tokens/s', 'time/step_s', 'time/compile_s',
)


class Job(NamedTuple):
  """One run."""

  config: str  # Name in configs/.
  seed: str


def jobs(seeds: Sequence[str] = (), methods: Sequence[str] = ()) -> list[Job]:
  """The runs of the results, or those of the seeds and methods named."""
  return [
      Job(config, seed)
      for config in options.chosen('methods', methods, METHODS)
      for seed in seeds or SEEDS.get(config, ('0',))
  ]


def command_of(job: Job) -> command.Command:
  return command.Command(
      config=f'configs/{job.config}.py',
      flags={'seed': job.seed, 'tensorboard': False},
      columns={name: name for name in COLUMNS},
  )


def curves(
    rows: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, dict[str, dict[int, float]]]]:
  """{config: {seed: {column: {step: value}}}} of rows, configs by name."""
  found = collections.defaultdict(
      lambda: collections.defaultdict(lambda: collections.defaultdict(dict))
  )
  for row in sorted(rows, key=lambda row: (row['config'], row['seed'])):
    for column in COLUMNS:
      if row[column]:
        of_seed = found[row['config']][row['seed']]
        of_seed[column][int(row['step'])] = float(row[column])
  return found


def summarize(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
  """{config: held-out accuracy at the ends, steps to the target by seed}."""
  results = {}
  for config, seeds in curves(rows).items():
    accuracy = [columns['eval/avg@8'] for columns in seeds.values()]
    before = [curve[min(curve)] for curve in accuracy]
    after = [curve[max(curve)] for curve in accuracy]
    results[config] = {
        'seeds': len(seeds),
        'before': float(np.mean(before)),
        'after': float(np.mean(after)),
        'after_min': min(after),
        'after_max': max(after),
        'steps_to_target': [
            min((s for s, x in curve.items() if x >= TARGET), default=None)
            for curve in accuracy
        ],
    }
  return results


def main(_):
  command.measure(
      jobs(options.given('seeds'), options.given('methods')),
      command_of,
      HERE / options.given('file'),
      summarize=summarize,
  )


if __name__ == '__main__':
  app.run(main)
