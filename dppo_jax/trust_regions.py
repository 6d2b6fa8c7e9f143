"""Which tokens may still push the policy, given how far they have moved.

`outward` is DPPO's and PPO's rule; the others are those it is compared with. A
rule sees divergences, never probabilities of its own making, so any rule works
with any divergence. It returns bool, or float32 weights in [0, 1] where it is
soft. Nothing here carries a gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import divergences
from dppo_jax import registry
from dppo_jax import segments
from dppo_jax.types import by_token
from dppo_jax.types import Threshold

register = registry.Registry('trust region')
build = register.build
names = register.names
config = register.config


class RegionInputs(NamedTuple):
  """What a rule may look at. All [B, T] but the threshold.

  Rules marked `by_token` may see [n] instead.
  """

  divergence: jax.Array  # float32, D(anchor || target).
  log_ratio: jax.Array  # float32, logprobs - anchor_logprobs.
  direction: jax.Array  # float32, > 0 where raising the token moves out.
  anchor_logprobs: jax.Array  # float32
  advantages: jax.Array  # float32
  token_mask: jax.Array  # bool
  segment_ids: jax.Array  # int32, which sequence of its row.
  threshold: Threshold


RegionFn = Callable[[RegionInputs], jax.Array]


def needs_threshold(name: str) -> bool:
  """Whether the rule called `name` drops nothing with divergence 'none'.

  Not `outward`, which is what algorithms without a region have.
  """
  return bool(register.fact(name, 'needs_threshold'))


def limits_tokens(name: str) -> bool:
  """Whether it takes a token for outside if its D is above the limit."""
  return bool(register.fact(name, 'limits_tokens'))


def _limit(inputs: RegionInputs) -> jax.Array:
  return divergences.limit_of(inputs.advantages, inputs.threshold)


def _moving_out(inputs: RegionInputs) -> jax.Array:
  return divergences.moving_out(
      direction=inputs.direction, advantages=inputs.advantages
  )


@register.with_facts(limits_tokens=True)
def outward() -> RegionFn:
  """Drops a token that is outside the trust region and moving further out.

  Eq. 12 of arXiv:2602.04879; with `ratio_gap` PPO's clip.
  """

  @by_token
  def region_fn(inputs: RegionInputs) -> jax.Array:
    return divergences.trust_region(
        divergence=inputs.divergence,
        log_ratio=inputs.direction,
        advantages=inputs.advantages,
        threshold=inputs.threshold,
    )

  return region_fn


@register.with_facts(needs_threshold=True)
def minimal() -> RegionFn:
  """Drops only what lowers a token by `threshold` or more: A < 0, pi < mu.

  The mask of Sec. 5.3 of arXiv:2602.04879, there with binary TV and 0.5 or 0.8
  (>= and not >, as in the paper). It shows that a handful of such updates is
  what makes training unstable.
  """

  @by_token
  def region_fn(inputs: RegionInputs) -> jax.Array:
    low, _ = divergences.low_high(inputs.threshold)
    falling = (inputs.advantages < 0) & (inputs.log_ratio < 0)
    return ~(falling & (inputs.divergence >= low))

  return region_fn


@register.with_facts(needs_threshold=True, limits_tokens=True)
def relaxed(*, alpha: float = 0.1, side: str = 'both') -> RegionFn:
  """`outward`, but a token with mu < alpha is never dropped.

  Sec. 6 of arXiv:2602.04879, which asks what the ratio clip throws away.

  Args:
    alpha: probability under the anchor below which the clip is lifted.
    side: 'high' lifts it for A > 0, 'low' for A < 0, 'both' for both.
  """
  if side not in ('high', 'low', 'both'):
    raise ValueError(registry.unknown('side', side, ('high', 'low', 'both')))
  inner = outward()

  @by_token
  def region_fn(inputs: RegionInputs) -> jax.Array:
    lifted = jnp.exp(inputs.anchor_logprobs) < alpha
    if side == 'high':
      lifted &= inputs.advantages > 0
    if side == 'low':
      lifted &= inputs.advantages < 0
    return inner(inputs) | lifted

  return region_fn


@register.with_facts(limits_tokens=True)
def dual_clip(*, ratio_limit: float = 3.0) -> RegionFn:
  """`outward`, and drops A < 0 tokens whose ratio is above a limit.

  max(min(r A, clip(r) A), c A) for A < 0 (Eq. 5 of arXiv:1912.09729, c = 3) has
  no gradient above c.
  """
  if not ratio_limit > 1:
    raise ValueError(f'ratio_limit={ratio_limit} must be above 1; try 3.')
  inner = outward()

  @by_token
  def region_fn(inputs: RegionInputs) -> jax.Array:
    too_far = (inputs.advantages < 0) & (
        inputs.log_ratio > jnp.log(ratio_limit)
    )
    return inner(inputs) & ~too_far

  return region_fn


@register
def band(*, lowest: float = 0.5, highest: float = 5.0) -> RegionFn:
  """Drops a token whose ratio leaves a band, wherever it moves (IcePop).

  arXiv:2510.18855 drops tokens on which trainer and sampler disagree; its band
  is [0.5, 5]. Decided on the log-ratio, so that no ratio overflows.
  """
  if not 0 < lowest < 1 < highest:
    raise ValueError(
        f'lowest={lowest} and highest={highest} must be on both sides of 1.'
    )

  @by_token
  def region_fn(inputs: RegionInputs) -> jax.Array:
    log_ratio = inputs.log_ratio
    # A NaN stays, so that its update is skipped and counted.
    return ~((log_ratio < jnp.log(lowest)) | (log_ratio > jnp.log(highest)))

  return region_fn


@register.with_facts(needs_threshold=True)
def sequence_ratio() -> RegionFn:
  """PPO's clip on the geometric mean of a sequence's ratios (GSPO).

  Eq. 5 to 7 of arXiv:2507.18071: a sequence is dropped whole. The threshold is
  that of |s - 1|.
  """

  def region_fn(inputs: RegionInputs) -> jax.Array:
    log_ratio = segments.mean(
        inputs.log_ratio, inputs.token_mask, inputs.segment_ids
    )
    return divergences.trust_region(
        divergence=jnp.abs(jnp.expm1(log_ratio)),
        log_ratio=log_ratio,
        advantages=inputs.advantages,
        threshold=inputs.threshold,
    )

  return region_fn


@register.with_facts(needs_threshold=True)
def sequence_divergence(*, statistic: str = 'max') -> RegionFn:
  """Drops a sequence whose divergence, largest or mean, is above the threshold.

  Trust Region Masking, baseline of arXiv:2606.10968 (TRM-Max and TRM-Avg).

  Args:
    statistic: 'max' or 'mean' over the tokens of a sequence.
  """
  statistics = {'max': segments.largest, 'mean': segments.mean}
  if statistic not in statistics:
    raise ValueError(registry.unknown('statistic', statistic, statistics))

  def region_fn(inputs: RegionInputs) -> jax.Array:
    value = statistics[statistic](
        inputs.divergence, inputs.token_mask, inputs.segment_ids
    )
    return ~(value > _limit(inputs))  # A NaN stays, as in `band`.

  return region_fn


@register.with_facts(needs_threshold=True)
def cumulative_prefix(
    *, budget: float = 0.015, smallest_weight: float = 0.8, soft: bool = False
) -> RegionFn:
  """Limits a token's divergence and the sum over its prefix (CPPO).

  Eq. 8 to 10 of arXiv:2606.10968: token t, moving out, is kept iff w_t D_t <= d
  and S_t <= d + budget * W_(t-1), with prefix sums S of w D and W of w, and w
  falling from 1 to `smallest_weight` over the sequence. Dropped tokens still
  count in the sums. Soft (App. C): the weight min(1, 1 / x) with x the larger
  of the two quotients.

  Args:
    budget: of divergence per token; 0.015 for post-trained models.
    smallest_weight: w of the last token.
    soft: weights instead of a mask.
  """

  def region_fn(inputs: RegionInputs) -> jax.Array:
    mask, ids = inputs.token_mask, inputs.segment_ids
    ones = jnp.ones_like(inputs.divergence)
    position = segments.prefix(ones, mask, ids) - 1  # t - 1
    length = segments.total(ones, mask, ids)
    weights = 1 - (1 - smallest_weight) * position / jnp.maximum(length - 1, 1)
    weights = jnp.where(mask, weights, 0.0)
    weighted = weights * jnp.where(mask, inputs.divergence, 0.0)
    prefix = segments.prefix(weighted, mask, ids)  # S_t
    before = segments.prefix(weights, mask, ids) - weights  # W_(t-1)
    limit = _limit(inputs)
    excess = jnp.maximum(weighted / limit, prefix / (limit + budget * before))
    if soft:
      kept = jnp.minimum(1.0, 1.0 / jnp.maximum(excess, 1.0))
      return jnp.where(_moving_out(inputs), kept, 1.0)
    return ~(_moving_out(inputs) & (excess > 1))

  return region_fn


@register
def second_moment(*, limit: float = 0.04) -> RegionFn:
  """Drops the largest (log r)^2 until their mean is within a limit (M2PO).

  arXiv:2510.01161, limit 0.04. Tokens moving out are candidates, the largest
  first, and the mean is over a sequence: the paper's is over a batch, which
  would make the loss depend on how a batch is split. That choice is ours.
  """

  def region_fn(inputs: RegionInputs) -> jax.Array:
    mask, ids = inputs.token_mask, inputs.segment_ids
    moment = jnp.where(mask, jnp.square(inputs.log_ratio), 0.0)
    candidate = mask & _moving_out(inputs)
    # Within a sequence: what must stay first, then candidates from below.
    order = jnp.lexsort((jnp.where(candidate, moment, -1.0), ids), axis=-1)
    take = lambda x: jnp.take_along_axis(x, order, axis=-1)
    rank = segments.prefix(jnp.ones_like(moment), take(mask), take(ids))
    mean = segments.prefix(take(moment), take(mask), take(ids))
    mean /= jnp.maximum(rank, 1)
    # Dropping from above ends at the last candidate up to which the mean is
    # within the limit; below it the mean may be larger again.
    within = take(candidate) & (mean <= limit)
    last = segments.largest(rank, within, take(ids))
    kept = jnp.take_along_axis(
        rank <= last, jnp.argsort(order, axis=-1), axis=-1
    )
    return ~candidate | kept

  return region_fn
