"""A step of dppo_jax: the very program that a run compiles.

    python benchmarks/peers/ours.py --size=tiny --lengths=geometric \
        --microbatches=8,16 --row_lengths=256,512 --slots=32,64 --halvings=3

One call learns from a rollout and samples the next; rewards are computed on the
host between two calls, as `dppo_jax.main` does it. Rows as sampled share the
prompt of their group, so a micro-batch is one group at least; with packed rows
it is as large as its completions would be at their longest.
"""

import argparse
import itertools
import pathlib
import sys
import types

# benchmarks/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
import jax
import numpy as np

from benchmarks import shapes
from benchmarks.peers import work
from configs import default
from dppo_jax import checks
from dppo_jax import main as main_lib
from dppo_jax import memory
from dppo_jax import program as program_lib
from dppo_jax import sharding
from dppo_jax import train_step as train_step_lib
from dppo_jax.models import llama
from dppo_jax.types import Prompts
from dppo_jax.types import ScoredRollout


def make_config(
    args: argparse.Namespace,
    *,
    microbatch: int,
    row_length: int,
    slots: int,
    halvings: int,
    part_halvings: int,
    halving_steps: int,
    reuse: int,
    chunk_size: int,
    unroll: int,
):
  """The algorithm, GRPO for the agreed work, with the sizes of `work`."""
  config = default.get_config(args.algorithm)
  config.update_from_flattened_dict({
      'total_steps': 1 + args.warmup + args.steps,
      'num_prompts': work.NUM_PROMPTS,
      'group_size': work.GROUP_SIZE,
      'max_prompt_length': work.PROMPT_LENGTH,
      'max_completion_length': work.MAX_LENGTH,
      'sampling.num_slots': slots,
      'sampling.num_halvings': halvings,
      'learner.num_minibatches': 1,
      'learner.num_microbatches': work.BATCH // microbatch,
      'learner.row_length': row_length,
      'learner.num_halvings': part_halvings if row_length else 0,
      **{
          f'{section}.halving_steps': halving_steps
          for section, halved in (
              ('sampling', halvings), ('learner', row_length and part_halvings)
          ) if halved
      },
      'learner.share_prompts': not row_length,
      'learner.reuse_forward': bool(reuse),
      'learner.chunk_size': chunk_size,
      'model.unroll_layers': bool(unroll),
      'optimizer.learning_rate': work.LEARNING_RATE,
      'optimizer.schedule': 'constant',
      'optimizer.weight_decay': work.WEIGHT_DECAY,
      'optimizer.max_grad_norm': work.MAX_GRAD_NORM,
  })
  checks.check(config, num_batch_shards=1)
  return config


class Run:
  """Steps of one setting; the first compiles, samples, and learns nothing."""

  def __init__(self, args: argparse.Namespace, **setting):
    config = make_config(args, **setting)
    size = work.SIZES[args.size]
    model = shapes.Stopping(
        shapes.architecture(size), llama, stop=work.STOP[args.lengths],
        unrolls_layers=config.model.unroll_layers,
    )
    mesh = sharding.make_mesh(**config.mesh)
    self._rows = sharding.batch(mesh)
    program = program_lib.make_program(
        config, mesh, main_lib.make_method(config), model,
        types.SimpleNamespace(
            eos_token_id=work.EOS_ID, pad_token_id=work.PAD_ID
        ),
    )
    tokens = work.make_prompts(size.vocab)
    self._prompts = Prompts(tokens, np.ones(tokens.shape, bool))
    key_params, key_state, key_adapters = jax.random.split(
        jax.random.key(args.seed), 3
    )
    self._state = jax.jit(program.init, out_shardings=program.shardings)(
        model.init(key_params), key_state, key_adapters
    )
    self._scored = jax.device_put(
        train_step_lib.blank(program.rollout_fn, self._state, self._prompts),
        self._rows,
    )
    self._train_step = program.train_step
    self._num_updates = 0

  def step(self) -> np.ndarray:
    """Learns and samples; the lengths of what was sampled, [B]."""
    self._state, rollout, metrics = self._train_step(
        self._state, self._scored, self._prompts
    )
    tokens, mask = jax.device_get((rollout.tokens[:, 1:], rollout.token_mask))
    rewards = np.float32(
        [work.reward(t[m]) for t, m in zip(tokens, mask, strict=True)]
    )
    self._scored = ScoredRollout(rollout, jax.device_put(rewards, self._rows))
    jax.device_get(metrics)
    assert int(self._state.step) == self._num_updates, self._state.step
    assert self._train_step._cache_size() == 1, 'compiled more than once'
    self._num_updates += 1
    return mask.sum(-1)

  def memory(self) -> dict[str, int]:
    """Bytes that the compiled step needs, by kind."""
    return memory.of_step(
        self._train_step.lower(
            self._state, self._scored, self._prompts
        ).compile()
    )


def run(args: argparse.Namespace, **setting) -> work.Steps:
  """Steps of one setting, the warm-up first."""
  own = Run(args, **setting)
  steps = work.Steps()
  steps.mark()
  for _ in range(1 + args.warmup + args.steps):
    steps.drew(own.step())
    steps.mark()
  return steps


def parser() -> argparse.ArgumentParser:
  """Of the flags, those of all three scripts first."""
  flags = work.parser(__doc__)
  flags.add_argument(
      '--algorithm', default='grpo',
      help='Of a step by itself (turns.py): one that peers do not have.',
  )
  flags.add_argument(
      '--row_lengths', type=work.integers, default=[0, 256],
      help='config.learner.row_length, to try one by one; 0 shares prompts.',
  )
  flags.add_argument(
      '--slots', type=work.integers, default=[0],
      help='config.sampling.num_slots, to try one by one.',
  )
  flags.add_argument(
      '--halvings', type=work.integers, default=[0],
      help='config.sampling.num_halvings, to try one by one.',
  )
  flags.add_argument(
      '--part_halvings', type=work.integers, default=[0],
      help='config.learner.num_halvings, to try one by one; of packed rows.',
  )
  flags.add_argument(
      '--halving_steps', type=work.integers, default=[1],
      help='To each half, of slots and of packed rows, to try one by one.',
  )
  flags.add_argument(
      '--reuses', type=work.integers, default=[0],
      help='config.learner.reuse_forward, to try one by one: 0 or 1.',
  )
  flags.add_argument(
      '--chunk_sizes', type=work.integers, default=[0],
      help='config.learner.chunk_size, to try one by one.',
  )
  flags.add_argument(
      '--unrolls', type=work.integers, default=[0],
      help='config.model.unroll_layers, to try one by one: 0 or 1.',
  )
  return flags


def settings(args: argparse.Namespace) -> list[dict[str, int]]:
  """All that the flags ask to try."""
  tried = {
      'microbatch': args.microbatches,
      'row_length': args.row_lengths,
      'slots': args.slots,
      'halvings': args.halvings,
      'part_halvings': args.part_halvings,
      'halving_steps': args.halving_steps,
      'reuse': args.reuses,
      'chunk_size': args.chunk_sizes,
      'unroll': args.unrolls,
  }
  return [
      dict(zip(tried, values)) for values in itertools.product(*tried.values())
  ]


def main():
  flags = parser()
  args = flags.parse_args()
  if args.algorithm != 'grpo':
    flags.error('The peers have no other algorithm than grpo.')
  work.measure(
      'dppo_jax', args, settings(args), run,
      ('jax', 'jaxlib', 'flax', 'optax', 'numpy'),
  )


if __name__ == '__main__':
  main()
