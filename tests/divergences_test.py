"""Divergences and the trust region, number by number.

mu is the behaviour policy's probability of the sampled token, pi the target
policy's. Cases said to come from another project use its inputs; the results
are derived again here, in float64 on paper, so they hold for any
implementation of arXiv:2602.04879.
"""

import functools

import hand_numbers
from hand_numbers import logs
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import divergences
from dppo_jax import losses
from dppo_jax import normalizers
from dppo_jax.types import LossInputs

pytestmark = pytest.mark.usefixtures('no_nans')

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def binary(kind, *, behaviour, target):
  """'tv' or 'kl' of Bernoullis, from probabilities. Lists -> [...] array."""
  fn = {
      'tv': divergences.binary_total_variation,
      'kl': divergences.binary_kullback_leibler,
  }[kind]
  return fn(behaviour=logs(behaviour), target=logs(target))


EIGHT = functools.partial(np.resize, new_shape=8)  # One shape, one compilation.


def kept(kind, threshold, *, behaviour, target, advantages):
  """What the trust region lets push, as a list of 0 and 1."""
  count = len(target)
  behaviour, target = EIGHT(behaviour), EIGHT(target)
  advantages = EIGHT(np.asarray(advantages, np.float32))
  region = divergences.trust_region(
      divergence=binary(kind, behaviour=behaviour, target=target),
      log_ratio=logs(target) - logs(behaviour),
      advantages=jnp.asarray(advantages),
      threshold=threshold,
  )
  return np.asarray(region)[:count].astype(int).tolist()


def surrogate(keep, *, behaviour, target, advantages):
  """Sum of -keep * ratio * advantage."""
  ratio = np.asarray(target) / np.asarray(behaviour)
  return -np.sum(np.asarray(keep) * ratio * np.asarray(advantages))


# --- the binary divergences --------------------------------------------------


@pytest.mark.parametrize(
    'mu, pi, ratio, tv, kl',
    [
        (1e-4, 1e-2, 100, 0.0099, 0.00948882),
        (0.99, 0.80, 0.808081, 0.19, 0.181005),
        (0.5, 0.65, 1.3, 0.15, 0.0471553),
        (0.5, 0.35, 0.7, 0.15, 0.0471553),
        (0.9, 0.75, 0.833333, 0.15, 0.0724603),
        (0.8, 0.65, 0.8125, 0.15, 0.0541883),
        (0.1, 0.3, 3, 0.2, 0.116322),
        (0.3, 0.1, 0.333333, 0.2, 0.153664),
        (0.01, 0.16, 16, 0.15, 0.134934),
        # From bashgym's tests.
        (0.2, 0.3, 1.5, 0.1, 0.025732),
        (0.2, 0.01, 0.05, 0.19, 0.428672),
        (0.001, 0.01, 10, 0.009, 0.006738),
        (0.2, 0.5, 2.5, 0.3, 0.192745),
    ],
)
def test_binary_divergences_of_one_token(mu, pi, ratio, tv, kl):
  measured = functools.partial(
      hand_numbers.sampled_distance, behaviour=mu, target=pi
  )
  close(measured('binary_tv'), tv)
  close(measured('binary_kl'), kl, rtol=1e-4)
  close(measured('ratio_gap'), abs(ratio - 1), rtol=1e-4)


def test_binary_divergences_of_a_row_of_tokens():
  # From open-instruct's tests: .1 - .2, .5 - .5, .9 - .3.
  tv = binary('tv', behaviour=(0.1, 0.5, 0.9), target=(0.2, 0.5, 0.3))
  close(tv, (0.1, 0, 0.6))
  kl = binary('kl', behaviour=(0.1, 0.5, 0.9), target=(0.1, 0.5, 0.9))
  close(kl, np.zeros(3))


def test_binary_kl_tells_two_nearly_certain_policies_apart():
  # mu = 1 - 1e-7, pi = 1 - 2e-7, which float32 probabilities cannot tell:
  # (1 - 1e-7) * 1e-7 + 1e-7 ln(1/2) = 1e-7 (1 - .693147).
  kl = divergences.binary_kullback_leibler(
      behaviour=jnp.asarray(-1e-7), target=jnp.asarray(-2e-7)
  )
  np.testing.assert_allclose(kl, 3.0685e-8, rtol=1e-3)


