"""Losses, normalisers and the table of algorithms, by hand and by identity."""

import functools
import math

import hand_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import table_model

from dppo_jax import advantages
from dppo_jax import algorithms
from dppo_jax import divergences
from dppo_jax import duals
from dppo_jax import losses
from dppo_jax import normalizers
from dppo_jax.types import LossInputs

pytestmark = pytest.mark.usefixtures('no_nans')

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def slopes(*, logprobs, behaviour, divergence, advantages, threshold,
           ratio_cap=math.inf):
  """Gradient of the summed loss by each logprob. All [T] -> [T]."""
  region = divergences.trust_region(
      divergence=divergence,
      log_ratio=logprobs - behaviour,
      advantages=advantages,
      threshold=threshold,
  )
  loss_fn = losses.build('policy_gradient', ratio_cap=ratio_cap)

  def total(logprobs):
    mask = jnp.ones(logprobs.shape, bool)
    inputs = LossInputs(
        logprobs, behaviour, divergence, region, advantages, mask
    )
    return jnp.sum(loss_fn(inputs)[0])

  return jax.grad(total)(logprobs)


def slopes_of_algorithm(name, *, behaviour, target, advantages):
  """The same, from probabilities of sampled tokens in a vocabulary of 24.

  Every token is a sequence of its own.
  """

  def logits(p):  # The rest is spread evenly over tokens 1 to 23.
    p = np.asarray(p)[:, None]
    rest = np.broadcast_to((1 - p) / 23, (len(p), 23))
    return hand_numbers.logs(np.concatenate([p, rest], 1))[:, None]

  got = table_model.slopes(
      name,
      behaviour=logits(behaviour),
      target=logits(target),
      tokens=np.zeros((len(behaviour), 1), np.int32),
      advantages=np.asarray(advantages)[:, None],
  )
  return got[:, 0]


# --- the table of algorithms -------------------------------------------------


def test_drops_only_tokens_leaving_the_region():
  # behaviour 0.5; target 0.7 0.7 0.3 0.3; TV 0.2 > 0.15 everywhere.
  # A:     +1     -1     +1     -1
  # moves: out    back   back   out   -> gradient -ratio*A = 0, 1.4, -0.6, 0
  got = slopes_of_algorithm(
      'dppo_binary_tv',
      behaviour=(0.5,) * 4,
      target=(0.7, 0.7, 0.3, 0.3),
      advantages=(1, -1, 1, -1),
  )
  close(got, (0, 1.4, -0.6, 0))


@pytest.mark.parametrize('name', algorithms.names())
def test_gradient_of_every_algorithm_on_ten_tokens(name):
  got = slopes_of_algorithm(
      name,
      behaviour=hand_numbers.BEHAVIOUR,
      target=hand_numbers.TARGET,
      advantages=hand_numbers.SIGNS,
  )
  close(got, hand_numbers.ALGORITHMS[name])


@pytest.mark.parametrize('name', algorithms.names())
def test_every_algorithm_has_a_source_and_the_settings_of_its_paper(name):
  row = algorithms.row(name)
  assert 'arXiv:' in row.source or row.source.startswith('ours:')
  config = algorithms.config(name)
  assert config['algorithm'] == name
  expected = {
      'advantage.name': 'group_mean',  # Nowhere a standard deviation, but ...
      'anchor': 'behaviour',
      'normalizer.name': 'constant',
      'dual.name': 'none',
  } | hand_numbers.PAPER_SETTINGS.get(name, {})
  options = dict(config['divergence'])
  divergence = divergences.build(options.pop('name'), **options)
  assert divergence.threshold == expected.pop('threshold')
  if 'ratio_cap' in config['loss']:
    assert config['loss']['ratio_cap'] == expected.pop(
        'loss.ratio_cap', math.inf
    )
  for field, value in expected.items():
    section, _, option = field.partition('.')
    assert (config[section][option] if option else config[section]) == value


def test_unknown_algorithm_suggests_the_nearest():
  with pytest.raises(ValueError, match="Did you mean 'dppo_topk_tv'"):
    algorithms.config('dppo_topktv')


# --- single tokens -----------------------------------------------------------


def token_slopes(ratios, advantages, *, threshold=math.inf, **options):
  """Gradients at given ratios inside the region of |ratio - 1|; mu = .01."""
  ratios = np.asarray(ratios)
  behaviour = hand_numbers.logs(np.full(ratios.shape, 0.01))
  return slopes(
      logprobs=behaviour + hand_numbers.logs(ratios),
      behaviour=behaviour,
      divergence=jnp.asarray(np.abs(ratios - 1), jnp.float32),
      advantages=jnp.asarray(advantages, jnp.float32),
      threshold=threshold,
      **options,
  )


