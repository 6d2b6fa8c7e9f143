"""Several optimizer updates on one rollout.

Per token until the last moment: divergence, trust region, loss and metrics are
[b, T], and the learner only ever sums `loss * weight` with weights computed
once on the whole rollout. So mini-batches, micro-batches and sharding cannot
change the loss. B sequences of a rollout, U updates, k micro-batches of b
sequences in each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dppo_jax import diagnostics
from dppo_jax import divergences
from dppo_jax import sampling
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import Divergence
from dppo_jax.types import LossFn
from dppo_jax.types import LossInputs
from dppo_jax.types import PyTree
from dppo_jax.types import Rollout
from dppo_jax.types import ScoredRollout
from dppo_jax.types import TrainState


class Batch(NamedTuple):
  """A rollout with what is computed once on the whole of it."""

  rollout: Rollout
  advantages: jax.Array  # [B, T] float32
  weights: jax.Array  # [B, T] float32, 0 on what was not sampled.


class TargetStats(NamedTuple):
  """The target policy at the sampled tokens. All [b, T] float32."""

  logprobs: jax.Array
  entropy: jax.Array
  divergence: jax.Array


def make_target_fn(
    model: CausalLM,
    divergence: Divergence,
    *,
    temperature: float,
    chunk_size: int = 0,
) -> Callable[[PyTree, Rollout], TargetStats]:
  """What the target policy says of a rollout's tokens.

  Args:
    model: the architecture.
    divergence: measures against the rollout's record.
    temperature: that of the sampler.
    chunk_size: tokens whose logits exist at a time, recomputed in the backward
      pass; 0 for all at once.

  Returns:
    `target_fn(params, rollout) -> TargetStats`. Only `logprobs` and `entropy`
    carry a gradient.
  """

  def of_tokens(params, hidden, targets, record):
    """[n, D], [n], [n, ...] -> TargetStats of [n]."""
    logits = sampling.process_logits(
        model.head(params, hidden), temperature=temperature
    )
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    measured = divergence.measure(
        jax.lax.stop_gradient(logits), targets, record
    )
    return TargetStats(
        divergences.token_logprobs(logits, targets),
        -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1),
        jax.lax.stop_gradient(measured),
    )

  def target_fn(params, rollout):
    hidden, _ = model.trunk(
        params,
        rollout.tokens[:, :-1],
        positions=rollout.positions[:, :-1],
        segment_ids=rollout.segment_ids[:, :-1],
    )
    targets = rollout.tokens[:, 1:]  # [b, T]
    count = targets.size
    # [b * T, ...]; padding of the last chunk repeats nothing, it is zeros.
    flat = jax.tree.map(
        lambda x: x.reshape(count, *x.shape[2:]),
        (hidden, targets, rollout.record),
    )
    if not chunk_size or chunk_size >= count:
      stats = of_tokens(params, *flat)
    else:
      stats = _in_chunks(of_tokens, params, flat, count, chunk_size)
    return jax.tree.map(lambda x: x.reshape(targets.shape), stats)

  return target_fn


def _in_chunks(of_tokens, params, flat, count, chunk_size):
  """Maps over chunks of tokens, so that no [count, V] array exists."""
  num_chunks = -(-count // chunk_size)
  extra = num_chunks * chunk_size - count
  chunks = jax.tree.map(
      lambda x: jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)).reshape(
          num_chunks, chunk_size, *x.shape[1:]
      ),
      flat,
  )
  body = jax.checkpoint(of_tokens, prevent_cse=False)
  _, stats = jax.lax.scan(
      lambda _, chunk: (None, body(params, *chunk)), None, chunks
  )
  return jax.tree.map(lambda x: x.reshape(-1)[:count], stats)


def make_learner(
    *,
    model: CausalLM,
    divergence: Divergence,
    loss_fn: LossFn,
    advantage_fn: Callable[[jax.Array], jax.Array],
    normalizer: Callable[[jax.Array], jax.Array],
    optimizer: Any,
    temperature: float,
    num_epochs: int,
    num_minibatches: int,
    num_microbatches: int = 1,
    chunk_size: int = 0,
) -> Callable[..., tuple[TrainState, diagnostics.TokenStats, dict]]:
  """A pure function that learns from one scored rollout.

  Args:
    model: the architecture.
    divergence: measure and threshold of the trust region.
    loss_fn: LossInputs -> (loss [b, T], metrics).
    advantage_fn: rewards [B] -> advantages [B].
    normalizer: token_mask [B, T] -> weights [B, T].
    optimizer: an `optim.Optimizer`.
    temperature: that of the sampler.
    num_epochs: passes over the rollout.
    num_minibatches: updates per pass, over sequences shuffled anew each pass.
    num_microbatches: parts of a mini-batch whose gradients are accumulated.
    chunk_size: see `make_target_fn`.

  Returns:
    `learn(state, scored, key) -> (state, token stats [U, ...], metrics)`; the
    key is consumed. An update whose loss or gradient is not finite is skipped
    and counted.
  """
  target_fn = make_target_fn(
      model, divergence, temperature=temperature, chunk_size=chunk_size
  )

  def weighted_loss(params, batch):
    """Sum of loss * weight over a micro-batch, and its tokens."""
    rollout, mask = batch.rollout, batch.rollout.token_mask
    target = target_fn(params, rollout)
    region = divergences.trust_region(
        divergence=target.divergence,
        log_ratio=target.logprobs - rollout.behaviour_logprobs,
        advantages=batch.advantages,
        threshold=divergence.threshold,
    )
    inputs = LossInputs(
        logprobs=target.logprobs,
        behaviour_logprobs=rollout.behaviour_logprobs,
        divergence=target.divergence,
        trust_region=region,
        advantages=batch.advantages,
        token_mask=mask,
    )
    loss, loss_metrics = loss_fn(inputs)
    stats = diagnostics.TokenStats(
        targets=rollout.tokens[:, 1:],
        entropy=target.entropy,
        **inputs._asdict(),
        **loss_metrics,
    )
    weighted = jnp.where(mask, loss, 0.0) * batch.weights
    return jnp.sum(weighted), jax.lax.stop_gradient(stats)

  def accumulate(params, batch, rows):
    """Loss, gradient and tokens of the micro-batches `rows` [k, b]."""

    def add(total, chosen):
      part = jax.tree.map(lambda x: jnp.take(x, chosen, axis=0), batch)
      (loss, stats), gradients = jax.value_and_grad(
          weighted_loss, has_aux=True
      )(params, part)
      return jax.tree.map(jnp.add, total, (loss, gradients)), stats

    zeros = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params))
    (loss, gradients), stats = jax.lax.scan(add, zeros, rows)
    return loss, gradients, stats

  def update(state, batch, rows):
    """One optimizer update, or none if it would not be finite."""
    loss, gradients, stats = accumulate(state.params, batch, rows)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    changes, opt_state = optimizer.transformation.update(
        gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, changes)
    choose = lambda new, old: jnp.where(finite, new, old)
    new_state = state._replace(
        params=jax.tree.map(choose, params, state.params),
        opt_state=jax.tree.map(choose, opt_state, state.opt_state),
        policy_version=state.policy_version + finite,
        nonfinite_in_a_row=jnp.where(finite, 0, state.nonfinite_in_a_row + 1),
    )
    metrics = {
        'loss': jnp.where(finite, loss, 0.0),
        'optimizer/grad_norm': jnp.where(finite, norm, 0.0),
        'optimizer/skipped': ~finite,
        'optimizer/learning_rate': optimizer.schedule(state.policy_version),
    }
    return new_state, (stats, metrics)

  def learn(state, scored, key):
    batch = prepare(scored)
    num_rows = scored.rewards.shape[0]
    shuffles = jax.vmap(lambda k: jax.random.permutation(k, num_rows))(
        jax.random.split(key, num_epochs)
    )
    rows = shuffles.reshape(
        num_epochs * num_minibatches, num_microbatches, -1
    )  # [U, k, b]
    state, (stats, metrics) = jax.lax.scan(
        lambda state, rows: update(state, batch, rows), state, rows
    )
    stats = jax.tree.map(
        lambda x: x.reshape(x.shape[0], -1, x.shape[-1]), stats
    )
    return state, stats, metrics

  def prepare(scored):
    mask = scored.rollout.token_mask
    advantages = advantage_fn(scored.rewards)[:, None]
    return Batch(
        scored.rollout,
        jnp.where(mask, advantages, 0.0),
        normalizer(mask) * num_minibatches,
    )

  return learn