def test_binary_kl_of_certainty_is_what_a_rest_of_two_to_the_minus_24_gives():
  # mu = .5, pi = 1: .5 ln(.5 / 1) + .5 ln(.5 / 2^-24) = (-.5 + 11.5) ln 2.
  # mu = 1, pi = .5: 1 ln(1 / .5) + 2^-24 ln(2^-24 / .5) = ln 2 - 1e-6.
  kl = hand_numbers.sampled_distance(
      'binary_kl', behaviour=[0.5, 1.0], target=[1.0, 0.5]
  )
  close(kl, (11 * np.log(2), np.log(2)))


def test_kl_region_of_one_twentieth_in_ratio_terms():
  #  mu    pi from .. to        ratio from .. to
  # .01    2.5e-5  .0781       .0025   7.81
  # .1     .0313   .2201       .313    2.201
  # .5     .346    .654        .692    1.308
  # .9     .780    .969        .867    1.077
  # .99    .922    .999975     .931    1.0101
  mu = np.asarray([0.01, 0.1, 0.5, 0.9, 0.99])
  low = np.asarray([2.5e-5, 0.0313, 0.346, 0.780, 0.9219])
  high = np.asarray([0.0781, 0.2201, 0.654, 0.9687, 0.999975])
  for bound, sign in ((low, -1), (high, 1)):
    np.testing.assert_allclose(
        binary('kl', behaviour=mu, target=bound), np.full(5, 0.05), rtol=0.02
    )
    region = functools.partial(kept, 'kl', 0.05, behaviour=mu, advantages=sign)
    inside = bound + 0.02 * (mu - bound)
    # Half of what is left of the way to 0 or 1 at most.
    edge = np.where(sign > 0, 1, 0)
    outside = bound + np.where(
        np.abs(edge - bound) < 0.02 * np.abs(mu - bound),
        0.5 * (edge - bound),
        0.02 * (bound - mu),
    )
    assert region(target=inside) == [1] * 5
    assert region(target=outside) == [0] * 5


def test_bfloat16_logprobs_move_a_probability_by_less_than_a_thousandth():
  # .5: -.693147 -> -.691406, p' = .500871, ratio 1.001742.
  exact = logs((0.5, 0.05, 0.99))
  rounded = exact.astype(jnp.bfloat16).astype(jnp.float32)
  close(jnp.exp(rounded)[0], 0.500871)
  close(jnp.exp(rounded - exact), (1.001742, 0.995741, 0.999980))
  tv = divergences.binary_total_variation(behaviour=exact, target=rounded)
  assert jnp.all(tv < 1e-3)


def test_logprobs_entropy_and_their_gradient_are_those_of_log_softmax():
  rng = np.random.RandomState(0)
  logits = np.float32(3 * rng.standard_normal((2, 3, 11)))
  logits[0, 0] = [40.0] + [0.0] * 10  # Certain to the last bit but some.
  logits[0, 1] = 0.0
  tokens = jnp.asarray([[0, 3, 10], [1, 1, 2]])
  upstream = np.float32(rng.standard_normal((2, 2, 3)))

  def ours(logits):
    return jnp.stack(divergences.logprobs_and_entropy(logits, tokens))

  def direct(logits):
    every = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(every, tokens[..., None], axis=-1)[..., 0]
    return jnp.stack([chosen, -jnp.sum(jnp.exp(every) * every, axis=-1)])

  close(ours(logits), direct(logits))
  close(ours(logits)[1, 0, 1], np.log(11))
  for of_which in ((1, 1), (1, 0), (0, 1)):
    weights = upstream * np.reshape(np.float32(of_which), (2, 1, 1))
    found, expected = (
        jax.vjp(fn, logits)[1](weights)[0] for fn in (ours, direct)
    )
    close(found, expected)


def test_a_token_without_mass_has_no_gradient_and_no_share_of_the_entropy():
  logits = jnp.asarray([[1.0, -jnp.inf, 2.0], [1.0, 0.5, -jnp.inf]])
  tokens = jnp.asarray([2, 0])
  rest = jnp.asarray([[1.0, 2.0], [1.0, 0.5]])
  total = lambda tokens: lambda x: sum(
      jnp.sum(y) for y in divergences.logprobs_and_entropy(x, tokens)
  )
  found, gradient = jax.value_and_grad(total(tokens))(logits)
  expected, of_rest = jax.value_and_grad(total(jnp.asarray([1, 0])))(rest)
  close(found, expected)
  close(gradient[[0, 0, 1, 1], [0, 2, 0, 1]], of_rest.ravel())
  assert gradient[0, 1] == gradient[1, 2] == 0