def test_clip_of_open_instruct_s_four_tokens():
  # ratio 1.5 .5 1.5 .5, A + + - -, clip .2: out, back, back, out.
  got = token_slopes((1.5, 0.5, 1.5, 0.5), (1, 1, -1, -1), threshold=0.2)
  close(got, (0, -0.5, 1.5, 0))


def test_large_ratios_pass_untruncated_without_a_cap():
  # From rLLM's tests: behaviour e^-6, target e^-2 to e^0, A < 0.
  ratios = np.exp([4.0, 5.0, 6.0])  # 54.6, 148.4, 403.4
  behaviour = jnp.full(3, -6.0)
  got = slopes(
      logprobs=jnp.asarray([-2.0, -1.0, 0.0]),
      behaviour=behaviour,
      divergence=jnp.zeros(3),
      advantages=-jnp.ones(3),
      threshold=0.15,
  )
  close(got, ratios)


def test_token_above_the_cap_keeps_the_gradient_of_the_cap():
  # C = 3; ratio 2 3 4 100, A = +2 -1 +2 -1: -min(ratio, 3) A.
  got = token_slopes((2, 3, 4, 100), (2, -1, 2, -1), ratio_cap=3.0)
  close(got, (-4, 3, -6, 3))


def test_cap_reports_where_it_acts_and_the_surrogate_is_not_capped():
  loss_fn = losses.build('policy_gradient', ratio_cap=3.0)
  _, metrics = loss_fn(
      LossInputs(
          logprobs=hand_numbers.logs([[0.2, 0.4, 0.4]]),
          behaviour_logprobs=hand_numbers.logs([[0.1, 0.1, 0.1]]),
          divergence=jnp.zeros((1, 3)),
          trust_region=jnp.asarray([[True, True, False]]),
          advantages=jnp.asarray([[1.0, -1.0, 1.0]]),
          token_mask=jnp.ones((1, 3), bool),
      )
  )
  close(metrics['surrogate'], [[2, -4, 0]])
  np.testing.assert_array_equal(metrics['capped'], [[0, 1, 0]])


def test_a_cap_below_one_acts_on_no_token_that_is_dropped():
  _, metrics = losses.build('policy_gradient', ratio_cap=0.5)(LossInputs(
      logprobs=hand_numbers.logs([[0.2, 0.4, 0.2, 0.2]]),
      behaviour_logprobs=hand_numbers.logs([[0.2, 0.4, 0.2, 0.2]]),
      divergence=jnp.zeros((1, 4)),
      trust_region=jnp.asarray([[True, False, True, True]]),
      advantages=jnp.asarray([[1.0, 1.0, 0.0, 1.0]]),
      token_mask=jnp.asarray([[True, True, True, False]]),
  ))
  np.testing.assert_array_equal(metrics['capped'], [[1, 0, 0, 0]])


def test_cap_that_is_not_positive_is_refused():
  for cap in (0.0, -1.0, float('nan')):
    with pytest.raises(ValueError, match='ratio_cap=.* is not positive'):
      losses.build('policy_gradient', ratio_cap=cap)


# --- identities --------------------------------------------------------------


def random_tokens(count=500):
  """logprobs, behaviour logprobs and advantages; ratios from .2 to 5."""
  keys = jax.random.split(jax.random.key(1), 3)
  behaviour = -3 * jax.random.uniform(keys[0], (count,)) - 2
  logprobs = behaviour + 0.5 * jax.random.normal(keys[1], (count,))
  return logprobs, behaviour, jax.random.normal(keys[2], (count,))


