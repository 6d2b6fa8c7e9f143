"""Terms beside the policy gradient: shaping, groups, reference KL, entropy.

The policy is a table of logits, one row for every token, so each gradient is
known. N prompts with two completions each, B sequences, T tokens.
"""

import functools
import types

import hand_numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import table_model
import tiny_model

from configs import default
from dppo_jax import advantages
from dppo_jax import diagnostics
from dppo_jax import divergences
from dppo_jax import groups
from dppo_jax import losses
from dppo_jax import normalizers
from dppo_jax import objective
from dppo_jax import penalties
from dppo_jax import shaping
from dppo_jax.types import ScoredRollout

pytestmark = pytest.mark.usefixtures('no_nans')

close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)

GROUP_SIZE, VOCABULARY = 2, 12
LENGTHS = np.asarray([4, 2, 1, 3, 4, 2, 3, 4])
MASK = np.arange(4) < LENGTHS[:, None]
REWARDS = (1.0, 1, 0, 1, 0, 0, 1, 0)  # Spread in the second and fourth group.


# --- rewards and groups ------------------------------------------------------


def test_groups_with_spread_come_first_and_keep_their_order():
  rewards = jnp.asarray([0.0, 0, 1, 0, 1, 1, 0, 1])
  rows = groups.with_spread_first(rewards, group_size=2)
  np.testing.assert_array_equal(rows, [2, 3, 6, 7, 0, 1, 4, 5])
  # Of one group, or all with spread: as they were.
  for group_size, n in ((8, 8), (2, 2)):
    rows = groups.with_spread_first(
        jnp.arange(float(n)), group_size=group_size
    )
    np.testing.assert_array_equal(rows, np.arange(n))


def test_groups_whose_rewards_are_all_equal_are_cut_out_of_the_mask():
  mask = jnp.asarray([[1, 1], [1, 0], [0, 1], [1, 1], [1, 1], [1, 1]], bool)
  rewards = jnp.asarray([0.7, 0.7, 0, 1, 1, 1])
  cut = groups.mask_with_spread
  thirds = np.array(mask)
  thirds[3:] = False
  np.testing.assert_array_equal(cut(mask, rewards, group_size=3), thirds)
  expected = np.array(mask)
  expected[[0, 1, 4, 5]] = False
  np.testing.assert_array_equal(cut(mask, rewards, group_size=2), expected)
  with jax.debug_nans(False):  # It is left for the learner to find.
    spoiled = rewards.at[4].set(jnp.nan)
    expected[4:] = mask[4:]
    np.testing.assert_array_equal(cut(mask, spoiled, group_size=2), expected)


@pytest.mark.parametrize('buffer', [0, 11, -1])
def test_buffer_that_does_not_fit_is_refused(buffer):
  with pytest.raises(ValueError, match=f'buffer={buffer} must be at least 1'):
    shaping.build('overlong', horizon=10, buffer=buffer)


# --- the estimators ----------------------------------------------------------


def distributions(seed=0, count=50):
  rng = np.random.RandomState(seed)
  logits = 2 * rng.standard_normal((2, count, VOCABULARY))
  return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))


def full_kl(target, reference):
  return np.sum(np.exp(target) * (target - reference), -1)


def test_k3_is_never_negative_and_k1_is_where_the_token_lost():
  x = jnp.linspace(-5, 5, 101)
  k1, k2, k3 = (
      penalties.reference_kl(
          logprobs=x, reference_logprobs=jnp.zeros(101), estimator=name
      )
      for name in ('k1', 'k2', 'k3')
  )
  assert jnp.all(k3 >= 0) and jnp.all(k2 >= 0) and jnp.any(k1 < 0)
  close(k3[50], 0)


