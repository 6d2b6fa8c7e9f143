"""An update takes the products of its forward pass from the sampler.

N prompts, B completions, T slots of a row, L layers, E entries, F features.
"""

import functools

from golden import make_family_logits as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import whole_step

from configs import default
from dppo_jax import checks
from dppo_jax import decoding
from dppo_jax import fitting
from dppo_jax import lora
from dppo_jax import operations
from dppo_jax import plan
from dppo_jax import program as program_lib
from dppo_jax import rollout as rollout_lib
from dppo_jax.models import attention
from dppo_jax.models import load
from dppo_jax.models import packed_attention

MODEL = tiny_model.MODEL
ONCE = {'learner__num_minibatches': 1}
SIZES = {
    'num_prompts': tiny_model.NUM_PROMPTS,
    'prompt_length': tiny_model.PROMPT_LENGTH,
    'batch': tiny_model.NUM_PROMPTS * tiny_model.GROUP_SIZE,
    'length': tiny_model.COMPLETION_LENGTH,
}
SLOTS = [(0, 0), (5, 0), (8, 0), (8, 2)]  # 5 do not divide 16 completions.


@functools.cache
def trajectory(**options):
  if 'model__router_replay' in options:
    model = tiny_model.WITH_EXPERTS
    params = tiny_model.jit(model.init)(jax.random.key(0))
  else:
    model, params = MODEL, tiny_model.params()
  return whole_step.three_steps(model, params, **ONCE | options)


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    {},
    {'sampling__num_stages': 3},
    {'sampling__num_slots': 8, 'sampling__num_halvings': 2},
    {'sampling__num_slots': 8, 'sampling__num_halvings': 1,
     'sampling__halving_steps': 2,
     'learner__row_length': 32, 'learner__num_microbatches': 4,
     'learner__num_halvings': 2, 'learner__halving_steps': 4},
    {'learner__share_prompts': True, 'learner__num_microbatches': 2},
    {'learner__row_length': 32, 'learner__num_microbatches': 4,
     'learner__num_halvings': 1},
    {'model__remat': 'full'},
    {'lora__rank': 2},
    {'num_groups': 2, 'anchor': 'recomputed'},
    {'extras__kl_coefficient': 0.1, 'extras__kl_estimator': 'full'},
    {'model__router_replay': True},
], ids=str)
def test_steps_are_those_of_a_new_forward_pass(options):
  anew = trajectory(**options)
  reused = trajectory(learner__reuse_forward=True, **options)
  assert reused['tokens'] == anew['tokens']
  np.testing.assert_allclose(
      reused['parameters'], anew['parameters'], rtol=1e-5
  )
  for ours, theirs in zip(reused['metrics'], anew['metrics'], strict=True):
    assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5)
    # Only attention and the head differ between the two passes, but for four
    # units in the last place of a log-prob near 4.
    largest = 'on_policy/log_ratio_max'
    assert ours[largest] <= theirs[largest] + 2e-6


@pytest.mark.parametrize('num_slots, num_halvings', SLOTS)
def test_products_stand_where_entries_say(num_slots, num_halvings):
  params, prompts = tiny_model.params(), tiny_model.prompts()
  sampler = tiny_model.make_sampler(
      num_slots=num_slots, num_halvings=num_halvings
  )
  roll_out = tiny_model.jit(rollout_lib.make_rollout_fn(
      sampler, group_size=tiny_model.GROUP_SIZE
  ))
  arguments = params, prompts, jax.random.key(3), jnp.int32(0)
  buffer = MODEL.empty_products(
      decoding.num_entries(num_slots=num_slots, **SIZES)
  )
  rollout, aux = roll_out(*arguments, buffer)
  without, _ = roll_out(*arguments)
  tiny_model.assert_trees_equal(rollout._replace(entries=()), without)
  _, kept = tiny_model.jit(
      functools.partial(MODEL.trunk, keep_products=True)
  )(
      params,
      rollout.tokens[:, :-1],
      positions=rollout.positions[:, :-1],
      segment_ids=rollout.segment_ids[:, :-1],
  )
  found = tiny_model.all_products(aux.products, rollout.entries)
  # Of tokens that an update reads, the last of a completion is none.
  reads = rollout.segment_ids[:, 1:] > 0
  assert 0.3 < reads.mean() < 0.95
  assert found.keys() == {'q', 'k', 'v', 'o', 'gate', 'up', 'down'}
  for name, values in found.items():
    np.testing.assert_allclose(
        values[:, reads], kept.products[name][:, reads], atol=2e-5,
        err_msg=name,
    )


