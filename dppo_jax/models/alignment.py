"""Rows of one sequence each, moved so that it begins with the first slot.

As they are sampled, all prompts end at the same slot, padded on the left. B
rows, T slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# An odd number of slots is made even, as kernels ask for.
_MULTIPLE = 2


class Order(NamedTuple):
  """Where each slot of rows comes from, and where it went."""

  source: jax.Array  # [B, T or T + 1] int32, T and above for a new slot.
  target: jax.Array  # [B, T] int32

  def move(self, x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [B, T or T + 1, ...], 0 in a new slot."""
    return _take(x, self.source, self.target)

  def move_back(self, x: jax.Array) -> jax.Array:
    """What `move` moved."""
    return _take(x, self.target, self.source)


def order_of(segment_ids: jax.Array) -> Order:
  """That brings the first real slot to the front. [B, T], padding is 0."""
  length = segment_ids.shape[1]
  size = length + -length % _MULTIPLE
  first = jnp.argmax(segment_ids > 0, axis=1, keepdims=True)
  return Order(
      (jnp.arange(size)[None] + first) % size,
      (jnp.arange(length)[None] - first) % size,
  )


@jax.custom_vjp
def _take(x, index, inverse):
  index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1, mode='fill', fill_value=0)


def _take_forward(x, index, inverse):
  return _take(x, index, inverse), (index, inverse)


def _take_backward(kept, gradient):
  # Nothing is taken twice, so no sum is needed.
  index, inverse = kept
  return _take(gradient, inverse, index), None, None


_take.defvjp(_take_forward, _take_backward)
