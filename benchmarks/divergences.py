"""What each divergence and loss costs, relative to PPO's ratio clip.

    python benchmarks/divergences.py --name=divergences

For each one, two programs are timed. `learn` is the learner's head, forward and
backward, by the learner's own code: hidden states to chunks of logits to log-
probs, entropy and divergence, to trust region and loss, to the gradient of
hidden states and head. `sample` is what the sampler does with one chunk of
logits: draw, log-prob, record. The trunk is left out, so in a whole step every
ratio is nearer to 1. Runs alternate with the baseline, A B A C A D, and a ratio
is the median over rounds of the run and the baseline just before it. The row of
the baseline itself shows the noise. `step` adds both: all tokens sampled, chunk
by chunk, and learned from.

The defaults take about a minute on two CPU cores. A real size, ten minutes:

    python benchmarks/divergences.py --tokens=16384 --vocab=151936 --rounds=3 \
        --divergences=topk_tv --clock=cpu

and on an accelerator with --hidden=1024 --chunk=1024.
"""

import functools
import pathlib
import sys
import time
from typing import Any, NamedTuple

# benchmarks/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

# ruff: noqa: E402
from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from dppo_jax import divergences
from dppo_jax import losses
from dppo_jax import packing
from dppo_jax import sampling
from dppo_jax import target as target_lib
from dppo_jax.types import Divergence
from dppo_jax.types import is_by_token
from dppo_jax.types import LossFn
from dppo_jax.types import LossInputs
from dppo_jax.types import Rollout

_TOKENS = flags.DEFINE_integer('tokens', 1024, 'Tokens learned from.')
_VOCAB = flags.DEFINE_integer('vocab', 32768, 'Vocabulary.')
_HIDDEN = flags.DEFINE_integer('hidden', 64, 'Width of the hidden states.')
_CHUNK = flags.DEFINE_integer('chunk', 256, 'Tokens whose logits exist.')
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Runs of each.', lower_bound=1)
_ONLY = flags.DEFINE_list(
    'divergences', [], 'Only these beside the baseline; everything if empty.'
)
_RECORD_LIMIT = flags.DEFINE_float(
    'record_limit', 2.0, 'Skip what remembers more, in GB.'
)
_CLOCK = flags.DEFINE_enum(
    'clock', 'wall', ['wall', 'cpu'],
    "Seconds that passed, or seconds of all the process's threads: on CPU, the "
    'one that other programs do not disturb.',
)
_NAME = flags.DEFINE_string('name', None, 'Keeps the result under it.')

BASELINE = ('ratio_gap', 'policy_gradient')


class Head(NamedTuple):
  """A model of which only the head is left; what the learner needs of one."""

  by_tokens: None = None  # A single device.

  def trunk(self, params, tokens, **_):
    """Hidden states are parameters here, so they get a gradient too."""
    del tokens
    return params['hidden'][None], None  # [1, tokens, D]

  def head(self, params, hidden):
    """[..., D] -> [..., V]."""
    return hidden @ params['kernel']


class Programs(NamedTuple):
  """Both halves of one case, compiled, with their arguments."""

  learn: Any
  learn_arguments: Any
  sample: Any
  sample_arguments: Any
  temporary_bytes: int | None
  record_bytes: int


def cases() -> list[tuple[str, str]]:
  """Each divergence under the loss of the baseline, and each other loss."""
  divergence, loss = BASELINE
  return [(name, loss) for name in divergences.names()] + [
      (divergence, name) for name in losses.names() if name != loss
  ]