@pytest.mark.parametrize('low, high', [(0.2, 0.2), (0.2, 0.28)])
def test_region_of_ratio_gap_has_the_gradient_of_ppo_clip(low, high):
  logprobs, behaviour, advantages = random_tokens()
  ratio = jnp.exp(logprobs - behaviour)
  ties = (jnp.abs(ratio - 1 + low) < 1e-5) | (jnp.abs(ratio - 1 - high) < 1e-5)
  assert not jnp.any(ties)

  def ppo_clip(logprobs):
    ratio = jnp.exp(logprobs - behaviour)
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return -jnp.sum(jnp.minimum(ratio * advantages, clipped * advantages))

  expected = jax.grad(ppo_clip)(logprobs)
  assert 0.1 < jnp.mean(expected == 0) < 0.6  # Both cases are there.
  got = slopes(
      logprobs=logprobs,
      behaviour=behaviour,
      divergence=jnp.abs(ratio - 1),
      advantages=advantages,
      threshold=(low, high),
  )
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_infinite_threshold_is_the_plain_importance_weighted_policy_gradient():
  logprobs, behaviour, advantages = random_tokens()

  def through_ratio(logprobs):
    return -jnp.sum(jnp.exp(logprobs - behaviour) * advantages)

  got = slopes(
      logprobs=logprobs,
      behaviour=behaviour,
      divergence=jnp.abs(jnp.exp(logprobs) - jnp.exp(behaviour)),
      advantages=advantages,
      threshold=math.inf,
  )
  np.testing.assert_allclose(got, jax.grad(through_ratio)(logprobs), rtol=1e-6)


def test_score_form_and_ratio_form_agree_inside_any_region_without_a_cap():
  logprobs, behaviour, advantages = random_tokens()
  tokens = {
      'divergence': jnp.abs(jnp.exp(logprobs) - jnp.exp(behaviour)),
      'advantages': advantages,
      'threshold': 0.02,
  }
  keep = divergences.trust_region(log_ratio=logprobs - behaviour, **tokens)
  assert 0.1 < jnp.mean(~keep) < 0.6

  def through_ratio(logprobs):
    return -jnp.sum(keep * jnp.exp(logprobs - behaviour) * advantages)

  got = slopes(logprobs=logprobs, behaviour=behaviour, **tokens)
  np.testing.assert_allclose(got, jax.grad(through_ratio)(logprobs), rtol=1e-6)


def test_on_policy_gradient_is_the_advantage_for_every_algorithm():
  # Right after a rollout ratio = 1 and divergence = 0: REINFORCE.
  signs = np.asarray(hand_numbers.SIGNS)
  for name in algorithms.names():
    got = slopes_of_algorithm(
        name,
        behaviour=hand_numbers.BEHAVIOUR,
        target=hand_numbers.BEHAVIOUR,
        advantages=0.75 * signs,
    )
    close(got, -0.75 * signs)


# --- the constraint of r2vpo -------------------------------------------------


def constrained_inputs(multiplier=0.3, limit=0.05):
  """Four sequences of one to five tokens at ratios around 1. [4, 5]."""
  rng = np.random.RandomState(10)
  mask = np.arange(5) < np.asarray([5, 1, 3, 4])[:, None]
  behaviour = -2 - rng.exponential(size=(4, 5))
  step = np.asarray([0.05, 0.6, 0.3, 0.5])[:, None]
  logprobs = behaviour + step * rng.standard_normal((4, 5))
  credit = np.asarray([1.0, -0.5, 2.0, 0.0])[:, None]
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  return LossInputs(
      logprobs=f32(logprobs),
      behaviour_logprobs=f32(behaviour),
      divergence=jnp.zeros((4, 5)),
      trust_region=jnp.ones((4, 5), bool),
      advantages=f32(np.broadcast_to(credit, (4, 5))),
      token_mask=jnp.asarray(mask),
      multiplier=multiplier,
      limit=limit,
  )


def per_sequence(values, mask):
  """The mean of each sequence. [B, T] -> [B]."""
  return jnp.sum(jnp.where(mask, values, 0), 1) / jnp.sum(mask, 1)


def constrained_slopes(inputs, normalizer, **options):
  """The gradient of the normalised loss by logprobs."""
  loss_fn = losses.build('r2vpo', **options)
  weights = normalizers.build(normalizer)(inputs.token_mask)
  return jax.grad(lambda x: jnp.sum(
      weights * loss_fn(inputs._replace(logprobs=x))[0]
  ))(inputs.logprobs)


