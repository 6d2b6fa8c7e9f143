"""What one update does, and what it must not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import table_model
import tiny_model

from dppo_jax import divergences
from dppo_jax import duals
from dppo_jax import learner
from dppo_jax import losses
from dppo_jax import normalizers
from dppo_jax import objective
from dppo_jax import optim
from dppo_jax import packing
from dppo_jax import rollout
from dppo_jax import sampling
from dppo_jax import target
from dppo_jax import train_step
from dppo_jax.models import load
from dppo_jax.tasks import arithmetic
from dppo_jax.tasks import prompts
from dppo_jax.types import Divergence
from dppo_jax.types import ScoredRollout

NUM_ROWS = tiny_model.NUM_PROMPTS * tiny_model.GROUP_SIZE
KEY = jax.random.key(7)
# Made once: a learner is compiled once per set of options.
TOPK_TV, NONE = tiny_model.topk_tv(), divergences.build('none')


def every_divergence(combine):
  """All of the registry as one; `combine` sees a dict of values by name."""
  built = {name: divergences.build(name) for name in divergences.names()}
  return Divergence(
      record=lambda *x: {k: d.record(*x) for k, d in built.items()},
      measure=lambda logits, tokens, recorded: combine({
          k: d.measure(logits, tokens, recorded[k]) for k, d in built.items()
      }),
      threshold=1.0,
  )


# On-policy: both policies have the same weights.


@pytest.fixture(scope='module')
def embedded():
  """The model, its tokenizer, and prompts of its task. [6, 8]."""
  tokenizer = load.load_tokenizer('embedded')
  texts = [row['prompt'] for row in arithmetic.problems('train')[::1500]]
  batch = prompts.encode(texts, tokenizer, max_prompt_length=8)
  return load.from_pretrained('embedded'), tokenizer, batch


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_ratio_is_one_and_every_divergence_zero_right_after_a_rollout(
    embedded, temperature,
):
  model, tokenizer, batch = embedded
  everything = every_divergence(lambda values: values)
  sampler = sampling.make_sampler(
      model.replace(params=None),
      group_size=4,
      max_completion_length=24,
      eos_ids=(tokenizer.eos_token_id,),
      pad_id=tokenizer.pad_token_id,
      temperature=temperature,
      record=everything.record,
  )
  target_fn = tiny_model.make_target_fn(
      everything, model=model.replace(params=None), temperature=temperature
  )
  # Optimized, as in a run.
  rolled, _ = jax.jit(rollout.make_rollout_fn(sampler, group_size=4))(
      model.params, batch, KEY, jnp.int32(0)
  )
  target = jax.jit(target_fn)(model.params, rolled)
  sampled = np.asarray(rolled.token_mask)
  assert sampled.sum() > 4 * len(batch.tokens) * 5
  log_ratio = np.asarray(target.logprobs - rolled.behaviour_logprobs)
  assert np.abs(log_ratio[sampled]).max() < 1e-5
  assert set(target.divergence) == set(divergences.names())
  for name, values in target.divergence.items():
    assert np.abs(np.asarray(values)[sampled]).max() < 1e-5, name


# One update of a tiny model. Compiled once per learner; SGD, so that parameters
# move by the gradient.


@pytest.fixture(scope='module')
def scored():
  return tiny_model.make_scored(TOPK_TV)


def state_of(optimizer=None, params=None):
  return train_step.init_state(
      tiny_model.params() if params is None else params,
      optimizer or tiny_model.sgd(),
      jax.random.key(0),
  )


@functools.cache
def compiled(**options):
  return tiny_model.jit(tiny_model.make_learner(**options))


def learn(scored, *, state=None, key=KEY, **options):
  """(new state, token stats, metrics)."""
  state = state_of(options.get('optimizer')) if state is None else state
  options.setdefault('divergence', TOPK_TV)
  return compiled(**options)(state, scored, key)


@pytest.fixture(scope='module')
def once(scored):
  """One update from the whole rollout."""
  return learn(scored)


def moved(state):
  """Largest change of any parameter."""
  changes = jax.tree.map(
      lambda new, old: jnp.max(jnp.abs(new - old)),
      state.params, tiny_model.params(),
  )
  return max(float(x) for x in jax.tree.leaves(changes))


def assert_same_params(actual, expected, atol=1e-6):
  # The change itself is thousands of times larger than what may differ.
  assert moved(expected) > 1000 * atol
  tiny_model.assert_trees_close(
      actual.params, expected.params, rtol=0, atol=atol
  )


def test_the_first_update_sees_no_mismatch(once):
  _, stats, metrics = once
  mask = np.asarray(stats.token_mask)
  gap = np.asarray(stats.logprobs - stats.behaviour_logprobs)[mask]
  assert np.abs(gap).max() < 1e-5
  assert np.asarray(stats.divergence)[mask].max() < 1e-5
  assert np.asarray(stats.trust_region)[mask].all()
  assert np.isfinite(metrics['loss']).all()


def test_the_loss_on_policy_is_the_hand_sum(once, scored):
  # -ratio * A * logprob * weight with ratio 1; rewards 1 0 0 1 have mean 1/2,
  # so A is +-1/2; the weight of a token is 1 / number of tokens.
  advantage = np.tile([0.5, -0.5, -0.5, 0.5], 4)[:, None]
  logprobs = np.asarray(scored.rollout.behaviour_logprobs)
  mask = np.asarray(scored.rollout.token_mask)
  expected = np.sum(np.where(mask, -advantage * logprobs, 0)) / mask.sum()
  np.testing.assert_allclose(once[2]['loss'], [expected], atol=1e-5)


def test_every_parameter_gets_a_gradient(once):
  changes = jax.tree.map(
      lambda new, old: np.abs(np.asarray(new - old)).max(),
      once[0].params, tiny_model.params(),
  )
  flat, _ = jax.tree_util.tree_flatten_with_path(changes)
  for path, change in flat:
    assert change > 1e-6, jax.tree_util.keystr(path)


def test_every_layer_gets_a_gradient(once):
  kernel = lambda params: params['layers']['attention']['q']['kernel']
  change = kernel(once[0].params) - kernel(tiny_model.params())
  for layer in np.asarray(change):
    assert np.abs(layer).max() > 1e-6


def test_nan_where_nothing_was_sampled_changes_nothing():
  # The sum of all divergences: a NaN of one is a NaN of the sum.
  divergence = every_divergence(lambda values: sum(values.values()))
  clean = tiny_model.make_scored(divergence)
  mask = clean.rollout.token_mask

  def poison(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    valid = jnp.expand_dims(mask, range(2, x.ndim))
    return jnp.where(jnp.broadcast_to(valid, x.shape), x, jnp.nan)

  dirty = clean._replace(
      rollout=clean.rollout._replace(
          behaviour_logprobs=poison(clean.rollout.behaviour_logprobs),
          record=jax.tree.map(poison, clean.rollout.record),
      )
  )
  assert np.isnan(dirty.rollout.behaviour_logprobs).any()
  learn_fn = tiny_model.jit(tiny_model.make_learner(divergence))
  (expected, _, metrics), (actual, stats, dirty_metrics) = (
      learn_fn(state_of(), x, KEY) for x in (clean, dirty)
  )
  assert np.isnan(stats.divergence).any()
  assert moved(expected) > 1e-3
  tiny_model.assert_trees_equal(actual.params, expected.params)
  tiny_model.assert_trees_equal(dirty_metrics, metrics)


def test_a_nan_advantage_of_a_row_without_tokens_changes_nothing(scored):
  # Nothing was sampled in the last group; its rewards are NaN or 1 0 0 1.
  last = np.arange(NUM_ROWS) >= NUM_ROWS - tiny_model.GROUP_SIZE
  empty = scored._replace(
      rollout=scored.rollout._replace(
          token_mask=scored.rollout.token_mask & ~last[:, None]
      )
  )
  dirty = empty._replace(rewards=jnp.where(last, jnp.nan, scored.rewards))
  expected, actual = learn(empty)[0], learn(dirty)[0]
  assert int(actual.nonfinite_in_a_row) == 0
  assert moved(expected) > 1e-3
  tiny_model.assert_trees_equal(actual.params, expected.params)


# What must not matter.


def test_micro_batches_equal_the_whole_batch(once, scored):
  # Weighted by token_mean, so parts of different lengths would show.
  state, _, metrics = learn(scored, num_microbatches=4)
  assert_same_params(state, once[0])
  for name in ('loss', 'optimizer/grad_norm'):
    np.testing.assert_allclose(
        metrics[name], once[2][name], rtol=1e-4, atol=1e-6
    )


def test_chunks_of_the_vocabulary_head_equal_the_whole(scored):
  # 16 rows of 10 predicted tokens: three columns make a chunk, one is left.
  rng = np.random.RandomState(0)
  mask = scored.rollout.token_mask
  weights = rng.standard_normal((2, *mask.shape)) * mask[None]

  def run(chunk_size):
    target_fn = tiny_model.make_target_fn(
        tiny_model.topk_tv(), temperature=0.7, chunk_size=chunk_size
    )

    def total(params):
      target = target_fn(params, scored.rollout)
      values = jnp.stack([target.logprobs, target.entropy])
      return jnp.mean(values * weights), target

    return tiny_model.jit(jax.grad(total, has_aux=True))(tiny_model.params())

  (expected, whole), (gradient, chunks) = run(0), run(50)
  for name in ('logprobs', 'entropy', 'divergence', 'direction'):
    values, others = getattr(whole, name), getattr(chunks, name)
    # Temperature 0.7 against a rollout at 1: no divergence is 0.
    assert np.abs(values[mask]).max() > 0.01
    np.testing.assert_allclose(
        others[mask], values[mask], rtol=0, atol=1e-5, err_msg=name
    )
  tiny_model.assert_trees_close(gradient, expected, rtol=1e-4, atol=1e-6)
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 1e-2


@pytest.mark.parametrize('options', [
    {'extras': objective.Extras(kl_coefficient=0.3, kl_estimator='full')},
    {'extras': objective.Extras(kl_coefficient=0.3, entropy_bonus=0.1)},
    {
        'loss_fn': losses.build('r2vpo'),
        'dual': duals.build('projected_ascent', limit=1e-3, by_age=True),
    },
    {'anchor': 'recomputed', 'loss_fn': losses.build('spo')},
], ids=['full kl', 'kl and entropy', 'dual by age', 'recomputed'])
def test_updates_in_chunks_of_the_head_are_those_of_all_logits_at_once(
    scored, options
):
  # At another temperature than the sampler's, so that nothing is 0.
  options = {'temperature': 0.7, 'num_minibatches': 2, **options}

  def run(chunk_size):
    state = tiny_model.make_state(
        tiny_model.params(), with_reference='extras' in options,
        dual=options.get('dual'),
    )
    learn_fn = tiny_model.make_learner(
        TOPK_TV, chunk_size=chunk_size, optimizer=tiny_model.sgd(0.1),
        **options,
    )
    return tiny_model.jit(learn_fn)(state, scored, KEY)

  (expected, _, metrics), (state, _, others) = run(0), run(7)
  assert moved(expected) > 1e-3
  assert_same_params(state, expected, atol=2e-5 * moved(expected))
  tiny_model.assert_trees_close(state.dual, expected.dual, rtol=1e-5)
  for name, value in metrics.items():
    np.testing.assert_allclose(others[name], value, rtol=1e-4, atol=1e-6)


def test_only_sampled_tokens_are_in_chunks(scored):
  calls = []
  token_map = target.make_token_map(
      tiny_model.MODEL, temperature=1.0, chunk_size=32
  )

  def count(logits, targets):
    jax.debug.callback(lambda: calls.append(1))
    return divergences.token_logprobs(logits, targets)

  def run(chosen):
    calls.clear()
    mask = scored.rollout.token_mask & chosen
    rows = packing.rows_of(scored.rollout._replace(token_mask=mask))
    out = tiny_model.jit(lambda *x: token_map(count, *x))(
        tiny_model.params(), rows
    )
    jax.block_until_ready(out)
    jax.effects_barrier()
    # Chunks that are full, and one for the rest.
    assert len(calls) == -(-int(mask.sum()) // 32)
    np.testing.assert_array_equal(np.asarray(out)[~mask], 0)
    return len(calls), mask, np.asarray(out)

  odd_rows = (np.arange(16) % 2 == 1)[:, None]
  (most, whole, logprobs), (few, half, others) = run(True), run(odd_rows)
  assert 1 < few < most < scored.rollout.token_mask.size / 32
  assert whole.sum() > half.sum() and (logprobs[whole] < 0).all()
  np.testing.assert_allclose(others[half], logprobs[half], rtol=1e-5)
  assert run(False)[0] == 0


def test_no_array_of_tokens_times_vocabulary_exists_with_chunks(scored):
  # 160 tokens of 64 words. In chunks of 32 no shape holds both sizes.
  def shapes(chunk_size):
    target_fn = tiny_model.make_target_fn(
        divergences.build('binary_tv'), chunk_size=chunk_size
    )
    small = scored.rollout._replace(record=scored.rollout.behaviour_logprobs)
    total = lambda p: jnp.mean(target_fn(p, small).logprobs)
    lowered = tiny_model.jit(jax.grad(total)).lower(tiny_model.params())
    return lowered.as_text()

  assert '160x64xf32' in shapes(0)
  in_chunks = shapes(32)
  assert '32x64xf32' in in_chunks
  assert '160x64xf32' not in in_chunks and '5x32x64xf32' not in in_chunks


@pytest.mark.parametrize('chunk_size', [0, 48])
def test_no_logits_are_made_of_prompts_and_nothing_else_changes(
    scored, chunk_size
):
  divergence, length = tiny_model.topk_tv(), tiny_model.PROMPT_LENGTH
  mask = scored.rollout.token_mask
  # 16 rows of 10 predicted tokens, of which 4 belong to the prompt.
  assert mask.shape == (16, 10) and not mask[:, : length - 1].any()

  def run(prompt_length):
    target_fn = tiny_model.make_target_fn(
        divergence, temperature=0.7, chunk_size=chunk_size,
        prompt_length=prompt_length,
    )

    def total(params):
      target = target_fn(params, scored.rollout)
      values = target.logprobs + 0.1 * target.entropy
      return jnp.sum(jnp.where(mask, values, 0.0)), target

    program = tiny_model.jit(jax.grad(total, has_aux=True))
    text = program.lower(tiny_model.params()).as_text()
    return *program(tiny_model.params()), text

  (expected, whole, before), (gradient, part, after) = run(0), run(length)
  for name in ('logprobs', 'entropy', 'divergence', 'direction'):
    values, others = getattr(whole, name), getattr(part, name)
    np.testing.assert_allclose(others[mask], values[mask], rtol=0, atol=1e-5)
    assert not others[:, : length - 1].any() and others[mask].any()
  tiny_model.assert_trees_close(gradient, expected, rtol=1e-4, atol=1e-5)
  if not chunk_size:
    assert '160x64xf32' in before and '160x64xf32' not in after
    assert '96x64xf32' in after


def test_a_step_without_logits_of_prompts_learns_the_same(once, scored):
  with_prompts, _, metrics = once
  state, _, others = learn(scored, prompt_length=tiny_model.PROMPT_LENGTH)
  assert_same_params(state, with_prompts)
  for name, value in metrics.items():
    np.testing.assert_allclose(others[name], value, rtol=1e-4, atol=1e-6)


def test_the_order_of_the_rows_does_not_matter(once, scored):
  # Whole groups change places; rows of a group belong together.
  groups = np.array([2, 0, 3, 1])
  rows = (groups[:, None] * 4 + np.arange(4)).ravel()
  shuffled = jax.tree.map(lambda x: x[rows], scored)
  assert_same_params(learn(shuffled)[0], once[0])


def test_the_shuffle_of_a_single_mini_batch_does_not_matter(once, scored):
  assert_same_params(learn(scored, key=jax.random.key(8))[0], once[0])


@pytest.fixture(scope='module')
def eight_updates(scored):
  """Two epochs of four mini-batches."""
  return learn(scored, num_epochs=2, num_minibatches=4)


def test_each_epoch_uses_every_row_once_in_another_order(
    eight_updates, scored
):
  # A row is known by its first sampled log-prob.
  stats = eight_updates[1]
  assert stats.behaviour_logprobs.shape[:2] == (8, 4)
  first = tiny_model.PROMPT_LENGTH - 1
  seen = np.asarray(stats.behaviour_logprobs)[..., first].reshape(2, NUM_ROWS)
  expected = np.asarray(scored.rollout.behaviour_logprobs)[:, first]
  for epoch in seen:
    np.testing.assert_array_equal(np.sort(epoch), np.sort(expected))
  assert (seen[0] != seen[1]).any()


def test_mini_batches_are_drawn_from_the_key(eight_updates, scored):
  again, other = (
      learn(scored, key=key, num_epochs=2, num_minibatches=4)[0]
      for key in (KEY, jax.random.key(8))
  )
  tiny_model.assert_trees_equal(again.params, eight_updates[0].params)
  assert any(
      (a != b).any() for a, b in zip(
          jax.tree.leaves(again.params),
          jax.tree.leaves(other.params),
          strict=True,
      )
  )


def test_the_policy_version_counts_updates(eight_updates):
  state, _, metrics = eight_updates
  assert int(state.policy_version) == 8
  assert metrics['loss'].shape == (8,)
  # The step counts rollouts; `train_step` does that.
  assert int(state.step) == 0


# An update that is not finite.


def test_an_update_that_is_not_finite_is_skipped_and_counted(scored):
  # Warm-up over two updates: 0, 1/2 and then all of the learning rate.
  adamw = optim.build(
      'adamw', total_updates=9, learning_rate=0.01, warmup_updates=2
  )
  rates = []

  def step(state, reward):
    rewards = scored.rewards.at[3].set(reward)
    state, _, metrics = learn(
        scored._replace(rewards=rewards), state=state, optimizer=adamw
    )
    rates.append(float(metrics['optimizer/learning_rate'][0]))
    return state, {name: float(x[0]) for name, x in metrics.items()}

  before, _ = step(state_of(adamw), 1.0)
  state = before
  for in_a_row, reward in enumerate((np.nan, np.inf, -np.inf), 1):
    state, metrics = step(state, reward)
    tiny_model.assert_trees_equal(state.params, before.params)
    tiny_model.assert_trees_equal(state.opt_state, before.opt_state)
    assert int(state.policy_version) == 1
    assert int(state.nonfinite_in_a_row) == in_a_row
    assert metrics['optimizer/skipped'] == 1
    assert metrics['loss'] == metrics['optimizer/grad_norm'] == 0
  state, metrics = step(state, 1.0)
  assert int(state.nonfinite_in_a_row) == 0
  assert int(state.policy_version) == 2
  assert metrics['optimizer/skipped'] == 0
  assert moved(state) > 1e-4
  # A skipped update takes no step of the schedule.
  np.testing.assert_allclose(rates, [0, 0.005, 0.005, 0.005, 0.005])


def test_an_update_in_which_no_token_counts_moves_nothing(scored):
  adamw = optim.build('adamw', total_updates=9, learning_rate=0.01)
  state, _, _ = learn(scored, state=state_of(adamw), optimizer=adamw)
  silent = scored._replace(rollout=scored.rollout._replace(
      token_mask=jnp.zeros_like(scored.rollout.token_mask)
  ))
  state = state._replace(nonfinite_in_a_row=jnp.int32(2))
  after, _, metrics = learn(
      silent, state=state, optimizer=adamw, num_minibatches=2
  )
  tiny_model.assert_trees_equal(after.params, state.params)
  tiny_model.assert_trees_equal(after.opt_state, state.opt_state)
  assert int(after.policy_version) == 1 and int(after.nonfinite_in_a_row) == 2
  assert not metrics['optimizer/updates'].any()
  assert not metrics['optimizer/skipped'].any()


def test_what_is_averaged_over_updates_is_of_those_that_were_taken():
  metrics = {
      'loss': jnp.asarray([1.0, 3.0, 0.0]),
      'optimizer/grad_norm': jnp.asarray([2.0, 4.0, 0.0]),
      'constraint/violation': jnp.asarray([0.01, 0.03, -0.04]),
      'dual/multiplier': jnp.asarray([0.2, 0.2, 0.0]),
      'by_age/0/multiplier': jnp.asarray([0.1, 0.2, 0.3]),
      'optimizer/updates': jnp.asarray([True, True, False]),
      'optimizer/skipped': jnp.asarray([False, False, True]),
      'learner/sampled_share': jnp.asarray([0.5, 0.5, 0.2]),
  }
  got = learner.over_updates(metrics)
  assert got['loss'] == 2 and got['optimizer/grad_norm'] == 3
  assert got['optimizer/updates'] == 2 and got['optimizer/skipped'] == 1
  assert got['learner/sampled_share'] == pytest.approx(0.4)
  # What no token of an update paid is not what tokens pay.
  assert got['constraint/violation'] == pytest.approx(0.02)
  assert got['dual/multiplier'] == pytest.approx(0.2)
  assert got['by_age/0/multiplier'] == pytest.approx(0.2)  # Of the state.


# The squares of the second are infinite.
@pytest.mark.parametrize('rate', [float('inf'), 1e38])
def test_weights_that_a_finite_gradient_makes_infinite_are_not_taken(
    scored, rate
):
  adamw = optim.build('adamw', total_updates=9, learning_rate=rate)
  before = state_of(adamw)
  state, _, metrics = learn(scored, state=before, optimizer=adamw)
  tiny_model.assert_trees_equal(state.params, before.params)
  tiny_model.assert_trees_equal(state.opt_state, before.opt_state)
  assert metrics['optimizer/skipped'] == 1
  assert int(state.nonfinite_in_a_row) == 1


def test_only_the_mini_batches_with_the_bad_group_are_skipped(scored):
  # A NaN reward spoils the advantages of its group, four of the 16 rows.
  bad = scored._replace(rewards=scored.rewards.at[3].set(jnp.nan))
  state, stats, metrics = learn(bad, num_epochs=2, num_minibatches=4)
  hit = np.isnan(np.asarray(stats.advantages)).any((1, 2))
  assert 2 <= hit.sum() < 8
  np.testing.assert_array_equal(metrics['optimizer/skipped'], hit)
  assert int(state.policy_version) == 8 - hit.sum()
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_an_infinite_ratio_skips_the_update_unless_it_is_capped(scored):
  # exp(-1 - -200) is inf in float32. No trust region, so nothing masks it.
  sampled = scored.rollout.token_mask
  bad = unanchored(scored)
  bad = bad._replace(
      rollout=bad.rollout._replace(
          behaviour_logprobs=jnp.where(sampled, -200.0, 0.0)
      )
  )
  state, _, metrics = learn(bad, divergence=NONE, num_minibatches=4)
  tiny_model.assert_trees_equal(state.params, tiny_model.params())
  assert metrics['optimizer/skipped'].all()
  state, _, metrics = learn(
      bad,
      divergence=NONE,
      num_minibatches=4,
      loss_fn=losses.build('policy_gradient', ratio_cap=3.0),
  )
  assert not metrics['optimizer/skipped'].any()
  assert moved(state) > 1e-3


# Numbers of the loss.


def test_losses_of_the_mini_batches_average_to_that_of_the_rollout(scored):
  # A loss of 1 a token under token_mean: 1 for the rollout. A mini-batch has
  # more or less than a quarter of the tokens.
  ones = lambda inputs: (
      1 + 0 * inputs.logprobs,
      dict.fromkeys(
          ('surrogate', 'capped', 'gradient_weight'), inputs.logprobs
      ),
  )
  _, _, metrics = learn(scored, loss_fn=ones, num_minibatches=4)
  assert metrics['loss'].shape == (4,)
  assert np.ptp(metrics['loss']) > 0.01
  np.testing.assert_allclose(jnp.mean(metrics['loss']), 1.0, rtol=1e-5)


@pytest.mark.parametrize('name', normalizers.names())
def test_weights_add_up(name, scored):
  mask = np.asarray(scored.rollout.token_mask)
  options = {'constant': {'horizon': 6}, 'prompt_mean': {'group_size': 4}}
  normalizer = normalizers.build(name, **options.get(name, {}))
  weights = np.asarray(normalizer(jnp.asarray(mask)))
  # Means add up to 1; constant counts tokens in units of 16 rows of 6,
  # sequence_sum in units of 16 rows.
  units = {'constant': 16 * 6, 'sequence_sum': 16}
  total = mask.sum() / units.get(name, mask.sum())
  np.testing.assert_allclose(weights.sum(), total, rtol=1e-6)
  assert (weights[mask] > 0).all() and (weights[~mask] == 0).all()


def unanchored(scored):
  """For divergence none, which records nothing."""
  return scored._replace(rollout=scored.rollout._replace(record=()))


def binary(scored):
  """For divergences that record the log-prob of the sampled token."""
  record = scored.rollout.behaviour_logprobs
  return scored._replace(rollout=scored.rollout._replace(record=record))


def test_an_infinite_threshold_is_the_plain_policy_gradient(scored):
  # Four updates, so that the policies move apart.
  unbounded = divergences.build('binary_tv', threshold=float('inf'))
  actual, _, _ = learn(
      binary(scored), divergence=unbounded, num_minibatches=4
  )
  plain, stats, _ = learn(
      unanchored(scored),
      divergence=NONE,
      num_minibatches=4,
  )
  assert_same_params(actual, plain)
  mask = np.asarray(stats.token_mask)
  gap = np.asarray(stats.logprobs - stats.behaviour_logprobs)[mask]
  assert np.abs(gap).max() > 0.05


def test_a_small_threshold_masks_what_moves_out(scored):
  tight = divergences.build('binary_tv', threshold=1e-3)
  state, stats, _ = learn(binary(scored), divergence=tight, num_minibatches=4)
  masked = np.asarray(stats.token_mask & (stats.trust_region == 0))
  assert not masked[0].any() and masked[1:].any()
  log_ratio = np.asarray(stats.logprobs - stats.behaviour_logprobs)
  assert ((np.asarray(stats.advantages) * log_ratio)[masked] > 0).all()
  assert (np.asarray(stats.surrogate)[masked] == 0).all()
  assert int(state.policy_version) == 4


def test_groups_without_spread_teach_nothing(scored):
  same = scored._replace(rewards=jnp.full(NUM_ROWS, 0.7))
  state, _, metrics = learn(same)
  tiny_model.assert_trees_equal(state.params, tiny_model.params())
  np.testing.assert_array_equal(metrics['optimizer/grad_norm'], [0.0])
  assert int(state.policy_version) == 1


def test_the_better_completions_become_likelier(once, scored):
  # A tenth of the update, so that the first order decides.
  params = jax.tree.map(
      lambda new, old: old + 0.1 * (new - old),
      once[0].params, tiny_model.params(),
  )
  target_fn = tiny_model.make_target_fn(tiny_model.topk_tv())
  after = tiny_model.jit(target_fn)(params, scored.rollout).logprobs
  change = np.where(
      scored.rollout.token_mask, after - scored.rollout.behaviour_logprobs, 0
  ).sum(1)
  better = np.asarray(scored.rewards) == 1
  assert change[better].mean() > 0 > change[~better].mean()


# The dual of a constraint; a table of logits is policy enough.

RULE = duals.build('projected_ascent', limit=0.05)


@functools.cache
def constrained(num_microbatches=1):
  """(state, stats, metrics) of four updates by r2vpo, and what went in."""
  keys = jax.random.split(jax.random.key(0), 3)
  behaviour = jax.random.normal(keys[0], (16, 3, 8))
  moved = behaviour + 0.5 * jax.random.normal(keys[1], behaviour.shape)
  tokens = jax.random.categorical(keys[2], behaviour)
  rollout = table_model.make_rollout(
      NONE, behaviour=behaviour, tokens=tokens,
      token_mask=np.arange(3) < np.tile([1, 2, 3, 3], 4)[:, None],
  )
  scored = ScoredRollout(rollout, jnp.tile(jnp.asarray([1.0, 0, 0, 1]), 4))
  state = tiny_model.make_state(moved.reshape(-1, 8), dual=RULE)
  learn_fn = tiny_model.jit(tiny_model.make_learner(
      NONE, model=table_model.MODEL, loss_fn=losses.build('r2vpo'), dual=RULE,
      num_minibatches=4, num_microbatches=num_microbatches,
  ))
  return learn_fn(state, scored, KEY), learn_fn, state, scored


def after_each_update(metrics, start=0.04):
  """The multiplier by hand, from the violations; before and after updates."""
  multipliers = [start]
  for violation, skipped in zip(
      metrics['constraint/violation'], metrics['optimizer/skipped'], strict=True
  ):
    step = 0.02 * np.clip(violation / 0.05, -1, 1)
    multipliers.append(multipliers[-1] + (0 if skipped else step))
  return multipliers


def test_the_dual_takes_one_step_with_each_update():
  (state, stats, metrics), _, _, _ = constrained()
  ratio = np.exp(np.asarray(stats.logprobs - stats.behaviour_logprobs))
  mask = np.asarray(stats.token_mask)
  expected = [np.mean((r[m] - 1) ** 2) for r, m in zip(ratio, mask)]
  np.testing.assert_allclose(
      metrics['constraint/violation'], np.asarray(expected) - 0.05, rtol=1e-4,
      atol=1e-6,
  )
  *before, last = after_each_update(metrics)
  np.testing.assert_allclose(metrics['dual/multiplier'], before, rtol=1e-5)
  np.testing.assert_allclose(state.dual.multiplier, [last], rtol=1e-5)
  assert last > 0.04 and int(state.policy_version) == 4


def test_a_skipped_update_leaves_the_dual_as_it_is():
  _, learn_fn, start, scored = constrained()
  bad = scored._replace(rewards=scored.rewards.at[3].set(jnp.nan))
  state, _, metrics = learn_fn(start, bad, KEY)
  skipped = np.asarray(metrics['optimizer/skipped'])
  assert 0 < skipped.sum() < 4
  *before, last = after_each_update(metrics)
  np.testing.assert_allclose(metrics['dual/multiplier'], before, rtol=1e-5)
  np.testing.assert_allclose(state.dual.multiplier, [last], rtol=1e-5)
  worse = scored._replace(rewards=jnp.full(NUM_ROWS, jnp.nan))
  state, _, metrics = learn_fn(start, worse, KEY)
  assert metrics['optimizer/skipped'].all()
  tiny_model.assert_trees_equal(state.dual, start.dual)


def test_the_multiplier_that_is_told_is_what_the_tokens_paid():
  rule = duals.build('projected_ascent', limit=0.05, by_age=True)
  (_, stats, _), *_ = constrained()
  stats = jax.tree.map(lambda x: x[0], stats)
  state = rule.init()
  state = state._replace(multiplier=state.multiplier.at[0].set(3.0))
  young = stats._replace(age=jnp.zeros_like(stats.age))
  for those, expected in (
      (young, 3.0), (young._replace(age=young.age + 1), 0.04)
  ):
    _, metrics = learner._constrain(rule, state, those)
    np.testing.assert_allclose(metrics['dual/multiplier'], expected, rtol=1e-5)


def test_micro_batches_move_the_dual_as_the_whole_mini_batch_does():
  (state, _, metrics), *_ = constrained(num_microbatches=2)
  (whole, _, expected), *_ = constrained()
  for name in ('constraint/violation', 'dual/multiplier', 'loss'):
    np.testing.assert_allclose(
        metrics[name], expected[name], rtol=1e-4, atol=1e-6
    )
  np.testing.assert_allclose(state.params, whole.params, atol=1e-5)


def test_a_dual_for_a_loss_without_a_constraint_is_refused():
  _, _, state, scored = constrained()
  learn_fn = tiny_model.make_learner(
      NONE, model=table_model.MODEL, dual=RULE
  )
  with pytest.raises(ValueError, match='the loss has no constraint for it; use '
                     'loss r2vpo, or another that returns .* or dual none'):
    jax.eval_shape(learn_fn, state, scored, KEY)


# Parameters in bfloat16.


@pytest.mark.parametrize('parts', [
    {'num_microbatches': 16}, {'chunk_size': 1}
], ids=str)
def test_gradients_of_bfloat16_parameters_are_summed_in_float32(scored, parts):
  short = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), tiny_model.params()
  )
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), short)
  expected, _, _ = learn(
      scored, state=state_of(params=wide), optimizer=tiny_model.sgd()
  )
  optimizer = optim.with_master_weights(tiny_model.sgd())
  actual, _, _ = learn(
      scored, state=state_of(optimizer, short), optimizer=optimizer, **parts
  )
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(actual.params))

  def change(params):
    leaves = jax.tree.leaves(jax.tree.map(jnp.subtract, params, wide))
    return np.concatenate([x.ravel() for x in leaves])

  ours, theirs = change(actual.opt_state.master), change(expected.params)
  error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
  # A gradient in bfloat16 is right to 1 part in 512; with sums in
  # bfloat16, 0.005 and 0.0023 were measured.
  assert 0 < error < 0.002