def test_estimators_against_the_whole_vocabulary():
  target, reference = distributions()
  kl = full_kl(target, reference)
  got = penalties.full_reference_kl(
      logits=jnp.asarray(target + 3), reference_logits=jnp.asarray(reference)
  )
  close(got, kl)
  for name in ('k1', 'k3'):  # Unbiased: the mean over pi is the KL.
    values = penalties.reference_kl(
        logprobs=target, reference_logprobs=reference, estimator=name
    )
    close(np.sum(np.exp(target) * values, -1), kl)
  # The gradient of k2 in the mean over pi is that of the KL: E x grad log pi.
  def mean_k2(logits, frozen):
    logprobs = jax.nn.log_softmax(logits)
    k2 = penalties.reference_kl(
        logprobs=logprobs, reference_logprobs=reference, estimator='k2'
    )
    return jnp.sum(jnp.exp(frozen) * k2)

  gradient = jax.grad(mean_k2)(jnp.asarray(target), jnp.asarray(target))
  expected = np.exp(target) * (target - reference - kl[:, None])
  close(gradient, expected, atol=1e-5)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'kl_estimator': 'k4'}, "Unknown estimator 'k4'"),
        ({'kl_where': 'rewards'}, "Did you mean 'reward'"),
        ({'kl_estimator': 'full', 'kl_where': 'reward'}, 'no sampled estimate'),
    ],
)
def test_extra_terms_that_cannot_be_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    objective.Extras(**options)


def test_unknown_estimator_is_refused():
  with pytest.raises(ValueError, match="Unknown estimator 'k4'"):
    penalties.reference_kl(
        logprobs=jnp.zeros(2), reference_logprobs=jnp.zeros(2), estimator='k4'
    )


# --- in the objective --------------------------------------------------------

DIVERGENCE = divergences.build('binary_tv')


@functools.cache
def policies():
  """Logits [B, T, V] of behaviour, target and reference policy; tokens."""
  keys = jax.random.split(jax.random.key(0), 4)
  behaviour = 2 * jax.random.normal(keys[0], (8, 4, VOCABULARY))
  target = behaviour + 0.1 * jax.random.normal(keys[1], behaviour.shape)
  reference = behaviour + jax.random.normal(keys[2], behaviour.shape)
  tokens = jax.random.categorical(keys[3], behaviour)
  return behaviour, target, reference, tokens


def table(logits):
  return logits.reshape(-1, VOCABULARY)


def scored(rewards=REWARDS):
  behaviour, _, _, tokens = policies()
  rollout = table_model.make_rollout(
      DIVERGENCE, behaviour=behaviour, tokens=tokens, token_mask=MASK
  )
  return ScoredRollout(rollout, jnp.asarray(rewards, jnp.float32))


def make_objective(divergence=DIVERGENCE, **options):
  return tiny_model.make_objective(divergence, **{
      'model': table_model.MODEL,
      'advantage_fn': advantages.build('raw'),
      'group_size': GROUP_SIZE,
      'normalizer': lambda mask: mask.astype(jnp.float32),
      **options,
  })


def batch_and_gradient(extras, *, rewards=(0.0,) * 8, target=None):
  """What is prepared, and the gradient by the target's table. [B, T, V]."""
  prepare, weighted_loss = make_objective(extras=extras)
  _, usual, anchor, _ = policies()
  target, anchor = usual if target is None else target, table(anchor)

  @tiny_model.jit
  def run(target, anchor, scored):
    state = types.SimpleNamespace(params=target, reference=anchor)
    batch = prepare(state, scored)
    (loss, _), gradient = jax.value_and_grad(weighted_loss, has_aux=True)(
        target, batch, anchor, jnp.int32(0)
    )
    return batch, loss, gradient

  batch, _, gradient = run(table(target), anchor, scored(rewards))
  return batch, np.asarray(gradient).reshape(target.shape)


def log_softmax(logits):
  return np.asarray(jax.nn.log_softmax(logits), np.float64)


