"""Runs the sweep of the real model and writes `runs.csv`; see README.md.

    python experiments/real_model/sweep.py

What is in the file is not run again, so the sweep may be stopped and started.
The work directories stay: `python -m dppo_jax.report` compares them.
"""

import pathlib
import sys
from typing import NamedTuple

from absl import app

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.lib import command
from experiments.lib import options
from experiments.lib import stability

options.define('seeds', 'methods', 'rates', 'file')

HERE = pathlib.Path(__file__).parent
SEEDS = ('0', '1', '2')
RATES = ('5e-4',)
METHODS = {
    'GRPO': 'grpo',
    'DPPO top-K TV': 'dppo_topk_tv',
    'R2VPO': 'r2vpo',
}
# Four updates for each rollout, so that trust regions have something to do, at
# a rate that does not fall, so that nothing else keeps the policy in place.
COMMON = {
    'total_steps': 12,
    'learner.num_minibatches': 2,
    'learner.num_epochs': 2,
    'learner.num_microbatches': 4,
    'learner.row_length': 128,
    'optimizer.schedule': 'constant',
    'eval.every': 4,
    'checkpoint_every': 1000,
    'tensorboard': False,
}
COLUMNS = {
    'accuracy': 'eval/avg@8',
    'pass': 'eval/pass@8',
    'reward': 'reward/mean',
    'gap_mean': 'mismatch/prob_gap_mean',
    'gap_max': 'mismatch/prob_gap_max',
    'gap_min': 'mismatch/prob_gap_min',
    'ratio_max': 'ratio/max',
    'masked': 'mask/fraction',
    'entropy': 'entropy/mean',
    'multiplier': 'dual/multiplier',
    'step_s': 'time/step_s',
}


class Job(NamedTuple):
  """One run."""

  setting: str  # Its learning rate.
  method: str
  seed: str


def jobs(seeds=(), methods=(), rates=()):
  """The runs of the results, or those of what is named."""
  return [
      Job(rate, method, seed)
      for rate in rates or RATES
      for seed in seeds or SEEDS
      for method in options.chosen('methods', methods, METHODS)
  ]


def command_of(job):
  """What a run is started with."""
  return command.Command(
      config=f'configs/smollm2_arithmetic.py:{METHODS[job.method]}',
      flags=COMMON
      | {'optimizer.learning_rate': job.setting, 'seed': job.seed},
      columns=COLUMNS,
  )


def summarize(rows):
  """Of the steps that were evaluated."""
  return stability.summarize([row for row in rows if row['accuracy']])


def main(_):
  command.measure(
      jobs(*map(options.given, ('seeds', 'methods', 'rates'))),
      command_of,
      HERE / options.given('file'),
      summarize=summarize,
  )


if __name__ == '__main__':
  app.run(main)
