"""From a scored rollout to the loss of a micro-batch.

Once per rollout: rewards are shaped, groups chosen, advantages, weights and
anchor computed (`make_prepare_fn`). Then per micro-batch: divergence, trust
region, loss and extra terms, all [b, T], summed with the weights
(`make_loss_fn`). So mini-batches, micro-batches and sharding cannot change the
loss.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import diagnostics
from dppo_jax import divergences
from dppo_jax import duals
from dppo_jax import groups
from dppo_jax import normalizers
from dppo_jax import packing
from dppo_jax import penalties
from dppo_jax import registry
from dppo_jax import sampling
from dppo_jax import shaping
from dppo_jax import target as target_lib
from dppo_jax import trust_regions
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.target import Anchor
from dppo_jax.types import Divergence
from dppo_jax.types import is_by_token
from dppo_jax.types import LossFn
from dppo_jax.types import LossInputs
from dppo_jax.types import of_shape
from dppo_jax.types import PyTree
from dppo_jax.types import Rollout
from dppo_jax.types import Rows
from dppo_jax.types import ScoredRollout

# `jax.named_scope` of what goes over a rollout, not over a mini-batch of it.
WHOLE = 'whole_rollout'


class Batch(NamedTuple):
  """Rows of a rollout with what is computed once on the whole of it.

  All [B, T, ...], so that they can be laid out in any other way (packing.py).
  """

  rows: Rows
  behaviour_logprobs: jax.Array  # float32
  policy_version: jax.Array  # int32
  anchor: Anchor
  advantages: jax.Array  # float32
  weights: jax.Array  # float32, 0 on what was not sampled.
  reference_logprobs: PyTree  # float32, or () without a penalty.
  replayed: PyTree = ()  # bool, or () without a buffer.


@dataclasses.dataclass(frozen=True)
class Extras:
  """Terms beside the policy gradient; none by default.

  Attributes:
    entropy_bonus: times the entropy, added to the objective.
    kl_coefficient: times kl(target || reference), taken off.
    kl_estimator: 'k1', 'k2', 'k3' (see penalties.py), or 'full' over the whole
      vocabulary, which runs the reference policy in every update.
    kl_where: 'loss', with a gradient; or 'reward', off the reward of a whole
      completion, estimated where it was sampled.
    router_balance: times the routers' `experts.balance_loss` over sampled
      tokens, mean of layers and of micro-batches, added to the loss.
  """

  entropy_bonus: float = 0.0
  kl_coefficient: float = 0.0
  kl_estimator: str = 'k3'
  kl_where: str = 'loss'
  router_balance: float = 0.0

  def __post_init__(self):
    estimators = [*penalties.ESTIMATORS, 'full']
    if self.kl_estimator not in estimators:
      raise ValueError(
          registry.unknown('estimator', self.kl_estimator, estimators)
      )
    if self.kl_where not in ('loss', 'reward'):
      raise ValueError(
          registry.unknown('place', self.kl_where, ('loss', 'reward'))
      )
    if self.kl_where == 'reward' and self.kl_estimator == 'full':
      raise ValueError(
          "kl_estimator='full' has no sampled estimate to take off a reward; "
          "use kl_where='loss', or k1, k2 or k3."
      )

  @property
  def needs_reference(self) -> bool:
    return self.kl_coefficient != 0

  @property
  def uses_full_kl(self) -> bool:
    return self.needs_reference and self.kl_estimator == 'full'

  @property
  def uses_sampled_kl(self) -> bool:
    return self.needs_reference and self.kl_estimator != 'full'

  @property
  def kl_in_reward(self) -> bool:
    return self.needs_reference and self.kl_where == 'reward'


def make_prepare_fn(
    *,
    model: CausalLM,
    divergence: Divergence,
    advantage_fn: Callable[[jax.Array], jax.Array],
    shaping_fn: shaping.ShapingFn,
    normalizer: normalizers.NormalizerFn,
    anchor: str,
    extras: Extras,
    group_size: int,
    num_groups: int,
    drop_groups_without_spread: bool,
    mask_truncated: bool,
    num_parts: int,
    temperature: float,
    chunk_size: int,
    prompt_length: int = 0,
    arrange: packing.ArrangeFn = packing.as_sampled,
) -> Callable[..., Batch]:
  """What is computed once on the whole rollout.

  Args:
    model: the architecture.
    divergence: its record is taken anew where the anchor is recomputed.
    advantage_fn: rewards [B] -> advantages [B].
    shaping_fn: rewards and lengths [B] -> rewards [B].
    normalizer: token_mask [B, T] -> weights [B, T].
    anchor: 'behaviour', the policy that sampled; or 'recomputed', the learner's
      own numerics with the parameters before the first update.
    extras: terms that need a reference policy.
    group_size: G.
    num_groups: learn from that many, those with spread first; 0 for all.
    drop_groups_without_spread: whether groups whose shaped rewards are all
      equal are left out, of the loss and of what it is divided by. A KL taken
      off the reward gives no group a spread: it comes later.
    mask_truncated: whether truncated completions teach nothing.
    num_parts: into which the rollout is split where a policy runs over it.
    temperature: that of the sampler.
    chunk_size: see `target.make_token_map`.
    prompt_length: see `target.make_token_map`.
    arrange: lays out rows, see packing.py.

  Returns:
    `prepare(state, scored, products) -> Batch`; for products of the state that
    are used again, see `target.hidden_states`.
  """
  anchors = ('behaviour', 'recomputed')
  if anchor not in anchors:
    raise ValueError(registry.unknown('anchor', anchor, anchors))
  in_parts = _make_map_in_parts(
      model, num_parts=num_parts, temperature=temperature,
      chunk_size=chunk_size, prompt_length=prompt_length, arrange=arrange,
  )

  references = _make_references(extras, in_parts)

  def prepare(state, scored, products=()):
    rollout = scored.rollout
    rewards = shaping_fn(scored.rewards, jnp.sum(rollout.token_mask, axis=-1))
    of_shape('shaping', shaping_fn, rewards, scored.rewards.shape)
    rollout, rewards, replayed = _choose_groups(
        ScoredRollout(rollout, rewards, scored.replayed),
        num_groups=num_groups,
        group_size=group_size,
    )
    sampled, mask = packing.rows_of(rollout), rollout.token_mask
    if mask_truncated:
      mask &= ~rollout.truncated[:, None]
    if drop_groups_without_spread:
      mask = groups.mask_with_spread(mask, rewards, group_size=group_size)
    rows = sampled._replace(token_mask=mask)
    if extras.kl_in_reward:
      # Also of what is masked, which the others of a group are compared with.
      reference_logprobs = references(state, sampled)
      rewards -= _kl_of_completions(extras, rollout, reference_logprobs)
    else:
      reference_logprobs = references(state, rows)
    advantages = of_shape(
        'advantage', advantage_fn, advantage_fn(rewards), rewards.shape
    )
    anchored = Anchor(rollout.behaviour_logprobs, rollout.record)
    if anchor == 'recomputed':
      recompute = functools.partial(_anchor_of, divergence)
      anchored = in_parts(recompute, state.params, rows, products)
    everywhere = lambda x: jnp.broadcast_to(x[:, None], mask.shape)
    return Batch(
        rows=rows,
        behaviour_logprobs=rollout.behaviour_logprobs,
        policy_version=everywhere(rollout.policy_version),
        anchor=anchored,
        advantages=jnp.where(mask, advantages[:, None], 0.0),
        weights=of_shape(
            'normalizer', normalizer, normalizer(mask), mask.shape
        ),
        reference_logprobs=reference_logprobs,
        replayed=jax.tree.map(everywhere, replayed),
    )

  return prepare


def _choose_groups(scored, *, num_groups, group_size):
  """The groups to learn from, those that teach something first; 0 for all."""
  if not num_groups:
    return scored
  rows = groups.with_spread_first(
      scored.rewards, group_size=group_size
  )[: num_groups * group_size]
  return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), scored)


def _make_references(extras, in_parts):
  """Log-probs of tokens under the reference policy; () if nobody asks."""

  def references(state, rows):
    if not extras.uses_sampled_kl:
      return ()
    return in_parts(
        divergences.token_logprobs, state.reference, _own_routing(rows)
    )

  return references


def _anchor_of(divergence, logits, targets):
  """What a policy remembers of tokens, as it would have while sampling."""
  return Anchor(
      divergences.token_logprobs(logits, targets),
      divergence.record(logits, targets),
  )


def _kl_of_completions(extras, rollout, reference_logprobs):
  """What is taken off the rewards. [B]."""
  estimate = _sampled_kl(
      extras, rollout.token_mask, rollout.behaviour_logprobs, reference_logprobs
  )
  return extras.kl_coefficient * jnp.sum(estimate, axis=-1)


def _sampled_kl(extras, mask, logprobs, reference_logprobs):
  """The estimate of a token, 0 where none was sampled. [b, T]."""
  # Before the exponential: padding may be certain under one of the two.
  return penalties.reference_kl(
      logprobs=jnp.where(mask, logprobs, 0.0),
      reference_logprobs=jnp.where(mask, reference_logprobs, 0.0),
      estimator=extras.kl_estimator,
  )


def _own_routing(rows: Rows) -> Rows:
  """For another policy than the one that is trained: its own experts."""
  return rows._replace(routing=())


def _router_stats(routed, mask):
  """Means over the layers, [b, T] each; () where nothing was measured."""
  every = lambda x: jnp.broadcast_to(jnp.mean(x), mask.shape)
  return diagnostics.Router(
      changed=jax.tree.map(lambda x: jnp.mean(x, axis=-1), routed.changed),
      changed_sets=jax.tree.map(
          lambda x: jnp.mean(x > 0, axis=-1), routed.changed
      ),
      balance=jax.tree.map(every, routed.balance),
  )


def make_logprobs_fn(**options) -> Callable[[PyTree, Rollout], jax.Array]:
  """`logprobs_fn(params, rollout) -> [B, T]` of a policy.

  Options are those of `make_prepare_fn` that say how a policy runs.
  """
  in_parts = _make_map_in_parts(**options)

  def logprobs_fn(params, rollout):
    rows = packing.rows_of(rollout)
    return in_parts(divergences.token_logprobs, params, rows)

  return logprobs_fn


def _make_map_in_parts(
    model, *, num_parts, arrange=packing.as_sampled, **options
):
  """`token_map` of a whole rollout, a few rows at a time."""
  token_map = target_lib.make_token_map(model, **options)

  def in_parts(fn, params, rows, products=()):
    mask = rows.token_mask
    layout = arrange(rows, jnp.arange(len(mask)), num_parts)

    def of_part(part, length):
      [chosen] = packing.take(layout, part, rows, length=length)
      return (), token_map(fn, params, chosen, products=products)

    with jax.named_scope(WHOLE):
      _, out = packing.over_parts(of_part, layout, ())
    return packing.put_back(layout, out, mask)

  return in_parts


def make_loss_fn(
    *,
    model: CausalLM,
    divergence: Divergence,
    region_fn: trust_regions.RegionFn,
    loss_fn: LossFn,
    extras: Extras,
    temperature: float,
    chunk_size: int,
    prompt_length: int = 0,
    dual: duals.Dual | None = None,
) -> Callable[..., tuple[jax.Array, diagnostics.TokenStats]]:
  """The loss of a micro-batch, made of a divergence, a rule and a loss.

  Returns:
    `weighted_loss(params, batch, reference, version, *, dual_state, share,
    products)`: the sum of loss * weight over the tokens of a micro-batch, and
    these tokens as they were seen. A balance of experts is the only term that
    depends on how a mini-batch is split, as it is no sum over tokens: it counts
    by the `share` of the micro-batch, 1 over their number.
  """
  options = {
      'temperature': temperature,
      'chunk_size': chunk_size,
      'prompt_length': prompt_length,
  }
  summed_loss = target_lib.make_summed_loss(
      model,
      divergence,
      by_token=is_by_token(region_fn) and is_by_token(loss_fn),
      measure_balance=bool(extras.router_balance),
      **options,
  )
  full_kl = _make_full_kl_fn(model, **options)
  token_loss = _make_token_loss(divergence, region_fn, loss_fn, extras, dual)

  def weighted_loss(
      params, batch, reference, version, *,
      dual_state=(), share=1.0, products=(),
  ):
    rows, age = batch.rows, version - batch.policy_version
    total, target, (region, loss_metrics) = summed_loss(
        token_loss, params, rows, batch.anchor, batch,
        dual and duals.multiplier_at(dual_state, age),
        products=products,
    )
    reference_kl = ()
    if extras.uses_full_kl:
      reference_kl = full_kl(params, rows, reference, target.hidden)
      reference_kl = jnp.where(rows.token_mask, reference_kl, 0.0)
      total += extras.kl_coefficient * jnp.sum(reference_kl * batch.weights)
    elif extras.uses_sampled_kl:
      reference_kl = _sampled_kl(
          extras, rows.token_mask, target.logprobs, batch.reference_logprobs
      )
    if extras.router_balance:
      balance = jnp.mean(target.routed.balance)
      total += extras.router_balance * balance * share
    stats = diagnostics.TokenStats(
        targets=rows.targets,
        token_mask=rows.token_mask,
        logprobs=target.logprobs,
        behaviour_logprobs=batch.behaviour_logprobs,
        divergence=target.divergence,
        direction=target.direction,
        trust_region=region,
        advantages=batch.advantages,
        entropy=target.entropy,
        age=age,
        weights=batch.weights,
        replayed=batch.replayed,
        reference_kl=reference_kl,
        router=_router_stats(target.routed, rows.token_mask),
        **loss_metrics,
    )
    return total, jax.lax.stop_gradient(stats)

  return weighted_loss


def _make_token_loss(divergence, region_fn, loss_fn, extras, dual):
  """`token_loss` of `target.make_summed_loss`."""

  def token_loss(target, batch, multiplier):
    """What tokens, [b, T] or [n], add to the loss; region and metrics."""
    mask = batch.rows.token_mask
    region = region_fn(trust_regions.RegionInputs(
        divergence=target.divergence,
        log_ratio=jax.lax.stop_gradient(target.logprobs)
        - batch.anchor.logprobs,
        direction=target.direction,
        anchor_logprobs=batch.anchor.logprobs,
        advantages=batch.advantages,
        token_mask=mask,
        segment_ids=batch.rows.target_segments,
        threshold=divergence.threshold,
    ))
    of_shape('trust region', region_fn, region, mask.shape)
    loss, metrics = _checked(loss_fn, mask.shape, loss_fn(LossInputs(
        logprobs=target.logprobs,
        behaviour_logprobs=batch.behaviour_logprobs,
        divergence=target.divergence,
        trust_region=region,
        advantages=batch.advantages,
        token_mask=mask,
        segment_ids=batch.rows.target_segments,
        multiplier=multiplier,
        limit=dual and dual.limit,
    )))
    loss += _penalty(extras, target, batch)
    return loss * batch.weights, (region.astype(jnp.float32), metrics)

  return token_loss


_METRICS = ('surrogate', 'capped', 'gradient_weight')


def _checked(loss_fn, shape, returned):
  """Loss and metrics, if they are what `types.LossFn` says; own ones apart."""
  expected = (
      'beside the loss of each token it returns surrogate, capped and '
      'gradient_weight, of the same shape, as a dict (types.LossFn says what '
      'they are).'
  )
  if not (isinstance(returned, tuple) and len(returned) == 2):
    raise ValueError(f'The loss must return (loss, metrics): {expected}')
  loss, metrics = returned
  for name in _METRICS:
    if name not in metrics:
      raise ValueError(f'The loss returns no metric {name!r}; {expected}')
  of_shape('loss', loss_fn, loss, shape)
  own = {k: x for k, x in metrics.items() if k not in (*_METRICS, 'constraint')}
  for name in (*_METRICS, *own):
    of_shape(f'metric {name!r} of the loss', loss_fn, metrics[name], shape)
  known = {k: x for k, x in metrics.items() if k not in own}
  return loss, known | ({'own': own} if own else {})


def _penalty(extras, target, batch):
  """What the extra terms add to the loss of a token, but for the full KL."""
  added = 0.0
  if extras.entropy_bonus:
    added -= extras.entropy_bonus * target.entropy
  if extras.uses_sampled_kl and not extras.kl_in_reward:
    estimate = _sampled_kl(
        extras, batch.rows.token_mask, target.logprobs,
        batch.reference_logprobs,
    )
    added += extras.kl_coefficient * estimate
  return added


def _make_full_kl_fn(model, *, temperature, **options):
  """Over the whole vocabulary, [b, T]; runs the reference policy."""
  head_map = target_lib.make_head_map(
      model, temperature=temperature, **options
  )

  def of_tokens(reference, logits, _, reference_hidden):
    reference_logits = sampling.process_logits(
        model.head(reference, reference_hidden), temperature=temperature
    )
    return penalties.full_reference_kl(
        logits=logits, reference_logits=reference_logits
    )

  def full_kl(params, rows, reference, hidden):
    reference_hidden, _ = target_lib.hidden_states(
        model, reference, _own_routing(rows)
    )
    return head_map(
        of_tokens, params, hidden, rows, reference_hidden, beside=reference
    )

  return full_kl