def of_tokens(logprobs):
  tokens = np.asarray(policies()[3])
  return np.take_along_axis(logprobs, tokens[..., None], -1)[..., 0]


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3'])
def test_reference_kl_as_a_loss_pulls_towards_the_reference(estimator):
  # No rewards: c k'(x) (e_a - pi) is all that is left of the gradient.
  extras = objective.Extras(kl_coefficient=0.5, kl_estimator=estimator)
  _, gradient = batch_and_gradient(extras)
  _, target, reference, tokens = policies()
  target, reference = log_softmax(target), log_softmax(reference)
  x = of_tokens(target) - of_tokens(reference)
  slope = {'k1': np.ones_like(x), 'k2': x, 'k3': 1 - np.exp(-x)}[estimator]
  along = np.eye(VOCABULARY)[np.asarray(tokens)] - np.exp(target)
  expected = 0.5 * slope[..., None] * along * MASK[..., None]
  close(gradient, expected, atol=2e-5)
  if estimator != 'k1':  # Descent lowers what the reference finds less likely.
    at_token = of_tokens(gradient)
    assert np.all(np.sign(at_token)[MASK] == np.sign(x)[MASK])


def own_loss(change):
  """The policy gradient, and what `change(loss, metrics)` makes of it."""
  inner = losses.build('policy_gradient')

  def loss_fn(inputs):
    return change(*inner(inputs))

  return loss_fn


def run_once(**options):
  """Loss and tokens of a micro-batch."""
  prepare, weighted_loss = make_objective(**options)
  _, target, _, _ = policies()
  state = types.SimpleNamespace(params=table(target))
  return weighted_loss(
      table(target), prepare(state, scored()), None, jnp.int32(0)
  )


def without(name):
  return lambda loss, metrics: (
      loss, {k: v for k, v in metrics.items() if k != name}
  )


@pytest.mark.parametrize('change, message', [
    (without('capped'), "returns no metric 'capped'; beside the loss of each "
     'token .*types.LossFn'),
    (lambda loss, _: loss, r'must return \(loss, metrics\): beside the loss'),
    (lambda loss, metrics: (jnp.mean(loss), metrics),
     r"The loss 'own_loss' returns an array of shape \(\); here it must be \("),
    (lambda loss, metrics: (jnp.sum(loss, -1, keepdims=True), metrics),
     r"The loss 'own_loss' returns an array of shape \(8, 1\); here it must be "
     r'\(8, 4\), one number for each'),
    (lambda loss, metrics: (loss, metrics | {'mine': jnp.mean(loss)}),
     "The metric 'mine' of the loss 'own_loss' returns an array of shape"),
], ids=['missing', 'alone', 'mean', 'sequence', 'metric'])
def test_a_loss_that_returns_something_else_hears_what(change, message):
  with pytest.raises(ValueError, match=message):
    run_once(loss_fn=own_loss(change))


def test_what_else_a_loss_returns_is_logged_as_its_mean_over_tokens():
  def change(loss, metrics):
    return loss, metrics | {'twice': 2 + jnp.zeros_like(loss)}

  def measure(**options):
    total, stats = run_once(**options)
    stats = jax.tree.map(lambda x: x[None], stats)
    return total, diagnostics.token_metrics(stats, threshold=None)

  plain, expected = measure(loss_fn=losses.build('policy_gradient'))
  total, metrics = measure(loss_fn=own_loss(change))
  assert metrics.pop('loss/twice') == 2
  close(total, plain)
  assert metrics.keys() == expected.keys()


@pytest.mark.parametrize('shape', [(8, 1), (4, 2), (1,)])
def test_an_advantage_that_is_not_one_of_each_completion_is_refused(shape):
  def own_advantage():
    return lambda rewards: jnp.resize(rewards, shape)

  with pytest.raises(ValueError, match="The advantage '.*' returns an array of "
                     r'shape .*; here it must be \(8,\), one number for each'):
    run_once(advantage_fn=own_advantage())