# --- partitions of the vocabulary --------------------------------------------


def of_tables(name, mu, pi, token, **options):
  return hand_numbers.distance(
      divergences.build(name, **options),
      behaviour=logs(mu),
      target=logs(pi),
      tokens=jnp.asarray(token),
  )


def test_top_two_of_six_tokens():
  mu = (0.5, 0.2, 0.1, 0.1, 0.06, 0.04)
  pi = (0.4, 0.3, 0.05, 0.15, 0.02, 0.08)
  close(of_tables('full_tv', mu, pi, 5), 0.19)
  close(of_tables('full_kl', mu, pi, 5), 0.0974378)
  # Sampled token 5: {0} {1} {5} {rest .26 -> .22}.
  close(of_tables('topk_tv', mu, pi, 5, k=2), 0.14)
  close(of_tables('topk_kl', mu, pi, 5, k=2), 0.0461869)
  # Token 5 instead of token 1: {0} {5} {rest .46 -> .52}.
  replace = functools.partial(of_tables, k=2, construction='replace')
  close(replace('topk_tv', mu, pi, 5), 0.10)
  close(replace('topk_kl', mu, pi, 5), 0.0274488)
  close(of_tables('binary_tv', mu, pi, 5), 0.04)
  close(of_tables('binary_kl', mu, pi, 5), 0.0131313)
  # Sampled token 1 is one of the top two: {0} {1} {rest}, either way.
  for construction in ('union', 'replace'):
    options = {'k': 2, 'construction': construction}
    close(of_tables('topk_tv', mu, pi, 1, **options), 0.10)
    close(of_tables('topk_kl', mu, pi, 1, **options), 0.0304788)


REPLACE = {'k': 2, 'construction': 'replace'}


@pytest.mark.parametrize(
    'name, token, options, tv, kl, masked_by_tv, masked_by_kl',
    [
        # mu = .40 .25 .15 .10 .06 .04, pi = .30 .20 .18 .12 .16 .04.
        # Sampled token 4, outside the top 2 and the top 3.
        ('full', 4, {}, 0.15, 0.066429, True, True),
        ('binary', 4, {}, 0.10, 0.046880, False, False),
        ('topk', 4, {'k': 2}, 0.15, 0.065880, True, True),
        ('topk', 4, REPLACE, 0.10, 0.056223, False, False),
        ('topk', 4, {'k': 3}, 0.15, 0.065966, True, True),
        # Sampled token 0, inside; pi < mu, so A > 0 pulls back.
        ('binary', 0, {}, 0.10, 0.022582, False, False),
        ('topk', 0, {'k': 2}, 0.15, 0.046022, False, False),
        ('topk', 0, REPLACE, 0.15, 0.046022, False, False),
    ],
)
def test_construction_of_the_top_k_set_decides(
    name, token, options, tv, kl, masked_by_tv, masked_by_kl
):
  mu, pi = hand_numbers.MU, hand_numbers.PI
  log_ratio = logs(pi)[token] - logs(mu)[token]
  for unit, value, threshold, masked in (
      ('tv', tv, 0.12, masked_by_tv),
      ('kl', kl, 0.06, masked_by_kl),
  ):
    divergence = of_tables(f'{name}_{unit}', mu, pi, token, **options)
    close(divergence, value)
    keep = divergences.trust_region(
        divergence=divergence,
        log_ratio=log_ratio,
        advantages=jnp.asarray(1.0),
        threshold=threshold,
    )
    assert bool(keep) != masked


def test_top_two_without_the_sampled_token_is_another_divergence():
  # {0} {1} {rest}: what forgetting the union would give for sampled token 4.
  behaviour, target = logs((0.40, 0.25, 0.35)), logs((0.30, 0.20, 0.50))
  tv = divergences.tv_of_buckets(behaviour=behaviour, target=target)
  kl = divergences.kl_of_buckets(behaviour=behaviour, target=target)
  close(tv, 0.15)
  close(kl, 0.046022)  # Below .06, where the union's .065880 is above.


