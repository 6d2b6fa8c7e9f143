"""How far decoding and learning are from what the machine could do.

    python benchmarks/floor.py --name=floor-small

The floor of a piece of work is the larger of its operations at the rate of a
large matrix product and its bytes at the bandwidth of a large array, both
measured in the same process, in turns with the work: of the fastest of a few
calls, and sustained, of calls one after the other for about as long as the work
takes. On a machine that is shared, a tenth of a second can be luckier than
several seconds ever are. Completions are all of the same length. Counted are
products with weights, the head where a token was sampled, and scores and sums
of visible pairs; as bytes of a decode step the weights and the keys and values
that are visible, once.
"""

import math
import operator
import pathlib
import sys
from typing import NamedTuple

# benchmarks/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

# ruff: noqa: E402
from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import learner as learner_lib
from benchmarks import machine
from benchmarks import shapes
from dppo_jax import sampling

_SIDE, _BYTES = 2048, 2**29  # Of the matrix product, of the array.
_SECONDS = 3.0  # Of calls that a sustained rate is measured by, at least.

FLAGS = flags.FLAGS


class Rates(NamedTuple):
  """Operations and bytes a second of large arrays."""

  flops: float
  bandwidth: float


def rates() -> tuple[Rates, Rates]:
  """Of the fastest of a few calls, and of many one after the other.

  The array is written in place: the pages of a new one cost ten times as much
  as what is written to them.
  """
  a = jnp.ones((_SIDE, _SIDE))
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = [jnp.ones(_BYTES // 4)]

  def again():
    x[0] = add(x[0])
    return x[0]

  multiply = jax.jit(jnp.matmul)
  done = 2 * _SIDE**3, 2 * _BYTES
  seconds = zip(
      _seconds_of(lambda: multiply(a, a)), _seconds_of(again), strict=True
  )
  fastest, sustained = (Rates(*map(operator.truediv, done, x)) for x in seconds)
  return fastest, sustained


def _seconds_of(call) -> tuple[float, float]:
  """Of the fastest call, and of one of many, in the faster of two rounds."""
  fastest = machine.best_of(call)
  count = math.ceil(_SECONDS / fastest)

  def many():
    for _ in range(count):
      jax.block_until_ready(call())

  return fastest, machine.best_of(many, rounds=2) / count


def make_decode(model, batch_prompts, group):
  """(seconds of a decode step, operations, bytes), when called."""
  config = model.config
  params, prompts, key = shapes.make_inputs(model, batch_prompts)
  rows = batch_prompts * group
  keys = sampling.row_keys(key, rows)
  # Far apart: what a time varies by is divided by the steps between them.
  long, short = FLAGS.length, max(FLAGS.length // 8, 1)

  def compile_for(length):
    return jax.jit(sampling.make_sampler(
        model, group_size=group, max_completion_length=length,
        eos_ids=(shapes.end_id(0),), pad_id=shapes.PAD_ID, temperature=1.0,
        num_stages=FLAGS.stages,
    ))

  samplers = {length: compile_for(length) for length in (long, short)}
  # What is visible in the steps that the two differ by, prompt included.
  own = (long + short) / 2
  pairs = rows * (shapes.PROMPT_LENGTH + own)
  kept = batch_prompts * shapes.PROMPT_LENGTH + rows * own
  kv = 2 * config.num_key_value_heads * config.head_dim
  weights = sum(x.size for x in jax.tree.leaves(params))
  work = (
      shapes.operations(config, rows, rows, pairs),
      4 * (weights + config.num_hidden_layers * kv * kept),
  )

  def measure():
    seconds = [
        machine.best_of(samplers[x], params, prompts, keys, rounds=2)
        for x in (long, short)
    ]
    return (seconds[0] - seconds[1]) / (long - short), *work

  return measure


def make_learn(model):
  """(seconds of an update, operations, 0 bytes), when called."""
  config = model.config
  programs, state, scored, key = learner_lib.make_programs(
      model, [(0, FLAGS.microbatches_of_floor)], mean=0
  )
  [program] = programs.values()
  rows, length = scored.rollout.token_mask.shape
  forward = shapes.operations(
      config, rows * length, rows * FLAGS.length,
      rows * length * (length + 1) / 2,
  )
  return lambda: (
      machine.best_of(program, state, scored, key, rounds=2), 3 * forward, 0
  )


def measure() -> list[dict]:
  model = shapes.make_model(FLAGS.size, mean=0)
  decode = make_decode(model, FLAGS.prompts, FLAGS.group)
  learn = make_learn(model)
  found = {'decode': [], 'learn': []}
  for _ in range(FLAGS.rounds):
    fastest, sustained = rates()
    for name, work in (('decode', decode), ('learn', learn)):
      seconds, flops, moved = work()
      floors = [
          max(flops / x.flops, moved / x.bandwidth)
          for x in (fastest, sustained)
      ]
      found[name].append((seconds, *floors, *fastest, *sustained))
  rows = []
  for name, values in found.items():
    seconds, floors, of_sustained, *measured = np.array(values).T
    names = 'flops', 'bandwidth', 'sustained_flops', 'sustained_bandwidth'
    rows.append({
        'work': name,
        'seconds': machine.spread(seconds),
        'floor_seconds': machine.spread(floors),
        'over_floor': machine.spread(seconds / floors),
        'over_sustained': machine.spread(seconds / of_sustained),
        **dict(zip(names, map(machine.spread, measured), strict=True)),
    })
  return rows


def main(_):
  result = {
      'benchmark': 'floor',
      'sizes': {
          'model': FLAGS.size, 'prompts': FLAGS.prompts, 'group': FLAGS.group,
          'prompt_length': shapes.PROMPT_LENGTH, 'length': FLAGS.length,
          'stages': FLAGS.stages,
      },
      'rows': measure(),
      'machine': machine.describe(),
  }
  machine.report(result, FLAGS.name)


if __name__ == '__main__':
  flags.DEFINE_integer(
      'microbatches_of_floor', 4, 'Parts of the update.', lower_bound=1
  )
  flags.DEFINE_integer('stages', 4, 'Sizes of the cache.', lower_bound=1)
  FLAGS.set_default('size', 'small')
  FLAGS.set_default('prompts', 16)
  FLAGS.set_default('rounds', 7)
  app.run(main)
