"""The kernel of decoding brings what products with the whole cache bring.

It runs in Pallas' interpreter here: its numbers are tested, its speed is not.
The last test runs it where there is a GPU.
"""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
import tiny_model
import whole_step

from dppo_jax import sampling
from dppo_jax import sharding
from dppo_jax.models import attention
from dppo_jax.models import attention_kernels
from dppo_jax.models import decode_kernel
from dppo_jax.models import platforms
from dppo_jax.models import products

BLOCK = decode_kernel.BLOCK
interpreted = decode_kernel.by_triton(interpret=True)
PROMPTS, BATCH, MASKED = 3, 6, [3, 0, 4]  # Slots before each prompt.


class Kept(products.Tape):
  """Keeps what attention brought."""

  def attends(self, attended):
    self.attended = attended


def arranged(*, length, place, counts, window=None, prompt_length=5,
             cache_dtype='float32', dtype='float32', heads=(6, 2), size=16):
  """Two completions of each prompt: (queries, keys, values), what they see."""
  random = np.random.RandomState(0)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
  queries, keys = heads
  cache, prompt = (
      attention.convert_cache(
          attention.cache_of(*(draw(rows, slots, keys, size) for _ in 'kv')),
          jnp.dtype(cache_dtype),
      ) for rows, slots in ((BATCH, length), (PROMPTS, prompt_length))
  )
  mask = jnp.arange(prompt_length)[None] >= jnp.asarray(MASKED)[:, None]
  counts = jnp.asarray(counts, jnp.int32)
  visible = attention.visible_in_cache(
      prompt_mask=mask,
      prompt_positions=jnp.cumsum(mask, axis=1) - 1,
      positions=jnp.repeat(jnp.sum(mask, axis=1), 2) + counts - 1,
      length=length,
      place=jnp.int32(place),
      count=counts,
      window=window,
  )
  inputs = draw(BATCH, 1, queries, size), *(
      draw(BATCH, 1, keys, size) for _ in 'kv'
  )
  return inputs, {'prompt': prompt, 'cache': cache, 'visible': visible}


def by(attend_to_cache, cap=None):
  """What it brings to `arranged` queries, [B, 1, H, E], and its log-sum."""

  @jax.jit
  def run(inputs, seen):
    tape = Kept()
    attend_to_cache(
        **seen, scale=inputs[0].shape[-1] ** -0.5, cap=cap
    )(*inputs, tape)
    return tape.attended

  return run


def attended(attend_to_cache, *, cap=None, **settings):
  return by(attend_to_cache, cap)(*arranged(**settings))