SIX_LOGITS = st.lists(
    st.floats(-3, 3, width=32), min_size=6, max_size=6
).map(lambda values: np.asarray(values, np.float32))


@functools.partial(jax.jit, static_argnums=0)
def every_partition(unit, behaviour, target, tokens):
  """Binary, union and replaced top 1 to 6, and full, of six tokens."""
  topk, full = f'topk_{unit}', f'full_{unit}'
  measured = functools.partial(
      hand_numbers.distance, behaviour=behaviour, target=target, tokens=tokens
  )
  sizes = range(1, 7)
  return {
      'binary': measured(divergences.build(f'binary_{unit}')),
      'union': [measured(divergences.build(topk, k=k)) for k in sizes],
      'replace': [
          measured(divergences.build(topk, k=k, construction='replace'))
          for k in sizes
      ],
      'full': measured(divergences.build(full)),
  }


@given(SIX_LOGITS, SIX_LOGITS, st.integers(0, 5))
def test_finer_partitions_never_measure_less(behaviour, target, token):
  fulls = {}
  for unit, slack in (('tv', 1e-5), ('kl', 1e-4)):
    values = every_partition(unit, behaviour, target, np.int32(token))
    union, replace, full = (
        np.asarray(values[key]) for key in ('union', 'replace', 'full')
    )
    assert values['binary'] <= union[0] + slack
    assert values['binary'] <= replace[0] + slack
    for chain in (union, replace):
      assert np.all(chain[:-1] <= chain[1:] + slack)
      assert np.all(chain <= full + slack)
    assert np.all(replace <= union + slack)
    # Five of six tokens are named: the rest is the sixth.
    np.testing.assert_allclose(union[4:], [full, full], atol=slack)
    np.testing.assert_allclose(replace[5], full, atol=slack)
    fulls[unit] = full
  assert fulls['tv'] ** 2 <= fulls['kl'] / 2 + 1e-5  # Pinsker.


@given(SIX_LOGITS, SIX_LOGITS)
def test_ratio_gap_in_expectation_is_twice_the_total_variation(
    behaviour, target
):
  # Eq. 11: TV = sum over a of mu(a) |pi(a) / mu(a) - 1| / 2.
  probabilities, gaps, tv = gaps_of_all(behaviour, target)
  np.testing.assert_allclose(np.sum(probabilities * gaps) / 2, tv, atol=1e-5)


@jax.jit
def gaps_of_all(behaviour, target):
  everyone = jnp.arange(6)
  rows = [jnp.broadcast_to(x, (6, 6)) for x in (behaviour, target)]
  measured = functools.partial(
      hand_numbers.distance,
      behaviour=rows[0],
      target=rows[1],
      tokens=everyone,
  )
  gaps = measured(divergences.build('ratio_gap'))
  full = measured(divergences.build('full_tv'))[0]
  return jax.nn.softmax(behaviour), gaps, full


# --- the trust region --------------------------------------------------------


