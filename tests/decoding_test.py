"""Slots that are filled again draw what rows side by side draw."""

import dataclasses
import functools
import heapq
import json

import collectives
import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
import tiny_model
import whole_step

from dppo_jax import decoding
from dppo_jax import hlo
from dppo_jax import sampling
from dppo_jax import sharding
from dppo_jax.models import layers

NUM_PROMPTS, G, C = 8, 4, 12
NUM_ROWS = NUM_PROMPTS * G
# One token of 64, so that lengths differ more than with the usual eight.
EOS_IDS = (1, 2, 3)
# A token sees 3 of its row, so who sees too much of a ring draws another one.
WINDOW = dataclasses.replace(
    tiny_model.CONFIG,
    sliding_window=3,
    layer_types=(layers.SLIDING, layers.FULL),
)


def record_logprobs(logits, tokens):
  """A record that must come out equal to the sampler's own log-probs."""
  logprobs = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]


def make_sampler(
    num_slots, *, model=tiny_model.MODEL, config=tiny_model.CONFIG, **options
):
  return sampling.make_sampler(
      model.replace(config=config),
      **{
          'group_size': G,
          'max_completion_length': C,
          'eos_ids': EOS_IDS,
          'pad_id': tiny_model.PAD_ID,
          'temperature': 1.5,
          'record': record_logprobs,
          'num_slots': num_slots,
          **options,
      },
  )


@functools.lru_cache(maxsize=4)  # All of them would be too much to map.
def compiled(num_slots, **options):
  return tiny_model.jit(make_sampler(num_slots, **options))


@functools.cache
def sample(num_slots, *, order=tuple(range(NUM_PROMPTS)), **options):
  """Completions of 8 prompts of 1 to 5 tokens, which come in that order."""
  prompts = jax.tree.map(
      lambda x: x[np.array(order)], tiny_model.prompts(NUM_PROMPTS)
  )
  keys = sampling.row_keys(jax.random.key(3), NUM_ROWS)[rows_of(order)]
  return jax.device_get(
      compiled(num_slots, **options)(tiny_model.params(), prompts, keys)
  )


def rows_of(order):
  """Of the prompts in that order."""
  return (np.array(order)[:, None] * G + np.arange(G)).ravel()


def assert_same(actual, expected):
  for name in ('tokens', 'mask', 'truncated'):
    np.testing.assert_array_equal(
        getattr(actual, name), getattr(expected, name), err_msg=name
    )
  mask = expected.mask
  for name in ('logprobs', 'record'):
    np.testing.assert_allclose(
        getattr(actual, name)[mask], getattr(expected, name)[mask],
        rtol=0, atol=1e-5, err_msg=name,
    )
  assert not actual.logprobs[~mask].any()


@pytest.mark.parametrize('num_slots', [1, 5, 31])
def test_any_number_of_slots_gives_the_same_tokens(num_slots):
  expected = sample(0)
  lengths = expected.mask.sum(1)
  assert lengths.min() == 1 and lengths.max() == C  # Every kind of row.
  assert 0 < expected.truncated.sum() < NUM_ROWS
  assert_same(sample(num_slots), expected)


@pytest.mark.parametrize('num_slots, num_halvings', [
    (0, 0), (5, 0), (12, 2), (0, 3)
])
def test_rows_do_not_depend_on_the_batch_order_whatever_the_slots(
    num_slots, num_halvings
):
  # Other rows wait in the queue, follow each other in a slot and are the last.
  order = (5, 2, 7, 0, 3, 6, 1, 4)
  shuffled = sample(num_slots, order=order, num_halvings=num_halvings)
  in_place = jax.tree.map(
      lambda x: x[np.argsort(rows_of(order))] if x.ndim else x, shuffled
  )
  assert_same(in_place, sample(0))


