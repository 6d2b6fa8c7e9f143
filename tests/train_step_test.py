"""One compiled step: learn from the last rollout, then sample the next."""

import functools
import itertools
import json
import logging
import re

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
import tiny_model

from dppo_jax import optim
from dppo_jax import sharding
from dppo_jax import train_step
from dppo_jax.types import ScoredRollout

# What report.html plots.
REPORTED = (
    'completion/length_mean',
    'divergence/max',
    'divergence/mean',
    'entropy/mean',
    'loss',
    'mask/negative',
    'mask/positive',
    'mismatch/prob_gap_mean',
    'optimizer/grad_norm',
    'reward/mean',
    'sample/decode_steps',
    'tokens/sampled',
)


class Parts:
  """A step of the tiny model and what it starts from."""

  def __init__(self):
    divergence = tiny_model.topk_tv()
    optimizer = optim.build('adamw', total_updates=20, learning_rate=0.01)
    self.mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, expert=1)
    self.rollout_fn = tiny_model.make_rollout_fn(divergence)
    self.make_state = lambda: train_step.init_state(
        # Copied: the step gives its state's memory away.
        jax.tree.map(jnp.copy, tiny_model.params()),
        optimizer,
        jax.random.key(0),
    )
    self.shardings = train_step.state_shardings(self.make_state(), self.mesh)
    self.step = train_step.make_train_step(
        learn=tiny_model.make_learner(
            divergence, optimizer=optimizer, num_minibatches=2
        ),
        rollout_fn=self.rollout_fn,
        threshold=divergence.threshold,
        group_size=tiny_model.GROUP_SIZE,
        vocab_size=tiny_model.CONFIG.vocab_size,
        state_shardings=self.shardings,
        mesh=self.mesh,
    )
    self.prompts = tiny_model.prompts()

  def start(self):
    """A state, and a rollout in which nothing was sampled."""
    state = jax.device_put(self.make_state(), self.shardings)
    blank = train_step.blank(self.rollout_fn, state, self.prompts)
    return state, jax.device_put(blank, sharding.batch(self.mesh))

  def score(self, rollout):
    """Reward 1 for an even first token."""
    first = rollout.tokens[:, tiny_model.PROMPT_LENGTH]
    rewards = np.asarray(first % 2 == 0, np.float32)
    return ScoredRollout(
        rollout, jax.device_put(rewards, sharding.batch(self.mesh))
    )

  def run(self, num_steps):
    """A blank call, then `num_steps` that learn; all that was returned."""
    state, pending = self.start()
    outputs = []
    for i in range(1 + num_steps):
      prompts = tiny_model.prompts(seed=i)
      state, rollout, metrics = self.step(state, pending, prompts)
      pending = self.score(rollout)
      outputs.append((jax.device_get(rollout), jax.device_get(metrics)))
    return state, outputs


@pytest.fixture(scope='module')
def parts():
  with tiny_model.quick_compilation():
    parts = Parts()
    with jax.log_compiles(), _Compilations() as parts.compilations:
      # As `training.warm_up`, which wants to know what the program needs.
      state, blank = parts.start()
      parts.step.lower(state, blank, parts.prompts).compile()
      parts.run(0)
  return parts


class _Compilations(logging.Handler):
  """Names of the functions that XLA compiles, while it is entered."""

  def __init__(self):
    super().__init__()
    self.names = []

  def emit(self, record):
    found = re.search(r'XLA compilation of jit\((\w+)\)', record.getMessage())
    if found:
      self.names.append(found[1])

  def __enter__(self):
    logging.getLogger('jax').addHandler(self)
    return self

  def __exit__(self, *exception):
    logging.getLogger('jax').removeHandler(self)


@pytest.fixture(scope='module')
def three_steps(parts):
  return parts.run(3)


def test_compiling_ahead_of_time_is_the_only_compilation(parts):
  assert parts.compilations.names.count('train_step') == 1


def test_compiles_exactly_once(parts, three_steps):
  # Blank and learning calls, fresh and returned states, host and device arrays.
  assert parts.step._cache_size() == 1
  parts.run(1)
  assert parts.step._cache_size() == 1


