"""Optimizers: what moments and parameters are kept in, and what that loses."""

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
