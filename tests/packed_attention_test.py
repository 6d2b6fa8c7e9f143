"""Attention of packed rows in stretches is attention of whole rows.

B rows, T slots, N stretches, H query heads, K key heads, E width of a head.
"""

import functools

import attention_test
import collectives
import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
import tiny_model

from dppo_jax import decoding
from dppo_jax import operations
from dppo_jax import rollout as rollout_lib
from dppo_jax import sampling
from dppo_jax import sharding
from dppo_jax.models import attention
from dppo_jax.models import packed_attention
from dppo_jax.models import products

LENGTH, MODELS = attention_test.LENGTH, attention_test.MODELS
# Of rows of 50 slots, where a prompt is up to 38 slots before who sees it:
# without a step in between, and with some.
SIZES = [(8, 1, 32), (8, 1, 4), (8, 1, 0), (7, 2, 3), (3, 0, 1), (9, 3, 9)]


def where():
  """Two rows that hold prompts, their completions, and padding."""
  _, of_rows = attention_test.rows()
  return attention.Where(
      of_rows['segment_ids'], of_rows['positions'], of_rows['prompt_ids']
  )


def inputs(dtype='float32', heads=4, key_heads=2):
  """Queries, keys, values, and what gradients are taken along."""
  keys = jax.random.split(jax.random.key(0), 4)
  normal = lambda key, count: jax.random.normal(key, (2, LENGTH, count, 8))
  real = (where().segment_ids > 0)[..., None, None]
  *arrays, upstream = (
      normal(key, count) for key, count in zip(
          keys, (heads, key_heads, key_heads, heads), strict=True
      )
  )
  return [x.astype(dtype) for x in arrays], upstream * real


def attend(way, *arrays, window=None, cap=None, tape=products.no_tape):
  """[B, T, H, E] by a `RowAttention`."""
  [sight], attend_with = way(where(), [window], scale=0.3, cap=cap)
  return attend_with(sight)(*arrays, tape)[0]


def gradients(way, dtype='float32', **options):
  arrays, upstream = inputs(dtype)
  total = lambda *arrays: jnp.sum(attend(way, *arrays, **options) * upstream)
  return tiny_model.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_stretches_see_what_whole_rows_see(name, sizes):
  model = MODELS[name]
  params = tiny_model.jit(model.init)(jax.random.key(0))
  weights = np.random.RandomState(1).normal(size=(2, LENGTH, 32))
  by = lambda way: attention_test.outputs(
      model.replace(row_attention=way), params, weights
  )
  in_stretches = packed_attention.in_stretches(packed_attention.Sizes(*sizes))
  attention_test.assert_same(by(in_stretches), by(attention.in_xla()))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('options', [{}, {'window': 6, 'cap': 2.0}], ids=str)
def test_gradients_are_those_of_whole_rows(dtype, options):
  ours = gradients(
      packed_attention.in_stretches(packed_attention.Sizes(8, 1, 4)), dtype,
      **options,
  )
  tolerance = {'float32': 1e-5, 'bfloat16': 5e-2}[dtype]
  for actual, expected in zip(
      ours, gradients(attention.in_xla(), **options), strict=True
  ):
    assert actual.dtype == dtype and jnp.abs(expected).max() > 0.1
    np.testing.assert_allclose(
        actual.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance
    )


def walks(sizes, window=None):
  """Steps of each stretch between the farthest slots and the nearest."""
  way = packed_attention.in_stretches(packed_attention.Sizes(*sizes))
  [sight], _ = way(where(), [window], scale=1.0, cap=None)
  return sight.walks.max(axis=0).tolist()


def test_a_stretch_walks_to_what_it_sees_and_no_further():
  # The longest row of one sequence: every stretch sees its beginning.
  assert walks((10, 0, 10)) == [0, 0, 1, 2, 3]
  assert walks((10, 1, 10)) == [0, 0, 0, 1, 1]
  assert walks((10, 1, 24)) == [0, 0, 0, 0, 0]
  # Nobody sees more than six slots back.
  assert walks((10, 1, 1), window=6) == [0, 0, 0, 0, 0]


