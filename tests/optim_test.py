"""Optimizers: their updates, and what moments and parameters are kept in."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dppo_jax import optim


def descend(optimizer, params, *, num_updates, gradient):
  """Parameters and state after that many equal gradients."""
  state = optimizer.transformation.init(params)
  gradients = jax.tree.map(lambda x: jnp.full_like(x, gradient), params)
  for _ in range(num_updates):
    changes, state = optimizer.transformation.update(gradients, state, params)
    params = optax.apply_updates(params, changes)
  return params, state


def sgd():
  return optim.Optimizer(optax.sgd(1.0), optax.constant_schedule(1.0))


def test_updates_that_bfloat16_rounds_away_add_up_in_the_master_weights():
  # Next to 1 bfloat16 has 1 - 1/256; a step of 1/4096 is rounded away.
  params = {'w': {'kernel': jnp.ones((2, 3), jnp.bfloat16)}}
  steps = {'num_updates': 64, 'gradient': 1 / 4096}
  lost, _ = descend(sgd(), params, **steps)
  kept, state = descend(optim.with_master_weights(sgd()), params, **steps)
  assert (lost['w']['kernel'] == 1).all()
  assert kept['w']['kernel'].dtype == jnp.bfloat16
  assert (kept['w']['kernel'] == 1 - 64 / 4096).all()
  assert state.master['w']['kernel'].dtype == jnp.float32


@pytest.mark.parametrize('start', [1.0, -3e-3, 2e4])
def test_parameters_are_the_master_weights_rounded(start):
  rng = np.random.RandomState(0)
  values = start * rng.standard_normal(1000)
  params = {'w': {'kernel': jnp.asarray(values, jnp.bfloat16)}}
  optimizer = optim.with_master_weights(
      optim.build('adamw', total_updates=9, learning_rate=1e-4)
  )
  params, state = descend(optimizer, params, num_updates=9, gradient=0.1)
  master = state.master['w']['kernel']
  np.testing.assert_array_equal(
      params['w']['kernel'], master.astype(jnp.bfloat16)
  )
  assert (master != params['w']['kernel'].astype(jnp.float32)).any()


def test_in_float32_master_weights_change_nothing():
  params = {'w': {'kernel': jnp.linspace(-1, 1, 7)}}
  optimizer = optim.build('adamw', total_updates=5, learning_rate=0.01)
  steps = {'num_updates': 5, 'gradient': 0.3}
  plain, _ = descend(optimizer, params, **steps)
  wrapped, _ = descend(optim.with_master_weights(optimizer), params, **steps)
  np.testing.assert_allclose(
      wrapped['w']['kernel'], plain['w']['kernel'], rtol=0, atol=1e-7
  )


def test_the_first_moment_may_be_kept_in_bfloat16():
  params = {'w': {'kernel': jnp.ones((4, 4))}}
  # Of clipping and AdamW: the state of Adam.
  moments = lambda **options: optim.build(
      'adamw', total_updates=1, **options
  ).transformation.init(params)[1][0]
  short, whole = moments(mu_dtype='bfloat16'), moments()
  assert short.mu['w']['kernel'].dtype == jnp.bfloat16
  assert whole.mu['w']['kernel'].dtype == jnp.float32
  assert short.nu['w']['kernel'].dtype == jnp.float32


def test_another_dtype_of_the_first_moment_is_refused():
  with pytest.raises(ValueError, match="mu_dtype 'float8'.*bfloat16, float32"):
    optim.build('adamw', total_updates=1, mu_dtype='float8')


@pytest.mark.parametrize('schedule, rates', [
    ('constant', (0, 3, 6, 6, 6, 6, 6)),
    ('linear', (0, 3, 6, 4.5, 3, 0, 0)),
    # 3 (1 + cos(pi / 4)) a quarter of the way down.
    ('cosine', (0, 3, 6, 5.121320, 3, 0, 0)),
])
def test_a_schedule_warms_up_and_ends_with_the_run(schedule, rates):
  options = {'learning_rate': 6.0, 'schedule': schedule}
  warm = optim.build('adamw', total_updates=12, warmup_updates=4, **options)
  got = [warm.schedule(n) for n in (0, 2, 4, 6, 8, 12, 20)]
  np.testing.assert_allclose(got, rates, rtol=1e-6, atol=1e-6)
  # Without, from its peak on; and a run may be nothing but warm-up.
  cold = optim.build('adamw', total_updates=8, **options)
  got = [cold.schedule(n) for n in (0, 2, 4, 8, 16)]
  np.testing.assert_allclose(got, rates[2:], rtol=1e-6, atol=1e-6)
  short = optim.build('adamw', total_updates=4, warmup_updates=4, **options)
  assert [float(short.schedule(n)) for n in (0, 2, 4)] == [0, 3, 6]


def adamw_in_numpy(
    params, gradients, rates, *, b1=0.9, b2=0.999, epsilon=1e-8,
    weight_decay=0.01, max_grad_norm=1.0,
):
  """Algorithm 2 of arXiv:1711.05101 behind a clip, in float64."""
  params = dict(params)
  first, second = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
  for t, (of_update, rate) in enumerate(zip(gradients, rates), start=1):
    norm = np.sqrt(sum(np.sum(g**2) for g in of_update.values()))
    for name, g in of_update.items():
      g = g * min(1, max_grad_norm / norm)
      first[name] = b1 * first[name] + (1 - b1) * g
      second[name] = b2 * second[name] + (1 - b2) * g**2
      root = np.sqrt(second[name] / (1 - b2**t)) + epsilon
      step = first[name] / (1 - b1**t) / root
      if name in ('kernel', 'embedding', 'a', 'b'):
        step = step + weight_decay * params[name]
      params[name] = params[name] - rate * step
  return params


@pytest.mark.parametrize('options', [
    {},
    {'weight_decay': 0.0, 'max_grad_norm': math.inf},
    {'b1': 0.6, 'b2': 0.8, 'weight_decay': 0.5, 'max_grad_norm': 2.0},
    {'epsilon': 0.1},
])
def test_updates_are_those_of_adamw_written_out(options):
  rng = np.random.RandomState(0)
  draw = lambda size: {
      name: size * rng.standard_normal(shape)
      for name, shape in {
          'kernel': (2, 3, 4), 'embedding': (5, 3), 'a': (3, 2), 'b': (2, 3),
          'scale': (3,), 'bias': (4,),
      }.items()
  }
  # Norms of about 7 size: of 30, below every clip, and between them.
  params, gradients = draw(1.0), [draw(size) for size in (4, 0.05, 0.2, 1)]
  optimizer = optim.build(
      'adamw', total_updates=4, learning_rate=0.1, schedule='linear', **options
  )
  narrow = lambda tree: jax.tree.map(jnp.float32, tree)
  got = narrow(params)
  state = optimizer.transformation.init(got)
  for of_update in gradients:
    changes, state = optimizer.transformation.update(
        narrow(of_update), state, got
    )
    got = optax.apply_updates(got, changes)
  expected = adamw_in_numpy(
      params, gradients, (0.1, 0.075, 0.05, 0.025), **options
  )
  for name, x in expected.items():
    np.testing.assert_allclose(
        got[name], x, rtol=1e-4, atol=1e-5, err_msg=name
    )
