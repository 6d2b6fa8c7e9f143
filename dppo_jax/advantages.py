"""From rewards to advantages: who did better than the same prompt's others.

Completions of one prompt stand next to each other, so [B] rewards are N groups
of `group_size`. What comes back is [B]: one number for every sampled token of a
completion.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dppo_jax import registry

register = registry.Registry('advantage')
build = register.build
names = register.names
config = register.config

AdvantageFn = Callable[[jax.Array], jax.Array]


def teaches_without_spread(name: str) -> bool:
  """Whether a group whose rewards are all equal still has an advantage."""
  return bool(register.fact(name, 'teaches_without_spread'))


def compares_the_batch(name: str) -> bool:
  """Whether the advantages of a group depend on those of other groups."""
  return bool(register.fact(name, 'compares_the_batch'))


def _centred(rewards: jax.Array, group_size: int) -> jax.Array:
  """Rewards minus their group's mean. [N * G] -> [N, G].

  Exactly 0 where all are equal: a mean of eight times 0.7 is not 0.7, so the
  gaps to the first are averaged instead of the rewards.
  """
  groups = rewards.reshape(-1, group_size)
  gaps = groups - groups[:, :1]
  return gaps - jnp.mean(gaps, axis=-1, keepdims=True)


def _needs_others(group_size: int, name: str) -> None:
  if group_size < 2:
    raise ValueError(
        f'group_size={group_size}: {name} needs others to compare with; use '
        'group_size >= 2, or advantage raw.'
    )


@register
def group_mean(*, group_size: int) -> AdvantageFn:
  """Reward minus the mean of its group, itself included; no division.

  Sec. 4.1 of arXiv:2602.04879, whose App. C.1 leaves out GRPO's division by the
  standard deviation, as Dr. GRPO (arXiv:2503.20783) proposed: dividing makes
  prompts count more that are almost always or almost never solved.
  """
  _needs_others(group_size, 'group_mean')

  def advantage_fn(rewards: jax.Array) -> jax.Array:
    return _centred(rewards, group_size).reshape(rewards.shape)

  return advantage_fn


@register
def group_zscore(*, group_size: int, epsilon: float = 1e-6) -> AdvantageFn:
  """GRPO's own: reward minus group mean, over the group's standard deviation.

  Sec. 4.1.1 of arXiv:2402.03300, with the unbiased deviation that the public
  trainers use. A group without variance gets 0.
  """
  _needs_others(group_size, 'group_zscore')

  def advantage_fn(rewards: jax.Array) -> jax.Array:
    centred = _centred(rewards, group_size)
    deviation = jnp.std(centred, axis=-1, keepdims=True, ddof=1)
    return (centred / (deviation + epsilon)).reshape(rewards.shape)

  return advantage_fn


@register
def leave_one_out(*, group_size: int) -> AdvantageFn:
  """Reward minus the mean of the others in its group (RLOO, arXiv:2402.14740).

  `group_mean` times group_size / (group_size - 1).
  """
  _needs_others(group_size, 'leave_one_out')
  mean_fn = group_mean(group_size=group_size)

  def advantage_fn(rewards: jax.Array) -> jax.Array:
    return mean_fn(rewards) * (group_size / (group_size - 1))

  return advantage_fn


@register.with_facts(compares_the_batch=True)
def batch_zscore(*, group_size: int, epsilon: float = 1e-6) -> AdvantageFn:
  """Reward minus group mean, over the deviation of the whole batch.

  REINFORCE++ with baseline (arXiv:2501.03262): what a prompt's difficulty does
  to the scale is left in, what the reward's unit does to it is not.
  """
  _needs_others(group_size, 'batch_zscore')

  def advantage_fn(rewards: jax.Array) -> jax.Array:
    centred = _centred(rewards, group_size)
    return (centred / (jnp.std(centred) + epsilon)).reshape(rewards.shape)

  return advantage_fn


@register.with_facts(teaches_without_spread=True)
def raw() -> AdvantageFn:
  """The reward itself, no baseline. For rewards that are advantages already."""

  def advantage_fn(rewards: jax.Array) -> jax.Array:
    return rewards

  return advantage_fn