def test_an_empty_row_walks_nowhere_and_is_finite():
  nobody = jnp.zeros((1, LENGTH), jnp.int32)
  way = packed_attention.in_stretches(packed_attention.Sizes(8, 1, 8))
  [sight], attend_with = way(
      attention.Where(nobody, nobody, nobody), [None], scale=1.0, cap=None
  )
  assert not sight.walks.any()
  arrays = [x[:1] for x in inputs()[0]]
  total = lambda *arrays: jnp.sum(attend_with(sight)(*arrays)[0])
  with jax.debug_nans(True):
    for gradient in tiny_model.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays):
      assert jnp.isfinite(gradient).all()


def test_a_row_that_a_stretch_would_meet_as_a_whole_is_not_cut():
  sizes = packed_attention.Sizes(10, 1, LENGTH - 20)
  assert not packed_attention.pays(LENGTH, sizes)
  assert packed_attention.pays(LENGTH, sizes._replace(far=LENGTH - 21))
  way = packed_attention.in_stretches(sizes)
  [sight], _ = way(where(), [None], scale=1.0, cap=None)
  assert sight.shape == (2, LENGTH, LENGTH)


def recorded():
  """What a tape holds of whole rows."""
  tape = products.Recorder(attention=True)
  attend(attention.in_xla(), *inputs()[0], tape=tape)
  assert tape.products.keys() == {'attended', 'log_sum'}
  return tape.products


@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_gradients_from_a_tape_are_those_of_new_attention(sizes):
  way = packed_attention.in_stretches(packed_attention.Sizes(*sizes))
  kept = recorded()
  player = products.Player(kept)
  anew, again = gradients(way), gradients(way, tape=player)
  tiny_model.assert_trees_close(again, anew, rtol=1e-4, atol=1e-5)
  played = attend(way, *inputs()[0], tape=player)
  np.testing.assert_array_equal(
      played.reshape(2, LENGTH, -1), kept['attended']
  )
  # And they really come from the tape.
  other = gradients(way, tape=products.Player(
      kept | {'log_sum': kept['log_sum'] + 1.0}
  ))
  assert jnp.abs(other[0] - anew[0]).max() > 1e-2


def test_what_a_tape_holds_is_not_computed_again():
  way = packed_attention.in_stretches(packed_attention.Sizes(8, 1, 8))
  arrays, upstream = inputs()

  def count(kept):
    tape = products.Player(kept) if kept else products.no_tape
    total = lambda *x: jnp.sum(attend(way, *x, tape=tape) * upstream)
    jaxpr = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*arrays).jaxpr
    trips = lambda phase, loop: (phase, 0)
    return operations.count(jaxpr, num_trips=trips)['']

  # A forward pass has two products, a backward pass one of them, four more.
  assert count({}) > 0
  assert count({}) * 5 == count(recorded()) * 7


def test_a_tape_may_hold_anything_of_padding():
  # Three real tokens; padding has a sum of nothing that its keys know.
  segments = jnp.asarray([[1] * 3 + [0] * 61])
  positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
  way = packed_attention.in_stretches(packed_attention.Sizes(8, 1, 8))
  [sight], attend_with = way(
      attention.Where(segments, positions, jnp.zeros_like(segments)), [None],
      scale=1.0, cap=None,
  )
  shape = (1, 64, 2, 8)
  q, k, v = jnp.full(shape, 4.0), jnp.full(shape, -4.0), jnp.ones(shape)
  tape = products.Player({
      'attended': jnp.ones((1, 64, 16)), 'log_sum': jnp.full((1, 64, 2), -120.0)
  })
  total = lambda *x: jnp.sum(attend_with(sight)(*x, tape)[0][:, :3])
  for gradient in tiny_model.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v):
    assert jnp.isfinite(gradient).all()


def test_nothing_is_recorded_unless_it_is_asked_for():
  tape = products.Recorder()
  attend(attention.in_xla(), *inputs()[0], tape=tape)
  assert not tape.products


