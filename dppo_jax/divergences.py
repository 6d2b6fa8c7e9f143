"""Divergences between behaviour and target policy, measured token by token.

A divergence is `(record, measure, threshold)`: what the behaviour policy must
remember at a position, how the target policy is compared with it, and how much
is allowed. PPO's clip is one of them, |ratio - 1|: a one-sample estimate of the
total variation (Eq. 11 of arXiv:2602.04879). DPPO (the same paper) measures the
divergence itself, on a coarser partition of the vocabulary that costs next to
nothing: {sampled token, rest} (binary, Eq. 13 and 14) or {top K, sampled token,
rest} (Eq. 15 and 16). Every coarsening is a lower bound of the full divergence.

Throughout, `...` is any batch shape and V the vocabulary. Logits are those of
the distribution that is really sampled, that is after temperature. Everything
is computed in float32, whatever the dtype of the logits. No gradient flows
through a divergence: it selects tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import registry
from dppo_jax.types import Divergence
from dppo_jax.types import Threshold

register = registry.Registry('divergence')
build = register.build
names = register.names
config = register.config

# A float32 log-prob closer to 0 than this does not tell 1 - p from 0; one below
# the floor does not tell p from 0. Both keep a KL finite at p = 0 and p = 1.
_LOG_ALMOST_ONE = -(2.0**-24)
_LOG_ALMOST_ZERO = -87.0
_LOWEST = -1e4  # Its exponential is 0.


def trust_region(
    *,
    divergence: jax.Array,
    log_ratio: jax.Array,
    advantages: jax.Array,
    threshold: Threshold,
) -> jax.Array:
  """Keeps a token unless it is outside the trust region and moving further out.

  The mask of Eq. 12 of arXiv:2602.04879, all inequalities strict. A token whose
  advantage is 0 is always kept: it pushes nowhere.

  Args:
    divergence: [...] D(behaviour || target), in the divergence's own unit.
    log_ratio: [...] logprobs - behaviour_logprobs, in nats. The direction is
      decided here and not on probabilities, which round to ties.
    advantages: [...]; only the sign is used.
    threshold: largest divergence at which a token may still push outwards; a
      pair is (low, high), for negative and for positive advantages.

  Returns:
    [...] bool. Tokens that pull the policy back are always kept.
  """
  out = moving_out(direction=log_ratio, advantages=advantages)
  return ~(out & (divergence > limit_of(advantages, threshold)))


def moving_out(*, direction: jax.Array, advantages: jax.Array) -> jax.Array:
  """Whether an update pushes a token further the way it has gone. [...] bool.

  Args:
    direction: [...] > 0 where raising the token's probability moves out.
    advantages: [...]; who has 0 pushes nowhere.
  """
  up = (advantages > 0) & (direction > 0)
  down = (advantages < 0) & (direction < 0)
  return up | down


def limit_of(advantages: jax.Array, threshold: Threshold) -> jax.Array:
  """The threshold that holds for a token, by its advantage's sign. [...]."""
  low, high = low_high(threshold)
  return jnp.where(advantages > 0, high, low)


def low_high(threshold: Threshold) -> tuple[float, float]:
  """The thresholds for negative and for positive advantages."""
  if isinstance(threshold, (tuple, list)):
    low, high = threshold
    return low, high
  return threshold, threshold


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Log-probs of `tokens`. [..., V], [...] int -> [...] float32."""
  shifted, log_sum = _shift(logits)
  chosen = jnp.take_along_axis(shifted, tokens[..., None], axis=-1)
  return (chosen - log_sum)[..., 0]


@jax.custom_vjp
def logprobs_and_entropy(
    logits: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Log-probs of `tokens`, and the entropy in nats.

  Its gradient reads the logits once.

  Args:
    logits: [..., V]; -inf is a token without mass.
    tokens: [...] int32.

  Returns:
    [...] float32 each.
  """
  return _logprobs_and_entropy(logits, tokens)[0]


