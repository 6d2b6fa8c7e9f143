"""The last rollouts, kept on the device to be learned from again.

A ring of S slots, each a whole scored rollout of N groups with its behaviour
log-probs, records and policy versions, so importance ratios stay exact however
old it is. Every step draws groups from it and lays them beside the fresh ones.
Groups stay whole, so advantages stay right.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import groups
from dppo_jax import registry
from dppo_jax import shaping
from dppo_jax.masking import effective_share
from dppo_jax.types import PyTree
from dppo_jax.types import ScoredRollout

SAMPLING = ('uniform', 'recent', 'ess')


class Buffer(NamedTuple):
  """S slots, written in turns."""

  scored: ScoredRollout  # [S, B, ...]
  num_pushed: jax.Array  # [] int32, rollouts ever written.


class Replay(NamedTuple):
  """The functions of a buffer.

  `init(scored)` makes an empty one for rollouts of that shape; `push(buffer,
  scored)` overwrites the oldest; `mix(buffer, scored, state, key) -> (scored,
  metrics)` adds replayed groups behind the fresh ones.
  """

  init: Callable[[ScoredRollout], Buffer]
  push: Callable[[Buffer, ScoredRollout], Buffer]
  mix: Callable[..., tuple[ScoredRollout, dict[str, jax.Array]]]


def make_replay(
    *,
    capacity: int,
    num_groups: int,
    group_size: int,
    sampling: str,
    max_age: int,
    num_updates: int,
    logprobs_fn: Callable[[PyTree, Any], jax.Array],
    shaping_fn: shaping.ShapingFn,
) -> Replay | None:
  """A replay buffer, or None without capacity.

  A group may be drawn if its shaped rewards differ (others teach nothing) and
  no update of the step would see it at an age above `max_age`. Where fewer may
  be drawn than are asked for, the rest are rows in which no token counts:
  shapes never change, so nothing is compiled again while the buffer fills.

  Args:
    capacity: S, rollouts kept; 0 for no buffer.
    num_groups: drawn in each step, without replacement.
    group_size: G.
    sampling: 'uniform'; 'recent', the latest rollouts first; or 'ess', of twice
      as many drawn uniformly those with the largest effective sample size
      (Kish) under the policy as it is now.
    max_age: in optimizer updates.
    num_updates: of one step.
    logprobs_fn: (params, rollout) -> [B, T], only called for 'ess'.
    shaping_fn: of rewards; kept are those that the verifier gave.
  """
  if not capacity:
    return None
  if sampling not in SAMPLING:
    raise ValueError(registry.unknown('replay sampling', sampling, SAMPLING))

  def init(scored: ScoredRollout) -> Buffer:
    slots = jax.tree.map(
        lambda x: jnp.zeros((capacity, *x.shape), x.dtype), scored
    )
    return Buffer(slots, jnp.zeros((), jnp.int32))

  def eligible(buffer, version):
    """Which groups may be drawn. [S, N]."""
    scored = buffer.scored
    lengths = jnp.sum(scored.rollout.token_mask, axis=-1)
    rewards = jax.vmap(shaping_fn)(scored.rewards, lengths)
    spread = groups.has_spread(rewards, group_size=group_size)
    # A NaN has none, or its update would be skipped again and again.
    known = ~jnp.isnan(rewards).reshape(*spread.shape, group_size)
    spread &= jnp.all(known, axis=-1)
    sampled_by = buffer.scored.rollout.policy_version[:, ::group_size]
    last_age = version + num_updates - 1 - sampled_by
    written = jnp.arange(capacity) < buffer.num_pushed
    return spread & (last_age <= max_age) & written[:, None]

  def draw(buffer, state, key):
    """Indices of groups, best first, and whether they may be used. [R]."""
    allowed = eligible(buffer, state.policy_version)
    luck = jax.random.uniform(key, allowed.shape)
    if sampling == 'recent':
      # 0 for the slot written last.
      turns = (buffer.num_pushed - 1 - jnp.arange(capacity)) % capacity
      luck += turns[:, None]
    order = jnp.argsort(jnp.where(allowed, luck, jnp.inf).ravel())
    if sampling != 'ess':
      chosen = order[:num_groups]
      return chosen, allowed.ravel()[chosen]
    candidates = order[: 2 * num_groups]
    valid = allowed.ravel()[candidates]
    rollout = _take(buffer, candidates, valid, group_size).rollout
    sizes = effective_sample_size(
        logprobs=logprobs_fn(state.params, rollout),
        rollout=rollout,
        group_size=group_size,
    )
    best = jnp.argsort(jnp.where(valid, -sizes, jnp.inf))[:num_groups]
    return candidates[best], valid[best]

  def mix(buffer, scored, state, key):
    chosen, valid = draw(buffer, state, key)
    replayed = _take(buffer, chosen, valid, group_size)
    mixed = jax.tree.map(
        lambda *x: jnp.concatenate(x),
        scored._replace(replayed=jnp.zeros(scored.rewards.shape, bool)),
        replayed._replace(replayed=jnp.ones(replayed.rewards.shape, bool)),
    )
    ages = state.policy_version - replayed.rollout.policy_version
    used = jnp.any(replayed.rollout.token_mask, axis=-1)
    count = jnp.maximum(jnp.sum(used), 1)
    return mixed, {
        'replay/groups': jnp.sum(valid),
        'replay/tokens': jnp.sum(replayed.rollout.token_mask),
        'replay/age_mean': jnp.sum(jnp.where(used, ages, 0)) / count,
        'replay/age_max': jnp.max(jnp.where(used, ages, 0)),
        'replay/slots_filled': jnp.minimum(buffer.num_pushed, capacity),
    }

  return Replay(init, _push, mix)


def _push(buffer: Buffer, scored: ScoredRollout) -> Buffer:
  """Overwrites the oldest rollout."""
  capacity = buffer.scored.rewards.shape[0]
  slot = buffer.num_pushed % capacity
  slots = jax.tree.map(
      lambda slots, x: jax.lax.dynamic_update_index_in_dim(
          slots, x, slot, axis=0
      ),
      buffer.scored,
      scored,
  )
  return Buffer(slots, buffer.num_pushed + 1)


def _take(buffer, chosen, valid, group_size):
  """Rows of the groups `chosen` [R] out of S * N, silent where not valid."""
  num_groups = buffer.scored.rewards.shape[1] // group_size
  slots, rows = jnp.divmod(chosen, num_groups)
  rows = groups.rows_of(rows, group_size=group_size)
  scored = jax.tree.map(
      lambda x: x[slots[:, None], rows].reshape(-1, *x.shape[2:]),
      buffer.scored,
  )
  valid = jnp.repeat(valid, group_size)
  rollout = scored.rollout
  return scored._replace(
      rollout=rollout._replace(token_mask=rollout.token_mask & valid[:, None]),
      rewards=jnp.where(valid, scored.rewards, 0.0),
  )


def effective_sample_size(*, logprobs, rollout, group_size: int) -> jax.Array:
  """Kish's, per token of a group: (sum r)^2 / (n sum r^2), in [0, 1]. [R].

  1 where the policy is still the one that sampled, towards 0 where a few tokens
  carry all the weight; 0 for a group without tokens.

  Args:
    logprobs: [R * G, T], of the policy as it is now.
    rollout: R groups.
    group_size: G.
  """
  mask = rollout.token_mask
  log_ratio = jnp.where(mask, logprobs, 0.0) - jnp.where(
      mask, rollout.behaviour_logprobs, 0.0
  )
  of_groups = lambda x: x.reshape(-1, group_size * x.shape[-1])
  return jax.vmap(effective_share)(of_groups(log_ratio), of_groups(mask))
