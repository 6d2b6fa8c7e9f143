"""The price of a constraint: a Lagrange multiplier that learns.

A constraint E[c] <= limit is part of the objective as -lambda (E[c] - limit).
The policy maximises that, lambda minimises it: it rises while the constraint is
violated and falls while there is slack, so it settles where the constraint
just holds, or at its minimum where it never binds. One step per optimizer
update.

Steps are taken on u = violation / limit, cut at 1: since c is not negative, u
is never below -1, and without the cut a single token with a huge ratio would
send lambda up in one update by more than it comes down in a thousand.

R2VPO (arXiv:2601.03320) constrains the variance of the importance ratio by a
primal-dual method. Only its abstract could be read: rules, rates, limits and
starting values here are this project's own choice.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import ages
from dppo_jax import registry

register = registry.Registry('dual')
build = register.build
names = register.names
config = register.config


class DualState(NamedTuple):
  """K multipliers: one, or one for each bucket of ages."""

  multiplier: jax.Array  # [K] float32
  integral: jax.Array  # [K] float32, of the violation, where a rule needs it.


class Dual(NamedTuple):
  """A rule for the multiplier.

  `init()` makes a `DualState`. `update(dual, violation, seen=True)`, with the
  violation E[c] - limit as [] or [K], makes the next one; where nothing was
  seen, a multiplier stays as it is. `limit` is in the unit of c.
  """

  init: Callable[[], DualState]
  update: Callable[..., DualState]
  limit: float
  by_age: bool


class Constraint(NamedTuple):
  """What a loss says of its constraint, token by token. All [..., T]."""

  values: jax.Array  # float32, c
  weights: jax.Array  # float32, of each value in the mean E[c].
  beyond: jax.Array  # bool, where the brake is stronger than the reward.


@register
def none() -> None:
  """No constraint."""


@register
def fixed(*, multiplier: float = 0.04, limit: float = 0.02) -> Dual:
  """A multiplier that never moves: a plain penalty.

  Args:
    multiplier: lambda. 0.04 is what public toy versions of R2VPO use.
    limit: largest allowed E[c]; only reported, but for `per='sequence'`, where
      it says which sequences are braked.
  """
  return _make(
      lambda dual, u: dual,
      initial=multiplier, limit=limit, minimum=0.0, maximum=multiplier,
      by_age=False,
  )


@register
def projected_ascent(
    *,
    limit: float = 0.02,
    initial: float = 0.04,
    learning_rate: float = 0.02,
    maximum: float = 10.0,
    by_age: bool = False,
) -> Dual:
  """Gradient ascent on the Lagrangian: max(0, lambda + rate * u).

  Args:
    limit: epsilon, largest allowed E[c].
    initial: lambda at the start.
    learning_rate: of lambda; the largest change in an update.
    maximum: of lambda.
    by_age: one lambda for each bucket of ages, so old data are braked more.
  """
  _check_positive(learning_rate=learning_rate)

  def rule(dual, u):
    return dual._replace(multiplier=dual.multiplier + learning_rate * u)

  return _make(
      rule, initial=initial, limit=limit, minimum=0.0, maximum=maximum,
      by_age=by_age,
  )


@register
def exponentiated(
    *,
    limit: float = 0.02,
    initial: float = 0.04,
    learning_rate: float = 0.1,
    minimum: float = 1e-4,
    maximum: float = 10.0,
    by_age: bool = False,
) -> Dual:
  """Multiplicative steps: lambda * exp(rate * u).

  Args:
    limit: epsilon, largest allowed E[c].
    initial: lambda at the start.
    learning_rate: of log lambda; its largest change in an update.
    minimum: of lambda, which cannot grow again from 0.
    maximum: of lambda.
    by_age: one lambda for each bucket of ages.
  """
  _check_positive(learning_rate=learning_rate, minimum=minimum)

  def rule(dual, u):
    factor = jnp.exp(learning_rate * u)
    return dual._replace(multiplier=dual.multiplier * factor)

  return _make(
      rule, initial=initial, limit=limit, minimum=minimum, maximum=maximum,
      by_age=by_age,
  )


@register
def proportional_integral(
    *,
    limit: float = 0.02,
    initial: float = 0.04,
    proportional: float = 0.1,
    integral: float = 0.02,
    maximum: float = 10.0,
    by_age: bool = False,
) -> Dual:
  """A PI controller: ascent, plus a term that answers the violation at once.

  The proportional term damps the oscillation of plain ascent (Stooke et al.,
  arXiv:2007.03964).

  Args:
    limit: epsilon, largest allowed E[c].
    initial: lambda at the start.
    proportional: gain on u itself.
    integral: gain on the sum of u over updates.
    maximum: of lambda and of the sum.
    by_age: one lambda for each bucket of ages.
  """
  _check_positive(integral=integral)

  def rule(dual, u):
    total = jnp.clip(dual.integral + integral * u, 0.0, maximum)
    return DualState(total + proportional * u, total)

  return _make(
      rule, initial=initial, limit=limit, minimum=0.0, maximum=maximum,
      by_age=by_age,
  )


def multiplier_at(dual: DualState, age: jax.Array) -> jax.Array:
  """The multiplier that tokens of an age pay; same shape as `age`."""
  if dual.multiplier.shape == (1,):
    return jnp.broadcast_to(dual.multiplier, age.shape)
  return dual.multiplier[ages.bucket(age)]


def violation(
    constraint: Constraint, age: jax.Array, *, limit: float, by_age: bool
) -> tuple[jax.Array, jax.Array]:
  """E[c] - limit over all tokens [1], or by age [K], and where there are some.

  Args:
    constraint: of the tokens of an update.
    age: int32, broadcasts against its values.
    limit: epsilon.
    by_age: whether to split.
  """
  if by_age:
    buckets = ages.bucket(jnp.broadcast_to(age, constraint.values.shape))
    chosen = jax.nn.one_hot(buckets, ages.NUM_BUCKETS, dtype=bool)
  else:
    chosen = jnp.ones((*constraint.values.shape, 1), bool)
  weights = constraint.weights[..., None] * chosen
  values = jnp.where(constraint.weights > 0, constraint.values, 0.0)
  overall = lambda x: jnp.sum(x.reshape(-1, x.shape[-1]), axis=0)
  total = overall(weights)
  # Not a matrix product: accelerators take those at a lower precision.
  mean = overall(values[..., None] * weights) / jnp.where(total > 0, total, 1.0)
  return mean - limit, total > 0


def _make(rule, *, initial, limit, minimum, maximum, by_age) -> Dual:
  """Adds the clamp, the size, and the indifference to what was not seen."""
  if not limit > 0:
    raise ValueError(f'limit={limit} is not positive.')
  if not minimum <= initial <= maximum:
    raise ValueError(
        f'The multiplier starts at {initial}, outside of {minimum} to '
        f'{maximum}.'
    )
  size = ages.NUM_BUCKETS if by_age else 1

  def init() -> DualState:
    # Not one array twice: donation refuses the same buffer.
    start = lambda: jnp.full(size, initial, jnp.float32)
    return DualState(start(), start())

  def update(dual, violation, seen=True):
    new = rule(dual, jnp.clip(violation / limit, -1.0, 1.0))
    new = new._replace(
        multiplier=jnp.clip(new.multiplier, minimum, maximum)
    )
    return jax.tree.map(lambda x, y: jnp.where(seen, x, y), new, dual)

  return Dual(init, update, limit, by_age)


def _check_positive(**values: float) -> None:
  for name, value in values.items():
    if not value > 0:
      raise ValueError(f'{name}={value} is not positive.')