def _logprobs_and_entropy(logits, tokens):
  largest = _largest(logits)
  shifted, log_sum = _shift(logits, largest)
  chosen = jnp.take_along_axis(shifted, tokens[..., None], axis=-1)
  # 0 times -inf is not a number.
  terms = jnp.exp(shifted) * jnp.maximum(shifted, _LOWEST)
  mean = jnp.sum(terms, axis=-1, keepdims=True) / jnp.exp(log_sum)
  entropy = log_sum - mean
  of_rows = largest, log_sum, entropy
  return ((chosen - log_sum)[..., 0], entropy[..., 0]), of_rows


def _logprobs_and_entropy_forward(logits, tokens):
  out, of_rows = _logprobs_and_entropy(logits, tokens)
  return out, (logits, tokens, of_rows)


def _logprobs_and_entropy_backward(kept, gradients):
  logits, tokens, (largest, log_sum, entropy) = kept
  of_chosen, of_entropy = (x[..., None] for x in gradients)
  shifted = logits.astype(jnp.float32) - largest
  # Divided, as another difference would round once more.
  probs = jnp.exp(shifted) / jnp.exp(log_sum)
  ids = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1)
  change = jnp.where(ids == tokens[..., None], of_chosen, 0.0)
  # d entropy / d logit = -p (log p + entropy).
  change -= probs * (
      of_chosen
      + of_entropy * (jnp.maximum(shifted, _LOWEST) - log_sum + entropy)
  )
  return change.astype(logits.dtype), None


logprobs_and_entropy.defvjp(
    _logprobs_and_entropy_forward, _logprobs_and_entropy_backward
)


def _largest(logits: jax.Array) -> jax.Array:
  """[..., V] -> [..., 1] float32, a constant: nothing depends on its choice."""
  largest = jnp.max(logits.astype(jnp.float32), axis=-1, keepdims=True)
  return jax.lax.stop_gradient(largest)


