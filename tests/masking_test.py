"""Masked reductions against `np.ma`, with anything under the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import masking

REDUCTIONS = {
    'sum': (masking.masked_sum, np.ma.sum),
    'mean': (masking.masked_mean, np.ma.mean),
    'max': (masking.masked_max, np.ma.max),
    'min': (masking.masked_min, np.ma.min),
}
each_reduction = pytest.mark.parametrize('name', REDUCTIONS)


def values_and_mask():
  random = np.random.default_rng(0)
  values = random.normal(size=(5, 7)).astype(np.float32)
  return values, random.random((5, 7)) < 0.6


@each_reduction
def test_reduction_is_that_of_numpy_masked_arrays(name):
  ours, numpys = REDUCTIONS[name]
  values, mask = values_and_mask()
  expected = numpys(np.ma.array(values, mask=~mask))
  np.testing.assert_allclose(ours(values, mask), expected, rtol=1e-5)
  np.testing.assert_allclose(jax.jit(ours)(values, mask), expected, rtol=1e-5)


@each_reduction
@pytest.mark.parametrize('spoiler', [np.nan, np.inf, -np.inf])
def test_nothing_under_the_mask_reaches_value_or_gradient(name, spoiler):
  ours, _ = REDUCTIONS[name]
  values, mask = values_and_mask()
  spoiled = jnp.asarray(np.where(mask, values, spoiler))
  value, gradient = jax.value_and_grad(ours)(jnp.asarray(values), mask)
  got, spoiled_gradient = jax.value_and_grad(ours)(spoiled, mask)
  np.testing.assert_array_equal(got, value)
  np.testing.assert_array_equal(spoiled_gradient, gradient)
  assert not np.any(np.asarray(gradient)[~mask])


@each_reduction
def test_empty_mask_gives_zero(name):
  ours, _ = REDUCTIONS[name]
  assert ours(jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)) == 0


@pytest.mark.parametrize('q', [0.0, 0.25, 0.5, 0.9, 0.99, 1.0])
def test_quantile_is_the_smallest_value_that_a_share_q_does_not_exceed(q):
  values, mask = values_and_mask()
  expected = np.quantile(values[mask], q, method='inverted_cdf')
  spoiled = np.where(mask, values, np.nan)
  got = masking.masked_quantile(jnp.asarray(spoiled), jnp.asarray(mask), q=q)
  np.testing.assert_array_equal(got, expected)


def test_quantile_of_nothing_is_zero():
  nothing = jnp.zeros(4, bool)
  assert masking.masked_quantile(jnp.ones(4), nothing, q=0.5) == 0


def test_mean_of_bfloat16_is_taken_in_float32():
  # 1000 times 1.0 stops at 256 when it is added up in bfloat16.
  mean = masking.masked_mean(
      jnp.ones(1000, jnp.bfloat16), jnp.ones(1000, bool)
  )
  assert mean.dtype == jnp.float32 and mean == 1