def make_learn(divergence: Divergence, loss_fn: LossFn, *, chunk: int):
  """Loss and its gradient from hidden states, as in the learner."""
  summed_loss = target_lib.make_summed_loss(
      Head(), divergence, by_token=is_by_token(loss_fn), temperature=1.0,
      chunk_size=chunk,
  )

  def token_loss(target, behaviour_logprobs, advantages, mask):
    region = divergences.trust_region(
        divergence=target.divergence,
        log_ratio=target.logprobs - behaviour_logprobs,
        advantages=advantages,
        threshold=divergence.threshold,
    )
    per_token, _ = loss_fn(
        LossInputs(
            logprobs=target.logprobs,
            behaviour_logprobs=behaviour_logprobs,
            divergence=target.divergence,
            trust_region=region,
            advantages=advantages,
            token_mask=mask,
            # A constrained loss asks for them.
            multiplier=jnp.float32(0.04),
            limit=0.02,
        )
    )
    return per_token, ()

  def loss(params, rollout, advantages):
    anchor = target_lib.Anchor(rollout.behaviour_logprobs, rollout.record)
    total, target, _ = summed_loss(
        token_loss, params, packing.rows_of(rollout), anchor,
        rollout.behaviour_logprobs, advantages, rollout.token_mask,
    )
    return total, jnp.mean(target.entropy)

  return jax.value_and_grad(loss, has_aux=True)


def make_sample(divergence: Divergence):
  """What the sampler does with logits [n, V]."""

  def sample(logits, key):
    keys = sampling.row_keys(key, len(logits))
    tokens = sampling.categorical(keys, logits)
    logprobs = divergences.token_logprobs(logits, tokens)
    return tokens, logprobs, divergence.record(logits, tokens)

  return sample


def make_params(key, *, tokens: int, vocab: int, width: int):
  """A target policy and a behaviour policy near it."""
  key_hidden, key_kernel, key_noise = jax.random.split(key, 3)
  hidden = jax.random.normal(key_hidden, (tokens, width))
  # Logits with standard deviation 3: some tokens likely, most not.
  kernel = jax.random.normal(key_kernel, (width, vocab)) * 3 / width**0.5
  noise = jax.random.normal(key_noise, hidden.shape)
  target = {'hidden': hidden, 'kernel': kernel}
  return target, target | {'hidden': hidden + 0.1 * noise}


@functools.partial(jax.jit, static_argnames=('sample', 'chunk'))
def roll_out(params, key, *, sample, chunk: int) -> Rollout:
  """[1, T] tokens of a behaviour policy, sampled chunk by chunk."""
  hidden = params['hidden'].reshape(-1, chunk, params['hidden'].shape[-1])
  keys = jax.random.split(key, len(hidden))
  sampled = jax.lax.map(
      lambda x: sample(x[0] @ params['kernel'], x[1]), (hidden, keys)
  )  # [chunks, chunk, ...]
  tokens, logprobs, record = jax.tree.map(
      lambda x: x.reshape(1, -1, *x.shape[2:]), sampled
  )
  padded = jnp.pad(tokens, [(0, 0), (1, 0)])
  return Rollout(
      tokens=padded,
      segment_ids=jnp.ones_like(padded),
      positions=jnp.arange(padded.size, dtype=jnp.int32)[None],
      token_mask=jnp.ones_like(tokens, bool),
      behaviour_logprobs=logprobs,
      record=record,
      policy_version=jnp.zeros(1, jnp.int32),
      truncated=jnp.zeros(1, bool),
  )


def prepare(case, target, behaviour, *, chunk: int) -> Programs:
  """Compiles a case and makes its arguments; the same for all cases."""
  divergence = divergences.build(case[0])
  key_sample, key_advantages = jax.random.split(jax.random.key(1))
  sample = make_sample(divergence)
  rollout = roll_out(behaviour, key_sample, sample=sample, chunk=chunk)
  advantages = jax.random.normal(key_advantages, rollout.token_mask.shape)
  arguments = (target, rollout, advantages)
  learn = jax.jit(make_learn(divergence, losses.build(case[1]), chunk=chunk))
  compiled = learn.lower(*arguments).compile()
  memory = compiled.memory_analysis()
  logits = behaviour['hidden'][:chunk] @ behaviour['kernel']
  return Programs(
      learn=compiled,
      learn_arguments=arguments,
      sample=jax.jit(sample),
      sample_arguments=(logits, key_sample),
      temporary_bytes=memory and int(memory.temp_size_in_bytes),
      record_bytes=sum(x.nbytes for x in jax.tree.leaves(rollout.record)),
  )