@pytest.mark.parametrize('center', ['one', 'mean'])
@pytest.mark.parametrize('ratio, normalizer', [
    # What counts once is a token, or a sequence, by its product or its mean.
    ('token', 'token_mean'),
    ('sequence', 'sequence_sum'),
    ('geometric', 'sequence_mean'),
])
def test_gradient_of_r2vpo_is_that_of_its_lagrangian(center, ratio, normalizer):
  inputs = constrained_inputs()
  mask = inputs.token_mask

  def lagrangian(logprobs):
    log_ratio = jnp.where(mask, logprobs - inputs.behaviour_logprobs, 0)
    credit = inputs.advantages
    if ratio == 'token':
      r, credit = jnp.exp(log_ratio[mask]), credit[mask]
    else:
      total = jnp.sum(log_ratio, 1)
      r = jnp.exp(total if ratio == 'sequence' else total / jnp.sum(mask, 1))
      credit = credit[:, 0]
    middle = jnp.mean(r) if center == 'mean' else 1
    violation = jnp.mean((r - middle) ** 2) - inputs.limit
    return jnp.mean(r * credit) - inputs.multiplier * violation

  got = constrained_slopes(inputs, normalizer, center=center, ratio=ratio)
  expected = -jax.grad(lagrangian)(inputs.logprobs)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
  assert jnp.all(got[mask] != 0)  # Also where the advantage is 0.


def test_per_sequence_only_sequences_above_the_limit_are_braked():
  inputs = constrained_inputs()
  mask = inputs.token_mask
  second_moment = lambda r: per_sequence((r - 1) ** 2, mask)

  def lagrangian(logprobs):
    r = jnp.exp(jnp.where(mask, logprobs - inputs.behaviour_logprobs, 0))
    above = jnp.maximum(second_moment(r) - inputs.limit, 0)
    rewarded = per_sequence(r * inputs.advantages, mask)
    return jnp.mean(rewarded - inputs.multiplier * above)

  r = jnp.exp(inputs.logprobs - inputs.behaviour_logprobs)
  above = second_moment(r) > inputs.limit
  assert not above[0] and jnp.sum(above) >= 2
  got = constrained_slopes(inputs, 'sequence_mean', per='sequence')
  expected = -jax.grad(lagrangian)(inputs.logprobs)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('options, mean', [
    # Tokens count once, or each sequence does.
    ({}, lambda c, mask: jnp.mean(c[mask])),
    ({'per': 'sequence'}, lambda c, mask: jnp.mean(per_sequence(c, mask))),
], ids=['token', 'sequence'])
def test_r2vpo_tells_the_mean_of_its_constraint(options, mean):
  inputs = constrained_inputs()
  _, metrics = losses.build('r2vpo', **options)(inputs)
  violation, _ = duals.violation(
      metrics['constraint'], jnp.zeros((4, 1), int), limit=0.05, by_age=False
  )
  r = jnp.exp(inputs.logprobs - inputs.behaviour_logprobs)
  close(violation[0] + 0.05, mean((r - 1) ** 2, inputs.token_mask))


@pytest.mark.parametrize('log_ratio', [100.0, -100.0])
@pytest.mark.parametrize('options', [
    {}, {'ratio': 'sequence'}, {'ratio': 'geometric'}, {'center': 'mean'},
    {'per': 'sequence'}, {'stop_at_turning_point': True},
], ids=str)
def test_r2vpo_is_finite_at_any_ratio(log_ratio, options):
  inputs = constrained_inputs()
  inputs = inputs._replace(
      behaviour_logprobs=(inputs.logprobs - log_ratio).at[2].set(
          inputs.logprobs[2]
      )
  )
  loss, metrics = losses.build('r2vpo', **options)(inputs)
  for leaf in jax.tree.leaves((loss, metrics)):
    assert np.all(np.isfinite(leaf))
  slopes = constrained_slopes(inputs, 'token_mean', **options)
  assert np.all(np.isfinite(slopes))
  if log_ratio > 0 and not options.get('stop_at_turning_point'):
    # Beyond the turning point everything is pulled back.
    assert np.all(slopes[jnp.asarray([0, 1, 3])][:, 0] > 0)


def turning(ratios, advantages, **options):
  """Weights and whether a token is beyond the turning point; lambda is 1."""
  ratios = np.asarray(ratios)[None]
  inputs = LossInputs(
      logprobs=hand_numbers.logs(0.01 * ratios),
      behaviour_logprobs=hand_numbers.logs(np.full(ratios.shape, 0.01)),
      divergence=jnp.zeros(ratios.shape),
      trust_region=jnp.ones(ratios.shape, bool),
      advantages=jnp.asarray(advantages, jnp.float32)[None],
      token_mask=jnp.ones(ratios.shape, bool),
      multiplier=1.0,
      limit=0.02,
  )
  loss_fn = losses.build('r2vpo', **options)
  total = lambda x: jnp.sum(loss_fn(inputs._replace(logprobs=x))[0])
  beyond = loss_fn(inputs)[1]['constraint'].beyond
  return -jax.grad(total)(inputs.logprobs)[0], beyond[0]


