"""What happens to rewards before they become advantages.

B sequences in groups of G next to each other. Lengths are in sampled tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dppo_jax import registry

register = registry.Registry('shaping')
build = register.build
names = register.names
config = register.config

# (rewards [B], lengths [B]) -> rewards [B]
ShapingFn = Callable[[jax.Array, jax.Array], jax.Array]


@register
def unshaped() -> ShapingFn:
  """Rewards as the verifier gave them."""

  def shaping_fn(rewards: jax.Array, lengths: jax.Array) -> jax.Array:
    del lengths
    return rewards

  return shaping_fn


@register
def overlong(
    *, horizon: int, buffer: int = 4, penalty: float = 1.0
) -> ShapingFn:
  """Takes off up to `penalty` over the last `buffer` tokens before the limit.

  Soft overlong punishment, Eq. 13 of arXiv:2503.14476 (there 4,096 tokens of
  20,480 and penalty 1).

  Args:
    horizon: longest completion.
    buffer: tokens over which the penalty grows linearly.
    penalty: at the limit.
  """
  if not 0 < buffer <= horizon:
    raise ValueError(
        f'buffer={buffer} must be at least 1 and at most the longest '
        f'completion, {horizon}.'
    )

  def shaping_fn(rewards: jax.Array, lengths: jax.Array) -> jax.Array:
    share = (lengths - (horizon - buffer)) / buffer
    return rewards - penalty * jnp.clip(share, 0.0, 1.0)

  return shaping_fn


def has_spread(rewards: jax.Array, *, group_size: int) -> jax.Array:
  """Whether the rewards of a group differ. [B] -> [N] bool.

  A NaN differs: its group stays, so that the update is skipped and counted.
  """
  groups = rewards.reshape(-1, group_size)
  return jnp.max(groups, axis=-1) != jnp.min(groups, axis=-1)


def groups_with_spread_first(
    rewards: jax.Array, *, group_size: int
) -> jax.Array:
  """Rows of all groups, those whose rewards differ first, else in order. [B].

  With more groups sampled than learned from, taking the first ones refills the
  batch in place of groups that teach nothing (dynamic sampling of
  arXiv:2503.14476, by sampling ahead instead of again).
  """
  spread = has_spread(rewards, group_size=group_size)
  order = jnp.argsort(~spread, stable=True)
  rows = order[:, None] * group_size + jnp.arange(group_size)[None]
  return rows.reshape(-1)


def without_groups_without_spread(
    token_mask: jax.Array, rewards: jax.Array, *, group_size: int
) -> jax.Array:
  """The mask without groups whose rewards are all equal. [B, T].

  Such a group has no advantage, but it would count in what a loss is divided
  by: dropping it is the filter of dynamic sampling (arXiv:2503.14476).

  Args:
    token_mask: [B, T] bool.
    rewards: [B], shaped.
    group_size: G.
  """
  spread = has_spread(rewards, group_size=group_size)
  return token_mask & jnp.repeat(spread, group_size)[:, None]
