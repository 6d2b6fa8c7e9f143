"""Losses per token. What a token counts is the normaliser's business.

PPO, GRPO, clip-higher, CISPO, PG-IS and every DPPO variant are one loss, the
importance-weighted policy gradient inside a trust region, with different
divergences, thresholds and ratio caps (`algorithms.py` has the table).
"""

import math

import jax
import jax.numpy as jnp

from dppo_jax import registry
from dppo_jax.types import LossFn, LossInputs

register = registry.Registry('loss')
build = register.build
names = register.names
config = register.config


@register
def policy_gradient(*, ratio_cap: float = math.inf) -> LossFn:
  """-min(ratio, ratio_cap) * advantage * logprobs inside the trust region.

  Eq. 23 of arXiv:2602.04879: the weight is detached, so the gradient of a token
  is min(ratio, C) * A * grad log pi. Without a cap that is the gradient of
  ratio * A; with one, a token above the cap keeps the gradient C * A * grad log
  pi, where differentiating min(ratio, C) would silence it. The paper uses C =
  inf in its stability runs (3 for CISPO) and C = 5 in its scaling runs.

  A kept token with ratio = inf makes the loss infinite, on purpose: the learner
  counts and skips such an update instead of hiding it behind a clamp.
  """
  if not ratio_cap > 0:
    raise ValueError(
        f'ratio_cap={ratio_cap} is not positive; use inf for no cap.'
    )

  def loss_fn(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    # Replaced before the exponential, not multiplied by zero after it: a
    # padded, dropped or unrewarded token may hold anything.
    keep = inputs.trust_region & inputs.token_mask & (inputs.advantages != 0)
    logprobs = jnp.where(keep, inputs.logprobs, 0.0)
    log_ratio = logprobs - jnp.where(keep, inputs.behaviour_logprobs, 0.0)
    advantages = jnp.where(keep, inputs.advantages, 0.0)
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    weight = jnp.minimum(ratio, ratio_cap) * advantages
    metrics = {
        'surrogate': ratio * advantages,
        'capped': (keep & (ratio > ratio_cap)).astype(jnp.float32),
    }
    return -weight * logprobs, metrics

  return loss_fn
