"""Estimates of kl(target || reference) from sampled tokens.

With x = log pi - log pi_reference of a token sampled from (nearly) pi: k1 = x
is unbiased and may be negative, k2 = x^2 / 2 is biased with the right gradient,
k3 = exp(-x) - 1 + x is unbiased and never negative
(joschu.net/blog/kl-approx.html). As a loss, the gradient is that of the
estimate itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dppo_jax import registry

ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'k1': lambda x: x,
    'k2': lambda x: 0.5 * jnp.square(x),
    'k3': lambda x: jnp.expm1(-x) + x,
}


def reference_kl(
    *, logprobs: jax.Array, reference_logprobs: jax.Array, estimator: str
) -> jax.Array:
  """kl(target || reference), one sample a token. [...], [...] -> [...]."""
  if estimator not in ESTIMATORS:
    raise ValueError(registry.unknown('estimator', estimator, ESTIMATORS))
  return ESTIMATORS[estimator](logprobs - reference_logprobs)


def full_reference_kl(
    *, logits: jax.Array, reference_logits: jax.Array
) -> jax.Array:
  """kl(target || reference) over the vocabulary. [..., V] twice -> [...]."""
  target = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  reference = jax.nn.log_softmax(reference_logits.astype(jnp.float32), axis=-1)
  return jnp.sum(jnp.exp(target) * (target - reference), axis=-1)