def _shift(
    logits: jax.Array, largest: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Logits minus their maximum, and the log of their sum of exponentials.

  Log-probs are the difference of the two. Subtracting a log-sum-exp from the
  raw logits instead would cost a near-certain token the digits that tell 1 - p
  from 0: logits around 30 round at 2e-6.

  Args:
    logits: [..., V].
    largest: their maximum, if it is there.

  Returns:
    [..., V] and [..., 1] float32.
  """
  largest = _largest(logits) if largest is None else largest
  shifted = logits.astype(jnp.float32) - largest
  return shifted, jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))


def binary_total_variation(
    *, behaviour: jax.Array, target: jax.Array
) -> jax.Array:
  """|mu(a) - pi(a)| from log-probs of the sampled token. [...] -> [...]."""
  return jnp.abs(jnp.exp(behaviour) - jnp.exp(target))


def binary_kullback_leibler(
    *, behaviour: jax.Array, target: jax.Array
) -> jax.Array:
  """kl(behaviour || target) of Bernoullis from log-probs. [...] -> [...]."""
  return kl_of_buckets(
      behaviour=_with_rest(behaviour[..., None]),
      target=_with_rest(target[..., None]),
  )


def tv_of_buckets(*, behaviour: jax.Array, target: jax.Array) -> jax.Array:
  """Total variation of two partitions. [..., buckets] log-masses -> [...]."""
  gap = jnp.abs(jnp.exp(behaviour) - jnp.exp(target))
  return 0.5 * jnp.sum(gap, axis=-1)


def kl_of_buckets(*, behaviour: jax.Array, target: jax.Array) -> jax.Array:
  """kl(behaviour || target) of two partitions, in nats, never negative.

  Args:
    behaviour: [..., buckets] log-masses; -inf is a bucket without mass.
    target: [..., buckets] log-masses.

  Returns:
    [...] float32, finite even where the target has no mass.
  """
  behaviour = jnp.maximum(behaviour, _LOG_ALMOST_ZERO)
  target = jnp.maximum(target, _LOG_ALMOST_ZERO)
  terms = jnp.exp(behaviour) * (behaviour - target)
  # Rounding can leave -1e-8 where the two are equal.
  return jnp.maximum(jnp.sum(terms, axis=-1), 0.0)


def _with_rest(log_masses: jax.Array) -> jax.Array:
  """Appends log(1 - sum of masses). [..., K] -> [..., K + 1]."""
  total = jax.nn.logsumexp(log_masses, axis=-1, keepdims=True)
  return jnp.concatenate([log_masses, _log1mexp(total)], axis=-1)


def _log1mexp(log_p: jax.Array) -> jax.Array:
  """log(1 - exp(log_p)) for log_p <= 0, accurate at both ends."""
  log_p = jnp.minimum(log_p, _LOG_ALMOST_ONE)
  near_one = log_p > -jnp.log(2.0)
  # Double where: neither branch may see the other's argument.
  from_small = jnp.log(-jnp.expm1(jnp.where(near_one, log_p, -1.0)))
  from_large = jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, log_p)))
  return jnp.where(near_one, from_small, from_large)


def _thresholds(
    threshold: float, low: float | None, high: float | None
) -> Threshold:
  """One threshold, or (low, high) where either is given on its own."""
  given = {'threshold': threshold, 'threshold_low': low, 'threshold_high': high}
  for name, value in given.items():
    if value is not None and not value > 0:
      raise ValueError(
          f'{name}={value} is not positive: no token could ever leave the '
          'behaviour policy. Use a value above 0, or divergence none.'
      )
  low = threshold if low is None else low
  high = threshold if high is None else high
  return low if low == high else (low, high)


@register
def none() -> Divergence:
  """No trust region: every token may push. PG-IS and CISPO."""

  def record(logits, tokens):
    del logits, tokens
    return ()

  def measure(logits, tokens, recorded):
    del logits, recorded
    return jnp.zeros(tokens.shape, jnp.float32)

  return Divergence(record, measure, float('inf'))


@register
def ratio_gap(
    *,
    threshold: float = 0.2,
    threshold_low: float | None = None,
    threshold_high: float | None = None,
) -> Divergence:
  """|pi(a) / mu(a) - 1|: the clip of PPO and GRPO, seen as a divergence.

  Its trust region has exactly the gradient of PPO's clipped objective (Eq. 10
  and 11 of arXiv:2602.04879). GRPO uses 0.2; clip-higher raises
  `threshold_high` to 0.28 (0.27 in that paper's scaling runs).
  """

  def measure(logits, tokens, recorded):
    target = token_logprobs(logits, tokens)
    # -inf under both policies is no change; -inf minus -inf would be NaN.
    floor = jnp.finfo(jnp.float32).min
    log_ratio = jnp.maximum(target, floor) - jnp.maximum(recorded, floor)
    return jnp.abs(jnp.expm1(log_ratio))

  limits = _thresholds(threshold, threshold_low, threshold_high)
  return Divergence(token_logprobs, measure, limits)


@register
def binary_tv(
    *,
    threshold: float = 0.15,
    threshold_low: float | None = None,
    threshold_high: float | None = None,
) -> Divergence:
  """Total variation between Bernoulli(mu(a)) and Bernoulli(pi(a)), in [0, 1].

  |mu(a) - pi(a)| at the sampled token a: a lower bound of the full TV.
  Eq. 13 of arXiv:2602.04879, whose stability runs use threshold 0.15 (App. C.1)
  and whose scaling runs use 0.2 (App. E); the smaller one is the default here.
  """

  def measure(logits, tokens, recorded):
    return binary_total_variation(
        behaviour=recorded, target=token_logprobs(logits, tokens)
    )

  limits = _thresholds(threshold, threshold_low, threshold_high)
  return Divergence(token_logprobs, measure, limits)


@register
def binary_kl(
    *,
    threshold: float = 0.05,
    threshold_low: float | None = None,
    threshold_high: float | None = None,
) -> Divergence:
  """kl(Bernoulli(mu(a)) || Bernoulli(pi(a))) at the sampled token a, in nats.

  Eq. 14 of arXiv:2602.04879, which uses 0.05 throughout (App. C.1 and E). The
  probability of "not a" comes from expm1, so nothing is added to it.
  """

  def measure(logits, tokens, recorded):
    return binary_kullback_leibler(
        behaviour=recorded, target=token_logprobs(logits, tokens)
    )

  limits = _thresholds(threshold, threshold_low, threshold_high)
  return Divergence(token_logprobs, measure, limits)


class TopK(NamedTuple):
  """Explicit buckets of a top-K partition; the rest is implied."""

  tokens: jax.Array  # [..., K + 1] int32; the last one is the sampled token.
  logprobs: jax.Array  # [..., K + 1] float32, behaviour policy.
  valid: jax.Array  # [..., K + 1] bool, False on a bucket not in the set.


def explicit_mass(recorded: TopK) -> jax.Array:
  """The behaviour policy's probability of all explicit buckets. [...]."""
  probs = jnp.where(recorded.valid, jnp.exp(recorded.logprobs), 0.0)
  return jnp.sum(probs, axis=-1)


def _record_top_k(k: int, construction: str):
  """What is noted of logits [..., V] and tokens [...]: a `TopK`."""
  if k < 1:
    raise ValueError(f'k={k} is not positive; the paper uses k=20.')
  if construction not in ('union', 'replace'):
    raise ValueError(
        registry.unknown('construction', construction, ('union', 'replace'))
    )

  def record(logits, tokens):
    vocabulary = logits.shape[-1]
    if k > vocabulary:
      raise ValueError(
          f'k={k} is larger than the vocabulary of {vocabulary} tokens; use '
          f'k<={vocabulary} or divergence full_tv or full_kl.'
      )
    shifted, log_sum = _shift(logits)
    top, ids = jax.lax.top_k(shifted, k)
    inside = jnp.any(ids == tokens[..., None], axis=-1, keepdims=True)
    valid = jnp.broadcast_to(True, ids.shape)
    if construction == 'replace':
      # The sampled token takes the place of the last of the top K.
      valid = jnp.concatenate([valid[..., 1:], inside], axis=-1)
    sampled = jnp.take_along_axis(shifted, tokens[..., None], axis=-1)
    return TopK(
        tokens=jnp.concatenate([ids, tokens[..., None]], axis=-1),
        logprobs=jnp.concatenate([top, sampled], axis=-1) - log_sum,
        valid=jnp.concatenate([valid, ~inside], axis=-1),
    )

  return record


def _buckets(logits: jax.Array, recorded: TopK) -> dict[str, jax.Array]:
  """Log-masses of both policies, the rest as the last. [..., K + 2] each."""
  shifted, log_sum = _shift(logits)
  target = jnp.take_along_axis(shifted, recorded.tokens, axis=-1) - log_sum
  # An invalid bucket has no mass under either policy: its tokens are counted
  # elsewhere, as another bucket or in the rest.
  behaviour = jnp.where(recorded.valid, recorded.logprobs, -jnp.inf)
  target = jnp.where(recorded.valid, target, -jnp.inf)
  return {'behaviour': _with_rest(behaviour), 'target': _with_rest(target)}


def _over_top_k(distance, k: int, construction: str, limits) -> Divergence:
  """A distance of both policies' buckets, where the top K are recorded."""

  def measure(logits, tokens, recorded):
    del tokens  # Already among the recorded buckets.
    return distance(**_buckets(logits, recorded))

  return Divergence(_record_top_k(k, construction), measure, limits)


@register
def topk_tv(
    *,
    threshold: float = 0.2,
    threshold_low: float | None = None,
    threshold_high: float | None = None,
    k: int = 20,
    construction: str = 'union',
) -> Divergence:
  """Total variation over {top K of mu, sampled token, rest}, in [0, 1].

  Eq. 15 of arXiv:2602.04879 with its K = 20 and, from its Top-K ablation (App.
  F.3), threshold 0.2. The paper (Sec. 4.4) unites the top K with the sampled
  token, which makes up to K + 1 explicit buckets: `construction='union'`. The
  authors' code instead lets a sampled token outside the top K replace the last
  of them, `'replace'`, which is coarser and so masks less.
  """
  limits = _thresholds(threshold, threshold_low, threshold_high)
  return _over_top_k(tv_of_buckets, k, construction, limits)


@register
def topk_kl(
    *,
    threshold: float = 0.05,
    threshold_low: float | None = None,
    threshold_high: float | None = None,
    k: int = 20,
    construction: str = 'union',
) -> Divergence:
  """kl(behaviour || target) over {top K of mu, sampled token, rest}, in nats.

  Eq. 16 of arXiv:2602.04879, K = 20, threshold 0.05 (App. F.3). For
  `construction` see `topk_tv`.
  """
  limits = _thresholds(threshold, threshold_low, threshold_high)
  return _over_top_k(kl_of_buckets, k, construction, limits)


@register
def predictive_kl(
    *,
    threshold: float = 0.05,
    threshold_low: float | None = None,
    threshold_high: float | None = None,
    k: int = 20,
    construction: str = 'union',
) -> Divergence:
  """`topk_kl` whose direction is that of the gradient step, not of the ratio.

  A policy-gradient step with A > 0 adds e_a - pi to the logits and the gradient
  of kl(mu || pi) with respect to them is pi - mu, so the step moves out iff
  (pi - mu) . (e_a - pi) > 0, over the explicit buckets and the rest as one
  (predictive divergence masks, arXiv:2607.10848; the derivation is ours). That
  can differ from the ratio's sign: a token above its old probability may lie on
  the way back where another token has grown more.
  """
  base = topk_kl(
      threshold=threshold,
      threshold_low=threshold_low,
      threshold_high=threshold_high,
      k=k,
      construction=construction,
  )

  def direction(logits, tokens, recorded):
    masses = _buckets(logits, recorded)
    target = jnp.exp(masses['target'])
    gap = target - jnp.exp(masses['behaviour'])
    sampled = jnp.where(
        recorded.valid, recorded.tokens == tokens[..., None], False
    )
    at_sampled = jnp.sum(jnp.where(sampled, gap[..., :-1], 0.0), axis=-1)
    return at_sampled - jnp.sum(target * gap, axis=-1)

  return base._replace(direction=direction)


def _all_logprobs(logits: jax.Array, tokens: Any = None) -> jax.Array:
  """[..., V] float32 log-probs of the whole vocabulary."""
  del tokens
  return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


@register
def full_tv(
    *,
    threshold: float = 0.2,
    threshold_low: float | None = None,
    threshold_high: float | None = None,
) -> Divergence:
  """Total variation over the whole vocabulary: what the others approximate.

  It remembers [..., V] log-probs, so it is for small vocabularies and tests.
  The paper never runs it; the threshold is that of `topk_tv`.
  """

  def measure(logits, tokens, recorded):
    del tokens
    return tv_of_buckets(behaviour=recorded, target=_all_logprobs(logits))

  limits = _thresholds(threshold, threshold_low, threshold_high)
  return Divergence(_all_logprobs, measure, limits)


@register
def full_kl(
    *,
    threshold: float = 0.05,
    threshold_low: float | None = None,
    threshold_high: float | None = None,
) -> Divergence:
  """kl(behaviour || target) over the whole vocabulary, in nats.

  It remembers [..., V] log-probs, so it is for small vocabularies and tests.
  The paper never runs it; the threshold is that of `topk_kl`.
  """

  def measure(logits, tokens, recorded):
    del tokens
    return kl_of_buckets(behaviour=recorded, target=_all_logprobs(logits))

  limits = _thresholds(threshold, threshold_low, threshold_high)
  return Divergence(_all_logprobs, measure, limits)
