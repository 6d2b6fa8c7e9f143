"""Groups: the G completions of a prompt, which stand next to each other.

[B] are B sequences and [N] their groups, B = N G.
"""

import jax
import jax.numpy as jnp


def rows_of(groups: jax.Array, *, group_size: int) -> jax.Array:
  """Which sequences the groups of these numbers are. [...] -> [..., G]."""
  within = jnp.arange(group_size).reshape((1,) * groups.ndim + (-1,))
  return groups[..., None] * group_size + within


def has_spread(rewards: jax.Array, *, group_size: int) -> jax.Array:
  """Whether the rewards of a group differ. [..., B] -> [..., N] bool.

  A NaN differs: its group stays, so that the update is skipped and counted.
  """
  groups = rewards.reshape(*rewards.shape[:-1], -1, group_size)
  return jnp.max(groups, axis=-1) != jnp.min(groups, axis=-1)


def with_spread_first(rewards: jax.Array, *, group_size: int) -> jax.Array:
  """All sequences, of groups whose rewards differ first, else in order. [B].

  With more groups sampled than learned from, taking the first ones refills the
  batch in place of groups that teach nothing (dynamic sampling of
  arXiv:2503.14476, by sampling ahead instead of again).
  """
  spread = has_spread(rewards, group_size=group_size)
  order = jnp.argsort(~spread, stable=True)
  return rows_of(order, group_size=group_size).reshape(-1)


def mask_with_spread(
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
