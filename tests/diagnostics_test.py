"""Metrics of the trust region, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import diagnostics
from dppo_jax import divergences
from dppo_jax import duals
from dppo_jax import masking

pytestmark = pytest.mark.usefixtures('no_nans')

# One update of one row of eight tokens; the last two were not sampled. mu and
# pi are probabilities of the sampled token, TV = |mu - pi|, threshold 0.15.
#
#   token           0     1     2     3     4     5    | 6     7
#   mu             0.50  0.50  0.50  0.80  0.90  0.50  |
#   pi             0.70  0.40  0.60  0.50  0.30  0.20  |
#   TV             0.20  0.10  0.10  0.30  0.60  0.30  |
#   A               +1    +1    -1    +1    -1     0   |
#   moves          out   back  back  back  out    -    |
#   outside        yes   no    no    yes   yes   yes   |
#   masked         yes   no    no    no    yes   no    |
MU = np.array([0.5, 0.5, 0.5, 0.8, 0.9, 0.5])
PI = np.array([0.7, 0.4, 0.6, 0.5, 0.3, 0.2])
ADVANTAGES = np.array([1.0, 1.0, -1.0, 1.0, -1.0, 0.0])
TARGETS = np.array([3, 3, 1, 0, 2, 2])
ENTROPY = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def padded(values, fill):
  """[1, 1, 8]; what was not sampled holds `fill`."""
  values = np.concatenate([values, np.full(2, fill)])
  return jnp.asarray(values.astype(np.float32))[None, None]


def make_stats(fill=0.0, threshold=0.15):
  logprobs, behaviour = padded(np.log(PI), fill), padded(np.log(MU), fill)
  divergence = padded(np.abs(PI - MU), fill)
  advantages = padded(ADVANTAGES, 0.0)
  mask = padded(np.ones(6), 0.0) > 0
  region = divergences.trust_region(
      divergence=divergence,
      log_ratio=logprobs - behaviour,
      advantages=advantages,
      threshold=threshold,
  )
  return diagnostics.TokenStats(
      targets=padded(TARGETS, 0).astype(jnp.int32),
      token_mask=mask,
      logprobs=logprobs,
      behaviour_logprobs=behaviour,
      divergence=divergence,
      direction=logprobs - behaviour,
      trust_region=region.astype(jnp.float32),
      advantages=advantages,
      entropy=padded(ENTROPY, fill),
      age=jnp.zeros(mask.shape, jnp.int32),
      surrogate=padded(PI / MU * ADVANTAGES, fill),
      capped=padded(np.array([0, 0, 0, 1, 0, 0]), fill),
      gradient_weight=jnp.where(
          region, padded(np.abs(PI / MU * ADVANTAGES), fill), 0.0
      ),
      weights=padded(np.full(6, 1 / 6), fill),
  )


def metrics_of(stats, threshold=0.15):
  metrics = diagnostics.token_metrics(stats, threshold=threshold)
  return {name: float(value) for name, value in metrics.items()}


def test_shares_of_masked_tokens_by_hand():
  metrics = metrics_of(make_stats())
  expected = {
      'mask/fraction': 2 / 6,  # Tokens 0 and 4.
      'mask/of_nonzero': 2 / 5,  # Token 5 has no advantage.
      'mask/positive': 1 / 3,  # 0 of 0, 1, 3.
      'mask/negative': 1 / 2,  # 4 of 2, 4.
      'mask/outside': 4 / 6,  # 0, 3, 4, 5.
      'mask/coming_back': 1 / 6,  # 3.
      'mask/bad_updates': 1 / 6,  # 4: A < 0 and pi - mu = -0.6 <= -0.5.
      'mask/bad_updates_kept': 0.0,  # It is masked.
      'mask/zero_gradient': 3 / 6,  # 0, 4 and, without advantage, 5.
  }
  for name, value in expected.items():
    assert metrics[name] == pytest.approx(value, abs=1e-6), name


def test_a_token_that_only_the_constraint_moves_has_a_gradient():
  stats = make_stats()
  held_back = stats._replace(gradient_weight=jnp.where(
      stats.advantages == 0, 2.0, stats.gradient_weight
  ))
  got = metrics_of(held_back)['mask/zero_gradient']
  assert got == pytest.approx(2 / 6)  # 0 and 4; 5 has no advantage.


def test_a_bad_update_inside_the_region_is_kept():
  # With threshold 0.7 nothing is outside, and so nothing is masked.
  metrics = metrics_of(make_stats(threshold=0.7), threshold=0.7)
  assert metrics['mask/fraction'] == metrics['mask/outside'] == 0
  assert metrics['mask/bad_updates'] == pytest.approx(1 / 6)
  assert metrics['mask/bad_updates_kept'] == pytest.approx(1 / 6)


@pytest.mark.parametrize('gap, bad', [(0.49, 0.0), (0.51, 1 / 6)])
def test_a_bad_update_lowers_a_token_by_a_half_or_more(gap, bad):
  behaviour = padded(np.log(np.where(MU == 0.9, 0.3 + gap, MU)), 0.0)
  stats = make_stats(threshold=0.9)._replace(behaviour_logprobs=behaviour)
  metrics = metrics_of(stats, threshold=0.9)
  assert metrics['mask/bad_updates'] == pytest.approx(bad)
  assert metrics['mask/bad_updates_kept'] == pytest.approx(bad)


def test_a_constraint_is_a_mean_by_its_own_weights():
  # (1 * .1 + 3 * .3) / 4; padding of weight 0 may hold anything.
  constraint = duals.Constraint(
      values=padded(np.array([0.1, 0.3, 9, 9, 9, 9]), np.inf),
      weights=padded(np.array([1.0, 3.0, 0, 0, 0, 0]), 0.0),
      beyond=padded(np.array([1, 0, 0, 1, 0, 0]), 1.0) > 0,
  )
  metrics = metrics_of(make_stats()._replace(constraint=constraint))
  assert metrics['constraint/value'] == pytest.approx(0.25)
  assert metrics['constraint/beyond_turning_point'] == pytest.approx(2 / 6)


def test_two_thresholds_are_low_for_negative_and_high_for_positive():
  # Low 0.5: token 4 (0.6, A < 0) is outside. High 0.25: of A > 0 only token 3
  # (0.3), which comes back; token 5 (0.3, A = 0) counts as low.
  threshold = (0.5, 0.25)
  metrics = metrics_of(make_stats(threshold=threshold), threshold=threshold)
  assert metrics['mask/outside'] == pytest.approx(2 / 6)
  assert metrics['mask/coming_back'] == pytest.approx(1 / 6)
  assert metrics['mask/positive'] == 0
  assert metrics['mask/negative'] == pytest.approx(1 / 2)


def test_divergences_by_hand():
  metrics = metrics_of(make_stats())
  # Sorted: 0.1 0.1 0.2 0.3 0.3 0.6, mean 1.6 / 6.
  expected = {
      'divergence/mean': 1.6 / 6,
      'divergence/max': 0.6,
      'divergence/q50': 0.2,  # ceil(0.5 * 6) = 3rd.
      'divergence/q90': 0.6,  # ceil(5.4) = 6th.
      'divergence/q99': 0.6,
      'divergence/mean_masked': (0.2 + 0.6) / 2,
      'divergence/mean_kept': (0.1 + 0.1 + 0.3 + 0.3) / 4,
      # Here the divergence is the binary TV.
      'binary_tv/mean': 1.6 / 6,
      'binary_tv/max': 0.6,
      # Token 4: 0.9 log(0.9 / 0.3) + 0.1 log(0.1 / 0.7).
      'binary_kl/max': 0.9 * math.log(3) + 0.1 * math.log(1 / 7),
      'mismatch/prob_gap_mean': 1.6 / 6,
      'mismatch/prob_gap_max': 0.2,  # Token 0: 0.7 - 0.5.
      'mismatch/prob_gap_min': -0.6,  # Token 4: 0.3 - 0.9.
      'entropy/mean': 2.1 / 6,
      'loss/capped': 1 / 6,
  }
  for name, value in expected.items():
    assert metrics[name] == pytest.approx(value, rel=1e-5), name


def test_moments_of_the_ratio_by_hand():
  # pi / mu: 1.4, 0.8, 1.2, 0.625, 1/3, 0.4.
  ratio = np.array([1.4, 0.8, 1.2, 0.625, 1 / 3, 0.4])
  np.testing.assert_allclose(PI / MU, ratio)
  metrics = metrics_of(make_stats())
  # 4.758333 / 6 = 0.793056.
  assert metrics['ratio/mean'] == pytest.approx(0.793056, rel=1e-5)
  assert metrics['ratio/max'] == pytest.approx(1.4)
  assert metrics['ratio/log_abs_max'] == pytest.approx(math.log(3))
  # (0.16 + 0.04 + 0.04 + 0.140625 + 0.444444 + 0.36) / 6 = 0.197512.
  assert metrics['ratio/second_moment'] == pytest.approx(0.197512, rel=1e-5)
  # 0.197512 - (0.793056 - 1)^2 = 0.154686.
  assert metrics['ratio/variance'] == pytest.approx(0.154686, rel=1e-4)
  # r - 1 - log r, averaged.
  k3 = np.mean(ratio - 1 - np.log(ratio))
  assert metrics['ratio/k3'] == pytest.approx(k3, rel=1e-5)
  # 4.758333^2 / (6 (1.96 + 0.64 + 1.44 + 0.390625 + 0.111111 + 0.16)).
  assert metrics['ratio/effective_sample_size'] == pytest.approx(
      22.641736 / 28.210416, rel=1e-5
  )
  # Surrogate: (1.4 + 0.8 - 1.2 + 0.625 - 1/3 + 0) / 6.
  assert metrics['loss/surrogate'] == pytest.approx(1.2916667 / 6, rel=1e-5)


def test_equal_policies_have_no_mismatch_and_mask_nothing():
  stats = make_stats()
  same = stats._replace(
      logprobs=stats.behaviour_logprobs,
      divergence=jnp.zeros_like(stats.divergence),
      trust_region=jnp.ones_like(stats.trust_region),
  )
  metrics = metrics_of(same)
  for name in (
      'mask/fraction', 'mask/outside', 'mask/bad_updates', 'divergence/max',
      'binary_tv/max', 'binary_kl/max', 'mismatch/prob_gap_mean',
      'on_policy/log_ratio_max', 'on_policy/divergence_max', 'ratio/k3',
      'ratio/second_moment',
  ):
    assert metrics[name] == pytest.approx(0, abs=1e-6), name
  assert metrics['ratio/mean'] == pytest.approx(1)


def with_ages(*ages):
  """The six tokens sampled so many updates ago; padding is of no age."""
  age = np.asarray([*ages, 0, 0], np.int32)
  return make_stats()._replace(age=jnp.asarray(age)[None, None])


def test_metrics_of_an_age_by_hand():
  # Tokens 0 to 2 are fresh; of age 3, so in the bucket 2-3, are
  #
  #   token      3      4      5
  #   TV        0.30   0.60   0.30
  #   r         0.625  1/3    0.4
  #   A          +1     -1     0
  #   masked     no     yes    no
  metrics = metrics_of(with_ages(0, 0, 0, 3, 3, 3))
  r = np.array([0.625, 1 / 3, 0.4])
  expected = {
      'tokens': 3,
      'mask_fraction': 1 / 3,
      'mask_positive': 0,
      'mask_negative': 1,
      'mask_bad_updates': 1 / 3,  # 4.
      'divergence_mean': 1.2 / 3,
      'divergence_max': 0.6,
      'divergence_q50': 0.3,  # 2nd of 0.3 0.3 0.6.
      'divergence_q99': 0.6,
      'binary_tv_mean': 1.2 / 3,
      'mismatch_prob_gap_mean': 1.2 / 3,
      'entropy_mean': (0.4 + 0.5 + 0.6) / 3,
      'ratio_max': 0.625,
      # (0.140625 + 0.444444 + 0.36) / 3; minus (0.452778 - 1)^2.
      'ratio_second_moment': 0.315023,
      'ratio_variance': 0.315023 - 0.299452,
      # 1.358333^2 / (3 (0.390625 + 0.111111 + 0.16)).
      'ratio_effective_sample_size': 1.845069 / 1.985208,
      'ratio_k3': np.mean(r - 1 - np.log(r)),
  }
  for name, value in expected.items():
    assert metrics[f'by_age/2-3/{name}'] == pytest.approx(
        value, rel=1e-4, abs=1e-6
    ), name
  # And the others, of which only token 0 is masked.
  assert metrics['by_age/0/tokens'] == 3
  assert metrics['by_age/0/mask_positive'] == pytest.approx(1 / 2)
  assert metrics['by_age/0/divergence_q50'] == pytest.approx(0.1)
  assert metrics['by_age/0/divergence_q99'] == pytest.approx(0.2)


def test_ages_share_the_tokens_out_and_are_zero_where_there_are_none():
  metrics = metrics_of(with_ages(0, 1, 2, 31, 63, 64))
  ages = ('0', '1', '2-3', '16-31', '32-63', '64-')
  for age in ages:
    assert metrics[f'by_age/{age}/tokens'] == 1
  for token, age in enumerate(ages):
    assert metrics[f'by_age/{age}/ratio_max'] == pytest.approx(
        PI[token] / MU[token]
    )
    # A single token is as good as one.
    assert metrics[f'by_age/{age}/ratio_effective_sample_size'] == 1
  metrics = metrics_of(with_ages(0, 0, 0, 0, 0, 0))
  for name, value in metrics.items():
    if name.startswith('by_age/') and not name.startswith('by_age/0/'):
      assert value == 0, name


def test_all_tokens_of_one_age_have_the_numbers_of_all_tokens():
  metrics = metrics_of(with_ages(5, 5, 5, 5, 5, 5))
  whole = {name.replace('/', '_'): x for name, x in metrics.items()}
  split = [name for name in metrics if name.startswith('by_age/4-7/')]
  assert len(split) == 17
  for name in split:
    key = name.removeprefix('by_age/4-7/')
    assert metrics[name] == (6 if key == 'tokens' else whole[key]), name


def test_the_effective_sample_size_of_ratios_that_overflow_when_squared():
  # r e^60, and twice nothing beside it: one of three tokens counts.
  stats = make_stats()
  log_ratio = jnp.zeros((1, 1, 8)).at[0, 0, 0].set(60.0)
  mask = jnp.arange(8)[None, None] < 3
  share = masking.effective_share(log_ratio, mask & stats.token_mask)
  assert float(share) == pytest.approx(1 / 3)


def test_on_policy_metrics_look_at_tokens_of_age_0_only():
  off = make_stats()
  off = off._replace(age=jnp.ones_like(off.age))
  on = off._replace(
      logprobs=off.behaviour_logprobs,
      divergence=jnp.zeros((1, 1, 8)),
      age=jnp.zeros_like(off.age),
  )
  join = lambda *x: jax.tree.map(lambda *y: jnp.concatenate(y), *x)
  metrics = metrics_of(join(on, off))
  assert metrics['on_policy/log_ratio_max'] == 0
  assert metrics['on_policy/divergence_max'] == 0
  assert metrics['divergence/max'] == pytest.approx(0.6)
  metrics = metrics_of(off._replace(age=jnp.zeros_like(off.age)))
  assert metrics['on_policy/log_ratio_max'] == pytest.approx(math.log(3))
  assert metrics['on_policy/divergence_max'] == pytest.approx(0.6)
  assert metrics['on_policy/prob_gap_mean'] == pytest.approx(1.6 / 6)


def test_what_was_not_sampled_may_hold_anything():
  expected = metrics_of(make_stats())
  with jax.debug_nans(False):
    for fill in (np.nan, np.inf, -1e30):
      assert metrics_of(make_stats(fill=fill)) == expected


def test_nothing_sampled_gives_zeros():
  stats = make_stats()
  empty = stats._replace(token_mask=jnp.zeros_like(stats.token_mask))
  assert set(metrics_of(empty).values()) == {0.0}


def test_masked_tokens_are_counted_by_sign():
  # Masked: token 0 (A > 0, id 3) and token 4 (A < 0, id 2).
  counts = diagnostics.masked_token_counts(make_stats(), vocab_size=5)
  np.testing.assert_array_equal(counts, [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
  twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), make_stats())
  counts = diagnostics.masked_token_counts(twice, vocab_size=5)
  np.testing.assert_array_equal(counts, [[0, 0, 0, 2, 0], [0, 0, 2, 0, 0]])


def test_metrics_of_a_rollout_by_hand():
  # Two groups of three; rewards 1 0 0 and 1 1 1; lengths 1 2 3, 3 3 0.
  lengths = np.array([1, 2, 3, 3, 3, 0])
  metrics = diagnostics.rollout_metrics(
      rewards=jnp.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
      token_mask=jnp.asarray(np.arange(4)[None] < lengths[:, None]),
      truncated=jnp.array([False, False, True, True, False, False]),
      group_size=3,
  )
  expected = {
      'reward/mean': 4 / 6,
      'reward/std': math.sqrt(4 / 6 * 2 / 6),
      'reward/groups_without_spread': 1 / 2,
      'completion/length_mean': 12 / 6,
      'completion/length_min': 0,
      'completion/length_max': 3,
      'completion/truncated': 2 / 6,
      'tokens/sampled': 12,
  }
  assert {k: pytest.approx(float(v)) for k, v in metrics.items()} == expected
