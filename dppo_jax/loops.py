"""Loops over as many parts as there are, a number that is known at run time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dppo_jax.types import PyTree


def over_first(
    fn: Callable[[jax.Array], tuple[PyTree, PyTree]],
    count: Any,
    limit: int,
    zeros: PyTree,
) -> tuple[PyTree, PyTree]:
  """Runs `fn` over the first of some parts.

  Args:
    fn: of a part, [] int32: what is added up, and arrays.
    count: int or [] int32, parts to run.
    limit: parts that there may be.
    zeros: what sums begin with.

  Returns:
    the sums; and the arrays of all parts, [limit, ...] each, 0 for those that
    were not run.
  """
  if isinstance(count, int) and count == limit:  # XLA knows its length.

    def step(sums, part):
      terms, out = fn(part)
      return jax.tree.map(jnp.add, sums, terms), out

    return jax.lax.scan(step, zeros, jnp.arange(limit))
  # Traced once, here and in the loop.
  fn = jax.jit(fn, inline=True)
  _, shapes = jax.eval_shape(fn, jnp.int32(0))
  outputs = jax.tree.map(
      lambda x: jnp.zeros((limit, *x.shape), x.dtype), shapes
  )

  def body(part, state):
    sums, outputs = state
    # Added up here, as a conditional in `fn` would copy the sums.
    terms, out = fn(part)
    write = lambda old, new: jax.lax.dynamic_update_index_in_dim(
        old, new, part, axis=0
    )
    return (
        jax.tree.map(jnp.add, sums, terms), jax.tree.map(write, outputs, out)
    )

  return jax.lax.fori_loop(0, count, body, (zeros, outputs))
