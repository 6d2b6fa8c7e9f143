"""Prompts to `Rollout`: the sampler's completions, aligned with their prompts.

Every row is a left-padded prompt followed by a completion, so completions start
in the same column. All per-token arrays are [B, T] with T = P + C - 1, aligned
with `tokens[:, 1:]`; index P - 1 is about the first sampled token.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import sampling
from dppo_jax.models import causal_lm
from dppo_jax.types import Prompts
from dppo_jax.types import PyTree
from dppo_jax.types import Rollout


class SamplingAux(NamedTuple):
  """What sampling returns beside a rollout."""

  num_steps: jax.Array  # [] int32, calls of the model.
  products: PyTree = ()  # What kernels made, [L, E, F] each, if kept.


# rollout_fn(params, prompts, key, policy_version, products) -> (rollout, aux).
RolloutFn = Callable[
    [PyTree, Prompts, jax.Array, jax.Array, PyTree],
    tuple[Rollout, SamplingAux],
]


def make_rollout_fn(sampler, *, group_size: int) -> RolloutFn:
  """A pure function that rolls out G completions of each prompt.

  Args:
    sampler: from `sampling.make_sampler`, with the same group_size.
    group_size: G.

  Returns:
    `rollout_fn(params, prompts, key, policy_version, products) -> (rollout,
    aux)`; the key is consumed. `products` is the buffer of
    `sampling.make_sampler`, () to keep none.
  """

  @functools.partial(jax.jit, inline=True)  # Traced once, shapes included.
  def rollout_fn(params, prompts, key, policy_version, products=()):
    batch = prompts.tokens.shape[0] * group_size
    keys = sampling.row_keys(key, batch)
    buffer = (products,) if products else ()  # On several devices, none.
    completions = sampler(params, prompts, keys, *buffer)
    rollout = assemble(prompts, completions, group_size=group_size)
    version = jnp.broadcast_to(policy_version.astype(jnp.int32), (batch,))
    aux = SamplingAux(completions.num_steps, completions.products)
    return rollout._replace(policy_version=version), aux

  return rollout_fn


def assemble(
    prompts: Prompts, completions: sampling.Completions, *, group_size: int
) -> Rollout:
  """Joins prompts [N, P] and completions [B, C]; policy_version is 0."""
  prompt_tokens = jnp.repeat(prompts.tokens, group_size, axis=0)
  prompt_mask = jnp.repeat(prompts.mask, group_size, axis=0)
  before = prompts.tokens.shape[1] - 1
  real = jnp.concatenate([prompt_mask, completions.mask], axis=1)

  def of_read(remembered):
    """Of prompts [N, P, ...] and completions [B, C - 1, ...]: [B, T, ...]."""
    if not remembered:
      return ()
    of_prompts, of_completions = remembered
    return jnp.concatenate(
        [jnp.repeat(of_prompts, group_size, axis=0), of_completions], axis=1
    )

  def align(x):
    """[B, C, ...] -> [B, T, ...]."""
    return jnp.pad(x, [(0, 0), (before, 0)] + [(0, 0)] * (x.ndim - 2))

  return Rollout(
      tokens=jnp.concatenate([prompt_tokens, completions.tokens], axis=1),
      segment_ids=real.astype(jnp.int32),
      positions=causal_lm.positions_of(real),
      token_mask=align(completions.mask),
      behaviour_logprobs=align(completions.logprobs),
      record=jax.tree.map(align, completions.record),
      policy_version=jnp.zeros(real.shape[0], jnp.int32),
      truncated=completions.truncated,
      routing=of_read(completions.routing),
      entries=of_read(completions.entries),
  )