@pytest.mark.parametrize('num_slots', [1, 3, 5, 16])
def test_there_is_room_for_the_longest_rollout(num_slots):
  sampler = tiny_model.make_sampler(num_slots=num_slots, eos_ids=(64,))
  keys = jax.random.split(jax.random.key(0), SIZES['batch'])
  count = decoding.num_entries(num_slots=num_slots, **SIZES)
  drawn = tiny_model.jit(sampler)(
      tiny_model.params(), tiny_model.prompts(), keys,
      MODEL.empty_products(count),
  )
  assert drawn.mask.all()
  _, of_completions = drawn.entries
  assert len(np.unique(of_completions)) == of_completions.size
  assert count - num_slots <= of_completions.max() < count


@pytest.mark.parametrize('num_slots', [0, 5])
def test_completions_of_one_token_are_read_by_nobody(num_slots):
  sampler = tiny_model.make_sampler(
      num_slots=num_slots, max_completion_length=1
  )
  keys = jax.random.split(jax.random.key(0), SIZES['batch'])
  count = decoding.num_entries(num_slots=num_slots, **SIZES | {'length': 1})
  drawn = tiny_model.jit(sampler)(
      tiny_model.params(), tiny_model.prompts(), keys,
      MODEL.empty_products(count),
  )
  assert drawn.tokens.shape == (SIZES['batch'], 1) and drawn.mask.all()
  of_prompts, of_completions = drawn.entries
  assert np.array_equal(of_prompts.ravel(), np.arange(count))
  assert of_completions.shape == (SIZES['batch'], 0)


@pytest.mark.parametrize('name', golden.CASES)
def test_gradients_of_every_family_are_those_of_new_products(name, tmp_path):
  golden.write(tmp_path, name, tied=True)
  model = load.from_pretrained(tmp_path)
  compare_gradients(model, model.params)


def test_gradients_of_adapters_are_those_of_new_products():
  params = tiny_model.params()
  adapters = lora.init(params, jax.random.key(1), rank=2)
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  compare_gradients(
      MODEL, adapters, lambda x: lora.attach(params, x, alpha=4.0)
  )


def compare_gradients(model, trained, policy=lambda params: params):
  """With products of the same parameters, and that others give others."""
  tokens, mask = golden.batch()[:2]
  tokens = jnp.asarray(tokens, jnp.int32) % model.config.vocab_size
  where = {
      'positions': jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0),
      'segment_ids': jnp.asarray(mask, jnp.int32),
  }
  upstream = jax.random.normal(
      jax.random.key(7), (*tokens.shape, model.config.hidden_size)
  ) * mask[..., None]
  trunk = functools.partial(model.replace(params=None).trunk, **where)

  def loss(trained, kept):
    hidden, _ = trunk(policy(trained), tokens, products=kept)
    return jnp.sum(hidden * upstream)

  _, kept = tiny_model.jit(
      lambda x: trunk(policy(x), tokens, keep_products=True)
  )(trained)
  of = tiny_model.jit(jax.value_and_grad(loss))
  value, gradients = of(trained, None)
  again, reused = of(trained, tiny_model.selection(kept.products))
  assert float(again) == pytest.approx(float(value), rel=1e-4, abs=1e-3)
  scale = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
  tiny_model.assert_trees_close(reused, gradients, rtol=0, atol=1e-5 * scale)
  others = jax.tree.map(lambda x: x[..., ::-1], kept.products)
  other, _ = of(trained, tiny_model.selection(others))
  assert abs(other - value) > 1e-3 * abs(value)