def test_a_blank_call_leaves_the_state_and_samples_the_same_twice(parts):
  state, blank = parts.start()
  before = parts.make_state()
  state, first, metrics = parts.step(state, blank, parts.prompts)
  tiny_model.assert_trees_equal(state, before)
  state, second, _ = parts.step(state, blank, parts.prompts)
  tiny_model.assert_trees_equal(state, before)
  tiny_model.assert_trees_equal(second, first)
  assert first.token_mask.any()
  assert metrics['loss'] == metrics['tokens/sampled'] == 0
  assert metrics['sample/decode_steps'] > 0


def test_the_state_is_donated(parts):
  state, blank = parts.start()
  old = jax.tree.leaves((state.params, state.opt_state, state.step))
  parts.step(state, blank, parts.prompts)
  assert all(x.is_deleted() for x in old)


def test_the_rollout_learned_from_is_not_donated(parts):
  # It waits for a checkpoint on the host's side.
  state, blank = parts.start()
  parts.step(state, blank, parts.prompts)
  assert not any(x.is_deleted() for x in jax.tree.leaves(blank))


def test_the_same_start_gives_the_same_bits(parts, three_steps):
  state, outputs = parts.run(3)
  tiny_model.assert_trees_equal(state, three_steps[0])
  tiny_model.assert_trees_equal(outputs, three_steps[1])


def test_counts_steps_and_updates(three_steps):
  state, outputs = three_steps
  # Three rollouts learned from, two mini-batches each; the blank one is none.
  assert int(state.step) == 3
  assert int(state.policy_version) == 6
  # Sampled with the weights after 0, 2, 4 and 6 updates.
  versions = [int(rollout.policy_version[0]) for rollout, _ in outputs]
  assert versions == [0, 2, 4, 6]
  assert [int(m['policy/version']) for _, m in outputs] == [0, 2, 4, 6]
  # Each rollout is learned from with the weights that sampled it.
  assert [int(m['policy/age_max']) for _, m in outputs] == [0, 0, 0, 0]


def test_every_step_samples_with_a_key_of_its_own(three_steps):
  first = tiny_model.PROMPT_LENGTH
  tokens = [rollout.tokens[:, first:] for rollout, _ in three_steps[1]]
  for a, b in itertools.pairwise(tokens):
    assert (a != b).any()


def test_the_first_update_of_every_step_is_on_policy(three_steps):
  for _, metrics in three_steps[1][1:]:
    assert metrics['on_policy/log_ratio_max'] < 1e-5
    assert metrics['on_policy/divergence_max'] < 1e-5
    # The second update of a step is not.
    assert metrics['divergence/max'] > 1e-3


def test_metrics_are_finite_scalars_and_hold_what_is_reported(three_steps):
  _, outputs = three_steps
  for _, metrics in outputs:
    assert set(REPORTED) <= set(metrics)
    counts = metrics.pop('masked_tokens')
    assert counts.shape == (2, tiny_model.CONFIG.vocab_size)
    points = metrics.pop('scatter')
    assert points.shape == (512, 4) and np.isfinite(points).all()
    for name, value in metrics.items():
      assert np.shape(value) == () and np.isfinite(value), name
    metrics['masked_tokens'] = counts


def test_metrics_are_those_of_the_rollout_learned_from(parts, three_steps):
  # The metrics of call i + 1 are about the rollout of call i.
  _, outputs = three_steps
  for (rollout, _), (_, metrics) in itertools.pairwise(outputs):
    lengths = rollout.token_mask.sum(1)
    np.testing.assert_allclose(
        metrics['completion/length_mean'], lengths.mean(), rtol=1e-6
    )
    assert metrics['tokens/sampled'] == lengths.sum()
    rewards = np.asarray(parts.score(rollout).rewards)
    np.testing.assert_allclose(metrics['reward/mean'], rewards.mean())