@pytest.mark.parametrize('options, message', [
    ({'normalizer': lambda mask: 1 / jnp.sum(mask, -1, keepdims=True)},
     r'The normalizer .* shape \(8, 1\); here it must be \(8, 4\)'),
    ({'normalizer': lambda mask: 1 / jnp.sum(mask)},
     r'The normalizer .* shape \(\); here it must be \(8, 4\)'),
    ({'shaping_fn': lambda rewards, lengths: rewards[:, None]},
     r'The shaping .* shape \(8, 1\); here it must be \(8,\)'),
], ids=['column', 'number', 'shaping'])
def test_what_is_not_one_number_of_each_token_or_completion_is_refused(
    options, message
):
  prepare, _ = make_objective(**options)
  _, target, _, _ = policies()
  with pytest.raises(ValueError, match=message):
    prepare(types.SimpleNamespace(params=table(target)), scored())


def test_a_divergence_of_all_words_is_refused():
  measure = lambda logits, tokens, recorded: logits
  bad = DIVERGENCE._replace(measure=measure)
  with pytest.raises(ValueError, match='The divergence .* returns an array of '
                     r'shape \(.*12\); here it must be'):
    run_once(divergence=bad)


def test_a_region_of_a_sequence_is_refused():
  region_fn = lambda inputs: jnp.ones((len(inputs.token_mask), 1))
  with pytest.raises(ValueError, match='The trust region .* returns an array '
                     r'of shape \(8, 1\); here it must be \(8, 4\)'):
    run_once(region_fn=region_fn)


