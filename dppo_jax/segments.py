"""Reductions over the tokens of one sequence, where a row may hold several.

Everything is [B, T]; `segment_ids` [B, T] int32 tells which sequence of its row
a token belongs to, at most T of them, and a sequence's tokens are next to each
other. Each position gets back its own sequence's value. Masked-out tokens count
nothing.
"""

import jax
import jax.numpy as jnp

from dppo_jax.masking import where_valid


def total(
    values: jax.Array, mask: jax.Array, segment_ids: jax.Array
) -> jax.Array:
  """Sum over the sequence. [B, T]."""
  return _reduce(jax.ops.segment_sum, where_valid(values, mask), segment_ids)


def mean(
    values: jax.Array, mask: jax.Array, segment_ids: jax.Array
) -> jax.Array:
  """Mean over the sequence, 0 where nothing of it is masked in. [B, T]."""
  count = total(mask.astype(jnp.float32), mask, segment_ids)
  return total(values, mask, segment_ids) / jnp.maximum(count, 1)


def largest(
    values: jax.Array, mask: jax.Array, segment_ids: jax.Array
) -> jax.Array:
  """Maximum over the sequence, 0 at least: for what is not negative. [B, T]."""
  values = where_valid(values, mask)
  return jnp.maximum(_reduce(jax.ops.segment_max, values, segment_ids), 0)


def prefix(
    values: jax.Array, mask: jax.Array, segment_ids: jax.Array
) -> jax.Array:
  """Sum over the sequence up to and including this token. [B, T].

  What a sequence holds, an infinity too, stays in it.
  """
  values = where_valid(values, mask)
  starts = jnp.pad(
      segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)],
      constant_values=True,
  )

  def add(earlier, later):
    """Sums that begin anew where a sequence does."""
    (left, left_starts), (right, right_starts) = earlier, later
    total = right + jnp.where(right_starts, 0.0, left)
    return total, left_starts | right_starts

  return jax.lax.associative_scan(add, (values, starts), axis=1)[0]


def _reduce(operation, values, segment_ids):
  length = values.shape[-1]

  def row(values, ids):
    return operation(values, ids, num_segments=length + 1)[ids]

  return jax.vmap(row)(values, segment_ids)
