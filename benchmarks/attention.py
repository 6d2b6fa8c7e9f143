"""What attention among packed rows saves by not looking further than it must.

    python benchmarks/attention.py --name=attention

Forward and backward pass of the attention of all layers, scanned, over rows
that hold completions of geometric length behind their prompts: by the products
of whole rows (`attention.in_xla`) and by stretches that walk back over what
they see (`packed_attention`), for each pair of sizes given. Runs alternate with
the whole rows, A B A C; a ratio is the median over rounds of A over the run
after it, so above 1 is faster. Gradients agree, or the benchmark fails.
"""

import pathlib
import sys
import time

# benchmarks/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

# ruff: noqa: E402
from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks import shapes
from benchmarks.peers import work
from dppo_jax import packing
from dppo_jax.models import attention
from dppo_jax.models import packed_attention
from dppo_jax.types import Rows

_SIZE = flags.DEFINE_enum('size', 'small', list(work.SIZES), 'Of the model.')
_PROMPTS = flags.DEFINE_integer('prompts', 16, 'Prompts of 32 tokens.')
_GROUP = flags.DEFINE_integer('group', 8, 'Completions of each.')
_LENGTH = flags.DEFINE_integer('length', 64, 'Longest completion.')
_MEAN = flags.DEFINE_float('mean', 16.0, 'Mean length before it is cut.')
_ROWS = flags.DEFINE_list('rows', ['640', '1280'], 'Row lengths.')
_CUTS = flags.DEFINE_list(
    'cuts', ['64:1:32', '64:2:32', '128:1:32'],
    'Slots of a stretch, how many before it are met at once, farthest slots.',
)
_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Runs of each.', lower_bound=1)
_NAME = flags.DEFINE_string('name', None, 'Keeps the result under it.')


def make_row(row_length: int) -> attention.Where:
  """The first row that completions of these lengths are packed in."""
  before = shapes.PROMPT_LENGTH
  batch, slots = _PROMPTS.value * _GROUP.value, before + _LENGTH.value - 1
  lengths = np.random.RandomState(0).geometric(1 / _MEAN.value, batch)
  lengths = np.minimum(lengths, _LENGTH.value)
  sampled = np.arange(slots) - (before - 1)
  mask = (sampled >= 0) & (sampled < lengths[:, None])
  segments = (mask | (sampled < 0)).astype(np.int32)
  positions = np.broadcast_to(np.arange(slots), mask.shape)
  rows = Rows(
      inputs=segments, targets=segments, positions=positions,
      input_segments=segments, target_segments=segments, token_mask=mask,
  )
  rows = jax.tree.map(jnp.asarray, rows)
  layout = packing.make_packed(
      row_length=row_length, prompt_length=before, group_size=_GROUP.value
  )(rows, jnp.arange(batch), batch)
  [row] = packing.take(layout, 0, rows)
  return attention.Where(
      row.input_segments, row.positions, row.prompt_segments
  )


def make_program(row_attention: attention.RowAttention, where):
  """The gradient of a sum of what all layers attend to."""
  depth, _, heads, key_heads, *_ = work.SIZES[_SIZE.value]
  size = shapes.architecture(work.SIZES[_SIZE.value]).head_dim
  real = (where.segment_ids > 0)[..., None, None]

  def total(q, k, v, weights, where):
    [sight], attend_with = row_attention(
        where, [None], scale=size**-0.5, cap=None
    )

    def layer(sums, scanned):
      *inputs, weights = scanned
      out, _ = attend_with(sight)(*inputs)
      return sums + jnp.sum(jnp.where(real, out, 0.0) * weights), None

    return jax.lax.scan(layer, 0.0, (q, k, v, weights))[0]

  keys = jax.random.split(jax.random.key(0), 4)
  inputs = [
      jax.random.normal(key, (depth, *where.segment_ids.shape, count, size))
      for key, count in zip(keys, (heads, key_heads, key_heads, heads))
  ]
  gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
  return gradient.lower(*inputs, where).compile(), (*inputs, where)


def measure(row_length: int) -> list[dict]:
  """One row for each way to attend."""
  where = make_row(row_length)
  ways = {'whole rows': attention.in_xla()} | {
      cut: packed_attention.in_stretches(
          packed_attention.Sizes(*map(int, cut.split(':')))
      ) for cut in _CUTS.value
  }
  programs = {name: make_program(way, where) for name, way in ways.items()}

  def run(name):
    program, inputs = programs[name]
    start = time.perf_counter()
    out = jax.block_until_ready(program(*inputs))
    return time.perf_counter() - start, out

  outputs = {name: run(name)[1] for name in ways}
  rows = []
  for name in ways:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-3),
        outputs[name], outputs['whole rows'],
    )
    pairs = np.array([
        (run('whole rows')[0], run(name)[0]) for _ in range(_ROUNDS.value)
    ])
    rows.append({
        'row_length': row_length,
        'cut': name,
        'seconds': machine.spread(pairs[:, 1]),
        'speedup': machine.spread(pairs[:, 0] / pairs[:, 1]),
        'temporary_bytes': (
            programs[name][0].memory_analysis().temp_size_in_bytes
        ),
    })
    print(rows[-1], flush=True)
  return rows


def main(_):
  result = {
      'benchmark': 'attention',
      'sizes': {
          'model': _SIZE.value, 'prompts': _PROMPTS.value,
          'group': _GROUP.value, 'prompt_length': shapes.PROMPT_LENGTH,
          'length': _LENGTH.value, 'mean': _MEAN.value,
      },
      'rows': [row for x in _ROWS.value for row in measure(int(x))],
      'machine': machine.describe(),
  }
  machine.report(result, _NAME.value)


if __name__ == '__main__':
  app.run(main)