def test_full_reference_kl_has_the_gradient_of_the_kl():
  # By the logits: pi (ln(pi / reference) - KL).
  extras = objective.Extras(kl_coefficient=0.5, kl_estimator='full')
  _, gradient = batch_and_gradient(extras)
  target, reference = (log_softmax(x) for x in policies()[1:3])
  kl = full_kl(target, reference)[..., None]
  expected = 0.5 * np.exp(target) * (target - reference - kl)
  close(gradient, expected * MASK[..., None], atol=2e-5)


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3'])
def test_reference_kl_as_a_reward_lowers_the_advantage(estimator):
  extras = objective.Extras(
      kl_coefficient=0.5, kl_estimator=estimator, kl_where='reward'
  )
  batch, gradient = batch_and_gradient(extras, rewards=REWARDS)
  behaviour, target, reference, tokens = policies()
  x = of_tokens(log_softmax(behaviour)) - of_tokens(log_softmax(reference))
  k = {'k1': x, 'k2': x * x / 2, 'k3': np.exp(-x) - 1 + x}[estimator]
  rewards = np.asarray(REWARDS) - 0.5 * np.sum(k * MASK, -1)
  close(batch.advantages, rewards[:, None] * MASK, atol=1e-5)
  # And nothing else: -r A (e_a - pi), nowhere outside the region of .15.
  target, behaviour = log_softmax(target), log_softmax(behaviour)
  gap = np.exp(of_tokens(target)) - np.exp(of_tokens(behaviour))
  weight = np.exp(of_tokens(target) - of_tokens(behaviour)) * (
      (np.abs(gap) <= 0.15) | (gap * rewards[:, None] < 0)
  )
  along = np.eye(VOCABULARY)[np.asarray(tokens)] - np.exp(target)
  expected = -(weight * MASK * rewards[:, None])[..., None] * along
  close(gradient, expected, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize('where, estimator', [
    ('loss', 'k2'), ('loss', 'k3'), ('loss', 'full'), ('reward', 'k1'),
])
def test_the_kl_to_the_reference_is_measured_as_it_is_estimated(
    where, estimator
):
  prepare, weighted_loss = make_objective(extras=objective.Extras(
      kl_coefficient=0.5, kl_estimator=estimator, kl_where=where
  ))
  _, target, reference, _ = policies()

  @tiny_model.jit
  def measure(target, reference, scored):
    state = types.SimpleNamespace(params=target, reference=reference)
    _, stats = weighted_loss(
        target, prepare(state, scored), reference, jnp.int32(0)
    )
    stats = jax.tree.map(lambda x: x[None], stats)
    return diagnostics.token_metrics(stats, threshold=None)

  metrics = measure(table(target), table(reference), scored())
  target, reference = log_softmax(target), log_softmax(reference)
  x = of_tokens(target) - of_tokens(reference)
  kl = {
      'k1': x, 'k2': x * x / 2, 'k3': np.exp(-x) - 1 + x,
      'full': full_kl(target, reference),
  }[estimator]
  close(metrics['reference/kl'], kl[MASK].mean(), rtol=1e-4)
  # A rule that compares no token with a threshold tells not who is outside.
  assert 'mask/fraction' in metrics and 'mask/outside' not in metrics


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3', 'full'])
def test_policy_that_finds_padding_impossible_changes_nothing(estimator):
  # exp(-x) of a padded token is e^200, infinite; times zero it is NaN.
  extras = objective.Extras(kl_coefficient=0.5, kl_estimator=estimator)
  _, expected = batch_and_gradient(extras)
  target, tokens = np.array(policies()[1]), np.asarray(policies()[3])
  for row, column in np.argwhere(~MASK):
    target[row, column, tokens[row, column]] = -200.0
  _, got = batch_and_gradient(extras, target=jnp.asarray(target))
  np.testing.assert_array_equal(got, expected)


def test_entropy_bonus_raises_the_entropy():
  # Of -c H by the logits: c pi (ln pi + H).
  _, gradient = batch_and_gradient(objective.Extras(entropy_bonus=0.5))
  target = log_softmax(policies()[1])
  entropy = -np.sum(np.exp(target) * target, -1, keepdims=True)
  expected = 0.5 * np.exp(target) * (target + entropy) * MASK[..., None]
  close(gradient, expected, atol=2e-5)
  # Along it the entropy falls, so descent raises it.
  by_logits = -np.exp(target) * (target + entropy)
  assert np.all(np.sum(gradient * by_logits, -1)[MASK] < 0)


# --- in the learner ----------------------------------------------------------


def state_of(**options):
  return tiny_model.make_state(table(policies()[0]), **options)


def learn(scored, state=None, **options):
  """(state, token stats, metrics) of the real learner."""
  learn_fn = tiny_model.make_learner(DIVERGENCE, **{
      'model': table_model.MODEL,
      'advantage_fn': advantages.build('group_mean', group_size=GROUP_SIZE),
      'group_size': GROUP_SIZE,
      **options,
  })
  state = state_of() if state is None else state
  return tiny_model.jit(learn_fn)(state, scored, jax.random.key(1))


def test_coefficient_of_zero_is_bitwise_nothing_and_needs_no_reference():
  plain, _, _ = learn(scored())
  zero = objective.Extras(kl_coefficient=0.0, kl_estimator='full')
  assert not zero.needs_reference
  assert state_of(with_reference=zero.needs_reference).reference == ()
  got, _, _ = learn(scored(), extras=zero)
  tiny_model.assert_trees_equal(got.params, plain.params)
  assert not jnp.array_equal(got.params, state_of().params)
  # As a run has it, unless it is told otherwise.
  config = default.get_config()
  assert not objective.Extras(**config.extras).needs_reference


def test_reference_stays_where_the_policy_started():
  start = state_of(with_reference=True)
  extras = objective.Extras(kl_coefficient=0.1)
  state, _, _ = learn(scored(), start, extras=extras, num_minibatches=2)
  tiny_model.assert_trees_equal(state.reference, start.params)
  assert jnp.max(jnp.abs(state.params - state.reference)) > 1e-3


def test_reference_kl_keeps_the_policy_nearer_to_the_start():
  # Four updates from the same start.
  moved = {}
  for coefficient in (0.0, 0.5):
    state, _, _ = learn(
        scored(),
        state_of(with_reference=True),
        extras=objective.Extras(
            kl_coefficient=coefficient, kl_estimator='full'
        ),
        num_epochs=4,
    )
    kl = full_kl(log_softmax(state.params), log_softmax(state.reference))
    moved[coefficient] = kl.sum()
  assert 0 < moved[0.5] < moved[0.0]


def test_only_the_first_groups_with_spread_are_learned_from():
  # Two of four groups; those with spread are the second and the fourth.
  state, stats, _ = learn(
      scored(), num_groups=2, num_minibatches=2, num_microbatches=2
  )
  assert stats.token_mask.shape == (2, 2, 4)
  seen = np.sort(np.asarray(stats.token_mask).sum(-1).ravel())
  np.testing.assert_array_equal(seen, np.sort(LENGTHS[[2, 3, 6, 7]]))
  change = np.abs(state.params - state_of().params).max(-1).reshape(8, 4)
  # Each token has its own row of the table.
  learned = np.asarray([0, 0, 1, 1, 0, 0, 1, 1], bool)[:, None]
  np.testing.assert_array_equal(change > 0, MASK & learned)


def test_too_few_groups_with_spread_are_filled_up_in_order():
  # Three of four groups: the first is the best of those without spread.
  _, stats, _ = learn(scored(), num_groups=3)
  seen = np.sort(np.asarray(stats.token_mask).sum(-1).ravel())
  np.testing.assert_array_equal(seen, np.sort(LENGTHS[[0, 1, 2, 3, 6, 7]]))


@pytest.mark.parametrize('name', normalizers.names())
def test_groups_without_spread_are_dropped_as_if_they_were_not_there(name):
  options = {'constant': {'horizon': 4}, 'prompt_mean': {'group_size': 2}}
  normalizer = normalizers.build(name, **options.get(name, {}))
  drop = {'drop_groups_without_spread': True, 'normalizer': normalizer}
  # An entropy bonus would teach something without an advantage, too.
  drop['extras'] = objective.Extras(entropy_bonus=0.1)
  state, stats, metrics = learn(scored(), **drop)
  rows = np.asarray([2, 3, 6, 7])
  others = jax.tree.map(lambda x: x[rows], scored())
  expected, _, alone = learn(
      others, **(drop | {'drop_groups_without_spread': False})
  )
  close(metrics['loss'], alone['loss'])
  close(state.params, expected.params)
  assert jnp.max(jnp.abs(expected.params - state_of().params)) > 1e-3
  tokens = np.sort(np.asarray(stats.token_mask).sum(-1).ravel())
  np.testing.assert_array_equal(tokens, np.sort([0] * 4 + [*LENGTHS[rows]]))


def test_nothing_is_learned_where_no_group_has_spread():
  state, stats, metrics = learn(
      scored((1.0,) * 8), drop_groups_without_spread=True
  )
  assert not stats.token_mask.any()
  assert metrics['loss'] == metrics['optimizer/skipped'] == 0
  tiny_model.assert_trees_equal(state.params, state_of().params)


def test_spread_is_that_of_the_shaped_rewards_before_the_reference_kl():
  # Overlong over the last two of four tokens: a reward of 1 at lengths 4 2
  # becomes 0 1, and of 0 at 4 2 -1 0; the reference KL differs in every row.
  prepare, _ = make_objective(
      drop_groups_without_spread=True,
      shaping_fn=shaping.build('overlong', horizon=4, buffer=2),
      extras=objective.Extras(kl_coefficient=0.5, kl_where='reward'),
  )
  reference = table(policies()[2])
  state = types.SimpleNamespace(params=None, reference=reference)
  batch = prepare(state, scored((1.0, 1, 1, 1.5, 0, 0, 0.5, 1)))
  # Rewards shaped: 0 1, 1 1, -1 0, 0 0.
  kept = np.asarray([1, 1, 0, 0, 1, 1, 0, 0], bool)[:, None]
  np.testing.assert_array_equal(batch.rows.token_mask, MASK & kept)
  np.testing.assert_array_equal(batch.weights > 0, MASK & kept)


def test_too_few_groups_with_spread_are_not_filled_up_where_they_are_dropped():
  # Three of four groups are taken, two of them have spread.
  _, stats, _ = learn(
      scored(), num_groups=3, drop_groups_without_spread=True
  )
  seen = np.sort(np.asarray(stats.token_mask).sum(-1).ravel())
  np.testing.assert_array_equal(
      seen, np.sort([0, 0, *LENGTHS[[2, 3, 6, 7]]])
  )


def truncated_rows():
  """Row 3 hit the limit of four tokens."""
  data = scored()
  flags = jnp.zeros(8, bool).at[3].set(True)
  return data._replace(rollout=data.rollout._replace(truncated=flags))


def test_masked_truncated_completions_teach_nothing_but_are_compared_with():
  prepare, _ = make_objective(
      mask_truncated=True,
      advantage_fn=advantages.build('group_mean', group_size=GROUP_SIZE),
  )
  state = types.SimpleNamespace(params=None, reference=())
  batch = prepare(state, truncated_rows())
  expected = MASK.copy()
  expected[3] = False
  np.testing.assert_array_equal(batch.rows.token_mask, expected)
  np.testing.assert_array_equal(batch.weights, expected)
  # Rewards of the second group 0 and 1: -.5 for the other one all the same.
  close(batch.advantages[2:4], [[-0.5, 0, 0, 0], [0] * 4])


def test_masked_truncated_completions_have_the_length_they_were_sampled_with():
  # Overlong over the last two of four tokens: lengths 1 and 3 cost 0 and 1/2.
  prepare, _ = make_objective(
      mask_truncated=True,
      advantage_fn=advantages.build('group_mean', group_size=GROUP_SIZE),
      shaping_fn=shaping.build('overlong', horizon=4, buffer=2),
  )
  state = types.SimpleNamespace(params=None, reference=())
  batch = prepare(state, truncated_rows())
  # Rewards 0 and 1 - 1/2, mean .25.
  close(batch.advantages[2, 0], -0.25)


def test_masked_truncated_completions_are_compared_with_their_own_kl():
  # Off the reward, also where the completion itself teaches nothing.
  extras = objective.Extras(kl_coefficient=1.0, kl_where='reward')
  _, target, reference, _ = policies()
  state = types.SimpleNamespace(
      params=table(target), reference=table(reference)
  )
  found = []
  for mask_truncated in (False, True):
    prepare, _ = make_objective(
        mask_truncated=mask_truncated, extras=extras,
        advantage_fn=advantages.build('group_mean', group_size=GROUP_SIZE),
    )
    found.append(np.array(prepare(state, truncated_rows()).advantages))
  whole, masked = found
  assert np.abs(whole[3]).max() > 0.1
  whole[3] = 0
  close(masked, whole)


def test_truncated_completions_count_where_they_are_not_masked():
  prepare, _ = make_objective()
  state = types.SimpleNamespace(params=None, reference=())
  batch = prepare(state, truncated_rows())
  np.testing.assert_array_equal(batch.rows.token_mask, MASK)


# --- diagnostics -------------------------------------------------------------


def test_the_age_of_a_token_is_the_updates_since_it_was_sampled():
  _, stats, _ = learn(scored(), num_epochs=2, num_minibatches=4)
  ages = np.broadcast_to(np.arange(8)[:, None, None], stats.age.shape)
  np.testing.assert_array_equal(stats.age, ages)
  metrics = diagnostics.token_metrics(stats, threshold=0.15)
  counts = np.asarray(stats.token_mask).sum((1, 2))
  for name, updates in (
      ('0', [0]), ('1', [1]), ('2-3', [2, 3]), ('4-7', [4, 5, 6, 7]),
      ('8-15', []), ('16-31', []), ('64-', []),
  ):
    assert metrics[f'by_age/{name}/tokens'] == counts[updates].sum()
  assert metrics['by_age/0/ratio_second_moment'] < 1e-9
  assert metrics['by_age/4-7/ratio_second_moment'] > 1e-4
  assert metrics['by_age/64-/divergence_max'] == 0
  # A rollout that waited for three updates.
  data = scored()
  late = state_of()._replace(policy_version=jnp.int32(3))
  _, stats, _ = learn(data, late)
  assert np.all(np.asarray(stats.age) == 3)


def token_stats(**changes):
  """One update of one row: kept, dropped, half, padding."""
  mu, pi = np.asarray([0.5, 0.4, 0.2, 0.1]), np.asarray([0.5, 0.8, 0.1, 0.9])
  row = lambda x, dtype: jnp.asarray(x, dtype).reshape(1, 1, 4)
  fields = {
      'logprobs': np.log(pi),
      'behaviour_logprobs': np.log(mu),
      'divergence': np.abs(pi - mu),
      'direction': np.log(pi / mu),
      'trust_region': [1, 0, 0.5, 0],
      'advantages': [1, 1, -1, 1],
      'entropy': [1, 1, 1, 9],
      'surrogate': [1, 0, -0.5, 9],
      'capped': [0, 0, 0, 1],
      'gradient_weight': [1, 0, 0.5, 9],
      'weights': [1 / 3, 1 / 3, 1 / 3, 0],
  } | changes
  return diagnostics.TokenStats(
      targets=row([3, 4, 4, 4], jnp.int32),
      token_mask=row([1, 1, 1, 0], bool),
      age=row([0, 0, 0, 0], jnp.int32),
      **{name: row(value, jnp.float32) for name, value in fields.items()},
  )


def test_soft_weights_are_averaged_and_only_zero_is_dropped():
  metrics = diagnostics.token_metrics(token_stats(), threshold=0.05)
  close(metrics['mask/weight_mean'], 0.5)  # (1 + 0 + .5) / 3.
  close(metrics['mask/fraction'], 1 / 3)
  close(metrics['mask/positive'], 1 / 2)
  close(metrics['mask/negative'], 0)
  close(metrics['mask/outside'], 2 / 3)


def test_coming_back_is_decided_by_the_direction_of_the_divergence():
  metrics = diagnostics.token_metrics(token_stats(), threshold=0.05)
  close(metrics['mask/coming_back'], 0)
  turned = token_stats(direction=[0, -1, 1, 0])
  metrics = diagnostics.token_metrics(turned, threshold=0.05)
  close(metrics['mask/coming_back'], 2 / 3)


def test_scatter_holds_sampled_tokens_only_and_the_farthest_first():
  points = np.asarray(diagnostics.scatter(token_stats(), num_points=12))
  assert points.shape == (12, 4)
  known = np.asarray(
      [[0.5, 1, 0, 0], [0.4, 2, 0.4, 1], [0.2, 0.5, 0.1, 0]]
  )
  gaps = np.abs(points[:, None] - known[None]).max(-1)
  assert np.all(gaps.min(1) < 1e-5)
  close(points[:3], known[[1, 2, 0]], atol=1e-6)
  # The other half is spread evenly: two of each, in order.
  close(points[6:], known[[0, 0, 1, 1, 2, 2]], atol=1e-6)
  empty = token_stats()._replace(token_mask=jnp.zeros((1, 1, 4), bool))
  np.testing.assert_array_equal(
      diagnostics.scatter(empty, num_points=12), np.zeros((12, 4))
  )


def test_masked_tokens_are_counted_by_the_sign_of_the_advantage():
  counts = diagnostics.masked_token_counts(token_stats(), vocab_size=6)
  np.testing.assert_array_equal(counts, [[0, 0, 0, 0, 1, 0], [0] * 6])


def test_mass_of_the_explicit_buckets_of_a_record():
  # .4 + .25 of the top two, with the sampled token .06 outside and then inside.
  divergence = divergences.build('topk_tv', k=2)
  behaviour = jnp.stack([hand_numbers.logs(hand_numbers.MU)] * 3)[None]
  rollout = table_model.make_rollout(
      divergence, behaviour=behaviour, tokens=[[4, 0, 5]],
      token_mask=[[True, True, False]],
  )
  metrics = diagnostics.record_metrics(rollout)
  close(metrics['topk/mass_mean'], (0.71 + 0.65) / 2)
  close(metrics['topk/mass_min'], 0.65)
  other = rollout._replace(record=rollout.behaviour_logprobs)
  assert diagnostics.record_metrics(other) == {}
