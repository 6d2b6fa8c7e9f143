"""What happened to the trust region, as scalars, computed in the step.

The learner hands over every token as each update saw it; everything here is a
masked statistic of that. U updates, b sequences of a mini-batch, T tokens.
`pi` is the target policy's probability of the sampled token, `mu` the behaviour
policy's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import ages
from dppo_jax import divergences
from dppo_jax import groups
from dppo_jax.masking import effective_share
from dppo_jax.masking import masked_max
from dppo_jax.masking import masked_mean
from dppo_jax.masking import masked_min
from dppo_jax.masking import masked_quantile
from dppo_jax.masking import masked_sum
from dppo_jax.masking import weighted_mean
from dppo_jax.masking import where_valid
from dppo_jax.types import given
from dppo_jax.types import PyTree
from dppo_jax.types import Rollout
from dppo_jax.types import Threshold


class Router(NamedTuple):
  """What routers did, mean over layers, [U, b, T]; () where not measured."""

  changed: PyTree = ()  # float32, share of replayed experts not its own choice
  changed_sets: PyTree = ()  # float32, share of layers with such experts
  balance: PyTree = ()  # float32, the same for all tokens of a micro-batch


class TokenStats(NamedTuple):
  """Tokens as the updates saw them. All [U, b, T]."""

  targets: jax.Array  # int32
  token_mask: jax.Array  # bool
  logprobs: jax.Array  # float32
  behaviour_logprobs: jax.Array  # float32
  divergence: jax.Array  # float32
  direction: jax.Array  # float32, > 0 where raising the token moves out
  trust_region: jax.Array  # float32, 1 kept, 0 dropped, between where soft
  advantages: jax.Array  # float32
  entropy: jax.Array  # float32, nats
  surrogate: jax.Array  # float32, ratio * advantage of kept tokens
  capped: jax.Array  # float32, 1 where the ratio was truncated
  age: jax.Array  # int32, optimizer updates since the row was sampled
  gradient_weight: jax.Array  # float32, |factor of grad log pi| in the loss
  weights: jax.Array  # float32, of the normalizer
  replayed: PyTree = ()  # bool, from the buffer; () where there is none
  reference_kl: PyTree = ()  # float32, as estimated; () without a penalty
  constraint: PyTree = ()  # `duals.Constraint`; () where there is none
  router: Router = Router()
  own: PyTree = ()  # float32, by name: what a loss says beside all that.


def token_metrics(
    stats: TokenStats, *, threshold: Threshold | None
) -> dict[str, jax.Array]:
  """Scalars of the trust region, the mismatch and the ratio.

  Shares are of all sampled tokens unless the name says `positive` or
  `negative`: then of those with an advantage of that sign. A token without
  advantage is in no such share. `on_policy/` looks only at tokens of age 0,
  where both policies have the same parameters: what is left there is the
  training-inference mismatch.

  `mask/outside`, `mask/coming_back` are there only with a threshold; None
  where a rule does not take a token for outside that is above it.

  What `_telling` computes is there once more for the tokens of each age:
  `mask/fraction` of ages 2 and 3 is `by_age/2-3/mask_fraction`.
  """
  mask = stats.token_mask
  logprobs = where_valid(stats.logprobs, mask)
  behaviour = where_valid(stats.behaviour_logprobs, mask)
  log_ratio = logprobs - behaviour
  gap = jnp.exp(logprobs) - jnp.exp(behaviour)  # pi - mu
  masked = mask & ~(stats.trust_region > 0)
  pair = {'behaviour': behaviour, 'target': logprobs}
  binary_tv = divergences.binary_total_variation(**pair)
  binary_kl = divergences.binary_kullback_leibler(**pair)
  buckets = ages.bucket(stats.age)
  by_age = [mask & (buckets == i) for i in range(ages.NUM_BUCKETS)]
  # One program for all: nine would take as long to compile as the learner.
  values = jax.vmap(
      lambda chosen: _telling(stats, chosen, masked, log_ratio, gap, binary_tv)
  )(jnp.stack([mask, *by_age]))
  metrics = {name: x[0] for name, x in values.items()}
  for i, age in enumerate(ages.names()):
    metrics[f'by_age/{age}/tokens'] = jnp.sum(by_age[i])
    for name, x in values.items():
      metrics[f'by_age/{age}/{name.replace("/", "_")}'] = x[i + 1]
  metrics |= _mask_metrics(stats, masked, gap, threshold)
  metrics |= _divergence_metrics(stats, masked, binary_tv, binary_kl)
  metrics |= _constraint_metrics(stats)
  metrics |= _replay_metrics(stats)
  metrics |= _router_metrics(stats)
  if given(stats.reference_kl):
    metrics['reference/kl'] = masked_mean(stats.reference_kl, mask)
  for name, values in dict(stats.own).items():
    metrics[f'loss/{name}'] = masked_mean(values, mask)
  fresh = by_age[0]
  return metrics | {
      'ratio/mean': masked_mean(jnp.exp(log_ratio), mask),
      'ratio/log_abs_max': masked_max(jnp.abs(log_ratio), mask),
      'mismatch/prob_gap_max': masked_max(gap, mask),
      'mismatch/prob_gap_min': masked_min(gap, mask),
      'on_policy/log_ratio_max': masked_max(jnp.abs(log_ratio), fresh),
      'on_policy/divergence_max': masked_max(stats.divergence, fresh),
      'on_policy/prob_gap_mean': masked_mean(jnp.abs(gap), fresh),
      'loss/surrogate': masked_mean(stats.surrogate, mask),
      'loss/capped': masked_mean(stats.capped, mask),
  }


def _telling(stats, chosen, masked, log_ratio, gap, binary_tv):
  """The most telling numbers of the tokens `chosen` [U, b, T]."""
  positive = chosen & (stats.advantages > 0)
  negative = chosen & (stats.advantages < 0)
  divergence = stats.divergence
  ratio = jnp.exp(log_ratio)
  mean = masked_mean(ratio, chosen)
  return {
      'mask/fraction': masked_mean(masked, chosen),
      'mask/positive': masked_mean(masked, positive),
      'mask/negative': masked_mean(masked, negative),
      # What Sec. 5.3 of arXiv:2602.04879 blames for instability.
      'mask/bad_updates': masked_mean(negative & (gap <= -0.5), chosen),
      'divergence/mean': masked_mean(divergence, chosen),
      'divergence/max': masked_max(divergence, chosen),
      'divergence/q50': masked_quantile(divergence, chosen, q=0.5),
      'divergence/q99': masked_quantile(divergence, chosen, q=0.99),
      'binary_tv/mean': masked_mean(binary_tv, chosen),
      'mismatch/prob_gap_mean': masked_mean(jnp.abs(gap), chosen),
      'ratio/max': masked_max(ratio, chosen),
      # E(r - 1)^2 and Var(r) differ where the sample mean of r is not 1.
      'ratio/second_moment': masked_mean(jnp.square(ratio - 1), chosen),
      'ratio/variance': masked_mean(jnp.square(ratio - mean), chosen),
      'ratio/effective_sample_size': effective_share(log_ratio, chosen),
      # One-sample estimate of kl(behaviour || target) that is never negative.
      'ratio/k3': masked_mean(jnp.expm1(log_ratio) - log_ratio, chosen),
      'entropy/mean': masked_mean(stats.entropy, chosen),
  }


def _mask_metrics(stats, masked, gap, threshold):
  mask, advantages = stats.token_mask, stats.advantages
  bad = (advantages < 0) & (gap <= -0.5)
  metrics = {
      'mask/of_nonzero': masked_mean(masked, mask & (advantages != 0)),
      # Below 1 where a soft rule weighs tokens down.
      'mask/weight_mean': masked_mean(stats.trust_region, mask),
      'mask/bad_updates_kept': masked_mean(bad & ~masked, mask),
      'mask/zero_gradient': masked_mean(stats.gradient_weight == 0, mask),
  }
  if threshold is None:
    return metrics
  limit = divergences.limit_of(advantages, threshold)
  outside = mask & (stats.divergence > limit)
  coming_back = outside & divergences.moving_out(
      direction=-stats.direction, advantages=advantages
  )
  return metrics | {
      'mask/outside': masked_mean(outside, mask),
      'mask/coming_back': masked_mean(coming_back, mask),
  }


def _divergence_metrics(stats, masked, binary_tv, binary_kl):
  mask, divergence = stats.token_mask, stats.divergence
  return {
      'divergence/q90': masked_quantile(divergence, mask, q=0.9),
      'divergence/mean_masked': masked_mean(divergence, masked),
      'divergence/mean_kept': masked_mean(divergence, mask & ~masked),
      'binary_tv/max': masked_max(binary_tv, mask),
      'binary_tv/q50': masked_quantile(binary_tv, mask, q=0.5),
      'binary_tv/q99': masked_quantile(binary_tv, mask, q=0.99),
      'binary_kl/mean': masked_mean(binary_kl, mask),
      'binary_kl/max': masked_max(binary_kl, mask),
      'binary_kl/q50': masked_quantile(binary_kl, mask, q=0.5),
      'binary_kl/q99': masked_quantile(binary_kl, mask, q=0.99),
  }


def _constraint_metrics(stats):
  """How far the ratios are from what a constrained loss allows."""
  if not given(stats.constraint):
    return {}
  values, weights, beyond = stats.constraint
  values = jnp.where(weights > 0, values, 0.0)
  return {
      'constraint/value': weighted_mean(values, weights),
      'constraint/beyond_turning_point': masked_mean(beyond, stats.token_mask),
  }


def _replay_metrics(stats):
  """How much of what is learned comes from replayed tokens."""
  if not given(stats.replayed):
    return {}
  mass = where_valid(stats.gradient_weight * stats.weights, stats.token_mask)
  total = jnp.sum(mass)
  replayed = masked_sum(mass, stats.replayed)
  return {
      # Mass: sum of |factor of grad log pi|.
      'replay/gradient_share': replayed / jnp.where(total > 0, total, 1.0),
      'replay/token_share': masked_mean(stats.replayed, stats.token_mask),
  }


def _router_metrics(stats):
  """How far the learner's routers are from those that sampled."""
  measured = {
      'router/changed_experts': stats.router.changed,
      'router/changed_sets': stats.router.changed_sets,
      'router/balance': stats.router.balance,
  }
  return {
      name: masked_mean(x, stats.token_mask)
      for name, x in measured.items()
      if given(x)
  }


