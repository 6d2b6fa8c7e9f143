"""Losses per token. What a token counts is the normaliser's business.

PPO, GRPO, clip-higher, CISPO, PG-IS and every DPPO variant are one loss, the
importance-weighted policy gradient inside a trust region, with different
divergences, thresholds, rules and ratio caps (`algorithms.py` has the table).
SPO and DRPO replace the region by a penalty.

All are in score-function form: a detached weight times the log-prob. Their
gradients are those of the papers; their values are not.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp

from dppo_jax import registry
from dppo_jax import segments
from dppo_jax.types import LossFn
from dppo_jax.types import LossInputs

register = registry.Registry('loss')
build = register.build
names = register.names
config = register.config

# Beyond it a float32 ratio is useless: exp(20) is 5e8.
_LOG_RATIO_LIMIT = 20.0


def _score_function(
    inputs: LossInputs,
    weight_fn: Callable[[jax.Array, jax.Array], jax.Array],
    log_ratio_fn: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """-weight * logprobs on kept tokens, 0 elsewhere.

  Args:
    inputs: of the loss.
    weight_fn: (ratio, advantages) -> weight, all [B, T].
    log_ratio_fn: changes the log-ratio before the exponential.

  Returns:
    loss [B, T], and ratio and advantages with 1 and 0 where nothing is kept.
  """
  # Replaced before the exponential, not multiplied by zero after it: a padded,
  # dropped or unrewarded token may hold anything.
  keep = (inputs.trust_region > 0) & inputs.token_mask
  keep &= inputs.advantages != 0
  logprobs = jnp.where(keep, inputs.logprobs, 0.0)
  valid = inputs.token_mask
  log_ratio = jnp.where(valid, inputs.logprobs, 0.0) - jnp.where(
      valid, inputs.behaviour_logprobs, 0.0
  )
  log_ratio = jnp.where(keep, log_ratio_fn(jax.lax.stop_gradient(log_ratio)), 0)
  advantages = jnp.where(keep, inputs.advantages, 0.0)
  ratio = jnp.exp(log_ratio)
  region = jnp.where(keep, inputs.trust_region, False)
  weight = weight_fn(ratio, advantages) * region
  return -weight * logprobs, ratio, advantages


def _metrics(ratio, advantages, capped):
  return {
      'surrogate': ratio * advantages,
      'capped': capped.astype(jnp.float32),
  }


@register
def policy_gradient(
    *, ratio_cap: float = math.inf, ratio: str = 'token'
) -> LossFn:
  """-min(ratio, ratio_cap) * advantage * logprobs inside the trust region.

  Eq. 23 of arXiv:2602.04879: the weight is detached, so the gradient of a token
  is min(ratio, C) * A * grad log pi. Without a cap that is the gradient of
  ratio * A; with one, a token above the cap keeps the gradient C * A * grad log
  pi, where differentiating min(ratio, C) would silence it. The paper uses C =
  inf in its stability runs (3 for CISPO) and C = 5 in its scaling runs.

  A kept token with ratio = inf makes the loss infinite, on purpose: the learner
  counts and skips such an update instead of hiding it behind a clamp.

  Args:
    ratio_cap: C.
    ratio: 'token'; 'sequence', the product over the sequence, which is what an
      unbiased weight would be; or 'geometric', its mean per token, as GSPO has
      it (arXiv:2507.18071).
  """
  if not ratio_cap > 0:
    raise ValueError(
        f'ratio_cap={ratio_cap} is not positive; use inf for no cap.'
    )
  levels = {'sequence': segments.total, 'geometric': segments.mean}
  if ratio not in ('token', *levels):
    raise ValueError(registry.unknown('ratio', ratio, ('token', *levels)))

  def loss_fn(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:

    def level(log_ratio):
      if ratio == 'token':
        return log_ratio
      ids = inputs.segment_ids
      if ids is None:
        ids = jnp.ones_like(inputs.token_mask, jnp.int32)
      return levels[ratio](log_ratio, inputs.token_mask, ids)

    loss, ratios, advantages = _score_function(
        inputs, lambda r, a: jnp.minimum(r, ratio_cap) * a, level
    )
    return loss, _metrics(ratios, advantages, ratios > ratio_cap)

  return loss_fn


@register
def spo(*, epsilon: float = 12.5) -> LossFn:
  """Simple policy optimization: r A - |A| / (2 epsilon) (r - 1)^2.

  arXiv:2401.16025. The gradient weight is r (A - |A| / epsilon (r - 1)): it
  fades linearly, is 0 at |r - 1| = epsilon and pulls back beyond. 12.5 is what
  arXiv:2606.09821 uses for it with language models.
  """
  if not epsilon > 0:
    raise ValueError(f'epsilon={epsilon} is not positive.')

  def loss_fn(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    loss, ratio, advantages = _score_function(
        inputs,
        lambda r, a: r * (a - jnp.abs(a) / epsilon * (r - 1)),
        _clamp,
    )
    return loss, _metrics(ratio, advantages, jnp.zeros_like(ratio))

  return loss_fn


@register
def drpo(*, delta: float = 12.5) -> LossFn:
  """DRPO, SPO weighted by mu: r A - |A| / (2 delta) mu (r - 1)^2.

  Eq. 8 and 9 of arXiv:2606.09821, delta 12.5 there. The gradient weight is
  r A (1 - sign(A) (pi - mu) / delta): the penalty is on the probability that
  moved, not on its ratio.
  """
  if not delta > 0:
    raise ValueError(f'delta={delta} is not positive.')

  def loss_fn(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    mu = jnp.exp(jnp.where(inputs.token_mask, inputs.behaviour_logprobs, 0.0))
    loss, ratio, advantages = _score_function(
        inputs,
        lambda r, a: r * (a - jnp.abs(a) / delta * mu * (r - 1)),
        _clamp,
    )
    return loss, _metrics(ratio, advantages, jnp.zeros_like(ratio))

  return loss_fn


def _clamp(log_ratio: jax.Array) -> jax.Array:
  return jnp.clip(log_ratio, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
