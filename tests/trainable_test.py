"""What is trained moves as it should; what is frozen does not, by a bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from dppo_jax import lora
from dppo_jax import objective
from dppo_jax import optim
from dppo_jax import sharding
from dppo_jax import train_step
from dppo_jax import trainable as trainable_lib
from dppo_jax.models import weights
from dppo_jax.types import ScoredRollout

RANK, ALPHA = 3, 6.0
SCALE = ALPHA / RANK
TARGETS = ('q', 'down')
RATE = 0.5
flatten = weights.flatten


def make_trainable(**options):
  return trainable_lib.make_trainable(tiny_model.params(), **options)


def with_adapters(**options):
  return make_trainable(
      **{'rank': RANK, 'alpha': ALPHA, 'targets': TARGETS, **options}
  )


@functools.cache
def scored():
  return tiny_model.make_scored(tiny_model.topk_tv())


def one_step(trainable, params, frozen=(), *, optimizer=None, **options):
  """The state after one update of SGD on `scored`."""
  optimizer = optimizer or tiny_model.sgd(RATE)
  learn = tiny_model.make_learner(
      tiny_model.topk_tv(),
      trainable=trainable,
      optimizer=optimizer,
      **options,
  )
  state = train_step.init_state(
      params, optimizer, jax.random.key(0), frozen=frozen
  )
  state, _, metrics = tiny_model.jit(learn)(
      state, scored(), jax.random.key(1)
  )
  assert metrics['optimizer/skipped'].sum() == 0
  return state, metrics


def test_adapters_learn_the_same_in_chunks_of_a_head_that_is_fixed():
  trainable = with_adapters()
  params, frozen = trainable.split(tiny_model.params(), jax.random.key(2))
  # As new, half of an adapter is 0 and the other half has no gradient.
  params = jax.tree.map(lambda x: x + 0.1, params)
  whole, _ = one_step(trainable, params, frozen)
  chunks, _ = one_step(trainable, params, frozen, chunk_size=7)
  moved = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), whole.params, params)
  assert min(jax.tree.leaves(moved)) > 1e-4
  tiny_model.assert_trees_close(
      chunks.params, whole.params, rtol=0, atol=1e-6
  )



@functools.cache
def full_gradients():
  """Path -> gradient of the loss with respect to everything."""
  before = tiny_model.params()
  after, _ = one_step(trainable_lib.EVERYTHING, before)
  return flatten(
      jax.tree.map(lambda x, y: (x - y) / RATE, before, after.params)
  )


# LoRA.


def test_one_step_of_adapters_is_the_full_step_within_their_subspace():
  # b = 0, so only b moves: by -rate * scale * a^T G, where G is the gradient
  # of the whole kernel. So the kernel moves by -rate * scale^2 * (a a^T) G.
  trainable = with_adapters()
  params, frozen = trainable.split(tiny_model.params(), jax.random.key(2))
  state, _ = one_step(trainable, params, frozen)
  before = flatten(tiny_model.params())
  after = flatten(trainable.merge(state.params, state.frozen))
  for name in ('attention/q', 'mlp/down'):
    path = f'layers/{name}/kernel'
    a = np.asarray(flatten(params)[f'{path}/a'])
    gradient = np.asarray(full_gradients()[path])
    expected = -RATE * SCALE**2 * a @ a.swapaxes(1, 2) @ gradient
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(
        after[path] - before[path], expected, rtol=0, atol=2e-6
    )
    np.testing.assert_array_equal(flatten(state.params)[f'{path}/a'], a)


def test_a_step_later_both_factors_move_by_the_chain_rule():
  # a by -rate * scale * G b^T, b by -rate * scale * a^T G.
  trainable = with_adapters()
  adapters, frozen = trainable.split(tiny_model.params(), jax.random.key(2))
  params = jax.tree.map(lambda x: x + 0.01, adapters)
  merged = trainable.merge(params, frozen)
  full, _ = one_step(trainable_lib.EVERYTHING, merged)
  state, _ = one_step(trainable, params, frozen)
  before, after = flatten(params), flatten(state.params)
  for name in ('attention/q', 'mlp/down'):
    path = f'layers/{name}/kernel'
    change = flatten(full.params)[path] - flatten(merged)[path]
    a, b = before[f'{path}/a'], before[f'{path}/b']
    for which, expected in (
        ('a', SCALE * change @ b.swapaxes(1, 2)),
        ('b', SCALE * a.swapaxes(1, 2) @ change),
    ):
      assert jnp.abs(expected).max() > 1e-4
      np.testing.assert_allclose(
          after[f'{path}/{which}'] - before[f'{path}/{which}'],
          expected, rtol=0, atol=2e-6,
      )


def test_the_base_keeps_every_bit_and_has_no_optimizer_state():
  trainable = with_adapters()
  params, frozen = trainable.split(tiny_model.params(), jax.random.key(2))
  optimizer = optim.build('adamw', total_updates=1, learning_rate=0.1)
  state, _ = one_step(trainable, params, frozen, optimizer=optimizer)
  tiny_model.assert_trees_equal(state.frozen['base'], tiny_model.params())
  moments = state.opt_state[1][0]
  for moment in (moments.mu, moments.nu):
    assert jax.tree.structure(moment) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, moment) == jax.tree.map(jnp.shape, params)
  assert max(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * 48 * RANK


def test_the_reference_policy_is_the_base_without_a_copy():
  # Adapters that have moved are away from the reference by the KL of the two.
  trainable = with_adapters()
  adapters, frozen = trainable.split(tiny_model.params(), jax.random.key(2))
  assert trainable.start((), frozen) is frozen['base']
  moved = jax.tree.map(lambda x: x + 0.05, adapters)
  losses = {}
  for name, params in (('start', adapters), ('moved', moved)):
    for coefficient in (0.0, 1.0):
      extras = objective.Extras(kl_coefficient=coefficient, kl_estimator='full')
      _, metrics = one_step(trainable, params, frozen, extras=extras)
      losses[name, coefficient] = float(metrics['loss'][0])
  assert losses['start', 1.0] == pytest.approx(losses['start', 0.0], abs=1e-6)
  assert losses['moved', 1.0] > losses['moved', 0.0] + 1e-2


# Rules.


def test_what_has_factor_0_keeps_every_bit_and_has_no_optimizer_state():
  trainable = make_trainable(rules=(('embed|scale', 0.0), ('/q/', 0.0)))
  params, frozen = trainable.split(tiny_model.params(), jax.random.key(2))
  optimizer = optim.build('adamw', total_updates=1, learning_rate=0.1)
  state, _ = one_step(trainable, params, frozen, optimizer=optimizer)
  assert jax.tree.structure(state.opt_state[1][0].mu) == jax.tree.structure(
      params
  )
  before = flatten(tiny_model.params())
  after = flatten(trainable.join(state.params, state.frozen))
  assert before.keys() == after.keys()
  for path, x in after.items():
    is_frozen = 'embed' in path or 'scale' in path or '/q/' in path
    assert is_frozen == np.array_equal(x, before[path]), path
    assert is_frozen == (path not in flatten(state.params))


def test_each_layer_moves_by_its_own_factor():
  rules = (('layers/1/.*kernel', 0.25), ('layers', 0.0), ('', 2.0))
  trainable = make_trainable(rules=rules)
  params, frozen = trainable.split(tiny_model.params(), jax.random.key(2))
  # Of the two layers, one is trained and one is frozen.
  assert params['layers']['mlp']['up']['kernel'].shape == (1, 32, 48)
  assert frozen['layers']['mlp']['up']['kernel'].shape == (1, 32, 48)
  assert 'norm_mlp' not in params['layers']
  optimizer = optim.scaled(tiny_model.sgd(RATE), trainable.factors)
  state, _ = one_step(trainable, params, frozen, optimizer=optimizer)
  before = flatten(tiny_model.params())
  after = flatten(trainable.join(state.params, state.frozen))
  for path, gradient in full_gradients().items():
    change = after[path] - before[path]
    factor = np.float32(2.0)
    if path.startswith('layers'):
      factor = np.asarray([0.0, 0.25 if 'kernel' in path else 0.0], np.float32)
      factor = factor.reshape((2,) + (1,) * (gradient.ndim - 1))
      np.testing.assert_array_equal(change[0], 0.0)
    np.testing.assert_allclose(
        change, -RATE * factor * gradient, rtol=0, atol=2e-6, err_msg=path
    )


@pytest.mark.parametrize('frozen_layers', ['0', '1', '[02]', '[13]', '0|3'])
def test_splitting_and_joining_gives_back_every_bit(frozen_layers):
  tree = {
      'embed': {'embedding': jnp.arange(6.0).reshape(3, 2)},
      'layers': {'up': {'kernel': jnp.arange(24.0).reshape(4, 3, 2)}},
  }
  rules = ((f'layers/({frozen_layers})/', 0.0),)
  trainable = trainable_lib.make_trainable(tree, rules=rules)
  params, frozen = trainable.split(tree, jax.random.key(0))
  sizes = [x['layers']['up']['kernel'].shape[0] for x in (params, frozen)]
  assert sum(sizes) == 4 and min(sizes) > 0
  tiny_model.assert_trees_equal(trainable.join(params, frozen), tree)


def test_rules_apply_to_adapters():
  # The factor of b is another than that of a, and layer 0 has none to train.
  rules = (('layers/0/', 0.0), ('/b$', 16.0))
  trainable = with_adapters(rules=rules)
  params, frozen = trainable.split(tiny_model.params(), jax.random.key(2))
  assert {x.shape[0] for x in jax.tree.leaves(params)} == {1}
  factors = flatten(trainable.factors)
  assert {float(x.squeeze()) for x in factors.values()} == {1.0, 16.0}
  state, _ = one_step(trainable, params, frozen)
  merged = flatten(trainable.merge(state.params, state.frozen))
  adapters = flatten(trainable.adapters(state.params, state.frozen))
  path = 'layers/mlp/down/kernel'
  assert adapters[f'{path}/b'].shape == (2, RANK, 32)
  before = flatten(tiny_model.params())[path]
  np.testing.assert_array_equal(merged[path][0], before[0])
  assert jnp.any(merged[path][1] != before[1])


def test_rules_of_no_use_are_named():
  with pytest.raises(ValueError, match="'layrs/'.*'embed/embedding'.*layers/"):
    make_trainable(rules=(('layrs/', 0.0),))
  # A rule that one before it makes useless is a mistake too.
  with pytest.raises(ValueError, match="'embed'.*left over"):
    make_trainable(rules=(('', 1.0), ('embed', 0.0)))
  with pytest.raises(ValueError, match='freezes every parameter'):
    make_trainable(rules=(('', 0.0),))


# In the compiled step.


@pytest.mark.parametrize('kind', ['adapters', 'layers'])
def test_a_step_moves_what_is_trained_and_samples_from_what_it_makes(kind):
  trainable = (
      with_adapters(targets=lora.TARGETS)
      if kind == 'adapters'
      else make_trainable(rules=(('layers/0', 0.0),))
  )
  params, frozen = trainable.split(
      jax.tree.map(jnp.copy, tiny_model.params()), jax.random.key(2)
  )
  divergence = tiny_model.topk_tv()
  optimizer = optim.build('adamw', total_updates=20, learning_rate=0.05)
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, expert=1)
  state = train_step.init_state(
      params, optimizer, jax.random.key(0), frozen=frozen
  )
  expected_frozen = jax.tree.map(np.array, frozen)
  shardings = train_step.state_shardings(state, mesh)
  rollout_fn = tiny_model.make_rollout_fn(divergence)
  with tiny_model.quick_compilation():
    step = train_step.make_train_step(
        learn=tiny_model.make_learner(
            divergence, optimizer=optimizer, trainable=trainable
        ),
        rollout_fn=rollout_fn,
        threshold=divergence.threshold,
        group_size=tiny_model.GROUP_SIZE,
        vocab_size=tiny_model.CONFIG.vocab_size,
        state_shardings=shardings,
        mesh=mesh,
        trainable=trainable,
    )
    pending = train_step.blank(
        rollout_fn, state, tiny_model.prompts(), trainable
    )
    state = jax.device_put(state, shardings)
    pending = jax.device_put(pending, sharding.batch(mesh))
    for _ in range(3):
      state, rollout, metrics = step(state, pending, tiny_model.prompts())
      rewards = (rollout.tokens[:, tiny_model.PROMPT_LENGTH] % 2).astype('f4')
      pending = ScoredRollout(
          rollout, jax.device_put(rewards, sharding.batch(mesh))
      )
  assert step._cache_size() == 1
  assert state.policy_version == 2
  tiny_model.assert_trees_equal(
      jax.tree.map(np.asarray, state.frozen), expected_frozen
  )
  # What the step sampled has the probabilities of the merged policy, and the
  # learner's policy gave the same: the ratio is 1 before the first update.
  assert metrics['on_policy/log_ratio_max'] < 1e-5
  policy = trainable.merge(state.params, state.frozen)
  stats = tiny_model.jit(tiny_model.make_target_fn(divergence))(policy, rollout)
  np.testing.assert_allclose(
      np.where(rollout.token_mask, stats.logprobs, 0.0),
      rollout.behaviour_logprobs, rtol=0, atol=1e-5,
  )
  start = jax.tree.leaves(tiny_model.params())
  assert any(
      jnp.any(x != y) for x, y in zip(jax.tree.leaves(policy), start)
  )


def test_adapters_lie_where_their_kernels_do():
  # Shapes only, as on a pod: no device is touched.
  devices = jax.sharding.AbstractMesh((2, 2, 2, 1, 1), sharding.AXES)
  trainable = with_adapters(targets=lora.TARGETS)

  def make():
    params, frozen = trainable.split(tiny_model.params(), jax.random.key(0))
    optimizer = optim.build('adamw', total_updates=1)
    return train_step.init_state(
        params, optimizer, jax.random.key(0), frozen=frozen
    )

  shardings = train_step.state_shardings(jax.eval_shape(make), devices)
  specs = {
      path: x.spec for path, x in flatten(shardings.params).items()
  }
  kernels = flatten(sharding.of_params(tiny_model.params(), devices))
  assert len(specs) == 2 * len(lora.TARGETS)
  for path, spec in specs.items():
    kernel, which = path.rsplit('/', 1)
    _, inputs, outputs = kernels[kernel].spec
    assert spec == jax.P(None, *(
        (inputs, None) if which == 'a' else (None, outputs)
    ))
  moments = flatten(shardings.opt_state[1][0].mu)
  assert {path: x.spec for path, x in moments.items()} == specs


def test_a_fingerprint_sees_every_bit():
  tree = {'a': jnp.arange(5.0), 'b': jnp.ones((2, 2), jnp.bfloat16)}
  first = trainable_lib.fingerprint(tree)
  assert first == trainable_lib.fingerprint(jax.tree.map(jnp.copy, tree))
  changed = tree | {'a': tree['a'].at[3].set(np.nextafter(3, 4, dtype='f4'))}
  assert trainable_lib.fingerprint(changed) != first
  assert trainable_lib.fingerprint(()) == trainable_lib.fingerprint({})