@pytest.mark.parametrize('num_slots, num_halvings, halving_steps', [
    (2, 1, 1), (12, 2, 1), (12, 2, 3), (8, 3, 1), (8, 2, 2), (0, 5, 1),
])
def test_slots_that_are_halved_give_the_same_tokens_in_as_many_steps(
    num_slots, num_halvings, halving_steps
):
  halving = {'num_halvings': num_halvings, 'halving_steps': halving_steps}
  halved = sample(num_slots, **halving)
  assert_same(halved, sample(0))
  assert halved.num_steps == sample(num_slots).num_steps
  in_window = {'config': WINDOW, **halving}
  assert_same(sample(num_slots, **in_window), sample(0, config=WINDOW))


@pytest.mark.parametrize('halving_steps, sizes', [
    (1, [8, 4, 2]), (2, [8, 6, 4, 3, 2]),
])
def test_loops_over_fewer_slots_have_fewer_rows(halving_steps, sizes):
  """And less of what is kept for them."""
  sampler = make_sampler(8, num_halvings=2, halving_steps=halving_steps)
  keys = sampling.row_keys(jax.random.key(3), NUM_ROWS)
  traced = jax.make_jaxpr(sampler)(
      tiny_model.params(), tiny_model.prompts(NUM_PROMPTS), keys
  )
  loops = [
      equation for equation in traced.jaxpr.eqns
      if equation.primitive.name == 'while'
  ]
  heads, size = (
      tiny_model.CONFIG.num_key_value_heads, tiny_model.CONFIG.head_dim
  )
  caches = [
      {x.aval.shape[0] for x in loop.outvars
       if x.aval.shape[1:] == (heads, C, size)}
      for loop in loops
  ]
  assert [x for x in caches if x] == [{size} for size in sizes]