def test_r2vpo_turns_at_one_plus_a_over_two_lambda_unless_it_stops_there():
  # A + + - - 0: it turns at 1.5 1.5 .5 .5 and, without reward, nowhere.
  case = (1.4, 1.6, 0.6, 0.4, 1.5), (1, 1, -1, -1, 0)
  # r (A - 2 (r - 1)): 1.4 * .2, 1.6 * -.2, .6 * -.2, .4 * .2, 1.5 * -1.
  weights, beyond = turning(*case)
  close(weights, (0.28, -0.32, -0.12, 0.08, -1.5))
  assert beyond.tolist() == [False, True, False, True, False]
  stopped, beyond = turning(*case, stop_at_turning_point=True)
  close(stopped, (0.28, 0, -0.12, 0, -1.5))
  assert beyond.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize('told', [{}, {'multiplier': 1.0}, {'limit': 0.02}])
def test_r2vpo_without_a_dual_says_what_it_needs(told):
  inputs = constrained_inputs()._replace(multiplier=None, limit=None)
  with pytest.raises(ValueError, match='needs the multiplier and the limit of '
                     'a dual, for example config.dual.name=projected_ascent'):
    losses.build('r2vpo')(inputs._replace(**told))


@pytest.mark.parametrize('options, message', [
    ({'center': 'mean', 'per': 'sequence'}, "Use center='one'"),
    ({'center': 'mena'}, "Unknown center 'mena'. Did you mean 'mean'"),
    ({'per': 'sequnce'}, "Unknown per 'sequnce'. Did you mean 'sequence'"),
    ({'ratio': 'geometrc'}, "Unknown ratio 'geometrc'. Did you mean 'geom"),
])
def test_r2vpo_with_an_unknown_choice_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    losses.build('r2vpo', **options)


# --- normalisers -------------------------------------------------------------


@pytest.mark.parametrize(
    'name, options, value',
    [
        ('token_mean', {}, 3.25),  # (1 + 2 + 4 + 6) / 4.
        ('sequence_mean', {}, 3.25),  # (3 / 2 + 10 / 2) / 2.
        ('constant', {'horizon': 1}, 6.5),  # (3 + 10) / 2.
        ('constant', {'horizon': 3}, 2.166667),  # (3 / 3 + 10 / 3) / 2.
        ('sequence_sum', {}, 6.5),  # (3 + 10) / 2.
    ],
)
def test_normalisers_of_verl_s_two_sequences(name, options, value):
  loss = jnp.asarray([[1.0, 2, 30], [4, 50, 6]])  # 30 and 50 are padding.
  mask = jnp.asarray([[1, 1, 0], [1, 0, 1]], bool)
  weights = normalizers.build(name, **options)(mask)
  close(jnp.sum(loss * weights), value)


@pytest.mark.parametrize('name', normalizers.names())
def test_splitting_a_rollout_does_not_change_its_loss(name):
  # From verl's tests: 1 to 24 as 8 sequences of 3, the last token padding.
  loss = jnp.arange(1.0, 25.0).reshape(8, 3)
  mask = jnp.tile(jnp.asarray([True, True, False]), (8, 1))
  options = {'constant': {'horizon': 2}, 'prompt_mean': {'group_size': 4}}
  weights = normalizers.build(name, **options.get(name, {}))(mask)
  whole = jnp.sum(loss * weights)
  # Sequences of equal length: the mean of 1 2, 4 5, ..., 22 23; twice that
  # where a sequence of two tokens is summed.
  close(whole, 24 if name == 'sequence_sum' else 12)
  for pieces in (2, 4, 8):
    parts = jnp.split(loss * weights, pieces)
    close(sum(jnp.sum(part) for part in parts), whole)


@pytest.mark.parametrize('name', ['token_mean', 'sequence_mean'])
def test_mean_normalisers_give_a_rollout_the_weight_one(name):
  mask = jax.random.bernoulli(jax.random.key(0), 0.5, (6, 7)).at[:, 0].set(True)
  close(jnp.sum(normalizers.build(name)(mask)), 1)


# --- advantages --------------------------------------------------------------


@pytest.mark.parametrize(
    'name', ['batch_zscore', 'group_zscore', 'leave_one_out']
)
def test_group_of_one_has_nobody_to_compare_with(name):
  with pytest.raises(ValueError, match=f'group_size=1: {name} needs others'):
    advantages.build(name, group_size=1)
