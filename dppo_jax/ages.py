"""How stale a token is, in buckets that double.

An age counts optimizer updates between sampling a token and learning from it.
"""

import jax
import jax.numpy as jnp

# First age of each bucket; the last one has no end.
STARTS = (0, 1, 2, 4, 8, 16, 32, 64)
NUM_BUCKETS = len(STARTS)


def names() -> list[str]:
  """'0', '1', '2-3', ... '64-'."""
  ends = [str(start - 1) for start in STARTS[1:]] + ['']
  return [
      str(start) if str(start) == end else f'{start}-{end}'
      for start, end in zip(STARTS, ends, strict=True)
  ]


def bucket(age: jax.Array) -> jax.Array:
  """Index into `STARTS` of the bucket that an age is in; same shape."""
  return jnp.searchsorted(jnp.array(STARTS), age, side='right') - 1