@pytest.mark.parametrize(
    'kind, threshold, mu, pi, advantages, keep, value',
    [
        # From TRL's tests. D = .01 everywhere; .4; .4.
        ('tv', (0.2, 0.28), (0.5, 0.3, 0.7), (0.51, 0.29, 0.71), 1,
         [1, 1, 1], None),
        ('tv', 0.01, (0.1,), (0.5,), 1, [0], 0),
        ('tv', 0.01, (0.5,), (0.1,), -1, [0], 0),
        # From a SkyRL fork's tests. D = .3 .1 .3 .1 .3 .3, -ratio * A = -1.6
        # -1.2 .4 .8 -.4 1.6; the last two return.
        ('tv', (0.2, 0.2), (0.5,) * 6, (0.8, 0.6, 0.2, 0.4, 0.2, 0.8),
         (1, 1, -1, -1, 1, -1), [0, 1, 0, 1, 1, 1], 0.8),
        ('tv', (0.2, 0.35), (0.5,) * 6, (0.8, 0.6, 0.2, 0.4, 0.2, 0.8),
         (1, 1, -1, -1, 1, -1), [1, 1, 0, 1, 1, 1], -0.8),
        ('tv', (0.35, 0.2), (0.5,) * 6, (0.8, 0.6, 0.2, 0.4, 0.2, 0.8),
         (1, 1, -1, -1, 1, -1), [0, 1, 1, 1, 1, 1], 1.2),
        # From Miles' tests. D = .2 .2 .2 .2 .05 .05.
        ('tv', 0.1, (0.5,) * 6, (0.7, 0.3, 0.7, 0.3, 0.55, 0.45),
         (1, 1, -1, -1, 1, -1), [0, 1, 1, 0, 1, 1], None),
        # From a slime fork's tests. D = .25 .30 .40 .50; KL .510826 twice,
        # both on their way back.
        ('tv', (0.2, 0.28), (0.1, 0.4, 0.5, 0.7), (0.35, 0.1, 0.9, 0.2),
         (1, -1, 1, -1), [1, 0, 0, 0], None),
        ('kl', 0.05, (0.5, 0.5), (0.9, 0.1), (-1, 1), [1, 1], None),
        # From PipelineRL's tests. -.4 + 1.6 - 1.1, and -.5 - 1.1 - .75.
        ('tv', 0.1, (0.5,) * 6, (0.8, 0.2, 0.2, 0.8, 0.55, 0.8),
         (1, 1, -1, -1, 1, 0), [0, 1, 0, 1, 1, 1], 0.1),
        ('tv', 0.1, (0.5, 0.4, 0.5, 0.8), (0.8, 0.2, 0.55, 0.6), 1,
         [0, 1, 1, 1], -2.35),
        # From open-instruct's and rLLM's tests.
        ('tv', 0.05, (0.1,) * 3, (0.5,) * 3, (1, -1, 0), [0, 1, 1], 5),
        ('tv', 0.5, (0.4, 0.6), (0.5, 0.5), (1, -1), [1, 1], -0.416667),
        ('tv', 0.05, (0.5, 0.5), (0.1, 0.1), (-1, 1), [0, 1], -0.2),
        ('tv', 0.2, (0.5, 0.5), (0.9, 0.52), 1, [0, 1], -1.04),
        # From bashgym's tests. D = .3 .1 .19 .3 .3; KL .192745.
        ('tv', 0.15, (0.2, 0.2, 0.2, 0.5, 0.5), (0.5, 0.3, 0.01, 0.2, 0.8),
         (1, 1, 1, -1, -1), [0, 1, 1, 0, 1], None),
        ('kl', 0.05, (0.2,), (0.5,), 1, [0], 0),
        # From a TRL fork's tests: A > 0 at pi = .49 goes back for an anchor
        # recomputed at .5 and out for the .1 that was sampled.
        ('kl', 0.05, (0.5, 0.1), (0.49, 0.49), 1, [1, 0], None),
        # The paper's pairs. PPO's clip at .2 would cut the first (ratio 100)
        # and keep the second (.808).
        ('tv', 0.15, (1e-4,), (1e-2,), 1, [1], -100),
        ('kl', 0.05, (1e-4,), (1e-2,), 1, [1], -100),
        ('tv', 0.15, (0.99,), (0.8,), -1, [0], 0),
        ('tv', 0.20, (0.99,), (0.8,), -1, [1], 0.808081),
        ('kl', 0.05, (0.99,), (0.8,), -1, [0], 0),
        ('kl', 0.05, (0.5, 0.5), (0.65, 0.35), (1, -1), [1, 1], -0.6),
    ],
)
def test_trust_region_of_published_cases(
    kind, threshold, mu, pi, advantages, keep, value
):
  tokens = {'behaviour': mu, 'target': pi, 'advantages': advantages}
  assert kept(kind, threshold, **tokens) == keep
  if value is not None:
    close(surrogate(keep, **tokens), value)


def test_trust_region_from_logprobs():
  # From SkyRL's tests, given as log-probs. D = |e^-1 - e^-.3| ...
  region = functools.partial(_kept_of_logprobs, 'tv', 0.2)
  divergence, keep = region((-0.3, -2, -0.9), (1, -1, 1))
  close(divergence, (0.372939, 0.232544, 0.038690))
  assert keep == [0, 0, 1]  # -e^.1 = -1.105171 is left.
  # Both return: -e^-1 + e^.7 = 1.645873.
  assert region((-2, -0.3), (1, -1))[1] == [1, 1]

  divergence, keep = _kept_of_logprobs('kl', 0.05, (-0.1, -0.95), (1, 1))
  close(divergence, (0.865825, 0.000755))
  assert keep == [0, 1]
  divergence, keep = _kept_of_logprobs('kl', 0.5, (-1.01, -0.99), (1, -1))
  np.testing.assert_allclose(divergence, (2.9e-5, 2.9e-5), rtol=0.02)
  assert keep == [1, 1]