def test_parameters_and_moments_are_split_alike():
  # Shapes only, as on a pod: no device is touched.
  devices = jax.sharding.AbstractMesh(
      (2, 2, 2, 1, 1), sharding.AXES,
  )
  optimizer = optim.build('adamw', total_updates=1)
  make = lambda: train_step.init_state(
      tiny_model.MODEL.init(jax.random.key(0)), optimizer, jax.random.key(0)
  )
  shardings = train_step.state_shardings(jax.eval_shape(make), devices)
  specs = jax.tree.map(lambda x: x.spec, shardings.params)
  moments = shardings.opt_state[1][0]
  for moment in (moments.mu, moments.nu):
    assert jax.tree.map(lambda x: x.spec, moment) == specs
  P = jax.sharding.PartitionSpec
  assert specs['embed']['embedding'] == P('tensor', 'fsdp')
  layer = specs['layers']
  assert layer['attention']['q']['kernel'] == P(None, 'fsdp', 'tensor')
  assert layer['mlp']['down']['kernel'] == P(None, 'tensor', 'fsdp')
  assert layer['norm_mlp']['scale'] == P()
  assert shardings.key.spec == shardings.step.spec == P()


def test_an_axis_that_does_not_divide_is_not_split():
  mesh = jax.sharding.AbstractMesh((1, 3, 4, 1, 1), sharding.AXES)
  tree = {'embed': {'embedding': jax.ShapeDtypeStruct((64, 32), 'float32')}}
  spec = sharding.of_params(tree, mesh)['embed']['embedding'].spec
  # 64 tokens over 4, 32 numbers not over 3.
  assert spec == jax.sharding.PartitionSpec('tensor', None)


def test_what_is_not_split_is_named():
  mesh = jax.sharding.AbstractMesh((1, 3, 4, 1, 1), sharding.AXES)
  tree = {'embed': {'embedding': jax.ShapeDtypeStruct((64, 32), 'float32')}}
  assert sharding.undivided(tree, mesh) == [
      'embed/embedding: 32 over fsdp=3'
  ]


@pytest.mark.parametrize('own, sizes', [
    ({}, (2, 2, 2, 1, 1)),
    ({'tensor': 4}, (2, 1, 4, 1, 1)),
    ({'tensor': 1, 'expert': 8}, (1, 1, 1, 8, 1)),
])
def test_the_sampler_takes_the_rest_of_the_devices_for_rows(own, sizes):
  mesh = jax.sharding.AbstractMesh((2, 2, 2, 1, 1), sharding.AXES)
  found = sharding.sampling_mesh(mesh, **{'tensor': 0, 'expert': 0} | own)
  assert tuple(found.shape[axis] for axis in sharding.AXES) == sizes
  assert (found is mesh) == (not own)


@pytest.mark.parametrize('tensor', [3, 16, -1])
def test_a_sampler_that_does_not_divide_the_devices_is_refused(tensor):
  mesh = jax.sharding.AbstractMesh((2, 2, 2, 1, 1), sharding.AXES)
  with pytest.raises(ValueError, match=f'sampling.mesh.*{tensor}.*8 devices'):
    sharding.sampling_mesh(mesh, tensor=tensor, expert=1)


@pytest.mark.parametrize('sizes', [
    {'data': 2, 'fsdp': 1}, {'data': -1, 'fsdp': 3}, {'data': -1, 'fsdp': -1},
    {'data': 0, 'fsdp': 1},
])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
  count = jax.device_count()
  if sizes == {'data': count, 'fsdp': 1}:
    pytest.skip('It does fit this machine.')
  with pytest.raises(ValueError, match=f'{count} devices.*-1 for the rest'):
    sharding.make_mesh(**sizes, tensor=1, expert=1)


# The real program on several devices, in processes of their own.

