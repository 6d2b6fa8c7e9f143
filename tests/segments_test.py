"""Reductions over sequences, and that packing them changes nothing.

A packed row holds two or three sequences and padding; unpacked, every sequence
has a row of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import losses
from dppo_jax import segments
from dppo_jax import trust_regions
from dppo_jax.types import LossInputs

pytestmark = pytest.mark.usefixtures('no_nans')

# Ids of the packed rows; 0 is padding, and ids need not start at 1.
IDS = np.asarray([
    [1, 1, 1, 2, 2, 3, 3, 3, 3, 0],
    [4, 4, 4, 4, 4, 7, 7, 7, 0, 0],
    [1, 2, 2, 2, 2, 2, 2, 2, 2, 2],
], np.int32)
# Not sampled: prompts, and one sequence of which nothing was.
MASK = np.asarray([
    [0, 1, 1, 1, 1, 0, 0, 1, 1, 0],
    [0, 0, 1, 1, 1, 0, 0, 0, 0, 0],
    [1, 0, 1, 1, 0, 1, 1, 1, 1, 1],
], bool)


def sequences():
  """Yields (row, columns) of every sequence, sampled or not."""
  for row, ids in enumerate(IDS):
    for i in sorted(set(ids) - {0}):
      yield row, np.flatnonzero(ids == i)


def random_values(seed=0):
  return np.random.RandomState(seed).exponential(size=IDS.shape)


def expected(name, values):
  """The reduction by plain loops."""
  out = np.zeros(IDS.shape)
  for row, columns in sequences():
    sampled = [c for c in columns if MASK[row, c]]
    for c in columns:
      seen = [s for s in sampled if s <= c] if name == 'prefix' else sampled
      picked = values[row, seen]
      out[row, c] = {
          'total': np.sum, 'prefix': np.sum,
          'mean': lambda x: np.mean(x) if len(x) else 0,
          'largest': lambda x: np.max(x) if len(x) else 0,
      }[name](picked)
  return out


@pytest.mark.parametrize('name', ['total', 'mean', 'largest', 'prefix'])
def test_reduction_equals_a_loop_over_the_sequences(name):
  values = random_values()
  fn = getattr(segments, name)
  inputs = jnp.asarray(values, jnp.float32), jnp.asarray(MASK), jnp.asarray(IDS)
  valid = IDS > 0
  for got in (fn(*inputs), jax.jit(fn)(*inputs)):
    assert got.shape == IDS.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(
        np.asarray(got)[valid], expected(name, values)[valid], rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize('name', ['total', 'mean'])
def test_sums_take_negative_values(name):
  values = random_values() - 1
  got = getattr(segments, name)(
      jnp.asarray(values, jnp.float32), jnp.asarray(MASK), jnp.asarray(IDS)
  )
  valid = IDS > 0
  np.testing.assert_allclose(
      np.asarray(got)[valid], expected(name, values)[valid], rtol=1e-4,
      atol=1e-6,
  )


@pytest.mark.parametrize('name', ['total', 'mean', 'largest', 'prefix'])
@pytest.mark.parametrize('spoiler', [np.nan, np.inf, -np.inf])
def test_reduction_does_not_see_what_is_masked_out(name, spoiler):
  fn = getattr(segments, name)
  values = jnp.asarray(random_values(), jnp.float32)
  mask, ids = jnp.asarray(MASK), jnp.asarray(IDS)
  with jax.debug_nans(False):  # NaN goes in here, on purpose.
    dirty = fn(jnp.where(mask, values, spoiler), mask, ids)
  np.testing.assert_array_equal(dirty, fn(values, mask, ids))


@pytest.mark.parametrize('outlier', [np.inf, 1e30])
def test_a_prefix_does_not_see_an_outlier_of_its_neighbour(outlier):
  values = jnp.asarray([[0.1, outlier, 0.3, 0.3, 0.3]])
  ids = jnp.asarray([[1, 1, 2, 2, 2]])
  got = segments.prefix(values, jnp.ones(ids.shape, bool), ids)
  np.testing.assert_allclose(got, [[0.1, outlier, 0.3, 0.6, 0.9]], rtol=1e-6)


def unpacked(values, fill):
  """One sequence a row, from its first column on. [B, T] -> [S, T]."""
  out = np.full((len(list(sequences())), IDS.shape[1]), fill, values.dtype)
  for i, (row, columns) in enumerate(sequences()):
    out[i, :len(columns)] = values[row, columns]
  return out


def region_inputs(seed):
  rng = np.random.RandomState(seed)
  float32 = lambda x: np.asarray(x, np.float32)
  log_ratio = float32(0.3 * rng.standard_normal(IDS.shape))
  signs = np.zeros(IDS.shape)
  for row, columns in sequences():
    signs[row, columns] = rng.choice([-1, 1, 1])
  return {
      'divergence': float32(0.15 * rng.exponential(size=IDS.shape)),
      'log_ratio': log_ratio,
      'direction': log_ratio * np.float32(rng.choice([-1, 1, 1, 1])),
      'anchor_logprobs': float32(-rng.exponential(size=IDS.shape)),
      'advantages': float32(signs),
      'token_mask': MASK,
      'segment_ids': IDS,
  }


# Rules with other options than their defaults that reduce over sequences.
RULES = [(name, {}) for name in trust_regions.names()] + [
    ('cumulative_prefix', {'soft': True}),
    ('sequence_divergence', {'statistic': 'mean'}),
]


@pytest.mark.parametrize('name, options', RULES)
def test_region_of_packed_rows_is_that_of_one_sequence_a_row(name, options):
  rule = trust_regions.build(name, **options)

  @jax.jit
  def region_of(arrays):
    return rule(trust_regions.RegionInputs(threshold=0.2, **arrays))

  outcomes = []
  for seed in range(8):
    packed = region_inputs(seed)
    alone = {k: unpacked(v, np.zeros((), v.dtype)) for k, v in packed.items()}
    alone['segment_ids'] = np.ones_like(alone['segment_ids'])
    region, expected = (
        np.asarray(region_of(x), np.float32) for x in (packed, alone)
    )
    mask = alone['token_mask']
    region = unpacked(region, np.float32(0))
    np.testing.assert_allclose(region[mask], expected[mask], rtol=1e-5)
    outcomes.append(expected[mask])
  outcomes = np.concatenate(outcomes)
  assert outcomes.min() < 1 and outcomes.max() == 1  # Both are there.


@pytest.mark.parametrize('options', [
    {'ratio_cap': 1.5}, {'center': 'one'}, {'center': 'mean'},
    {'per': 'sequence'},
], ids=str)
@pytest.mark.parametrize('ratio', ['token', 'sequence', 'geometric'])
def test_loss_of_packed_rows_is_that_of_one_sequence_a_row(ratio, options):
  name = 'policy_gradient' if 'ratio_cap' in options else 'r2vpo'
  loss_fn = losses.build(name, ratio=ratio, **options)

  @jax.jit
  def loss_of(arrays):
    loss, _ = loss_fn(LossInputs(
        logprobs=arrays['anchor_logprobs'] + arrays['log_ratio'],
        behaviour_logprobs=arrays['anchor_logprobs'],
        divergence=arrays['divergence'],
        trust_region=jnp.ones(arrays['token_mask'].shape, bool),
        advantages=arrays['advantages'],
        token_mask=arrays['token_mask'],
        segment_ids=arrays['segment_ids'],
        multiplier=0.5,
        limit=0.05,
    ))
    return loss

  packed = region_inputs(0)
  alone = {k: unpacked(v, np.zeros((), v.dtype)) for k, v in packed.items()}
  without_ids = alone | {'segment_ids': None}
  expected = loss_of(without_ids)  # None: one sequence a row.
  got = unpacked(np.asarray(loss_of(packed)), np.float32(0))
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
