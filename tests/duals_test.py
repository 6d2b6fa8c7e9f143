"""The multiplier: what it sees, how it steps, and where it settles."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import ages
from dppo_jax import duals
from dppo_jax import losses
from dppo_jax.types import LossInputs

pytestmark = pytest.mark.usefixtures('no_nans')

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)

LEARNING = ('projected_ascent', 'exponentiated', 'proportional_integral')
each_learning_rule = pytest.mark.parametrize('name', LEARNING)


# --- ages and tokens ---------------------------------------------------------


def test_ages_go_into_buckets_that_double():
  age = jnp.asarray([[0, 1, 2, 3, 4], [7, 8, 63, 64, 10**6]])
  np.testing.assert_array_equal(
      ages.bucket(age), [[0, 1, 2, 2, 3], [3, 4, 6, 7, 7]]
  )
  assert len(ages.names()) == ages.NUM_BUCKETS == len(set(ages.names()))
  assert ages.names()[:3] == ['0', '1', '2-3']
  assert ages.names()[-1] == '64-'


def test_a_token_pays_the_multiplier_of_its_age():
  age = jnp.asarray([[0], [5], [100]])
  dual = duals.build('projected_ascent', by_age=True).init()
  dual = dual._replace(multiplier=jnp.arange(8.0))
  np.testing.assert_array_equal(duals.multiplier_at(dual, age), [[0], [3], [7]])
  alone = duals.build('projected_ascent', initial=0.5).init()
  np.testing.assert_array_equal(
      duals.multiplier_at(alone, age), [[0.5], [0.5], [0.5]]
  )


def constraint(values, weights):
  values = jnp.asarray(values, jnp.float32)
  return duals.Constraint(
      values, jnp.asarray(weights, jnp.float32), jnp.zeros(values.shape, bool)
  )


def test_the_violation_is_the_weighted_mean_less_the_limit():
  # (1 * .1 + 1 * .3 + .5 * .4) / 2.5 = .24; what has no weight may be NaN.
  with jax.debug_nans(False):
    seen_by_loss = constraint([[0.1, 0.3], [0.4, np.nan]], [[1, 1], [0.5, 0]])
  violation, seen = duals.violation(
      seen_by_loss, jnp.asarray([[0], [9]]), limit=0.02, by_age=False
  )
  close(violation, [0.22])
  assert seen.tolist() == [True]


def test_the_violation_by_age_is_that_of_each_bucket():
  # Ages 0 and 9, the latter in bucket 8-15: means .2 and .4.
  violation, seen = duals.violation(
      constraint([[0.1, 0.3], [0.4, 7.0]], [[1, 1], [0.5, 0]]),
      jnp.asarray([[0], [9]]),
      limit=0.02,
      by_age=True,
  )
  assert seen.tolist() == [True] + [False] * 3 + [True] + [False] * 3
  close(violation[seen], [0.18, 0.38])
  # Only these two move: u is cut at 1.
  rule = duals.build('projected_ascent', by_age=True)
  close(
      rule.update(rule.init(), violation, seen).multiplier,
      [0.06, 0.04, 0.04, 0.04, 0.06, 0.04, 0.04, 0.04],
  )


def test_micro_batches_add_up_to_the_violation_of_the_mini_batch():
  rng = np.random.RandomState(0)
  values, weights = rng.exponential(size=(2, 4, 3, 5)).astype(np.float32)
  age = rng.randint(0, 20, (4, 3, 1))
  age = np.broadcast_to(age, values.shape)
  for by_age in (False, True):
    options = {'limit': 0.5, 'by_age': by_age}
    parts = duals.violation(
        constraint(values, weights), jnp.asarray(age), **options
    )
    whole = duals.violation(
        constraint(values.reshape(12, 5), weights.reshape(12, 5)),
        jnp.asarray(age.reshape(12, 5)),
        **options,
    )
    close(parts[0], whole[0], rtol=1e-4)
    np.testing.assert_array_equal(parts[1], whole[1])


def test_nothing_seen_is_no_violation_that_counts():
  violation, seen = duals.violation(
      constraint([[3.0]], [[0.0]]), jnp.zeros((1, 1), int), limit=0.02,
      by_age=False,
  )
  assert np.isfinite(violation).all() and seen.tolist() == [False]


@pytest.mark.parametrize('name, options, message', [
    ('projected_ascent', {'initial': 11.0}, 'starts at 11.0, outside of 0.0 '),
    ('exponentiated', {'initial': 0.0}, 'starts at 0.0, outside of 0.0001 '),
    ('exponentiated', {'minimum': 0.0}, 'minimum=0.0 is not positive'),
    ('projected_ascent', {'learning_rate': 0.0}, 'learning_rate=0.0 is not'),
    ('proportional_integral', {'integral': 0.0}, 'integral=0.0 is not'),
    ('fixed', {'multiplier': -1.0}, 'starts at -1.0'),
    ('projected_ascent', {'limit': math.nan}, 'limit=nan is not positive'),
])
def test_a_rule_that_cannot_be_is_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    duals.build(name, **options)


# --- where it settles --------------------------------------------------------


def ascend(rule, gradient, value, start, *, rate, num_steps=3000):
  """Ascends on the policy and on the dual in turns; the last (x, dual)."""

  def step(carry, _):
    x, dual = carry
    x = x + rate * gradient(x, dual.multiplier[0])
    return (x, rule.update(dual, value(x) - rule.limit)), None

  run = lambda carry: jax.lax.scan(step, carry, length=num_steps)[0]
  return jax.jit(run)((start, rule.init()))


@each_learning_rule
@pytest.mark.parametrize('initial', [0.04, 4.0])
def test_the_multiplier_of_a_quadratic_problem_is_the_known_one(name, initial):
  # max -(x - 2)^2 / 2 with x^2 <= .25: x = 2 / (1 + 2 lambda) = .5, so lambda
  # = 1 / .5 - 1 / 2 = 1.5.
  x, dual = ascend(
      duals.build(name, limit=0.25, initial=initial),
      lambda x, price: 2 - x - 2 * price * x,
      jnp.square,
      jnp.float32(2.0),
      rate=0.1,
  )
  close(x, 0.5, rtol=1e-3)
  close(dual.multiplier, [1.5], rtol=3e-3)


@each_learning_rule
def test_the_multiplier_of_a_constraint_with_slack_falls_to_its_minimum(name):
  # The maximum itself, x = 2, is inside x^2 <= 9.
  x, dual = ascend(
      duals.build(name, limit=9.0),
      lambda x, price: 2 - x - 2 * price * x,
      jnp.square,
      jnp.float32(0.0),
      rate=0.1,
  )
  assert dual.multiplier[0] == (1e-4 if name == 'exponentiated' else 0)
  close(x, 2, rtol=1e-3)


# A bandit: four arms, of which mu draws the first four times out of ten, and so
# on. One token for each of the ten, so means over tokens are those over mu.

ARMS = np.repeat(np.arange(4), [4, 3, 2, 1])
MU = np.asarray([0.4, 0.3, 0.2, 0.1])
REWARDS = np.asarray([0.0, 0.2, 0.5, 1.0])
ADVANTAGES = REWARDS - MU @ REWARDS


def bandit_inputs(logits, multiplier=None, limit=None):
  logprobs = jax.nn.log_softmax(logits)[ARMS][None]
  return LossInputs(
      logprobs=logprobs,
      behaviour_logprobs=jnp.log(jnp.asarray(MU, jnp.float32))[ARMS][None],
      divergence=jnp.zeros((1, 10)),
      trust_region=jnp.ones((1, 10), bool),
      advantages=jnp.asarray(ADVANTAGES, jnp.float32)[ARMS][None],
      token_mask=jnp.ones((1, 10), bool),
      multiplier=multiplier,
      limit=limit,
  )


def bandit_gradient(logits, loss_fn, **options):
  """Of the loss, by the logits of the arms."""
  return jax.grad(
      lambda x: jnp.mean(loss_fn(bandit_inputs(x, **options))[0])
  )(logits)


def train_bandit(name, limit):
  """The logits and the dual after many updates, from the policy that drew."""
  rule, loss_fn = duals.build(name, limit=limit), losses.build('r2vpo')

  def variance(logits):
    _, metrics = loss_fn(bandit_inputs(logits, 0.0, limit))
    violation, _ = duals.violation(
        metrics['constraint'], jnp.zeros((1, 1), int), limit=limit, by_age=False
    )
    return violation[0] + limit

  def gradient(logits, price):
    return -bandit_gradient(logits, loss_fn, multiplier=price, limit=limit)

  start = jnp.log(jnp.asarray(MU, jnp.float32))
  return ascend(rule, gradient, variance, start, rate=0.5)


@each_learning_rule
def test_the_variance_of_a_bandit_s_ratios_settles_at_a_small_limit(name):
  # pi = mu (1 + A / (2 lambda)), so Var(r) = Var(A) / (4 lambda^2).
  limit = 0.02
  logits, dual = train_bandit(name, limit)
  ratio = np.asarray(jax.nn.softmax(logits)) / MU
  close(MU @ ratio, 1)
  close(MU @ (ratio - 1) ** 2, limit, rtol=0.1)
  known = np.sqrt(MU @ ADVANTAGES**2 / (4 * limit))
  close(dual.multiplier, [known], rtol=0.1)
  close(ratio, 1 + ADVANTAGES / (2 * known), rtol=0.02)


@each_learning_rule
def test_under_a_large_limit_the_update_is_that_of_importance_weights(name):
  # No policy over these arms has a variance above 1 / .1 - 1 = 9.
  logits, dual = train_bandit(name, 100.0)
  assert np.argmax(logits) == 3
  lowest = 1e-4 if name == 'exponentiated' else 0
  assert dual.multiplier[0] == lowest
  logits = logits / 4  # Back to where every arm still has a gradient.
  got = bandit_gradient(
      logits, losses.build('r2vpo'), multiplier=dual.multiplier[0], limit=100.0
  )
  expected = bandit_gradient(logits, losses.build('policy_gradient'))
  assert np.abs(expected).max() > 0.01
  if lowest:
    close(got, expected, atol=3e-3)
  else:
    np.testing.assert_array_equal(got, expected)
