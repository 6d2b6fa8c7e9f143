"""What slots save when completions differ in length.

    python benchmarks/rollout.py --slots=16,32,64,128 --name=rollout-tiny

The same completions, token for token, by the loop that ends with the longest
and by loops with fewer slots, which take the next of the queue when a
completion ends, and are halved as the last ones do. Lengths are geometric: a
Llama with random weights whose end token has probability 1 / mean everywhere.
Runs alternate with the loop that takes all at once, A B A C; a ratio is the
median over rounds of A over the run after it, so above 1 is faster.
"""

import itertools
import pathlib
import sys
import time

# benchmarks/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

# ruff: noqa: E402
from absl import app
from absl import flags
import jax
import numpy as np

from benchmarks import machine
from benchmarks import shapes
from benchmarks.peers import work
from dppo_jax import sampling

_SIZE = flags.DEFINE_enum('size', 'tiny', list(work.SIZES), 'Of the model.')
_PROMPTS = flags.DEFINE_integer('prompts', 64, 'Prompts of 32 tokens.')
_GROUP = flags.DEFINE_integer('group', 8, 'Completions of each.')
_LENGTH = flags.DEFINE_integer('length', 64, 'Longest completion.')
_MEAN = flags.DEFINE_float('mean', 16.0, 'Mean length before it is cut.')
_SLOTS = flags.DEFINE_list('slots', ['32', '64', '128'], 'Numbers of slots.')
_HALVINGS = flags.DEFINE_list(
    'halvings', ['0', '3'], 'How often slots are halved, with each number.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Runs of each.', lower_bound=1)
_NAME = flags.DEFINE_string('name', None, 'Keeps the result under it.')


def measure() -> dict:
  """One row for each number of slots and of halvings."""
  model = shapes.make_model(_SIZE.value, mean=_MEAN.value)
  params, prompts, key = shapes.make_inputs(model, _PROMPTS.value)
  batch = _PROMPTS.value * _GROUP.value
  keys = sampling.row_keys(key, batch)

  def compile_for(num_slots, num_halvings):
    sampler = sampling.make_sampler(
        model, group_size=_GROUP.value, max_completion_length=_LENGTH.value,
        eos_ids=(shapes.end_id(_MEAN.value),), pad_id=shapes.PAD_ID,
        temperature=1.0, num_slots=num_slots, num_halvings=num_halvings,
    )
    return jax.jit(sampler).lower(params, prompts, keys).compile()

  def run(program):
    start = time.perf_counter()
    out = jax.block_until_ready(program(params, prompts, keys))
    return time.perf_counter() - start, out

  at_once = 0, 0
  settings = [at_once, *itertools.product(
      map(int, _SLOTS.value), map(int, _HALVINGS.value)
  )]
  programs = {setting: compile_for(*setting) for setting in settings}
  outputs = {setting: run(program)[1] for setting, program in programs.items()}
  lengths = np.asarray(outputs[at_once].mask.sum(-1))
  rows = []
  for setting, program in programs.items():
    out = outputs[setting]
    np.testing.assert_array_equal(out.tokens, outputs[at_once].tokens)
    pairs = np.array([
        (run(programs[at_once])[0], run(program)[0])
        for _ in range(_ROUNDS.value)
    ])
    slots, halvings = setting
    rows.append({
        'slots': slots or batch,
        'halvings': halvings,
        'seconds': machine.spread(pairs[:, 1]),
        'speedup': machine.spread(pairs[:, 0] / pairs[:, 1]),
        'model_calls': int(out.num_steps),
        'temporary_bytes': program.memory_analysis().temp_size_in_bytes,
    })
  return {
      'tokens': int(lengths.sum()),
      'mean_length': round(float(lengths.mean()), 2),
      'longest': int(lengths.max()),
      'rows': rows,
  }


def main(_):
  result = {
      'benchmark': 'rollout',
      'sizes': {
          'model': _SIZE.value, 'prompts': _PROMPTS.value,
          'group': _GROUP.value, 'prompt_length': shapes.PROMPT_LENGTH,
          'length': _LENGTH.value, 'mean': _MEAN.value,
      },
      **measure(),
      'machine': machine.describe(),
  }
  machine.report(result, _NAME.value)


if __name__ == '__main__':
  app.run(main)
