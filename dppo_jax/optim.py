"""Optimizers from optax, as options."""

from typing import Any, NamedTuple

import jax
import optax

from dppo_jax import registry

register = registry.Registry('optimizer')
build = register.build
names = register.names
config = register.config

_SCHEDULES = ('constant', 'cosine', 'linear')
_DECAYING = ('kernel', 'embedding', 'a', 'b')  # The last two are adapters.


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
  """
  if schedule not in _SCHEDULES:
    raise ValueError(registry.unknown('schedule', schedule, _SCHEDULES))
  if not learning_rate > 0:
    raise ValueError(f'learning_rate={learning_rate} is not positive.')
  if not max_grad_norm > 0:
    raise ValueError(
        f'max_grad_norm={max_grad_norm} is not positive; use inf for none.'
    )
  rate = _make_schedule(schedule, learning_rate, warmup_updates, total_updates)
  transformation = optax.chain(
      optax.clip_by_global_norm(max_grad_norm),
      optax.adamw(
          rate,
          b1=b1,
          b2=b2,
          eps=epsilon,
          weight_decay=weight_decay,
          mask=_decays,
      ),
  )
  return Optimizer(transformation, rate)


def scaled(optimizer: Optimizer, factors: Any) -> Optimizer:
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
