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

  Args:
    values: not negative, which is what makes a running sum's smallest value in
      a sequence the one at its start.
    mask: bool.
    segment_ids: int32.
  """
  values = where_valid(values, mask)
  running = jnp.cumsum(values, axis=-1)
  before = running - values
  return running - _reduce(jax.ops.segment_min, before, segment_ids)


def _reduce(operation, values, segment_ids):
  length = values.shape[-1]

  def row(values, ids):
    return operation(values, ids, num_segments=length + 1)[ids]

  return jax.vmap(row)(values, segment_ids)