def test_a_plan_counts_what_is_left():
  params = tiny_model.params()
  tokens = jnp.ones((2, 9), jnp.int32)
  trunk = functools.partial(
      MODEL.trunk, positions=tokens, segment_ids=tokens
  )

  def count(kept):
    loss = lambda params: jnp.sum(trunk(params, tokens, products=kept)[0])
    return operations.count(jax.jit(jax.grad(loss)).trace(params).jaxpr)['']

  kept = trunk(params, tokens, keep_products=True)[1].products
  kernels = [x for x in jax.tree.leaves(params['layers']) if x.ndim == 3]
  assert len(kernels) == len(kept) == 7
  forward = 2 * tokens.size * sum(x.size for x in kernels)
  assert count(None) - count(tiny_model.selection(kept)) == forward


# Options of a step, and how many tokens its learner reads.
WAYS = [
    ({}, 160),
    ({'model__remat': 'full'}, 160),
    ({'extras__kl_coefficient': 0.1}, 160),
    ({'extras__kl_coefficient': 0.1, 'extras__kl_estimator': 'full'}, 160),
    ({'num_groups': 2}, 80),
    ({'learner__share_prompts': True, 'learner__num_microbatches': 2}, 112),
    # Of a part, as how many there are is not known before.
    ({'learner__row_length': 32, 'learner__num_microbatches': 4,
      'learner__num_halvings': 1}, 64),
]
PACKED = {
    'learner__row_length': 32, 'learner__num_microbatches': 4,
    'learner__num_halvings': 1,
}, 64


def count_learning(model=MODEL, **options):
  """Operations of the learner as it is traced."""
  config, mesh, program = whole_step.make_small(model, **ONCE | options)
  traced = program.train_step.trace(
      *program_lib.abstract_arguments(config, mesh, program)
  )
  return operations.count(
      traced.jaxpr,
      phases=('learn', 'sample'),
      num_trips=lambda phase, loop: (phase, int(phase == 'learn')),
  )['learn']


def forward_of(num_tokens, model=MODEL):
  """Operations of what is kept of the layers: all but experts and routers."""
  layers = jax.eval_shape(lambda: model.init(jax.random.key(0)))['layers']
  parts = [layers['attention']]
  if 'experts' not in layers['mlp']:
    parts.append(layers['mlp'])
  sizes = [x.size for x in jax.tree.leaves(parts) if x.ndim == 3]
  return 2 * num_tokens * sum(sizes)


@pytest.mark.parametrize('options, num_tokens', WAYS, ids=str)
def test_a_learner_multiplies_by_kernels_only_backwards(options, num_tokens):
  anew = count_learning(**options)
  reused = count_learning(learner__reuse_forward=True, **options)
  assert anew - reused == forward_of(num_tokens)


@pytest.fixture
def small_stretches(monkeypatch):
  """Rows of 32 slots are cut, which are too short for it otherwise."""
  sizes = packed_attention.Sizes(8, 1, 4)
  monkeypatch.setattr(packed_attention, 'sizes_for', lambda **_: sizes)
  return sizes


def test_packed_rows_attend_only_backwards_too(small_stretches):
  options, num_tokens = PACKED
  anew = count_learning(**options)
  reused = count_learning(learner__reuse_forward=True, **options)
  segments = jnp.zeros((2, 32), jnp.int32)
  config = MODEL.config
  heads = lambda count: jnp.zeros((*segments.shape, count, config.head_dim))

  def attend(segments):
    way = packed_attention.in_stretches(small_stretches)
    [sight], attend_with = way(
        attention.Where(segments, segments, segments), [None], scale=1.0,
        cap=None,
    )
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    return attend_with(sight)(*map(heads, (queries, keys, keys)))[0]

  forward = operations.count(
      jax.jit(attend).trace(segments).jaxpr,
      num_trips=lambda phase, loop: (phase, 1),
  )['']
  assert anew - reused == (
      forward_of(num_tokens) + config.num_hidden_layers * forward
  )