def _kept_of_logprobs(kind, threshold, target, advantages):
  """Divergence and kept tokens where the behaviour log-probs are all -1."""
  p = np.exp(np.asarray(target))
  mu = np.full_like(p, np.exp(-1))
  tokens = {'behaviour': mu, 'target': p}
  return binary(kind, **tokens), kept(
      kind, threshold, **tokens, advantages=advantages
  )


def test_token_exactly_at_the_threshold_is_kept():
  # mu = .5, pi = .8; the threshold is the very number that was measured.
  divergence = binary('tv', behaviour=(0.5,), target=(0.8,))
  for threshold, keep in (
      (float(divergence[0]), True),
      (float(np.nextafter(divergence[0], np.float32(0))), False),
  ):
    region = divergences.trust_region(
        divergence=divergence,
        log_ratio=logs((1.6,)),
        advantages=jnp.ones(1),
        threshold=threshold,
    )
    assert bool(region[0]) == keep


def test_direction_is_decided_by_the_log_ratio_alone():
  # Divergence 1 everywhere; a log-ratio of exactly 0 moves nowhere, and an
  # advantage of 0 pushes nowhere.
  region = divergences.trust_region(
      divergence=jnp.ones((3, 3)),
      log_ratio=jnp.tile(jnp.asarray([-1e-6, 0.0, 1e-6]), (3, 1)),
      advantages=jnp.tile(jnp.asarray([[-1.0], [0.0], [1.0]]), (1, 3)),
      threshold=0.1,
  )
  np.testing.assert_array_equal(region, [[0, 1, 1], [1, 1, 1], [1, 1, 0]])


def test_padding_is_not_the_business_of_the_trust_region_but_of_the_mask():
  # Padding holds anything; what is kept of it is never NaN, and the mask that
  # goes to the loss removes it. From TRL's, PipelineRL's and open-instruct's
  # tests: mu = .1 .5, pi = .9 .9, A > 0, threshold .01, mask 1 0.
  keep = kept('tv', 0.01, behaviour=(0.1, 0.5), target=(0.9, 0.9), advantages=1)
  assert keep == [0, 0]
  # mu = .5 x 6, A = + + - - 0 +, mask 1 1 1 1 1 0, threshold .1.
  mu, pi = (0.5,) * 6, (0.8, 0.2, 0.8, 0.2, 0.8, 0.8)
  close(binary('tv', behaviour=mu, target=pi), np.full(6, 0.3))
  signs = (1, 1, -1, -1, 0, 1)
  keep = kept('tv', 0.1, behaviour=mu, target=pi, advantages=signs)
  assert (np.asarray(keep) * (1, 1, 1, 1, 1, 0)).tolist() == [0, 1, 1, 0, 1, 0]
  # mu = .5 .4 .2, pi = .8 .1 .9.
  tv = binary('tv', behaviour=(0.5, 0.4, 0.2), target=(0.8, 0.1, 0.9))
  close(tv, (0.3, 0.3, 0.7))


# --- from logits to a gradient -----------------------------------------------


