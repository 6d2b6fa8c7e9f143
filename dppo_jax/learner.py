"""Several optimizer updates on one rollout.

B sequences of a rollout, U updates, K micro-batches of m rows in each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dppo_jax import ages
from dppo_jax import diagnostics
from dppo_jax import duals
from dppo_jax import groups
from dppo_jax import packing
from dppo_jax import trainable as trainable_lib
from dppo_jax.masking import weighted_mean
from dppo_jax.objective import Batch
from dppo_jax.types import given
from dppo_jax.types import PyTree
from dppo_jax.types import ScoredRollout
from dppo_jax.types import TrainState

# Of an update that was not taken there is none.
_OF_TAKEN = (
    'loss', 'optimizer/grad_norm', 'constraint/violation', 'dual/multiplier'
)
_COUNTS = ('optimizer/skipped', 'optimizer/updates')


def over_updates(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """What `learn` tells of each update [U], of all together [].

  Counts add up, the rest is averaged: over the updates that were taken, where
  others have no value.
  """
  taken = metrics['optimizer/updates']
  count = jnp.maximum(jnp.sum(taken), 1)

  def of(name, values):
    if name in _COUNTS:
      return jnp.sum(values)
    if name in _OF_TAKEN:
      return jnp.sum(jnp.where(taken, values, 0.0)) / count
    return jnp.mean(values)

  return {name: of(name, values) for name, values in metrics.items()}


def make_learner(
    *,
    weighted_loss: Callable[..., Any],
    prepare: Callable[[TrainState, ScoredRollout, PyTree], Batch],
    optimizer: Any,
    num_epochs: int,
    num_minibatches: int,
    num_microbatches: int = 1,
    dual: duals.Dual | None = None,
    trainable: trainable_lib.Trainable = trainable_lib.EVERYTHING,
    arrange: packing.ArrangeFn = packing.as_sampled,
    rows_together: int = 1,
    place: Callable[[PyTree], PyTree] = lambda tree: tree,
) -> Callable[..., tuple[TrainState, diagnostics.TokenStats, dict]]:
  """A pure function that learns from one scored rollout.

  Args:
    weighted_loss: from `make_loss_fn`.
    prepare: from `make_prepare_fn`.
    optimizer: an `optim.Optimizer`.
    num_epochs: passes over the rollout.
    num_minibatches: updates per pass, over sequences shuffled anew each pass.
    num_microbatches: parts of a mini-batch whose gradients are accumulated; at
      most that many where rows are packed.
    dual: of the loss's constraint, moved one step with each update.
    trainable: what is trained, and how it makes a policy.
    arrange: lays out the rows of a mini-batch, see packing.py.
    rows_together: so many neighbours stay together in a mini-batch.
    place: puts the rows of a micro-batch where they belong on a mesh.

  Returns:
    `learn(state, scored, key) -> (state, token stats [U, ...], metrics)`; the
    key is consumed. An update whose loss, gradient or new parameters are not
    finite is skipped and counted; one in which no token counts is none.
  """
  accumulate = _make_accumulate(
      weighted_loss, trainable, num_microbatches, arrange, place
  )
  update = _make_update(accumulate, optimizer, dual)

  def learn(state, scored, key):
    batch = prepare(
        state._replace(
            params=trainable.join(state.params, state.frozen),
            reference=trainable.start(state.reference, state.frozen),
        ),
        scored,
        state.products,
    )
    # Weights make the loss of the rollout; a mini-batch is a part of it.
    batch = batch._replace(weights=batch.weights * num_minibatches)
    num_units = batch.weights.shape[0] // rows_together
    shuffles = jax.vmap(lambda k: jax.random.permutation(k, num_units))(
        jax.random.split(key, num_epochs)
    )
    shuffles = groups.rows_of(shuffles, group_size=rows_together)
    chosen = shuffles.reshape(num_epochs * num_minibatches, -1)
    products, state = state.products, state._replace(products=())
    state, (stats, metrics) = jax.lax.scan(
        lambda state, chosen: update(state, batch, chosen, products),
        state, chosen,
    )
    # [U, K, m, R] -> [U, rows, R].
    stats = jax.tree.map(
        lambda x: x.reshape(x.shape[0], -1, x.shape[-1]), stats
    )
    return state, stats, metrics

  return learn


def _make_update(accumulate, optimizer, dual):
  """`update(state, batch, chosen, products)` of the rows `chosen`."""

  def update(state, batch, chosen, products):
    """One optimizer update, or none if it would not be finite."""
    accumulated = accumulate(state, batch, chosen, products)
    loss, gradients, stats, sizes = accumulated
    norm = optax.tree.norm(gradients)

    def changed():
      changes, opt_state = optimizer.transformation.update(
          gradients, state.opt_state, state.params
      )
      return optax.apply_updates(state.params, changes), opt_state

    # A finite gradient can still make infinite weights. New ones are computed
    # twice: to choose between two states, both would have to be there.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    finite &= _all_finite(changed()[0])
    # Where no token counts, moments and decay would still move parameters.
    taken = finite & jnp.any(stats.token_mask)
    params, opt_state = jax.lax.cond(
        taken, changed, lambda: (state.params, state.opt_state)
    )
    choose = lambda new, old: jnp.where(taken, new, old)
    new_dual, dual_metrics = _constrain(dual, state.dual, stats)
    new_state = state._replace(
        params=params,
        opt_state=opt_state,
        policy_version=state.policy_version + taken,
        nonfinite_in_a_row=jnp.where(
            taken, 0, state.nonfinite_in_a_row + ~finite
        ),
        dual=jax.tree.map(choose, new_dual, state.dual),
    )
    metrics = {
        'loss': jnp.where(taken, loss, 0.0),
        'optimizer/grad_norm': jnp.where(taken, norm, 0.0),
        'optimizer/skipped': ~finite,
        'optimizer/updates': taken,
        'optimizer/learning_rate': optimizer.schedule(state.policy_version),
        **sizes,
        **dual_metrics,
    }
    return new_state, (stats, metrics)

  return update


def _make_accumulate(
    weighted_loss, trainable, num_microbatches, arrange, place
):
  """Loss, gradient, tokens and size of a mini-batch, part by part."""

  def accumulate(state, batch, chosen, products):
    reference = trainable.start(state.reference, state.frozen)
    layout = arrange(batch.rows, chosen, num_microbatches)
    share = 1 / jnp.maximum(layout.num_parts, 1)
    rest = batch._replace(rows=())

    def loss_of(params, part):
      policy = trainable.join(params, state.frozen)
      return weighted_loss(
          policy,
          part,
          reference,
          state.policy_version,
          dual_state=state.dual,
          share=share,
          products=products,
      )

    def of_part(index, length):
      rows, part = packing.take(
          layout, index, batch.rows, rest, length=length
      )
      part = place(part._replace(rows=rows))
      (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(
          state.params, part
      )
      return (loss, gradients), stats

    # In float32 whatever the parameters are: sums of many small parts.
    zeros = (
        jnp.float32(0.0),
        jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params),
    )
    (loss, gradients), stats = packing.over_parts(of_part, layout, zeros)
    return loss, gradients, stats, {
        'learner/microbatches': jnp.float32(layout.num_parts),
        # Of all slots computed, those that predict a sampled token.
        'learner/sampled_share': jnp.sum(stats.token_mask)
        / jnp.maximum(packing.num_slots(layout), 1),
    }

  return accumulate


def _all_finite(tree: PyTree) -> jax.Array:
  """Whether all numbers are, and their squares. [] bool."""

  def every(x):
    squares = jnp.square(jnp.atleast_1d(x).astype(jnp.float32))
    # The last axis first: a CPU shares the others among its cores.
    return jnp.all(jnp.isfinite(squares), axis=-1)

  of_leaves = [jnp.all(every(x)) for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(of_leaves))


def _constrain(dual, state, stats):
  """The dual after an update that saw these tokens, and what it saw."""
  if dual is None:
    return state, {}
  if not given(stats.constraint):
    raise ValueError(
        'config.dual is set, but the loss has no constraint for it; use loss '
        'r2vpo, or another that returns the metric constraint, or dual none.'
    )
  violation, seen = duals.violation(
      stats.constraint, stats.age, limit=dual.limit, by_age=dual.by_age
  )
  overall, _ = duals.violation(
      stats.constraint, stats.age, limit=dual.limit, by_age=False
  )
  # What the tokens of the update paid.
  weights = stats.constraint.weights
  paid = duals.multiplier_at(
      state, jnp.broadcast_to(stats.age, weights.shape)
  )
  metrics = {
      'constraint/violation': overall[0],
      'dual/multiplier': weighted_mean(paid, weights),
  }
  if dual.by_age:
    metrics |= {
        f'by_age/{name}/multiplier': value
        for name, value in zip(ages.names(), state.multiplier, strict=True)
    }
  return dual.update(state, violation, seen), metrics