@pytest.mark.slow
@pytest.mark.usefixtures('small_stretches')
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_steps_in_stretches_are_those_of_a_new_forward_pass(remat):
  packed, _ = PACKED
  packed = packed | {'model__remat': remat}
  steps = lambda reuse: whole_step.three_steps(
      MODEL, tiny_model.params(), **ONCE | packed, learner__reuse_forward=reuse
  )
  reused, anew, whole = steps(True), steps(False), trajectory(**packed)
  for other in (anew, whole):
    assert reused['tokens'] == other['tokens']
    np.testing.assert_allclose(
        reused['parameters'], other['parameters'], rtol=1e-5
    )
    for ours, theirs in zip(reused['metrics'], other['metrics'], strict=True):
      assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize('row_length', [16, 32])
def test_only_rows_in_stretches_have_the_sampler_keep_attention(
    small_stretches, row_length
):
  _, _, program = whole_step.make_small(
      MODEL, learner__reuse_forward=True, learner__row_length=row_length,
      learner__num_microbatches=4, **ONCE,
  )
  kept = {'attended', 'log_sum'} & program.state.products.keys()
  cut = packed_attention.pays(row_length, small_stretches)
  assert cut == (row_length == 32)
  assert kept == ({'attended', 'log_sum'} if cut else set())


def test_adapters_multiply_once_more_at_most():
  anew = count_learning(lora__rank=2)
  reused = count_learning(learner__reuse_forward=True, lora__rank=2)
  assert anew - reused > forward_of(160)


def test_a_learner_of_experts_reuses_attention():
  model, options = tiny_model.WITH_EXPERTS, {'model__router_replay': True}
  anew = count_learning(model, **options)
  reused = count_learning(model, learner__reuse_forward=True, **options)
  assert anew - reused == forward_of(160, model)


def test_the_penalty_over_the_whole_vocabulary_runs_the_policy_once():
  sampled, full = (
      count_learning(
          extras__kl_coefficient=0.1, extras__kl_estimator=estimator
      )
      for estimator in ('k3', 'full')
  )
  # The head of the reference, recomputed, and the gradient from its products.
  assert full - sampled < forward_of(160)


@pytest.mark.slow
def test_a_recomputed_anchor_takes_products_too():
  sizes = ONCE | {'num_prompts': 4, 'optimized': True}

  def flops(**options):
    compiled = whole_step.compile_step(MODEL, **sizes, **options)
    return compiled.cost_analysis()['flops']

  recomputed, reuse = {'anchor': 'recomputed'}, {'learner__reuse_forward': True}
  anew = flops(**recomputed) - flops()
  assert flops(**recomputed, **reuse) - flops(**reuse) < 0.3 * anew


@pytest.mark.slow
def test_a_step_writes_products_in_place():
  sizes = ONCE | {'num_prompts': 16, 'optimized': True}
  before, after = (
      whole_step.compile_step(
          MODEL, learner__reuse_forward=reuse, **sizes
      ).memory_analysis()
      for reuse in (False, True)
  )
  room = after.argument_size_in_bytes - before.argument_size_in_bytes
  assert room > 4e6
  assert after.alias_size_in_bytes - before.alias_size_in_bytes > 0.99 * room
  assert after.temp_size_in_bytes - before.temp_size_in_bytes < 0.3 * room


