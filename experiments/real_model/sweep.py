"""Runs the sweep of the real model and writes `runs.csv`; see README.md.

    python experiments/real_model/sweep.py --runs=runs/real_model

Each run is a process of its own, with a command that a user would type, on one
core. What is in the file is not run again, so the sweep may be stopped and
started. The work directories stay: `python -m dppo_jax.report` compares them.
"""

import functools
import pathlib
import sys
import time
from typing import NamedTuple

from absl import app
from absl import flags

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from benchmarks import machine
from dppo_jax import metrics
from experiments.lib import command
from experiments.lib import pool
from experiments.lib import stability
from experiments.lib import table

_RUNS = flags.DEFINE_string('runs', 'runs/real_model', 'Where the runs go.')
_WORKERS = flags.DEFINE_integer('workers', 2, 'Runs at a time.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Of the runs.')
_RATES = flags.DEFINE_list('rates', ['5e-4'], 'Learning rates.')
_METHODS = flags.DEFINE_list('methods', [], 'Only these; all if empty.')
_FILE = flags.DEFINE_string('file', 'runs.csv', 'In the folder of the sweep.')

HERE = pathlib.Path(__file__).parent
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


def run(jobs, runs):
  """Runs a single job; its steps as rows."""
  [job] = jobs
  workdir = runs / f'{METHODS[job.method]}-{job.setting}-{job.seed}'
  flags_ = COMMON | {'optimizer.learning_rate': job.setting, 'seed': job.seed}
  command.train(
      f'configs/smollm2_arithmetic.py:{METHODS[job.method]}',
      flags_,
      workdir,
      log=pathlib.Path(f'{workdir}.log'),
  )
  pool.tick(1)
  return [
      job._asdict()
      | {'step': row['step']}
      | {name: table.short(row.get(key, '')) for name, key in COLUMNS.items()}
      for row in metrics.read(workdir)
  ]


def main(_):
  start = time.perf_counter()
  for name in _METHODS.value:
    if name not in METHODS:
      raise app.UsageError(
          f'--methods has {name!r}, which is none of {", ".join(METHODS)}.'
      )
  runs = pathlib.Path(_RUNS.value)
  runs.mkdir(parents=True, exist_ok=True)
  path = HERE / _FILE.value
  pool.run_missing(
      [
          [Job(rate, method, seed)]
          for rate in _RATES.value
          for seed in _SEEDS.value
          for method in _METHODS.value or METHODS
      ],
      functools.partial(run, runs=runs),
      path,
      workers=_WORKERS.value,
  )
  evaluated = [row for row in table.read(path) if row['accuracy']]
  table.write_summary(path.with_suffix('.json'), {
      'machine': machine.describe(),
      'seconds_of_this_call': time.perf_counter() - start,
      'results': stability.summarize(evaluated),
  })


if __name__ == '__main__':
  app.run(main)