def record_metrics(rollout: Rollout) -> dict[str, jax.Array]:
  """The behaviour policy's mass on explicit buckets, if it has such (Fig. 12).

  The nearer to 1, the tighter a Top-K divergence bounds the full one.
  """
  if not isinstance(rollout.record, divergences.TopK):
    return {}
  mass = divergences.explicit_mass(rollout.record)
  return {
      'topk/mass_mean': masked_mean(mass, rollout.token_mask),
      'topk/mass_min': masked_min(mass, rollout.token_mask),
  }


def scatter(stats: TokenStats, *, num_points: int = 512) -> jax.Array:
  """Tokens to plot ratio and total variation against mu (Fig. 2).

  Half of them are those that moved most, the other half are spread evenly over
  all sampled tokens; most of those are nearly certain and hardly move.

  Returns:
    [num_points, 4] float32: mu, ratio, |pi - mu|, 1 where dropped; rows of 0
    where nothing was sampled.
  """
  mask = stats.token_mask.ravel()
  log_mu = where_valid(stats.behaviour_logprobs.ravel(), mask)
  log_pi = where_valid(stats.logprobs.ravel(), mask)
  gap = jnp.abs(jnp.exp(log_pi) - jnp.exp(log_mu))
  dropped = (~(stats.trust_region.ravel() > 0)).astype(jnp.float32)
  columns = (jnp.exp(log_mu), jnp.exp(log_pi - log_mu), gap, dropped)
  columns = jnp.stack(columns, axis=-1)
  half = jnp.arange(num_points // 2)
  count = jnp.sum(mask)
  # half * count would leave int32 at eight million tokens.
  whole, rest = jnp.divmod(count, len(half))
  evenly = half * whole + half * rest // len(half)
  by_gap = jnp.argsort(where_valid(-gap, mask, jnp.inf))
  in_order = jnp.argsort(~mask, stable=True)
  chosen = jnp.concatenate([
      jnp.take(by_gap, jnp.minimum(half, jnp.maximum(count - 1, 0))),
      jnp.take(in_order, evenly),
  ])
  rows = jnp.take(columns, chosen, axis=0, mode='clip')
  return jnp.where(count > 0, rows, 0.0)


def masked_token_counts(stats: TokenStats, *, vocab_size: int) -> jax.Array:
  """How often each token was masked. [2, V] int32: A > 0, then A < 0.

  The paper's Appendix D lists the most frequent ones as text.
  """
  masked = stats.token_mask & ~(stats.trust_region > 0)

  def count(chosen):
    zeros = jnp.zeros(vocab_size, jnp.int32)
    return zeros.at[stats.targets.ravel()].add(chosen.ravel())

  return jnp.stack([
      count(masked & (stats.advantages > 0)),
      count(masked & (stats.advantages < 0)),
  ])


def rollout_metrics(
    *,
    rewards: jax.Array,
    token_mask: jax.Array,
    truncated: jax.Array,
    group_size: int,
) -> dict[str, jax.Array]:
  """Scalars of the rollout that was learned from.

  Args:
    rewards: [B].
    token_mask: [B, T].
    truncated: [B].
    group_size: G.
  """
  spread = groups.has_spread(rewards, group_size=group_size)
  lengths = jnp.sum(token_mask, axis=-1).astype(jnp.float32)
  return {
      'reward/mean': jnp.mean(rewards),
      'reward/std': jnp.std(rewards),
      # Groups without spread teach nothing.
      'reward/groups_without_spread': jnp.mean(~spread),
      'completion/length_mean': jnp.mean(lengths),
      'completion/length_min': jnp.min(lengths),
      'completion/length_max': jnp.max(lengths),
      'completion/truncated': jnp.mean(truncated),
      'tokens/sampled': jnp.sum(token_mask),
  }