@pytest.mark.parametrize('changes, match', [
    ({'learner.num_minibatches': 2}, r'num_minibatches=2 .*=1, or reuse'),
    ({'learner.num_epochs': 3}, r'num_epochs=3 .*=1, or reuse'),
    ({'replay.capacity': 2}, r'replay\.capacity=2 .*=0, or reuse'),
    ({'staleness': 1}, r'staleness=1 .*=0, or reuse'),
    ({'sampling.dtype': 'bfloat16'}, r"dtype='bfloat16' is not model"),
    ({'sampling.cache_dtype': 'int8'}, r"cache_dtype='int8' is not model"),
    ({'sampling.weights_dtype': 'int8'}, r"weights_dtype='int8' is not model"),
    ({'lora.rank': 2, 'model.params_dtype': 'bfloat16'},
     r"rank=2 .* config\.model\.params_dtype='bfloat16'; use 'float32'"),
    ({'lora.rank': 2, 'model.dtype': 'bfloat16',
      'sampling.dtype': 'bfloat16'},
     r"rank=2 .* config\.model\.dtype='bfloat16'; use 'float32'"),
])
def test_what_another_forward_pass_sampled_is_refused(changes, match):
  config = default.get_config('dppo_topk_tv')
  config.update_from_flattened_dict(
      {'learner.num_minibatches': 1, 'learner.reuse_forward': True} | changes
  )
  with pytest.raises(ValueError, match=match):
    checks.check(config, num_batch_shards=1)


@pytest.mark.parametrize('mode, num_devices, match', [
    ('split', 1, "config.mode='split' has two; use mode='fused', or"),
    ('fused', 2, 'there are 2; use reuse_forward=False, or show JAX one'),
])
def test_more_than_one_program_or_device_is_refused(mode, num_devices, match):
  config = default.get_config('dppo_topk_tv')
  config.mode, config.learner.reuse_forward = mode, True
  with pytest.raises(ValueError, match=match):
    checks.check_mode(config, num_devices=num_devices, num_processes=1)


def test_experts_that_did_not_sample_are_refused():
  config = default.get_config('dppo_topk_tv')
  config.learner.reuse_forward = True
  sizes = {'vocab_size': 454, 'max_positions': 512}
  checks.check_model(config, **sizes)
  with pytest.raises(ValueError, match='use model.router_replay=True, or'):
    checks.check_model(config, num_experts=4, **sizes)
  config.model.router_replay = True
  checks.check_model(config, num_experts=4, **sizes)


@pytest.mark.parametrize('rank, offered', [(0, True), (2, False)])
def test_a_step_that_does_not_fit_may_make_products_anew(rank, offered):
  config = whole_step.make_config(
      learner__reuse_forward=True, lora__rank=rank,
      learner__num_minibatches=1, num_prompts=4, group_size=4,
  )
  kinds = {'products': 2 * 10**9}
  with pytest.raises(
      ValueError, match=r'Most of it is products, 2.00 GB\. To lower it: '
      r'config\.learner\.reuse_forward=False \(now True\);'
  ):
    fitting.check_lasting(config, kinds, limit=10**9, num_batch_shards=1)
  sizes = {'arguments': 1, 'temporary': 10**9, 'results': 1, 'total': 10**9 + 2}
  with pytest.raises(ValueError) as refused:
    fitting.check(config, sizes, limit=10**8, num_batch_shards=1)
  # One dtype for both, and none is offered that is refused then.
  assert ("model.dtype='bfloat16'" in str(refused.value)) == offered
  assert 'sampling.dtype' not in str(refused.value)


def test_products_are_no_part_of_what_a_decode_loop_carries():
  loop = '(s32[], f32[2,60,32]{2,1,0}, f32[32,48]{1,0}, f32[60,48]{1,0})'
  options = {'head_dim': 8, 'lengths': (5, 6), 'rows': {4, 16}}
  weights = lambda **more: plan.decode_carry(loop, **options, **more)[
      "sampler's weights"
  ]
  assert weights() - weights(lasting=[(2, 60, 32)]) == 4 * 2 * 60 * 32
