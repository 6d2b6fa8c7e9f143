"""Reductions over masked arrays that no value under the mask can spoil.

A multiplication by zero keeps a NaN, so masked entries are replaced before
anything is computed from them. With an empty mask a mean or maximum is 0.
"""

import jax
import jax.numpy as jnp


def where_valid(values: jax.Array, mask: jax.Array, fill=0.0) -> jax.Array:
  """`values` with masked entries replaced, whatever stood there."""
  return jnp.where(mask, values, jnp.asarray(fill, values.dtype))


def masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum over the entries where `mask` is True. Any shape -> []."""
  return jnp.sum(where_valid(values, mask))


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean over the entries where `mask` is True. Any shape -> []."""
  values = values.astype(jnp.float32)
  return masked_sum(values, mask) / jnp.maximum(jnp.sum(mask), 1)


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
  """Mean by weights of 0 or more, 0 if all are 0. Any shape -> [].

  What has no weight must be finite.
  """
  total = jnp.sum(weights)
  return jnp.sum(values * weights) / jnp.where(total > 0, total, 1.0)


def effective_share(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
  """Kish's effective sample size (sum r)^2 / sum r^2, over n. Any shape -> [].

  Args:
    log_ratio: of n weights r, in nats, where `mask` is True.
    mask: same shape, bool.

  Returns:
    [] in (0, 1]; 0 where the mask is empty.
  """
  # Relative to the largest, so that no square overflows.
  ratio = jnp.exp(jnp.minimum(log_ratio - masked_max(log_ratio, mask), 0))
  mean, square = masked_mean(ratio, mask), masked_mean(ratio**2, mask)
  return jnp.square(mean) / jnp.where(jnp.any(mask), square, 1.0)


def masked_max(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Maximum over the entries where `mask` is True. Any shape -> []."""
  largest = jnp.max(where_valid(values, mask, -jnp.inf))
  return jnp.where(jnp.any(mask), largest, 0)


def masked_min(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Minimum over the entries where `mask` is True. Any shape -> []."""
  return -masked_max(-values, mask)


def masked_quantile(
    values: jax.Array, mask: jax.Array, *, q: float
) -> jax.Array:
  """The smallest masked-in value that at least a share q does not exceed.

  Args:
    values: any shape, float.
    mask: same shape, bool.
    q: in [0, 1].

  Returns:
    [] of the dtype of `values`; 0 where the mask is empty.
  """
  ordered = jnp.sort(where_valid(values, mask, jnp.inf).ravel())
  count = jnp.sum(mask)
  # Masked-out entries sort to the end, beyond `count`.
  index = jnp.ceil(q * count).astype(jnp.int32) - 1
  picked = ordered[jnp.clip(index, 0, ordered.size - 1)]
  return jnp.where(count > 0, picked, 0)
