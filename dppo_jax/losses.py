"""Losses per token. What a token counts is the normaliser's business.

PPO, GRPO, clip-higher, CISPO, PG-IS and every DPPO variant are one loss, the
importance-weighted policy gradient inside a trust region, with different
divergences, thresholds, rules and ratio caps (`algorithms.py` has the table).
SPO and DRPO replace the region by a penalty, R2VPO by a constraint with a price
that learns (`duals.py`).

All are in score-function form: a detached weight times the log-prob. Their
gradients are those of the papers; their values are not.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp

from dppo_jax import duals
from dppo_jax import registry
from dppo_jax import segments
from dppo_jax.masking import weighted_mean
from dppo_jax.types import by_token
from dppo_jax.types import LossFn
from dppo_jax.types import LossInputs

register = registry.Registry('loss')
build = register.build
names = register.names
config = register.config

# Beyond it a float32 ratio is useless: exp(20) is 5e8.
_LOG_RATIO_LIMIT = 20.0


def is_constrained(name: str) -> bool:
  """Whether the loss called `name` has a constraint, whose price is a dual."""
  return bool(register.fact(name, 'constrained'))


def _score_function(
    inputs: LossInputs,
    weight_fn: Callable[[jax.Array, jax.Array], jax.Array],
    log_ratio_fn: Callable[[jax.Array], jax.Array] = lambda x: x,
    *,
    ratio_cap: float = math.inf,
    without_advantage: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """-weight * logprobs on kept tokens, 0 elsewhere.

  Args:
    inputs: of the loss.
    weight_fn: (ratio, advantages) -> weight, all [B, T].
    log_ratio_fn: changes the log-ratio before the exponential.
    ratio_cap: counted, not applied.
    without_advantage: whether tokens with advantage 0 have a weight too.

  Returns:
    loss and metrics, all [B, T] float32.
  """
  # Replaced before the exponential, not multiplied by zero after it: a padded,
  # dropped or unrewarded token may hold anything.
  keep = (inputs.trust_region > 0) & inputs.token_mask
  if not without_advantage:
    keep &= inputs.advantages != 0
  logprobs = jnp.where(keep, inputs.logprobs, 0.0)
  log_ratio = log_ratio_fn(_log_ratio(inputs))
  log_ratio = jnp.where(keep, log_ratio, 0)
  advantages = jnp.where(keep, inputs.advantages, 0.0)
  ratio = jnp.exp(log_ratio)
  # Where it is soft, it is made of a divergence, which says what counts only.
  region = jax.lax.stop_gradient(jnp.where(keep, inputs.trust_region, False))
  weight = weight_fn(ratio, advantages) * region
  return -weight * logprobs, {
      'surrogate': ratio * advantages,
      'capped': (keep & (ratio > ratio_cap)).astype(jnp.float32),
      'gradient_weight': jnp.abs(weight),
  }


def _log_ratio(inputs: LossInputs) -> jax.Array:
  """The log-ratio without a gradient, 0 on padding. [B, T]."""
  valid = inputs.token_mask
  return jax.lax.stop_gradient(
      jnp.where(valid, inputs.logprobs, 0.0)
      - jnp.where(valid, inputs.behaviour_logprobs, 0.0)
  )


_LEVELS = {'sequence': segments.total, 'geometric': segments.mean}


def _check_level(ratio: str) -> None:
  if ratio not in ('token', *_LEVELS):
    raise ValueError(registry.unknown('ratio', ratio, ('token', *_LEVELS)))


def _at_level(log_ratio: jax.Array, inputs: LossInputs, ratio: str):
  """The log-ratio of each token, of its sequence, or its mean. [B, T]."""
  if ratio == 'token':
    return log_ratio
  ids = _segment_ids(inputs)
  return _LEVELS[ratio](log_ratio, inputs.token_mask, ids)


def _segment_ids(inputs: LossInputs) -> jax.Array:
  if inputs.segment_ids is None:
    return jnp.ones_like(inputs.token_mask, jnp.int32)
  return inputs.segment_ids


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
  _check_level(ratio)

  def loss_fn(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    return _score_function(
        inputs,
        lambda r, a: jnp.minimum(r, ratio_cap) * a,
        lambda log_ratio: _at_level(log_ratio, inputs, ratio),
        ratio_cap=ratio_cap,
    )

  return by_token(loss_fn) if ratio == 'token' else loss_fn


@register
def spo(*, epsilon: float = 12.5) -> LossFn:
  """Simple policy optimization: r A - |A| / (2 epsilon) (r - 1)^2.

  arXiv:2401.16025. The gradient weight is r (A - |A| / epsilon (r - 1)): it
  fades linearly, is 0 at |r - 1| = epsilon and pulls back beyond. 12.5 is what
  arXiv:2606.09821 uses for it with language models.
  """
  if not epsilon > 0:
    raise ValueError(f'epsilon={epsilon} is not positive.')

  @by_token
  def loss_fn(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    return _score_function(
        inputs,
        lambda r, a: r * (a - jnp.abs(a) / epsilon * (r - 1)),
        _clamp,
    )

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

  @by_token
  def loss_fn(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    mu = jnp.exp(jnp.where(inputs.token_mask, inputs.behaviour_logprobs, 0.0))
    return _score_function(
        inputs,
        lambda r, a: r * (a - jnp.abs(a) / delta * mu * (r - 1)),
        _clamp,
    )

  return loss_fn


@register.with_facts(constrained=True)
def r2vpo(
    *,
    center: str = 'one',
    ratio: str = 'token',
    per: str = 'batch',
    stop_at_turning_point: bool = False,
) -> LossFn:
  """Ratio-variance regularised policy optimization: r A - lambda (r - 1)^2.

  The Lagrangian of "maximise E[r A] subject to E[(r - 1)^2] <= limit", over
  tokens that the behaviour policy drew; there E[r] = 1, so the constraint is on
  the variance of r, which is chi^2(target || behaviour) and twice the KL
  divergence up to third order. The gradient weight is r (A - 2 lambda (r - 1)):
  a brake that grows smoothly instead of a clip. It is 0 at the turning point

    r = 1 + A / (2 lambda)

  and pulls back beyond it. Unlike SPO's and DRPO's, the penalty does not depend
  on the advantage, so tokens with A = 0 are held back too.

  arXiv:2601.03320, of which only the abstract could be read: the form of the
  constraint, the options and all numbers are this project's own choice. lambda
  and limit come with the inputs, see `duals.py`.

  Args:
    center: 'one', the second moment around 1; or 'mean', the variance around
      the mean ratio of all tokens in the call, which must then be a whole
      mini-batch.
    ratio: 'token'; 'sequence', the product over the sequence; or 'geometric',
      its mean per token.
    per: 'batch', one constraint on the mean over all tokens; or 'sequence',
      where only sequences whose own mean is above the limit are braked, and E[]
      counts each sequence once. In both cases the multiplier follows E[]
      against the limit; 'sequence' only chooses who pays for it.
    stop_at_turning_point: silence tokens beyond it instead of pulling them
      back.
  """
  _check_level(ratio)
  for name, value, known in (
      ('center', center, ('one', 'mean')), ('per', per, ('batch', 'sequence'))
  ):
    if value not in known:
      raise ValueError(registry.unknown(name, value, known))

  if center == 'mean' and per == 'sequence':
    raise ValueError(
        "center='mean' and per='sequence' do not go together: the mean ratio "
        'is that of all sequences, and only some would be braked. Use '
        "center='one'."
    )

  def loss_fn(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    if inputs.multiplier is None or inputs.limit is None:
      raise ValueError(
          'Loss r2vpo needs the multiplier and the limit of a dual, for '
          'example config.dual.name=projected_ascent.'
      )
    mask = inputs.token_mask
    level = lambda log_ratio: _clamp(_at_level(log_ratio, inputs, ratio))
    ratios = jnp.exp(jnp.where(mask, level(_log_ratio(inputs)), 0.0))
    weights = mask.astype(jnp.float32)
    if ratio != 'token' or per == 'sequence':
      weights /= jnp.maximum(
          segments.total(weights, mask, _segment_ids(inputs)), 1
      )
    middle = 1.0
    if center == 'mean':
      middle = weighted_mean(ratios, weights)
    values = jnp.square(ratios - middle)
    price = jnp.broadcast_to(inputs.multiplier, mask.shape)
    if per == 'sequence':
      values = segments.mean(values, mask, _segment_ids(inputs))
      price = jnp.where(values > inputs.limit, price, 0.0)

    def brake(r, a):
      """The advantage less what the constraint charges."""
      return a - 2 * price * (r - middle)

    def weight(r, a):
      braked = brake(r, a)
      if stop_at_turning_point:
        braked = jnp.where(braked * a < 0, 0.0, braked)
      return r * braked

    advantages = jnp.where(mask, inputs.advantages, 0.0)
    loss, metrics = _score_function(
        inputs, weight, level, without_advantage=True
    )
    beyond = mask & (brake(ratios, advantages) * advantages < 0)
    return loss, metrics | {
        'constraint': duals.Constraint(values, weights, beyond)
    }

  if (center, ratio, per) == ('one', 'token', 'batch'):
    return by_token(loss_fn)
  return loss_fn


def _clamp(log_ratio: jax.Array) -> jax.Array:
  return jnp.clip(log_ratio, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