ONE_STEP = """
    import json, sys
    import jax, numpy as np
    from dppo_jax import main
    from dppo_jax import training
    from dppo_jax.models import weights
    from experiments.small import config as small

    config = small.get_config('dppo_topk_tv')
    config.num_prompts, config.group_size = 8, 4
    config.eval.num_prompts, config.eval.num_samples = 6, 2
    config.learner.num_minibatches = 2
    config.replay.capacity = 2
    config.mesh.update(json.loads(sys.argv[1]))
    config.lora.rank = int(sys.argv[2])
    config.sampling.num_slots = int(sys.argv[3])
    config.sampling.mesh.tensor = int(sys.argv[4])
    reader, parts_read = weights._reader, []
    def spied(parameter, *rest):
      read = reader(parameter, *rest)
      def spy(index):
        part = read(index)
        if parameter.path == 'layers/mlp/up/kernel':
          parts_read.append(list(part.shape))
        return part
      return spy
    weights._reader = spied
    parts = main.build(config)
    state, pending = parts.state, training.blank_rollout(parts)
    evaluated, samples = parts.evaluate_fn(training.policy(parts, state))
    for call in range(3):
      batch = next(parts.prompts)
      state, rollout, latest = parts.train_step(state, pending, batch.prompts)
      pending, _ = training.score(parts, rollout, batch)
      if call == 0:
        tokens = rollout.tokens
      if call == 1:
        metrics = latest
        # On several devices the third call dispatches by an entry of its own;
        # XLA compiles nothing for it.
        compilations = parts.train_step._cache_size()
    metrics.pop('masked_tokens')
    metrics.pop('scatter')
    held = state.replay.scored.rollout.tokens
    used = {d for x in jax.tree.leaves(state.params)
            for d in x.sharding.device_set}
    kernel = state.params['layers']['mlp']['up']['kernel']
    kernel = kernel['a'] if config.lora.rank else kernel
    print(json.dumps({
        'devices': len(used),
        'kernel': list(kernel.addressable_shards[0].data.shape),
        'parts_read': parts_read,
        'compilations': compilations,
        'tokens': np.asarray(tokens).tolist(),
        'evaluated': evaluated,
        'evaluated_texts': samples['completions'],
        'metrics': {k: float(v) for k, v in metrics.items()},
        'held': np.asarray(held[0]).tolist(),
        'held_shard': list(held.addressable_shards[0].data.shape),
        'replayed': [int(latest['replay/' + k])
                     for k in ('groups', 'tokens', 'slots_filled')],
    }))
"""


def run_on(num_devices, mesh, rank=0, num_slots=0, own_tensor=0):
  printed = many_devices.run(
      ONE_STEP, json.dumps(mesh), rank, num_slots, own_tensor,
      num_devices=num_devices, optimized=False,
  )
  return json.loads(printed[-1])


@functools.cache
def one_device(rank):
  return run_on(1, {}, rank)


@pytest.mark.several_devices
@pytest.mark.slow
@pytest.mark.parametrize('mesh, rank, num_slots, own_tensor, kernel', [
    # Stacked kernels of 2 layers, 64 to 192; fsdp splits the 64.
    ({'data': 8}, 0, 0, 0, [2, 64, 192]),
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 0, 12, 0, [2, 32, 96]),
    # Of an adapter from 64 to a rank of 4, fsdp splits the 64. The sampler
    # and the evaluation have whole heads.
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 4, 0, 1, [2, 32, 4]),
], ids=['data', 'all', 'adapters'])
def test_eight_devices_compute_what_one_does(
    mesh, rank, num_slots, own_tensor, kernel
):
  expected = one_device(rank)
  actual = run_on(8, mesh, rank, num_slots, own_tensor)
  assert (expected['devices'], actual['devices']) == (1, 8)
  assert actual['kernel'] == kernel
  # No device's part, much less the whole, is ever read for another.
  part = [2, 64 // mesh.get('fsdp', 1), 192 // mesh.get('tensor', 1)]
  assert actual['parts_read'] and all(x == part for x in actual['parts_read'])
  assert expected['compilations'] == actual['compilations'] == 1
  assert actual['tokens'] == expected['tokens']
  # Six prompts: some of them twice on eight devices, and counted once.
  assert len(actual['evaluated_texts']) == 6 * 2
  for name in ('evaluated', 'evaluated_texts'):
    assert actual[name] == expected[name]
  # What the second update learned from again lies where rollouts do.
  assert actual['held'] == expected['held'] == expected['tokens']
  slots, batch, length = expected['held_shard']
  split = mesh['data'] * mesh.get('fsdp', 1)
  assert actual['held_shard'] == [slots, batch // split, length]
  assert actual['replayed'] == expected['replayed']
  assert actual['replayed'][0] > 0
  assert actual['metrics'].keys() == expected['metrics'].keys()
  steps = expected['metrics']['sample/decode_steps']
  assert (actual['metrics']['sample/decode_steps'] > steps) == (num_slots > 0)
  for name, value in expected['metrics'].items():
    # The first is rounding itself.
    if not name.startswith(('on_policy/', 'sample/decode_steps')):
      np.testing.assert_allclose(
          actual['metrics'][name], value, rtol=1e-4, atol=2e-6, err_msg=name
      )
  assert actual['metrics']['on_policy/log_ratio_max'] < 1e-5