@pytest.mark.parametrize(
    'name, threshold, distances',
    [
        ('binary_tv', 0.15, [[0.3, 0.05, 0.3], [0.2, 0.05, 0]]),
        ('binary_kl', 0.05,
         [[0.223144, 0.010896, 0.226289], [0.104650, 0.005387, 0]]),
    ],
)
def test_two_sequences_from_logits_to_gradient(name, threshold, distances):
  # The last token of the second sequence is padding. Token (0, 2): A > 0, but
  # pi < mu, kept at TV .3. Token (1, 1): A < 0, but pi > mu, kept.
  mu = [[0.5, 0.1, 0.9], [0.4, 0.6, 0.25]]
  pi = [[0.8, 0.15, 0.6], [0.2, 0.65, 0.25]]
  mask = jnp.asarray([[1, 1, 1], [1, 1, 0]], bool)
  advantages = jnp.asarray([[1.0] * 3, [-1.0] * 3])
  divergence = divergences.build(name)
  assert divergence.threshold == threshold
  tokens = jnp.zeros((2, 3), jnp.int32)
  behaviour = divergence.record(hand_numbers.two_token_logits(mu), tokens)
  target = hand_numbers.two_token_logits(pi)
  measured = divergence.measure(target, tokens, behaviour)
  close(measured, distances, rtol=1e-4)
  logprobs = divergences.token_logprobs(target, tokens)
  keep = divergences.trust_region(
      divergence=measured,
      log_ratio=logprobs - behaviour,
      advantages=advantages,
      threshold=divergence.threshold,
  )
  np.testing.assert_array_equal(keep & mask, [[0, 1, 1], [0, 1, 0]])
  masked_share = 1 - jnp.sum(keep & mask) / jnp.sum(mask)
  close(masked_share, 0.4)  # 2 of 5.
  inputs = LossInputs(logprobs, behaviour, measured, keep, advantages, mask)
  loss_fn = losses.build('policy_gradient')

  loss, metrics = loss_fn(inputs)
  # ratio = 1.6 1.5 .667; .5 1.0833 1.
  through_ratio = -metrics['surrogate']
  close(through_ratio, [[0, -1.5, -2 / 3], [0, 13 / 12, 0]])
  # 1.5 (1.897120) + .667 (.510826) - 1.0833 (.430783): as a number the loss
  # is not the surrogate; its gradient is the surrogate's.
  close(jnp.sum(loss), 2.719549)
  close(jnp.sum(through_ratio), -1.083333)

  def total(logprobs, weights):
    return jnp.sum(loss_fn(inputs._replace(logprobs=logprobs))[0] * weights)

  for normalizer, value, slopes in (
      # -1.083333 / 5 tokens.
      (normalizers.build('token_mean'), -0.216667,
       [[0, -0.3, -0.133333], [0, 0.216667, 0]]),
      # (-2.166667 / 3 + 1.083333 / 2) / 2 sequences.
      (normalizers.build('sequence_mean'), -0.090278,
       [[0, -0.25, -0.111111], [0, 0.270833, 0]]),
      # -1.083333 / 2 sequences.
      (normalizers.build('constant', horizon=1), -0.541667,
       [[0, -0.75, -0.333333], [0, 0.541667, 0]]),
  ):
    weights = normalizer(mask)
    close(jnp.sum(through_ratio * weights), value)
    close(jax.grad(total)(logprobs, weights), slopes)


# --- errors ------------------------------------------------------------------


def test_unknown_name_suggests_the_nearest():
  with pytest.raises(ValueError) as error:
    divergences.build('binary_tvd')
  assert "Unknown divergence 'binary_tvd'." in str(error.value)
  assert "Did you mean 'binary_tv'?" in str(error.value)
  assert all(name in str(error.value) for name in divergences.names())


def test_unknown_option_suggests_the_nearest():
  with pytest.raises(ValueError, match="'treshold'.*Did you mean 'threshold'"):
    divergences.build('binary_tv', treshold=0.1)
  with pytest.raises(ValueError, match="'unoin'.*Did you mean 'union'"):
    divergences.build('topk_tv', construction='unoin')


def test_top_k_larger_than_the_vocabulary_names_both_numbers():
  divergence = divergences.build('topk_tv')
  with pytest.raises(ValueError, match='k=20 .* vocabulary of 6 tokens'):
    divergence.record(jnp.zeros((2, 6)), jnp.zeros(2, jnp.int32))
  with pytest.raises(ValueError, match='k=0 is not positive'):
    divergences.build('topk_kl', k=0)


@pytest.mark.parametrize('option', [
    'threshold', 'threshold_low', 'threshold_high'
])
@pytest.mark.parametrize('value', [0.0, -0.1, float('nan')])
def test_threshold_that_is_not_positive_is_refused_by_its_name(option, value):
  for name in divergences.names():
    if option in divergences.register.options(name):
      with pytest.raises(ValueError, match=f'^{option}={value} is not'):
        divergences.build(name, **{option: value})


def test_one_sided_threshold_leaves_the_other_side_at_its_default():
  assert divergences.build('binary_tv').threshold == 0.15
  only_high = divergences.build('ratio_gap', threshold_high=0.28)
  assert only_high.threshold == (0.2, 0.28)
  both = divergences.build('topk_kl', threshold_low=0.1, threshold_high=0.1)
  assert both.threshold == 0.1
