"""Sampling with weights and caches of fewer bits than what is learned with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from dppo_jax import diagnostics
from dppo_jax import divergences
from dppo_jax import rollout as rollout_lib
from dppo_jax import sampling
from dppo_jax.models import quantization

KEYS = sampling.row_keys(jax.random.key(3), 16)
EIGHT_BITS = pytest.mark.parametrize('dtype', quantization.SCALED)


@EIGHT_BITS
@pytest.mark.parametrize('axis', [-2, -1])
def test_a_value_is_off_by_at_most_half_a_step(dtype, axis):
  sizes = 10.0 ** jnp.linspace(-3, 3, 50)[None, None]
  x = sizes * jax.random.normal(jax.random.key(0), (3, 40, 50))
  x = x.at[1].set(0.0)  # Nothing to scale.
  small = quantization.quantize(x, dtype, axis=axis)
  assert small.values.dtype == jnp.dtype(dtype) and small.shape == x.shape
  assert small.scale.shape == tuple(
      1 if i == axis % 3 else n for i, n in enumerate(x.shape)
  )
  wide = quantization.widen(small, jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
  # int8 has 127 steps; float8_e4m3fn three bits behind the first.
  step = largest / 127 if dtype == 'int8' else jnp.maximum(
      jnp.abs(x) / 8, largest / 448 * 2.0**-9
  )
  assert (jnp.abs(wide - x) <= 0.501 * step).all()
  assert jnp.abs(wide - x).max() > 0 and not wide[1].any()
  np.testing.assert_allclose(
      jnp.max(jnp.abs(wide), axis=axis), largest.squeeze(axis), rtol=1e-5
  )


@EIGHT_BITS
def test_small_weights_keep_their_digits_in_float16(dtype):
  # As float16, a scale of 1e-5 / 127 has one digit or none.
  x = 1e-5 * jax.random.normal(jax.random.key(0), (40, 50))
  small = quantization.quantize(x, dtype, axis=0)
  exact, wide = (
      quantization.widen(small, t).astype(jnp.float32)
      for t in (jnp.float32, jnp.float16)
  )
  # Half of the smallest float16.
  assert jnp.abs(wide - exact).max() <= 2.0**-25


def test_a_type_without_a_scale_is_cast():
  x = jnp.linspace(0, 1, 6).reshape(2, 3)
  for dtype in ('bfloat16', 'float16', 'float32'):
    same = quantization.convert(x, dtype, axis=-1)
    assert same.dtype == jnp.dtype(dtype)
    assert quantization.widen(same, jnp.float32) is same


def test_only_the_projections_of_layers_are_quantized():
  for model in (tiny_model.MODEL, tiny_model.WITH_EXPERTS):
    params = tiny_model.jit(model.init)(jax.random.key(0))
    small = quantization.convert_kernels(params, jnp.bfloat16, 'int8')
    flat, _ = jax.tree_util.tree_flatten_with_path(
        small, is_leaf=lambda x: isinstance(x, quantization.Quantized)
    )
    names = {
        jax.tree_util.keystr(path, simple=True, separator='/')
        for path, x in flat if isinstance(x, quantization.Quantized)
    }
    mlp = 'mlp/experts' if model.config.num_experts else 'mlp'
    assert names == {
        *(f'layers/attention/{x}/kernel' for x in 'qkvo'),
        *(f'layers/{mlp}/{x}/kernel' for x in ('gate', 'up', 'down')),
    }
    assert all(
        x.dtype == jnp.bfloat16 for _, x in flat
        if not isinstance(x, quantization.Quantized)
    )


@functools.cache
def sampled(model=tiny_model.MODEL, **options):
  """(params, completions) of some types; compiled once for each."""
  params = tiny_model.params()
  if model.config.num_experts:
    params = tiny_model.jit(model.init)(jax.random.key(0))
    params['embed']['embedding'] *= 20
  sampler = sampling.make_sampler(
      model, group_size=4, max_completion_length=6,
      eos_ids=tiny_model.EOS_IDS, pad_id=0, temperature=1.0, **options,
  )
  return params, tiny_model.jit(sampler)(params, tiny_model.prompts(), KEYS)


@pytest.mark.parametrize('model', [
    tiny_model.MODEL, tiny_model.WITH_EXPERTS
], ids=['dense', 'experts'])
@EIGHT_BITS
def test_logprobs_are_those_of_the_weights_that_sampled(model, dtype):
  params, completions = sampled(model, weights_dtype=dtype)
  rollout = rollout_lib.assemble(
      tiny_model.prompts(), completions, group_size=4
  )
  fn = lambda params: tiny_model.make_target_fn(
      divergences.build('binary_tv'), model=model
  )(params, rollout._replace(record=rollout.behaviour_logprobs)).logprobs
  wide = quantization.widen(
      quantization.convert_kernels(params, jnp.float32, dtype), jnp.float32
  )
  mask = np.asarray(rollout.token_mask)
  gap = lambda params: np.abs(
      np.asarray(tiny_model.jit(fn)(params) - rollout.behaviour_logprobs)
  )[mask].max()
  assert gap(wide) < 1e-4 < 1e-3 < gap(params)


@pytest.mark.parametrize('dtype', [*quantization.SCALED, 'bfloat16', 'float16'])
def test_a_cache_of_fewer_bits_moves_the_logprobs_a_little(dtype):
  params, completions = sampled(cache_dtype=dtype)
  rollout = rollout_lib.assemble(
      tiny_model.prompts(), completions, group_size=4
  )
  rollout = rollout._replace(record=rollout.behaviour_logprobs)
  exact = tiny_model.jit(
      tiny_model.make_target_fn(divergences.build('binary_tv'))
  )(params, rollout).logprobs
  mask = np.asarray(rollout.token_mask)
  gap = np.abs(np.asarray(exact - rollout.behaviour_logprobs))
  # The first token is drawn from the prompt itself, not from its cache.
  first = tiny_model.PROMPT_LENGTH - 1
  assert gap[:, first].max() < 1e-5
  rough = 1.0 if dtype == 'float8_e4m3fn' else 0.1
  assert 1e-5 < gap[mask].max() < rough


@pytest.mark.parametrize('options', [
    {'weights_dtype': 'int8', 'cache_dtype': 'int8'},
    {'weights_dtype': 'float8_e4m3fn', 'cache_dtype': 'float8_e4m3fn'},
    {'dtype': 'float16', 'cache_dtype': 'int8'},
    {'dtype': 'bfloat16', 'weights_dtype': 'int8'},
], ids=str)
def test_slots_draw_the_same_tokens_in_every_type(options):
  _, together = sampled(**options)
  # The last rows go on in a single slot.
  _, in_slots = sampled(num_slots=4, num_halvings=2, **options)
  np.testing.assert_array_equal(in_slots.tokens, together.tokens)
  np.testing.assert_allclose(
      in_slots.logprobs, together.logprobs, rtol=0, atol=2e-2
  )
  assert np.isfinite(together.logprobs).all() and together.mask.sum() > 16


def test_the_token_loop_holds_eight_bit_weights_and_cache():
  def shapes(**options):
    sampler = sampling.make_sampler(
        tiny_model.MODEL, group_size=4, max_completion_length=6,
        eos_ids=(1,), pad_id=0, temperature=1.0, **options,
    )
    return jax.jit(sampler).lower(
        tiny_model.params(), tiny_model.prompts(), KEYS
    ).as_text()

  text = shapes(weights_dtype='int8', cache_dtype='int8')
  # 16 rows of 6 tokens, 2 heads of 8; a kernel [32, 48] of a layer.
  assert 'tensor<16x2x6x8xi8>' in text and 'tensor<16x2x8x6xi8>' in text
  assert 'tensor<32x48xi8>' in text
  assert 'tensor<16x2x6x8xf32>' in text  # As it is read.
  assert 'xi8>' not in shapes()


@pytest.mark.parametrize('dtype', ['float32', 'int8', 'float8_e4m3fn'])
@pytest.mark.parametrize('axis', [2, 3])
def test_an_empty_cache_is_of_the_form_of_what_is_written_to_it(dtype, axis):
  shape = (2, 3, 4, 5)
  empty = quantization.zeros(shape, jnp.dtype(dtype), axis=axis)
  made = quantization.convert(jnp.ones(shape), jnp.dtype(dtype), axis=axis)
  assert jax.eval_shape(lambda: empty) == jax.eval_shape(lambda: made)
  assert not quantization.widen(empty, jnp.float32).any()


@pytest.mark.parametrize('options', [
    {}, {'dtype': 'bfloat16'}, {'weights_dtype': 'int8'},
    {'weights_dtype': 'float8_e4m3fn', 'cache_dtype': 'int8'},
], ids=str)
def test_the_mismatch_of_a_coarser_sampler_is_measured(options):
  divergence = tiny_model.topk_tv()
  scored = tiny_model.make_scored(divergence, **options)
  learn_fn = tiny_model.jit(tiny_model.make_learner(divergence))
  _, stats, _ = learn_fn(
      tiny_model.make_state(tiny_model.params()), scored, jax.random.key(0)
  )
  metrics = diagnostics.token_metrics(stats, threshold=divergence.threshold)
  gap = float(metrics['on_policy/log_ratio_max'])
  assert gap > 1e-3 if options else gap < 1e-4
  assert float(metrics['divergence/mean']) < 0.2
