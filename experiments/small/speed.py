"""How fast are runs side by side? Seconds of a step for each of them.

    python experiments/small/speed.py                 # on all cores
    taskset -c 0 python experiments/small/speed.py    # on one

Prints a JSON object on the last line.
"""

import functools
import json
import pathlib
import sys
import time

from absl import app
from absl import flags
import jax
import numpy as np

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from benchmarks import machine
from dppo_jax import training
from dppo_jax.backlog import Backlog
from experiments.lib import cells

_STEPS = flags.DEFINE_integer('steps', 10, 'That are timed.')
_RUNS = flags.DEFINE_integer('runs', 5, 'Side by side.')
_EPOCHS = flags.DEFINE_integer('epochs', 4, 'Passes over each rollout.')


def seconds(number, how):
  """Of making and compiling, and of a step for each run."""
  start = time.perf_counter()
  runs = cells.together([
      cells.make_cell(
          '', '', 'dppo_binary_tv', seed, learner__num_epochs=_EPOCHS.value
      )
      for seed in range(number)
  ], how)
  state, backlog = runs.state, Backlog(functools.partial(cells.score, runs))
  runs = runs._replace(state=None)
  batch = next(runs.prompts)
  state, rollout, _ = runs.train_step(state, runs.blank, batch.prompts)
  state = training.fill(
      runs.config, runs, state, runs.blank, backlog, rollout, batch
  )
  begun, times, of_cpu = time.perf_counter() - start, [], []
  for _ in range(_STEPS.value):
    start, cpu = time.perf_counter(), time.process_time()
    batch = next(runs.prompts)
    state, rollout, _ = runs.train_step(state, backlog.pop(), batch.prompts)
    backlog.push(rollout, batch)
    backlog.score()
    times.append((time.perf_counter() - start) / number)
    of_cpu.append((time.process_time() - cpu) / number)
  return {
      'begin_s': round(begun, 2),
      'step_s': round(float(np.median(times)), 4),
      # Of all threads; beside other programs the better measure on one core.
      'step_cpu_s': round(float(np.median(of_cpu)), 4),
  }


def main(_):
  jax.config.update('jax_enable_compilation_cache', False)
  print(json.dumps({
      'alone': seconds(1, 'map'),
      'map': seconds(_RUNS.value, 'map'),
      'vmap': seconds(_RUNS.value, 'vmap'),
      'machine': machine.describe(),
  }))


if __name__ == '__main__':
  app.run(main)