@pytest.mark.parametrize('num_stages', [3, C])
@pytest.mark.parametrize('options', [
    {},
    {'config': WINDOW},
    {'cache_dtype': 'int8'},
    {'eos_ids': tuple(range(tiny_model.CONFIG.vocab_size // 2))},  # All end.
], ids=str)
def test_a_cache_that_grows_gives_the_same_tokens_in_as_many_steps(
    num_stages, options
):
  grown = sample(0, num_stages=num_stages, **options)
  expected = sample(0, **options)
  assert_same(grown, expected)
  assert grown.num_steps == expected.num_steps


def test_stages_that_nobody_reaches_take_no_step():
  everything = tuple(range(tiny_model.CONFIG.vocab_size))
  ended = sample(0, eos_ids=everything, num_stages=3)
  assert ended.num_steps == 1 and (ended.mask.sum(1) == 1).all()
  one = sample(0, max_completion_length=1, num_stages=3)
  assert_same(one, sample(0, max_completion_length=1))


@pytest.mark.parametrize('length, num_stages, lengths, ends', [
    (16, 4, [4, 8, 12, 16], [5, 9, 13, 16]),
    (7, 3, [3, 5, 7], [4, 6, 7]),
    (9, 1, [9], [9]),
    (3, 3, [1, 2, 3], [2, 3, 3]),
])
def test_a_stage_ends_when_its_places_are_taken(
    length, num_stages, lengths, ends
):
  assert decoding.stage_lengths(length, num_stages) == lengths
  assert decoding.stage_ends(length, num_stages) == ends


def test_each_stage_has_a_cache_of_its_own_length():
  keys = sampling.row_keys(jax.random.key(3), NUM_ROWS)
  traced = jax.make_jaxpr(make_sampler(0, num_stages=3))(
      tiny_model.params(), tiny_model.prompts(NUM_PROMPTS), keys
  )
  config = tiny_model.CONFIG
  heads, size = config.num_key_value_heads, config.head_dim
  caches = [
      {x.aval.shape[3] for x in equation.outvars
       if x.aval.shape[:3] == (NUM_ROWS, heads, size)}
      for equation in traced.jaxpr.eqns if equation.primitive.name == 'while'
  ]
  assert [x for x in caches if x] == [
      {x} for x in decoding.stage_lengths(C, 3)
  ]


def test_a_slot_does_not_see_what_its_last_owner_left():
  # Rows begin anywhere in the ring and go around its end.
  expected = sample(0, config=WINDOW)
  assert (expected.tokens != sample(0).tokens).any()  # The window matters.
  assert_same(sample(5, config=WINDOW), expected)


@pytest.mark.parametrize('num_slots', [1, 5, 31])
def test_a_slot_is_filled_again_in_the_step_in_which_its_row_ends(num_slots):
  # A schedule without gaps: the next row starts where a slot is free first.
  lengths = sample(0).mask.sum(1)
  ends = [0] * num_slots
  for length in lengths[lengths > 1]:
    heapq.heappush(ends, heapq.heappop(ends) + int(length) - 1)
  assert sample(num_slots).num_steps == 1 + max(ends)


def test_rows_that_end_at_once_need_no_slot():
  everything = tuple(range(tiny_model.CONFIG.vocab_size))
  ended = sample(5, eos_ids=everything)
  assert ended.num_steps == 1 and (ended.mask.sum(1) == 1).all()
  assert_same(ended, sample(0, eos_ids=everything))


def test_completions_of_one_token_need_no_slot():
  one = sample(5, max_completion_length=1)
  assert one.num_steps == 1 and one.mask.all()
  assert_same(one, sample(0, max_completion_length=1))


@pytest.mark.parametrize('num_slots, dtype, length', [
    (0, 'float32', 4096),
    (8, 'float32', 4096),
    # Shorter, as XLA computes what is in an empty cache when it compiles.
    pytest.param(0, 'int8', 256, marks=pytest.mark.slow),
    pytest.param(8, 'int8', 1024, marks=pytest.mark.slow),
])
def test_each_layer_costs_the_memory_of_its_cache_and_no_copy_of_it(
    num_slots, dtype, length
):
  config = tiny_model.CONFIG
  # Of a token and head, with its scale.
  vector = 4 * config.head_dim if dtype == 'float32' else config.head_dim + 4
  vectors = 2 * config.num_key_value_heads * length * (num_slots or NUM_ROWS)
  cache = vector * vectors  # Of one layer.
  grown = bytes_of_a_layer(
      num_slots, max_completion_length=length, cache_dtype=dtype
  )
  # Weights of a layer and copies of prompts beside it are smaller.
  assert cache < grown < cache + 60_000


def test_a_cache_that_grows_does_not_exist_twice():
  config, length = tiny_model.CONFIG, 4096
  cache = 2 * 4 * config.num_key_value_heads * config.head_dim * (
      length * NUM_ROWS
  )
  # The last one and the one before it would be 1.75 of it.
  grown = bytes_of_a_layer(0, max_completion_length=length, num_stages=4)
  assert 0.9 * cache < grown < 1.1 * cache


def bytes_of_a_layer(num_slots, **options):
  """Temporary bytes of a sampler, of each layer that is added."""

  def temporary_bytes(num_layers):
    config = dataclasses.replace(
        tiny_model.CONFIG, num_hidden_layers=num_layers
    )
    sampler = make_sampler(num_slots, config=config, **options)
    shapes = jax.eval_shape(
        lambda: (
            tiny_model.MODEL.replace(config=config).init(jax.random.key(0)),
            jax.tree.map(jnp.asarray, tiny_model.prompts(NUM_PROMPTS)),
            sampling.row_keys(jax.random.key(0), NUM_ROWS),
        )
    )
    compiled = jax.jit(sampler).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  return (temporary_bytes(6) - temporary_bytes(2)) / 4


# --- on eight devices --------------------------------------------------------


def on_eight_devices():
  """Prints what a sampler over a mesh draws, and what its loops wait for."""
  prompts = tiny_model.prompts(NUM_PROMPTS)
  keys = sampling.row_keys(jax.random.key(3), NUM_ROWS)
  for sizes in (
      {'data': 8}, {'data': 2, 'fsdp': 4}, {'data': 2, 'fsdp': 2, 'tensor': 2}
  ):
    mesh = whole_step.make_mesh(**sizes)
    params = jax.device_put(
        tiny_model.params(), sharding.of_params(tiny_model.params(), mesh)
    )
    rows = jax.device_put((prompts, keys), sharding.batch(mesh))
    for num_slots, options in (
        (0, {}), (0, {'num_stages': 3}), (2, {}), (2, {'num_halvings': 1})
    ):
      sampler = sharding.by_rows(
          make_sampler(num_slots, **options), mesh,
          head_dim=tiny_model.CONFIG.head_dim,
      )
      program = jax.jit(sampler).lower(params, *rows).compile()
      out = program(params, *rows)
      print(json.dumps({
          'sizes': sizes,
          'num_slots': num_slots,
          'devices': len(out.tokens.sharding.device_set),
          'tokens': np.asarray(out.tokens).tolist(),
          'num_steps': int(out.num_steps),
          'collectives': collectives.in_loops(program.as_text()),
      }))


def permutes(moved):
  """Those in which on a CPU all devices take part, also those that have ended.

  The others are of a group of devices, which end together.
  """
  return [x for x in moved if x[0] == 'collective-permute']


@pytest.mark.several_devices
@pytest.mark.slow
def test_over_a_mesh_tokens_are_the_same_and_no_loop_moves_weights_or_waits():
  printed = many_devices.run(
      'import decoding_test; decoding_test.on_eight_devices()',
      optimized=False,
  )
  lines = [json.loads(x) for x in printed]
  assert len(lines) == 12
  expected = sample(0)
  for line in lines:
    assert line['devices'] == 8
    np.testing.assert_array_equal(line['tokens'], expected.tokens)
    assert bool(line['collectives']) == ('tensor' in line['sizes'])
    assert not permutes(line['collectives'])
    if not line['num_slots']:
      assert line['num_steps'] == expected.num_steps


# A kernel of a layer has 256 * 256 numbers, more than any activation. Tokens
# are drawn from 128 blocks of 4.
WIDE = {
    'vocab_size': 512, 'hidden_size': 256, 'intermediate_size': 512,
    'num_attention_heads': 8, 'num_key_value_heads': 8, 'head_dim': 32,
}
DENSE = dataclasses.replace(tiny_model.CONFIG, **WIDE)
WITH_EXPERTS = dataclasses.replace(
    tiny_model.WITH_EXPERTS.config, **WIDE, num_experts=8,
    moe_intermediate_size=256,
)
# Half a head, and one and a half, would be what a device has of the kernels.
ONE_KEY_HEAD = dataclasses.replace(DENSE, num_key_value_heads=1)
ODD_HEADS = dataclasses.replace(
    DENSE, num_attention_heads=6, num_key_value_heads=3
)
# The model, the learner's mesh, and what the sampler has of its own.
LAYOUTS = {
    'fsdp': (DENSE, {'fsdp': 8}, {}),
    'sequence': (DENSE, {'fsdp': 2, 'sequence': 4}, {}),
    'tensor': (DENSE, {'tensor': 8}, {}),
    'all': (DENSE, {'data': 2, 'fsdp': 2, 'tensor': 2}, {}),
    'one key head': (ONE_KEY_HEAD, {'data': 2, 'fsdp': 2, 'tensor': 2}, {}),
    'odd heads': (ODD_HEADS, {'data': 2, 'tensor': 4}, {}),
    'fsdp, then tensor': (DENSE, {'fsdp': 8}, {'tensor': 2}),
    'expert': (WITH_EXPERTS, {'fsdp': 2, 'expert': 4}, {}),
    'fsdp, then expert': (WITH_EXPERTS, {'fsdp': 8}, {'expert': 4}),
}


def loops_on_eight_devices():
  """Prints what the loops over a prompt's layers and over tokens move."""
  for name, (config, sizes, own) in LAYOUTS.items():
    mesh = whole_step.make_mesh(**sizes)
    sampling_mesh = sharding.sampling_mesh(
        mesh, **{'tensor': 0, 'expert': 0} | own
    )
    model = tiny_model.WITH_EXPERTS if config.num_experts else tiny_model.MODEL
    params = jax.eval_shape(
        model.replace(config=config).init, jax.random.key(0)
    )
    params = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        params, sharding.of_params(params, mesh),
    )
    sampler = sharding.on_its_own_mesh(
        make_sampler(0, model=model, config=config, group_size=1),
        mesh=sampling_mesh, learner_mesh=mesh, head_dim=config.head_dim,
    )
    rows = sharding.batch(mesh)
    of_params = jax.tree.map(lambda x: x.sharding, params)
    jitted = jax.jit(sampler, in_shardings=(of_params, rows, rows))
    text = jitted.lower(
        params,
        tiny_model.prompts(NUM_PROMPTS),
        sampling.row_keys(jax.random.key(3), NUM_PROMPTS),
    ).compile(many_devices.QUICK).as_text()
    program = hlo.parse(text)
    steps = hlo.executed(program, num_trips=lambda phase, _: (phase, C))
    gathered = [
        x.payload * x.times
        for x in hlo.collectives(program, list(steps), num_devices=mesh.size)
        if x.kind == 'all-gather'
    ]
    tensor, heads = sampling_mesh.shape['tensor'], config.num_key_value_heads
    parts = 1 if heads % tensor else tensor
    num_rows = NUM_PROMPTS // sharding.num_row_shards(sampling_mesh)
    print(json.dumps({
        'name': name,
        'rows': num_rows,
        'devices': tensor,
        'collectives': collectives.in_loops(text),
        'gathered': sorted(gathered),
        # Of weights that are split.
        'weights': sorted(
            4 * x.size for x in jax.tree.leaves(params)
            if x.sharding.shard_shape(x.shape) != x.shape
        ),
        # Keys [B, K, E, C]: of a device's rows and heads, not of all heads.
        'split': f'[{num_rows},{heads // parts},32,{C}]' in text,
        'whole': parts > 1 and f'[{num_rows},{heads},32,{C}]' in text,
    }))


@functools.cache
def loops_of_layouts():
  """What `loops_on_eight_devices` prints, by name."""
  printed = many_devices.run(
      'import decoding_test; decoding_test.loops_on_eight_devices()',
      optimized=False,
  )
  return {line.pop('name'): line for line in map(json.loads, printed)}


@pytest.fixture(scope='module')
def loops():
  return loops_of_layouts()


@pytest.mark.several_devices
@pytest.mark.slow
@pytest.mark.parametrize('name', ['fsdp', 'sequence'])
def test_split_weights_are_brought_together_once_for_prompts_and_all_tokens(
    loops, name
):
  weights = loops[name]['weights']
  # Embedding and head in one, and seven kernels of all layers.
  assert len(weights) == 8
  assert loops[name]['gathered'] == weights


@pytest.mark.several_devices
@pytest.mark.slow
@pytest.mark.parametrize('name', LAYOUTS)
def test_loops_of_the_sampler_move_activations_and_never_weights(loops, name):
  config, sizes, own = LAYOUTS[name]
  moved = loops[name]['collectives']
  assert loops[name]['split'] and not loops[name]['whole']
  # Splitting rows moves nothing.
  split = (sizes | own).keys() & {'tensor', 'expert'}
  assert bool(moved) == bool(split)
  assert not permutes(moved)
  # Sums of activations; of each device the best token of every row; and how
  # many tokens go to each expert.
  few = max(config.num_experts, loops[name]['rows'] * loops[name]['devices'])
  # What one device computes of odd heads, all others gather.
  assert all(
      size <= few for kind, size in moved
      if kind != 'all-reduce' and (kind, config) != ('all-gather', ODD_HEADS)
  )
  # Of all tokens of the prompts, for each of the experts of a token.
  tokens = loops[name]['rows'] * tiny_model.PROMPT_LENGTH
  activations = tokens * 256 * max(config.num_experts_per_tok, 1)
  assert activations < 256 * 256
  assert all(size <= activations for _, size in moved)
