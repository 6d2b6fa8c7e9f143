"""Losses and rules marked `by_token` see each token by itself, no others do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import losses
from dppo_jax import trust_regions
from dppo_jax.types import by_token
from dppo_jax.types import is_by_token
from dppo_jax.types import LossInputs

pytestmark = pytest.mark.usefixtures('no_nans')

SHAPE = 2, 6  # Two sequences.
TOKEN = 0, 2  # The one that is watched.
LOSSES = {
    'policy_gradient': True,
    'policy_gradient, ratio=sequence': False,
    'policy_gradient, ratio=geometric': False,
    'spo': True,
    'drpo': True,
    'r2vpo': True,
    'r2vpo, stop_at_turning_point=true': True,
    'r2vpo, center=mean': False,
    'r2vpo, ratio=sequence': False,
    'r2vpo, ratio=geometric': False,
    'r2vpo, per=sequence': False,
}
REGIONS = {
    'outward': True,
    'minimal': True,
    'relaxed': True,
    'dual_clip': True,
    'band': True,
    'sequence_ratio': False,
    'sequence_divergence': False,
    'sequence_divergence, statistic=mean': False,
    'cumulative_prefix': False,
    'cumulative_prefix, soft=true': False,
    'second_moment': False,
}


def build(module, case):
  name, *options = case.split(', ')
  pairs = dict(x.split('=') for x in options)
  return module.build(
      name, **{k: True if v == 'true' else v for k, v in pairs.items()}
  )


def draw(seed):
  """What a rule and a loss look at, one draw of it, [2, 6]."""
  rng = np.random.RandomState(seed)
  normal = lambda: np.float32(rng.standard_normal(SHAPE))
  behaviour = -np.abs(normal()) - 0.1
  log_ratio = 0.3 * normal()
  return {
      'behaviour_logprobs': behaviour,
      'logprobs': np.minimum(behaviour + log_ratio, -0.01),
      'divergence': np.abs(0.12 * normal()),
      'advantages': normal(),
      'token_mask': rng.uniform(size=SHAPE) < 0.8,
  }


def of_loss(loss_fn, drawn):
  """Loss, what it reports and its gradient, of each token."""
  inputs = LossInputs(
      trust_region=jnp.ones(drawn['logprobs'].shape, bool), multiplier=0.5,
      limit=0.02, **drawn,
  )

  def total(logprobs):
    loss, metrics = loss_fn(inputs._replace(logprobs=logprobs))
    return jnp.sum(jnp.where(inputs.token_mask, loss, 0)), (loss, metrics)

  return jax.grad(total, has_aux=True)(inputs.logprobs)


def of_region(region_fn, drawn):
  log_ratio = drawn['logprobs'] - drawn['behaviour_logprobs']
  return region_fn(trust_regions.RegionInputs(
      divergence=drawn['divergence'], log_ratio=log_ratio, direction=log_ratio,
      anchor_logprobs=drawn['behaviour_logprobs'],
      advantages=drawn['advantages'], token_mask=drawn['token_mask'],
      segment_ids=jnp.ones(log_ratio.shape, jnp.int32), threshold=0.1,
  ))


def depends_on_others(apply, fn):
  """Whether what it says of a token changes with the other ones."""
  changed = False
  for seed in range(20):
    drawn, others = draw(2 * seed), draw(2 * seed + 1)
    for x, y in zip(drawn.values(), others.values()):
      y[TOKEN] = x[TOKEN]
    drawn['token_mask'][TOKEN] = others['token_mask'][TOKEN] = True
    found, again = (
        [x[TOKEN] for x in jax.tree.leaves(apply(fn, arrays(y)))]
        for y in (drawn, others)
    )
    changed |= not np.allclose(found, again, rtol=1e-6, atol=1e-7)
  return changed


def arrays(drawn):
  return {name: jnp.asarray(x) for name, x in drawn.items()}


CASES = [(losses, of_loss, *x) for x in LOSSES.items()]
CASES += [(trust_regions, of_region, *x) for x in REGIONS.items()]


@pytest.mark.parametrize('module, apply, case, marked', CASES)
def test_what_is_marked_by_token_and_only_that_sees_each_token_by_itself(
    module, apply, case, marked
):
  fn = build(module, case)
  assert is_by_token(fn) == marked
  assert depends_on_others(apply, fn) == (not marked)
  if not marked:
    return
  # So any tokens will do, in no order and in no rows.
  drawn, chosen = arrays(draw(0)), jnp.asarray([7, 2, 11, 4])
  some = jax.tree.map(lambda x: x.ravel()[chosen], drawn)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(
          x.ravel()[chosen], y, rtol=1e-6, atol=1e-7
      ),
      apply(fn, drawn), apply(fn, some),
  )


def test_every_loss_and_every_rule_is_among_the_cases():
  first = lambda cases: {case.split(',')[0] for case in cases}
  assert first(LOSSES) == set(losses.names())
  assert first(REGIONS) == set(trust_regions.names())


def test_what_says_nothing_of_itself_is_not_taken_to_be_by_token():
  fn = lambda inputs: (inputs.logprobs, {})
  assert not is_by_token(fn)
  assert by_token(fn) is fn and is_by_token(fn)