def assert_close(settings, tolerance):
  """Of the kernel to XLA, as a share of the largest."""
  ours, theirs = (
      attended(attend, **settings)
      for attend in (interpreted, attention.attend_to_cache)
  )
  for one, other in zip(ours, theirs, strict=True):
    one, other = (np.asarray(x, np.float32) for x in (one, other))
    largest = np.abs(other).max()
    assert largest > 0.1
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize('length', [BLOCK, 2 * BLOCK + 7, 5])
@pytest.mark.parametrize('place', [0, BLOCK - 1, 2 * BLOCK + 3])
def test_a_kernel_sees_the_ring_that_xla_sees(length, place):
  counts = [1, 2, length // 2, length - 1, length, min(length, place + 2)]
  assert_close(
      {'length': length, 'place': place % length, 'counts': counts}, 3e-6
  )


def test_rows_of_one_age_are_seen_as_a_scalar_says():
  assert_close({'length': 2 * BLOCK, 'place': 70, 'counts': 71}, 3e-6)


LONG = {
    'length': 2 * BLOCK + 7, 'place': 20, 'counts': [1, 9, 21, 22, 90, 130]
}


@pytest.mark.parametrize('options, tolerance', [
    ({'window': 1}, 3e-6),
    ({'window': 24}, 3e-6),
    ({'prompt_length': BLOCK + 9, 'window': BLOCK + 20}, 3e-6),
    ({'cap': 0.5}, 3e-6),
    ({'heads': (3, 3)}, 3e-6),
    ({'heads': (18, 1)}, 3e-6),
    ({'cache_dtype': 'int8'}, 3e-6),
    ({'cache_dtype': 'float8_e4m3fn', 'window': 100}, 3e-6),
    ({'dtype': 'bfloat16', 'cache_dtype': 'bfloat16'}, 0.01),
    ({'dtype': 'float16', 'cache_dtype': 'int8'}, 0.01),
], ids=str)
def test_a_kernel_sees_and_weighs_as_xla_does(options, tolerance):
  assert_close(LONG | options, tolerance)


@pytest.mark.parametrize('options', [
    {'cache_dtype': 'int8'},
    {'cache_dtype': 'int8', 'window': 24, 'cap': 0.5, 'prompt_length': 40},
    {'cache_dtype': 'float8_e4m3fn'},
    {'cache_dtype': 'float32'},
], ids=str)
def test_scales_that_a_tpu_leaves_to_scores_and_weights_change_nothing(options):
  expected = attended(attention.attend_to_cache, **LONG | options)
  with platforms.traced_for('tpu'):
    ours = attended(attention.attend_to_cache, **LONG | options)
  for one, other in zip(ours, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=3e-6)


@pytest.mark.parametrize('window', [None, 4])
def test_a_kernel_reads_no_block_without_a_visible_slot(window):
  """Where it must not look there is what would show."""
  settings = {
      'length': 6 * BLOCK, 'place': 4 * BLOCK + 3, 'counts': BLOCK,
      'prompt_length': 3 * BLOCK, 'window': window,
  }
  inputs, seen = arranged(**settings)
  expected = by(attention.attend_to_cache)(inputs, seen)
  # Of the ring, blocks 3 and 4 are seen, or the last of them; of prompts that
  # begin in slots 3, 0 and 4 all, or nothing.
  unseen = jnp.arange(6 * BLOCK) // BLOCK
  unseen = (unseen < (3 if window is None else 4)) | (unseen > 4)
  poison = lambda x, axis, where: jnp.where(
      where.reshape([-1 if i == axis else 1 for i in range(4)]), jnp.nan, x
  )
  cache = seen['cache']
  seen['cache'] = attention.Cache(
      poison(cache.keys, 3, unseen), poison(cache.values, 2, unseen)
  )
  if window is not None:
    everything = jnp.ones(3 * BLOCK, bool)
    prompt = seen['prompt']
    seen['prompt'] = attention.Cache(
        poison(prompt.keys, 3, everything), poison(prompt.values, 2, everything)
    )
  found = by(interpreted)(inputs, seen)
  assert_trees_close = functools.partial(
      np.testing.assert_allclose, rtol=0, atol=1e-5
  )
  jax.tree.map(assert_trees_close, found, expected)


def test_blocks_are_those_of_visible_slots_each_once():
  length = 6 * BLOCK
  for place in range(0, length, 37):
    for count in (1, BLOCK, BLOCK + 1, length - 1, length):
      begin, number = decode_kernel._blocks(
          jnp.int32(place), jnp.int32(count), length
      )
      read = {(int(begin) + i) % 6 for i in range(int(number))}
      seen = {(place - i) % length // BLOCK for i in range(count)}
      assert read == seen and len(read) == int(number)


def sample(attend_to_cache, **options):
  model = tiny_model.MODEL.replace(attend_to_cache=attend_to_cache)
  prompts = tiny_model.prompts()
  sampler = sampling.make_sampler(
      model, group_size=4, max_completion_length=9,
      eos_ids=tiny_model.EOS_IDS, pad_id=0, temperature=1.0, **options,
  )
  keys = sampling.row_keys(jax.random.key(3), 4 * len(prompts.tokens))
  return jax.jit(sampler)(tiny_model.params(), prompts, keys)


def test_of_a_completion_that_has_ended_one_slot_is_read():
  visible = attention.visible_in_cache(
      prompt_mask=jnp.ones((2, 3), bool),
      prompt_positions=jnp.arange(3)[None].repeat(2, axis=0),
      positions=jnp.full(4, 12), length=20, place=jnp.int32(9),
      count=jnp.int32(10), window=None,
      ended=jnp.asarray([False, True, False, True]),
  )
  np.testing.assert_array_equal(visible.count, [10, 1, 10, 1])


@pytest.mark.parametrize('options', [
    {}, {'num_stages': 3}, {'num_slots': 4, 'num_halvings': 1}
], ids=['together', 'in stages', 'in slots'])
def test_a_sampler_draws_the_same_tokens_with_the_kernel(options):
  ours = sample(interpreted, **options)
  theirs = sample(attention.attend_to_cache)
  np.testing.assert_array_equal(ours.tokens, theirs.tokens)
  np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
  assert ours.mask.any(axis=1).all() and ours.mask.sum() > 50


def on_eight_devices():
  """Prints tokens that are drawn by a kernel over a mesh."""
  prompts = tiny_model.prompts(8)
  keys = sampling.row_keys(jax.random.key(3), 16)
  for sizes in ({'data': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}):
    mesh = whole_step.make_mesh(**sizes)
    share = sharding.by_rows_and_heads(mesh, axis=1)
    model = tiny_model.MODEL.replace(
        attend_to_cache=decode_kernel.by_triton(share, interpret=True)
    )
    sampler = sharding.by_rows(
        sampling.make_sampler(
            model, group_size=2, max_completion_length=6,
            eos_ids=tiny_model.EOS_IDS, pad_id=0, temperature=1.0,
        ), mesh, head_dim=tiny_model.CONFIG.head_dim,
    )
    params = tiny_model.params()
    params = jax.device_put(params, sharding.of_params(params, mesh))
    rows = jax.device_put((prompts, keys), sharding.batch(mesh))
    print(json.dumps(jax.jit(sampler)(params, *rows).tokens.tolist()))


@pytest.mark.several_devices
@pytest.mark.slow
def test_over_a_mesh_the_kernel_draws_the_tokens_of_one_device():
  lines = many_devices.run(
      'import decode_kernel_test as test; test.on_eight_devices()',
      optimized=False,
  )
  sampler = tiny_model.make_sampler(group_size=2, max_completion_length=6)
  expected = jax.jit(sampler)(
      tiny_model.params(), tiny_model.prompts(8),
      sampling.row_keys(jax.random.key(3), 16),
  ).tokens.tolist()
  assert list(map(json.loads, lines)) == [expected] * 2


def as_if_on_an_h100():
  """Later versions of JAX ask for the GPU that a kernel is compiled for."""
  if jax.__version_info__ < (0, 11):
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(
      (1,), ('x',), abstract_device=jax.sharding.AbstractDevice(
          device_kind='NVIDIA H100', num_cores=None, platform='gpu'
      ),
  ))


def test_for_cuda_the_kernel_is_given_to_triton():
  arguments = jax.eval_shape(
      lambda: arranged(**LONG, dtype='bfloat16', cache_dtype='bfloat16')
  )
  with as_if_on_an_h100():
    traced = by(decode_kernel.by_triton()).trace(*arguments)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert '__gpu$xla.gpu.triton' in text


@pytest.mark.skipif(
    attention_kernels.platform_of() != 'cuda', reason='there is no such GPU'
)
@pytest.mark.parametrize('options', [
    {}, {'window': 50}, {'cache_dtype': 'int8'}, {'cap': 2.0},
    {'cache_dtype': 'float8_e4m3fn'}, {'cache_dtype': 'float32'},
    {'size': 16}, {'size': 256},
], ids=str)
def test_on_a_gpu_the_kernel_rounds_as_xla_does(options):
  settings = LONG | {
      'dtype': 'bfloat16', 'cache_dtype': 'bfloat16', 'size': 128,
      'heads': (16, 8),
  } | options
  wide = settings | {
      'dtype': 'float32',
      'cache_dtype': options.get('cache_dtype', 'float32'),
  }
  with jax.default_matmul_precision('highest'):
    exact = attended(attention.attend_to_cache, **wide).out
  distance = lambda attend: float(jnp.sqrt(jnp.mean(jnp.square(
      attended(attend, **settings).out.astype(jnp.float32) - exact
  ))))
  ours = distance(decode_kernel.by_triton())
  assert 0 < ours < 2 * distance(attention.attend_to_cache)
