"""What packed rows and shared prompts save in the learner.

    python benchmarks/learner.py --name=learner-tiny

One update from the completions that rollout.py draws, of geometric length or of
a fixed one, by rows as they were sampled, by packed ones, and with --shared by
rows with a prompt for its group. Runs alternate with the fastest of the rows as
sampled, A B A C; a ratio is the median over rounds of A over the run after it,
so above 1 is faster. Parameters after the update agree, or the benchmark fails.
"""

import pathlib
import sys
import time
import types

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
from configs import default
from dppo_jax import main as main_lib
from dppo_jax import program as program_lib
from dppo_jax import sharding
from dppo_jax.types import ScoredRollout

_SIZE = flags.DEFINE_enum('size', 'tiny', list(work.SIZES), 'Of the model.')
_PROMPTS = flags.DEFINE_integer('prompts', 64, 'Prompts of 32 tokens.')
_GROUP = flags.DEFINE_integer('group', 8, 'Completions of each.')
_LENGTH = flags.DEFINE_integer('length', 64, 'Longest completion.')
_MEAN = flags.DEFINE_float(
    'mean', 16.0, 'Mean length before it is cut; 0: fixed.'
)
_MICRO = flags.DEFINE_list('microbatches', ['4', '16'], 'As sampled.')
_PACKED = flags.DEFINE_list(
    'packed', ['192:32', '256:32'], 'Row lengths and micro-batches.'
)
_SHARED = flags.DEFINE_list(
    'shared', [], 'Micro-batches of rows that share their prompt.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Runs of each.', lower_bound=1)
_NAME = flags.DEFINE_string('name', None, 'Keeps the result under it.')


def make_config(
    row_length: int, num_microbatches: int, share_prompts: bool = False
):
  """GRPO with one update for each rollout."""
  config = default.get_config('grpo')
  config.num_prompts, config.group_size = _PROMPTS.value, _GROUP.value
  config.max_prompt_length = shapes.PROMPT_LENGTH
  config.max_completion_length = _LENGTH.value
  config.sampling.num_slots = min(64, _PROMPTS.value * _GROUP.value)
  config.learner.num_minibatches = 1
  config.learner.num_microbatches = num_microbatches
  config.learner.row_length = row_length
  config.learner.share_prompts = share_prompts
  return config


def make_programs(model, layouts, *, mean: float):
  """What learns in each layout, and what they are called with."""
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, expert=1)
  tokenizer = types.SimpleNamespace(
      eos_token_id=shapes.end_id(mean), pad_token_id=shapes.PAD_ID
  )

  def make_program(layout):
    config = make_config(*layout)
    return program_lib.make_program(
        config, mesh, main_lib.make_method(config), model, tokenizer
    )

  first = make_program(layouts[0])
  key = jax.random.key(0)
  params, prompts, draw_key = shapes.make_inputs(model, _PROMPTS.value)
  state = first.init(params, key, key)
  rollout, _ = jax.jit(first.rollout_fn)(state.params, prompts, draw_key, 0)
  rewards = jax.random.bernoulli(key, 0.5, rollout.truncated.shape)
  scored = ScoredRollout(rollout, rewards.astype(jnp.float32))
  programs = {
      layout: jax.jit(make_program(layout).learn)
      .lower(state, scored, key).compile()
      for layout in layouts
  }
  return programs, state, scored, key


def measure() -> dict:
  """One row for each layout."""
  model = shapes.make_model(_SIZE.value, mean=_MEAN.value)
  # Options of `make_config`.
  layouts = [(0, int(x)) for x in _MICRO.value]
  layouts += [(0, int(x), True) for x in _SHARED.value]
  layouts += [tuple(map(int, x.split(':'))) for x in _PACKED.value]
  programs, state, scored, key = make_programs(
      model, layouts, mean=_MEAN.value
  )

  def run(layout):
    start = time.perf_counter()
    out = jax.block_until_ready(programs[layout](state, scored, key))
    return time.perf_counter() - start, out

  outputs = {layout: run(layout)[1] for layout in layouts}
  for new, _, _ in outputs.values():
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-3),
        new.params, outputs[layouts[0]][0].params,
    )
  best = min(layouts[: len(_MICRO.value)], key=lambda x: run(x)[0])
  rows = []
  for layout in layouts:
    pairs = np.array([
        (run(best)[0], run(layout)[0]) for _ in range(_ROUNDS.value)
    ])
    _, _, metrics = outputs[layout]
    rows.append({
        'row_length': layout[0],
        'share_prompts': len(layout) == 3,
        'num_microbatches': layout[1],
        'microbatches_run': int(metrics['learner/microbatches'][0]),
        'sampled_share': float(metrics['learner/sampled_share'][0]),
        'seconds': machine.spread(pairs[:, 1]),
        'speedup': machine.spread(pairs[:, 0] / pairs[:, 1]),
        'temporary_bytes': (
            programs[layout].memory_analysis().temp_size_in_bytes
        ),
    })
  lengths = np.asarray(scored.rollout.token_mask.sum(-1))
  return {
      'tokens': int(lengths.sum()),
      'mean_length': round(float(lengths.mean()), 2),
      'rows': rows,
  }


def main(_):
  result = {
      'benchmark': 'learner',
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