def record_bytes(case, *, tokens: int, vocab: int) -> int:
  """What a divergence would remember, without making it."""
  record = jax.eval_shape(
      divergences.build(case[0]).record,
      jax.ShapeDtypeStruct((tokens, vocab), jnp.float32),
      jax.ShapeDtypeStruct((tokens,), jnp.int32),
  )
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(record))


def compare(programs: dict, num_rounds: int, num_chunks: int):
  """Times of all cases, each run just after one of the baseline."""
  rows = {}
  # Of the same tokens learned from and sampled, without the trunk.
  steps = {case: 0.0 for case in programs}
  for half in ('learn', 'sample'):
    times = {case: [] for case in programs}
    for index in range(num_rounds + 1):
      for case, program in programs.items():
        pair = (_time(programs[BASELINE], half), _time(program, half))
        if index:  # The first round warms up.
          times[case].append(pair)
    for case, pairs in times.items():
      before, own = np.array(pairs).T
      runs = num_chunks if half == 'sample' else 1
      steps[case] += runs * np.median(pairs, axis=0)
      rows.setdefault(case, {}).update({
          f'{half}_s': machine.spread(own),
          f'{half}_ratio': machine.spread(own / before),
      })
  for case, (before, own) in steps.items():
    rows[case]['step_ratio'] = round(float(own / before), 3)
  return rows


def measure(
    *, tokens, vocab, width, chunk, num_rounds, record_limit, only=()
):
  """One row for each case; those that remember too much say so instead."""
  if tokens % chunk:
    raise ValueError(f'tokens={tokens} is not divisible by chunk={chunk}.')
  target, behaviour = make_params(
      jax.random.key(0), tokens=tokens, vocab=vocab, width=width
  )
  programs, rows = {}, {}
  chosen = [
      case for case in cases()
      if not only or case == BASELINE or case[0] in only
  ]
  for case in sorted(chosen, key=lambda case: case != BASELINE):
    needed = record_bytes(case, tokens=tokens, vocab=vocab)
    if needed > record_limit:
      rows[case] = {'skipped': f'its record needs {needed / 1e9:.1f} GB'}
    else:
      programs[case] = prepare(case, target, behaviour, chunk=chunk)
  rows |= compare(programs, num_rounds, tokens // chunk)
  baseline = programs[BASELINE].temporary_bytes
  for case, program in programs.items():
    rows[case]['record_bytes_per_token'] = program.record_bytes / tokens
    if baseline:
      rows[case]['temporary_ratio'] = round(
          program.temporary_bytes / baseline, 3
      )
  return [
      {'divergence': divergence, 'loss': loss, **rows[divergence, loss]}
      for divergence, loss in sorted(rows)
  ]


def _time(program: Programs, half: str) -> float:
  """Seconds of one run."""
  function = getattr(program, half)
  arguments = getattr(program, f'{half}_arguments')
  clock = time.process_time if _CLOCK.value == 'cpu' else time.perf_counter
  start = clock()
  jax.block_until_ready(function(*arguments))
  return clock() - start


def main(argv):
  """Measures with the sizes of the command line."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected argument {argv[1]!r}.')
  rows = measure(
      tokens=_TOKENS.value,
      vocab=_VOCAB.value,
      width=_HIDDEN.value,
      chunk=_CHUNK.value,
      num_rounds=_ROUNDS.value,
      record_limit=_RECORD_LIMIT.value * 1e9,
      only=_ONLY.value,
  )
  result = {
      'benchmark': 'divergences',
      'sizes': {
          'tokens': _TOKENS.value,
          'vocab': _VOCAB.value,
          'hidden': _HIDDEN.value,
          'chunk': _CHUNK.value,
      },
      'clock': _CLOCK.value,
      'rounds': _ROUNDS.value,
      'baseline': BASELINE,
      'rows': rows,
      'machine': machine.describe(),
  }
  machine.report(result, _NAME.value)


if __name__ == '__main__':
  app.run(main)