@pytest.mark.parametrize('num_slots', [0, 5])
def test_a_sampler_records_what_whole_rows_attend_to(num_slots):
  # In decoding a token attends to caches, in `trunk` to its row.
  model = tiny_model.MODEL.replace(keeps_attention=True)
  params, prompts = tiny_model.params(), tiny_model.prompts()
  batch = tiny_model.NUM_PROMPTS * tiny_model.GROUP_SIZE
  sampler = sampling.make_sampler(
      model, group_size=tiny_model.GROUP_SIZE,
      max_completion_length=tiny_model.COMPLETION_LENGTH,
      eos_ids=tiny_model.EOS_IDS, pad_id=tiny_model.PAD_ID, temperature=1.0,
      num_slots=num_slots,
  )
  buffer = model.empty_products(decoding.num_entries(
      num_prompts=tiny_model.NUM_PROMPTS, batch=batch, num_slots=num_slots,
      prompt_length=tiny_model.PROMPT_LENGTH,
      length=tiny_model.COMPLETION_LENGTH,
  ))
  rollout, aux = tiny_model.jit(rollout_lib.make_rollout_fn(
      sampler, group_size=tiny_model.GROUP_SIZE
  ))(params, prompts, jax.random.key(3), jnp.int32(0), buffer)
  _, kept = tiny_model.jit(
      functools.partial(model.trunk, keep_products=True)
  )(
      params, rollout.tokens[:, :-1], positions=rollout.positions[:, :-1],
      segment_ids=rollout.segment_ids[:, :-1],
  )
  found = tiny_model.all_products(aux.products, rollout.entries)
  reads = rollout.segment_ids[:, 1:] > 0
  for name in ('attended', 'log_sum'):
    np.testing.assert_allclose(
        found[name][:, reads], kept.products[name][:, reads], atol=2e-5,
        err_msg=name,
    )


def on_eight_devices(num_heads):
  """Prints how far gradients are from those of one device, and how large.

  And before these, what moves between the devices.
  """
  twice = lambda x: jnp.concatenate([x, x[::-1]])
  rows = jax.tree.map(twice, where())
  arrays, upstream = inputs()
  arrays, upstream = [twice(x) for x in arrays], twice(upstream)

  def gradient(*share):
    way = packed_attention.in_stretches(
        packed_attention.Sizes(8, 1, 4), *share
    )

    def total(q, k, v, rows):
      [sight], attend_with = way(rows, [None], scale=0.3, cap=None)
      return jnp.sum(attend_with(sight)(q, k, v)[0] * upstream)

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))

  mesh = sharding.make_mesh(data=4, fsdp=1, tensor=2, expert=1)
  share = sharding.by_rows_and_heads(mesh, num_heads=num_heads)
  put = lambda x, *axes: jax.device_put(
      x, jax.NamedSharding(mesh, jax.P(*axes))
  )
  heads = 'tensor' if num_heads == 2 else None
  placed = [put(x, 'data', None, heads) for x in arrays]
  placed.append(jax.tree.map(lambda x: put(x, 'data'), rows))
  compiled = gradient(share).lower(*placed).compile()
  moved = [x for x, _ in collectives.of(compiled.as_text())]
  print(sorted({*moved} - {'all-reduce'}))
  spread = compiled(*placed)
  assert len(spread[0].sharding.device_set) == 8
  for x, y in zip(spread, gradient()(*arrays, rows), strict=True):
    print(float(jnp.abs(x - y).max()), float(jnp.abs(y).max()))


@pytest.mark.several_devices
@pytest.mark.slow
@pytest.mark.parametrize('num_heads', [2, 1])  # 1: not as if they divided.
def test_rows_and_heads_may_be_spread_over_devices(num_heads):
  moved, *printed = many_devices.run(
      'import packed_attention_test as test; '
      f'test.on_eight_devices({num_heads})'
  )
  assert moved == '[]'  # A row is met where it is.
  for line in printed:
    difference, largest = map(float, line.split())
    assert difference < 1e-5 and largest > 0.1
  assert len(printed) == 3
