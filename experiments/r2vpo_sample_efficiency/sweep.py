"""Runs the sweep and writes `rates.csv` and `runs.csv`; see README.md.

    python experiments/r2vpo_sample_efficiency/sweep.py

First a grid of learning rates for every method, on seeds that are not used
again; then, at each method's best rate, every staleness on the seeds of the
results. What is in the two files is not run again, so the sweep may be stopped
and started.
"""

import collections
from collections.abc import Mapping, Sequence
import pathlib
import sys
from typing import Any, NamedTuple

from absl import app
from absl import flags
import numpy as np

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.lib import command
from experiments.lib import options
from experiments.lib import table

options.define('seeds', 'methods')
_STALENESS = flags.DEFINE_list(
    'staleness', ['0', '4', '16'], 'Steps between sampling and learning.'
)

HERE = pathlib.Path(__file__).parent
RATES, RUNS = HERE / 'rates.csv', HERE / 'runs.csv'
LEARNING_RATES = ('1.5e-4', '3e-4', '6e-4')
GRID_SEEDS = ('100', '101')
SEEDS = ('0', '1', '2', '3', '4')
TARGET = 0.9
COLUMNS = {
    'accuracy': 'eval/avg@4',
    'reward': 'reward/mean',
    'second_moment': 'ratio/second_moment',
    'mask_fraction': 'mask/fraction',
    'entropy': 'entropy/mean',
    'multiplier': 'dual/multiplier',
    'age_max': 'policy/age_max',
    'replay_age_max': 'replay/age_max',
    'replay_gradient_share': 'replay/gradient_share',
}

# A step learns from 128 completions, all of them fresh, in 2 updates; with
# replay, from 32 fresh and 96 replayed ones in 1 update. Staleness is given in
# steps of 2 updates.
COMMON = (
    'total_steps=80',
    'num_prompts=16',
    'group_size=8',
    'learner.num_minibatches=2',
    'optimizer.schedule=constant',
    'eval.every=5',
    'eval.num_samples=4',
    'checkpoint_every=1000',
    'tensorboard=False',
)
_REPLAY = (
    'num_prompts=4',
    'replay.ratio=3',
    'replay.capacity=32',
    'replay.max_age=64',
    'learner.num_minibatches=1',
    'total_steps=200',
    'eval.every=10',
)
METHODS = {
    'grpo': ('grpo', ()),
    'grpo_clip_higher': ('grpo_clip_higher', ()),
    'dppo_binary_tv': ('dppo_binary_tv', ()),
    'r2vpo': ('r2vpo', ()),
    'r2vpo_replay': ('r2vpo', _REPLAY),
}
# Where methods are compared under staleness, in rollouts: the last quarter of
# the stale runs, which have a third of the steps of the others.
ENDS = {method: (3840, 5120) for method in METHODS}
ENDS['r2vpo_replay'] = (2400, 3200)


class Job(NamedTuple):
  """One run."""

  method: str
  learning_rate: str
  staleness: str
  seed: str


def grid(methods):
  """Every method at every rate, on policy."""
  return [
      Job(method, rate, '0', seed)
      for seed in GRID_SEEDS
      for method in methods
      for rate in LEARNING_RATES
  ]


def final(best, methods):
  """Every method at its best rate; seeds one after the other."""
  return [
      Job(method, best[method], staleness, seed)
      for staleness in _STALENESS.value
      for seed in options.given('seeds') or SEEDS
      for method in methods
  ]


def command_of(job):
  """What a run is started with; its evaluations are kept."""
  algorithm, changes = METHODS[job.method]
  config = {
      **dict(change.split('=') for change in (*COMMON, *changes)),
      'optimizer.learning_rate': job.learning_rate,
      'seed': job.seed,
  }
  if int(job.staleness):  # Only the end matters.
    config['total_steps'] = int(config['total_steps']) // 2
    config['eval.every'] = 2 * int(config['eval.every'])
  elif job.seed not in GRID_SEEDS:
    config['total_steps'] = 3 * int(config['total_steps']) // 2
  updates = 2 * int(job.staleness)
  config['staleness'] = updates // int(config['learner.num_minibatches'])
  if 'replay.max_age' in config:
    # Replay looks back as far as without staleness, from older fresh data.
    config['replay.max_age'] = int(config['replay.max_age']) + updates
  return command.Command(
      config=f'configs/default.py:{algorithm}',
      flags=config,
      columns=COLUMNS,
      only='eval/avg@4',
      workdir_stays=False,
  )


def rollouts_per_step(job):
  """Completions sampled in a step."""
  config = dict(x.split('=') for x in (*COMMON, *METHODS[job.method][1]))
  return int(config['num_prompts']) * int(config['group_size'])


def curves(rows):
  """{Job: (rollouts, accuracy)} of rows, by rollouts."""
  points = collections.defaultdict(list)
  for row in rows:
    job = Job(*(row[x] for x in Job._fields))
    rollouts = int(row['step']) * rollouts_per_step(job)
    points[job].append((rollouts, float(row['accuracy'])))
  return {job: np.array(sorted(x)).T for job, x in points.items()}


def rollouts_to_target(curve, target=TARGET):
  """Where a curve first crosses the target, or inf."""
  rollouts, accuracy = curve
  above = np.flatnonzero(accuracy >= target)
  if not len(above):
    return np.inf
  if not (i := above[0]):
    return float(rollouts[0])
  share = (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
  return float(rollouts[i - 1] + share * (rollouts[i] - rollouts[i - 1]))


def accuracy_at_half(method, curve):
  """Held-out accuracy, averaged over the evaluations of `ENDS`."""
  rollouts, accuracy = curve
  first, last = ENDS[method]
  return float(accuracy[(rollouts >= first) & (rollouts <= last)].mean())


def summarize(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
  """{method: {learning rate: {staleness: numbers, one for each seed}}}."""
  results = {method: {} for method in METHODS}
  for job, curve in sorted(curves(rows).items()):
    ages = results[job.method].setdefault(job.learning_rate, {})
    of_age = ages.setdefault(
        job.staleness,
        {'seeds': [], 'rollouts_to_target': [], 'accuracy_at_half': []},
    )
    of_age['seeds'].append(job.seed)
    of_age['rollouts_to_target'].append(rollouts_to_target(curve))
    of_age['accuracy_at_half'].append(accuracy_at_half(job.method, curve))
  return results


def best_rates(rows):
  """The rate that needs fewest rollouts; where none arrives, the most exact.

  A run that does not arrive counts as one that needs all of its rollouts.
  """
  scores = collections.defaultdict(list)
  for job, curve in curves(rows).items():
    needed = min(rollouts_to_target(curve), curve[0][-1])
    accuracy = curve[1][-3:].mean()
    scores[job.method, job.learning_rate].append((needed, -accuracy))
  return {
      method: min(
          LEARNING_RATES,
          key=lambda rate: tuple(np.mean(scores[method, rate], axis=0)),
      )
      for method in sorted({method for method, _ in scores})
  }


def main(_):
  methods = options.chosen('methods', options.given('methods'), METHODS)
  command.measure(grid(methods), command_of, RATES, summarize=summarize)
  best = best_rates(table.read(RATES))
  print('Best learning rates:', best)
  command.measure(final(best, methods), command_of, RUNS, summarize=summarize)


if __name__ == '__main__':
  app.run(main)
