"""Prompts to `Rollout`: the sampler's completions, aligned with their prompts.

Every row is a left-padded prompt followed by a completion, so completions start
in the same column. All per-token arrays are [B, T] with T = P + C - 1, aligned
with `tokens[:, 1:]`; index P - 1 is about the first sampled token.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from dppo_jax import sampling
from dppo_jax.models import causal_lm
from dppo_jax.types import Prompts
from dppo_jax.types import PyTree
from dppo_jax.types import Rollout

RolloutFn = Callable[
    [PyTree, Prompts, jax.Array, jax.Array], tuple[Rollout, jax.Array]
]


def make_rollout_fn(sampler, *, group_size: int) -> RolloutFn:
  """A pure function that rolls out G completions of each prompt.

  Args:
    sampler: from `sampling.make_sampler`, with the same group_size.
    group_size: G.

  Returns:
    `rollout_fn(params, prompts, key, policy_version) -> (rollout, number of
    decode steps)`; the key is consumed.
  """

  @functools.partial(jax.jit, inline=True)  # Traced once, shapes included.
  def rollout_fn(params, prompts, key, policy_version):
    batch = prompts.tokens.shape[0] * group_size
    completions = sampler(params, prompts, sampling.row_keys(key, batch))
    rollout = assemble(prompts, completions, group_size=group_size)
    version = jnp.broadcast_to(policy_version.astype(jnp.int32), (batch,))
    return rollout._replace(policy_version=version), completions.num_steps

  return rollout_fn


def assemble(
    prompts: Prompts, completions: sampling.Completions, *, group_size: int
) -> Rollout:
  """Joins prompts [N, P] and completions [B, C]; policy_version is 0."""
  prompt_tokens = jnp.repeat(prompts.tokens, group_size, axis=0)
  prompt_mask = jnp.repeat(prompts.mask, group_size, axis=0)
  before = prompts.tokens.shape[1] - 1
  real = jnp.concatenate([prompt_mask, completions.mask], axis=1)

  routing = ()
  if completions.routing:
    of_prompts, of_completions = completions.routing
    routing = jnp.concatenate(
        [jnp.repeat(of_prompts, group_size, axis=0), of_completions], axis=1
    )  # [B, T, L, k]

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
      routing=routing,
  )
