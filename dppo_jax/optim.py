"""Optimizers from optax, as options."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dppo_jax import registry
from dppo_jax.types import PyTree

register = registry.Registry('optimizer')
build = register.build
names = register.names
config = register.config

_SCHEDULES = ('constant', 'cosine', 'linear')
_DECAYING = ('kernel', 'embedding', 'a', 'b')  # The last two are adapters.
_MOMENTS = ('float32', 'bfloat16')


class Optimizer(NamedTuple):
  """An optax transformation and the learning rate it uses at an update."""

  transformation: optax.GradientTransformation
  schedule: optax.Schedule


@register
def adamw(
    *,
    total_updates: int,
    learning_rate: float = 1e-6,
    schedule: str = 'constant',
    warmup_updates: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    mu_dtype: str = 'float32',
) -> Optimizer:
  """AdamW after clipping to a global gradient norm.

  Norms and biases (parameters that are vectors within a layer) do not decay.

  Args:
    total_updates: optimizer updates of the whole run, where a schedule ends.
    learning_rate: peak. 1e-6 is what DPPO trains models of billions of
      parameters with (App. E of arXiv:2602.04879).
    schedule: 'constant', or 'cosine' or 'linear' down to 0 at the end.
    warmup_updates: linear warm-up from 0.
    b1: decay of the first moment.
    b2: decay of the second moment.
    epsilon: added to the root of the second moment.
    weight_decay: decoupled.
    max_grad_norm: larger gradients are scaled down to it; inf for never.
    mu_dtype: of the first moment, 'float32' or 'bfloat16'. The second stays in
      float32: with b2 near 1 its small changes would be rounded away.
  """
  if schedule not in _SCHEDULES:
    raise ValueError(registry.unknown('schedule', schedule, _SCHEDULES))
  if not learning_rate > 0:
    raise ValueError(f'learning_rate={learning_rate} is not positive.')
  if not max_grad_norm > 0:
    raise ValueError(
        f'max_grad_norm={max_grad_norm} is not positive; use inf for none.'
    )
  if mu_dtype not in _MOMENTS:
    raise ValueError(registry.unknown('mu_dtype', mu_dtype, _MOMENTS))
  rate = _make_schedule(schedule, learning_rate, warmup_updates, total_updates)
  transformation = optax.chain(
      optax.clip_by_global_norm(max_grad_norm),
      optax.adamw(
          rate,
          b1=b1,
          b2=b2,
          eps=epsilon,
          mu_dtype=mu_dtype,
          weight_decay=weight_decay,
          mask=_decays,
      ),
  )
  return Optimizer(transformation, rate)


def scaled(optimizer: Optimizer, factors: PyTree) -> Optimizer:
  """Another learning rate for each parameter, decay included.

  Args:
    optimizer: its schedule stays that of a factor of 1.
    factors: a tree like the parameters, of arrays that broadcast against them.
  """

  def scale(updates, _):
    return jax.tree.map(
        lambda x, factor: (x * factor).astype(x.dtype), updates, factors
    )

  return optimizer._replace(
      transformation=optax.chain(
          optimizer.transformation, optax.stateless(scale)
      )
  )


class MasterState(NamedTuple):
  """What `with_master_weights` keeps."""

  master: PyTree  # The parameters in float32.
  inner: PyTree  # Of the optimizer, which sees only these.


def with_master_weights(optimizer: Optimizer) -> Optimizer:
  """Keeps the parameters in float32 where the model has them in bfloat16.

  bfloat16 has 8 bits: an update below 1/512 of a parameter is rounded away,
  which at the learning rates of fine-tuning is nearly all of them. Here updates
  add up in float32, and the model's parameters are the master's, rounded
  (mixed precision training, arXiv:1710.03740 Sec. 3.1).
  """
  inner = optimizer.transformation
  widen = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

  def init(params):
    master = widen(params)
    return MasterState(master, inner.init(master))

  def update(gradients, state, params):
    changes, inner_state = inner.update(
        widen(gradients), state.inner, state.master
    )
    master = optax.apply_updates(state.master, changes)
    # In float32, so that `optax.apply_updates` rounds the sum, not the change.
    changes = jax.tree.map(jnp.subtract, master, widen(params))
    return changes, MasterState(master, inner_state)

  return optimizer._replace(
      transformation=optax.GradientTransformation(init, update)
  )


def _make_schedule(name, peak, warmup, total) -> optax.Schedule:
  after = max(total - warmup, 1)
  main = {
      'constant': optax.constant_schedule(peak),
      'cosine': optax.cosine_decay_schedule(peak, after),
      'linear': optax.linear_schedule(peak, 0.0, after),
  }[name]
  if not warmup:
    return main
  return optax.join_schedules(
      [optax.linear_schedule(0.0, peak, warmup), main], [warmup]
  )


def _decays(params):
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key in _DECAYING, params
  )
