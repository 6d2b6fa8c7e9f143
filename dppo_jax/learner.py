"""Several optimizer updates on one rollout.

B sequences of a rollout, U updates, k micro-batches of b sequences in each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dppo_jax import diagnostics
from dppo_jax.objective import Batch
from dppo_jax.types import ScoredRollout
from dppo_jax.types import TrainState


def make_learner(
    *,
    weighted_loss: Callable[..., Any],
    prepare: Callable[[TrainState, ScoredRollout], Batch],
    optimizer: Any,
    num_epochs: int,
    num_minibatches: int,
    num_microbatches: int = 1,
) -> Callable[..., tuple[TrainState, diagnostics.TokenStats, dict]]:
  """A pure function that learns from one scored rollout.

  Args:
    weighted_loss: from `make_loss_fn`.
    prepare: from `make_prepare_fn`.
    optimizer: an `optim.Optimizer`.
    num_epochs: passes over the rollout.
    num_minibatches: updates per pass, over sequences shuffled anew each pass.
    num_microbatches: parts of a mini-batch whose gradients are accumulated.

  Returns:
    `learn(state, scored, key) -> (state, token stats [U, ...], metrics)`; the
    key is consumed. An update whose loss, gradient or new parameters are not
    finite is skipped and counted.
  """

  def accumulate(state, batch, rows):
    """Loss, gradient and tokens of the micro-batches `rows` [k, b]."""

    def add(total, chosen):
      part = jax.tree.map(lambda x: jnp.take(x, chosen, axis=0), batch)
      (loss, stats), gradients = jax.value_and_grad(
          weighted_loss, has_aux=True
      )(state.params, part, state.reference, state.policy_version)
      return jax.tree.map(jnp.add, total, (loss, gradients)), stats

    zeros = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, state.params))
    (loss, gradients), stats = jax.lax.scan(add, zeros, rows)
    return loss, gradients, stats

  def update(state, batch, rows):
    """One optimizer update, or none if it would not be finite."""
    loss, gradients, stats = accumulate(state, batch, rows)
    norm = optax.tree.norm(gradients)
    changes, opt_state = optimizer.transformation.update(
        gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, changes)
    # A finite gradient can still make infinite weights.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    finite &= jnp.isfinite(optax.tree.norm(params))
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
    batch = prepare(state, scored)
    # Weights make the loss of the rollout; a mini-batch is a part of it.
    batch = batch._replace(weights=batch.weights * num_minibatches)
    num_rows = batch.weights.shape[0]
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

  return learn
