"""What a plan counts is what hand arithmetic says; slices need not exist."""

import dataclasses
import importlib
import importlib.util
import math
import os
import pathlib
import re
import subprocess
import sys

from flax import nnx
import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from benchmarks import plans
from configs import default
from dppo_jax import checks
from dppo_jax import chips
from dppo_jax import hlo
from dppo_jax import operations
from dppo_jax import plan as plan_lib
from dppo_jax import plan_search
from dppo_jax import plan_text
from dppo_jax import plan_types
from dppo_jax import roofline
from dppo_jax import sharding
from dppo_jax.models import attention
from dppo_jax.models import attention_kernels
from dppo_jax.models import experts
from dppo_jax.models import sizes

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="the TPU compiler is not installed: pip install 'dppo_jax[tpu]'",
)
M, N, K, L = 8, 16, 32, 5


def count(fn, *arguments, **options):
  return operations.count(jax.make_jaxpr(fn)(*arguments), **options)


def scanned_products(x, kernels):
  """[M, K] times [L, K, K], one after the other."""
  return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]


X, KERNELS = jnp.ones((M, K)), jnp.ones((L, K, K))


def test_a_product_is_two_operations_for_each_triple():
  assert count(jnp.matmul, X, jnp.ones((K, N))) == {'': 2 * M * K * N}


def test_the_body_of_a_scan_counts_as_often_as_it_runs():
  assert count(scanned_products, X, KERNELS) == {'': L * 2 * M * K * K}


def test_a_gradient_and_what_it_recomputes_count():
  layer = jax.checkpoint(lambda x, kernel: jnp.sin(x @ kernel) @ kernel)
  loss = lambda x, kernel: jnp.sum(layer(x, kernel))
  # Forward 2 products; the first again; then two gradients of each.
  [total] = count(jax.grad(loss, (0, 1)), X, KERNELS[0]).values()
  assert total == (2 + 1 + 4) * 2 * M * K * K


def test_rows_of_a_grouped_product_meet_their_own_group_only():
  groups, kernels = jnp.full(4, M // 4), jnp.ones((4, K, N))
  loss = lambda x, y: jnp.sum(jax.lax.ragged_dot(x, y, groups))
  once = 2 * M * K * N
  assert count(loss, X, kernels) == {'': once}
  assert count(jax.grad(loss, (0, 1)), X, kernels) == {'': 3 * once}


@pytest.mark.parametrize('rows', [1, 3])
def test_a_kernel_counts_as_if_it_left_no_block_out(rows):
  length, heads, size = 640, 4, 8  # Two blocks of 384 are 768.

  def attend(segments, q):
    where = attention.Where(segments, segments, segments)
    [sight], attend_with = attention_kernels.splash()(
        where, [None], scale=1.0, cap=None
    )
    return attend_with(sight)(q, q, q)[0]

  segments = jnp.ones((rows, length), jnp.int32)
  q = jnp.ones((rows, length, heads, size))
  # Queries with keys, weights with values.
  assert count(attend, segments, q) == {
      '': rows * heads * 2 * (2 * 768 * 768 * size)
  }


def test_a_loop_of_unknown_length_is_asked_for():
  def decode(x):
    with jax.named_scope('sample'):
      return jax.lax.while_loop(
          lambda x: jnp.sum(x) < 1, lambda x: x @ x, x @ x
      )

  trips = lambda phase, _: ('decode', 100) if phase == 'sample' else (phase, 0)
  once = 2 * K**3
  assert count(
      decode, KERNELS[0], phases=('sample',), num_trips=trips
  ) == {'sample': once, 'decode': 100 * once}
  with pytest.raises(ValueError, match='num_trips'):
    count(decode, KERNELS[0])


def test_the_dearest_branch_counts_and_shards_count_all():
  def fn(x):
    return jax.lax.cond(
        x[0, 0] > 0, lambda: x @ KERNELS[0] @ KERNELS[1], lambda: x * 2
    )

  assert count(fn, X) == {'': 2 * 2 * M * K * K}
  mesh = jax.sharding.AbstractMesh(
      (2, 1), ('rows', 'rest'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  rows = jax.P('rows')
  split = jax.shard_map(
      lambda x: x @ KERNELS[0], mesh=mesh, in_specs=rows, out_specs=rows,
      axis_names={'rows'},
  )
  assert count(jax.jit(split), X) == {'': 2 * M * K * K}


@pytest.mark.parametrize('sizes', [
    {'fsdp': 4}, {'expert': 4}, {'fsdp': 2, 'tensor': 2, 'expert': 2}
], ids=str)
def test_a_token_costs_its_own_experts_wherever_they_are(sizes):
  mesh = jax.sharding.AbstractMesh(
      tuple(sizes.get(axis, 1) for axis in sharding.AXES), sharding.AXES,
      axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
  )
  config = dataclasses.replace(
      tiny_model.CONFIG, num_experts=8, num_experts_per_tok=2,
      moe_intermediate_size=16,
  )
  batch, length, width = 4, 3, config.hidden_size
  layer = experts.Experts(config, rngs=nnx.Rngs(0))
  x = jnp.ones((batch, length, width))
  choices = jnp.zeros((batch, length, 2), jnp.int32)
  run = lambda x: layer(
      x, choices, jnp.ones(choices.shape), sharding.by_experts(mesh)
  )
  [total] = count(jax.jit(run), x).values()
  products = 2 * batch * length * 2 * 3 * width * 16
  # Weighted sums are one more, of a device's part of each.
  assert products <= total <= products * 1.1


def test_a_models_forward_pass_is_the_sum_of_its_products():
  config = tiny_model.CONFIG
  batch, length = 3, 7
  tokens = jnp.zeros((batch, length), jnp.int32)
  params = jax.eval_shape(tiny_model.MODEL.init, jax.random.key(0))
  [total] = count(tiny_model.MODEL.apply, params, tokens).values()
  width, heads = config.hidden_size, config.num_attention_heads
  size, keys = config.head_dim, config.num_key_value_heads
  projections = width * size * (2 * heads + 2 * keys)  # q, o; k, v.
  scores = 2 * length * heads * size  # q with k, weights with v.
  mlp = 3 * width * config.intermediate_size
  layers = config.num_hidden_layers * (projections + scores + mlp)
  expected = 2 * batch * length * (layers + width * config.vocab_size)
  # The angles of rotary positions are a product too, of size / 2 numbers.
  assert total == pytest.approx(expected, rel=0.01)
  assert total >= expected


def program_of(fn, *arguments):
  compiled = jax.jit(fn).lower(*arguments).compile()
  return hlo.parse(compiled.as_text())


def test_the_text_of_a_compiled_scan_tells_how_often_it_runs():
  program = program_of(scanned_products, X, KERNELS)
  steps = list(hlo.executed(program))
  [loop] = [x for x in steps if x.instruction.opcode == 'while']
  assert hlo.trip_count(program, loop.computation, loop.instruction) == L
  inside = [x for x in steps if x.computation != program.entry]
  assert inside and {x.times for x in inside} == {L}


def test_a_scanned_layer_is_read_as_a_slice():
  kernels = jnp.ones((40, K, K))
  program = program_of(scanned_products, X, kernels)
  total = sum(
      x.times * hlo.traffic(program, x) for x in hlo.executed(program)
  )
  read_once = 4 * kernels.size
  # A layer may be copied first, and rows come and go; were all layers read
  # with each, it would be 40 times as much.
  assert read_once <= total < 6 * read_once


def test_a_loop_whose_end_is_data_is_asked_for():
  def fn(x):
    with jax.named_scope('sample'):
      return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, jnp.sin, x)

  program = program_of(fn, X)
  trips = lambda phase, loop: ('decode', 7)
  steps = list(hlo.executed(program, phases=('sample',), num_trips=trips))
  assert {x.times for x in steps if x.phase == 'decode'} == {7}


# Lines as XLA writes them, with long names and layouts shortened to the kinds
# that differ.
_TEXT = '''HloModule jit_step, num_partitions=8

%gathered.1 (param_0.2: bf16[4,8]) -> bf16[16,8] {
  %param_0.2 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.9 = bf16[16,8]{1,0} all-gather(%param_0.2), \
replica_groups=mesh['axis_0'=2,'axis_1'=4], \
device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}
}

%cond (p: (s32[], f32[4,8])) -> pred[] {
  %c = s32[]{:T(128)} constant(6)
  %p = (s32[]{:T(128)}, /*index=1*/f32[4,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

%body (p.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p.1 = (s32[]{:T(128)}, /*index=1*/f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p.1), index=1
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %r = f32[4,8]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %t = (s32[]{:T(128)}, /*index=1*/f32[4,8]{1,0}) tuple(%i.1, %r)
}

ENTRY %main.1_spmd (a: bf16[4,8], b: f32[4,8]) -> f32[4,8] {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[4,8]{1,0} parameter(1)
  %fusion.1 = bf16[16,8]{1,0} fusion(%a), kind=kCustom, \
calls=%gathered.1, metadata={op_name="jit(step)/learn/x"}
  %start = (f32[4,8]{1,0}, f32[4,8]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) \
collective-permute-start(%b), source_target_pairs={{0,1},{1,0}}
  %done = f32[4,8]{1,0:T(8,128)S(1)} collective-permute-done(%start)
  %zero = s32[] constant(0)
  %init = (s32[], f32[4,8]{1,0}) tuple(%zero, %done)
  %loop = (s32[], f32[4,8]{1,0}) while(%init), condition=%cond, \
body=%body, metadata={op_name="jit(step)/sample/while"}
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
'''


_WEIGHTS = '''HloModule jit_step

%same.1 (w.1: bf16[64,32]) -> bf16[64,32] {
  %w.1 = bf16[64,32]{1,0} parameter(0)
  ROOT %b.1 = bf16[64,32]{1,0} bitcast(%w.1)
}

%product.1 (w: bf16[64,32], x: bf16[4,64]) -> bf16[4,32] {
  %w = bf16[64,32]{1,0} parameter(0)
  %x = bf16[4,64]{1,0} parameter(1)
  %f = bf16[64,32]{1,0} fusion(%w), kind=kLoop, calls=%same.1
  ROOT %y = bf16[4,32]{1,0} USER
}

ENTRY %main.1_spmd (a: bf16[64,32], b: bf16[4,64]) -> bf16[4,32] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[4,64]{1,0} parameter(1)
  ROOT %fusion.1 = bf16[4,32]{1,0} fusion(%a, %b), kind=kOutput, \
calls=%product.1
}
'''


@pytest.mark.parametrize('user, read', [
    ('convolution(%x, %f), dim_labels=bf_io->bf', 2 * 64 * 32),
    ('slice(%f), slice={[0:4], [0:32]}', 2 * 4 * 32),
])
def test_weights_that_a_fusion_in_a_fusion_only_renames_are_read(user, read):
  program = hlo.parse(_WEIGHTS.replace('USER', user))
  [step] = [x for x in hlo.executed(program) if x.instruction.is_root]
  result = 2 * 4 * 32
  other = 2 * 4 * 64 if 'convolution' in user else 0
  assert hlo.traffic(program, step) == read + other + result


_FUSED = '''HloModule jit_step

%first.1 (w.1: f32[4,64]) -> f32[1,64] {
  %w.1 = f32[4,64]{1,0} parameter(0)
  ROOT %b.1 = f32[1,64]{1,0} slice(%w.1), slice={[0:1], [0:64]}
}

%taken.1 (x: bf16[4,64], i: s32[4], u: f32[1,64]) -> RESULT {
  %x = bf16[4,64]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %u = f32[1,64]{1,0} parameter(2)
  %r = bf16[4,64]{1,0} bitcast(%x)
  %d = f32[4,64]{1,0} convert(%x)
  %l = f32[4,64]{1,0} logistic(%d)
  %s = f32[4,64]{1,0} multiply(%d, %l)
  ROOT %y = RESULT USER
}

ENTRY %main.1_spmd (a: bf16[4,64], b: s32[4], c: f32[1,64]) -> RESULT {
  %a = bf16[4,64]{1,0} parameter(0)
  %b = s32[4]{0} parameter(1)
  %c = f32[1,64]{1,0} parameter(2)
  ROOT %fusion.1 = RESULT fusion(%a, %b, %c), kind=kLoop, calls=%taken.1
}
'''


@pytest.mark.parametrize('result, user, read, written', [
    ('f32[4,1]{1,0}', 'gather(%d, %i), offset_dims={1}', 2 * 4, 4 * 4),
    # Reached by two paths, and read once.
    ('f32[4,1]{1,0}', 'gather(%s, %i), offset_dims={1}', 2 * 4, 4 * 4),
    ('f32[4]{0}', 'reduce(%s, %i), dimensions={1}', 2 * 256, 4 * 4),
    ('f32[1,64]{1,0}', 'fusion(%d), kind=kLoop, calls=%first.1',
     2 * 64, 4 * 64),
    # In place, and as a whole.
    ('bf16[4,64]{1,0}', 'dynamic-update-slice(%r, %u, %i)', 0, 4 * 64),
    ('f32[4,64]{1,0}', 'dynamic-update-slice(%d, %u, %i)', 2 * 256, 4 * 256),
    ('f32[4,64]{1,0}', 'scatter(%s, %i, %u)', 2 * 256, 4 * 256),
], ids=['taken', 'by two paths', 'summed', 'within', 'put', 'made', 'spread'])
def test_a_fusion_reads_what_it_takes_of_what_it_makes(
    result, user, read, written
):
  program = hlo.parse(_FUSED.replace('USER', user).replace('RESULT', result))
  [step] = [x for x in hlo.executed(program) if x.instruction.is_root]
  others = 4 * 4 * ('%i' in user) + 4 * 64 * ('%u' in user)
  assert hlo.traffic(program, step) == read + written + others


def test_many_paths_through_a_fusion_are_walked_once():
  more, product, gate = '', '%s', '%l'
  for i in range(64):
    more += (
        f'  %s{i} = f32[4,64]{{1,0}} multiply({product}, {gate})\n'
        f'  %l{i} = f32[4,64]{{1,0}} logistic(%s{i})\n'
    )
    product, gate = f'%s{i}', f'%l{i}'
  text = _FUSED.replace('  ROOT %y', more + '  ROOT %y')
  text = text.replace('USER', f'gather({product}, %i), offset_dims={{1}}')
  program = hlo.parse(text.replace('RESULT', 'f32[4,1]{1,0}'))
  [step] = [x for x in hlo.executed(program) if x.instruction.is_root]
  assert hlo.traffic(program, step) == 2 * 4 + 4 * 4 + 4 * 4


def test_collectives_are_found_in_fusions_loops_and_all_notations():
  program = hlo.parse(_TEXT)
  steps = list(hlo.executed(program, phases=('learn', 'sample')))
  found = hlo.collectives(program, steps, num_devices=8)
  gather, permute, reduce = found
  # Of 16 * 8 numbers of 2 bytes, three quarters come from three others.
  assert gather[:5] == ('all-gather', 'learn', 1, 4, 256)
  assert gather.sent == 256 * 3 / 4
  assert permute[:2] == ('collective-permute', '')
  assert permute.sent == 4 * 32
  # Twice around the ring, less what is one's own.
  assert reduce[:5] == ('all-reduce', 'sample', 6, 4, 128)
  assert reduce.sent == 2 * 128 * 3 / 4


_SCATTERED = '''HloModule jit_step

%all-reduce-scatter.1 (x: bf16[16,8]) -> bf16[4,8] {
  %x = bf16[16,8]{1,0} parameter(0)
  %sum = bf16[16,8]{1,0} all-reduce(%x), replica_groups={{0,2,4,6},{1,3,5,7}}, \
to_apply=%add
  %first = s32[] constant(4)
  %zero = s32[] constant(0)
  ROOT %part = bf16[4,8]{1,0} dynamic-slice(%sum, %first, %zero), \
dynamic_slice_sizes={4,8}
}

ENTRY %main.1 (a: bf16[16,8]) -> bf16[4,8] {
  %a = bf16[16,8]{1,0} parameter(0)
  ROOT %out = bf16[4,8]{1,0} fusion(%a), kind=kCustom, \
calls=%all-reduce-scatter.1
}
'''


def test_a_sum_of_which_a_device_takes_its_part_is_sent_once():
  program = hlo.parse(_SCATTERED)
  steps = list(hlo.executed(program))
  [found] = hlo.collectives(program, steps, num_devices=8)
  assert (found.kind, found.group, found.payload) == ('reduce-scatter', 4, 256)
  assert found.sent == 256 * 3 / 4


_KERNEL = '''HloModule jit_step

ENTRY %main.1 (a: bf16[4,8]) -> f32[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %kernel = f32[4,8]{1,0} custom-call(%a), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/learn/pallas_call"}
  ROOT %out = f32[4,8]{1,0} copy(%kernel)
}
'''


def test_a_kernel_is_one_instruction_although_its_lines_break():
  program = hlo.parse(_KERNEL)
  steps = list(hlo.executed(program, phases=('learn',)))
  assert [step.instruction.name for step in steps] == ['a', 'kernel', 'out']
  kernel = steps[1]
  assert kernel.phase == 'learn'
  # Reads 32 numbers of 2 bytes, writes as many of 4.
  assert hlo.traffic(program, kernel) == 32 * (2 + 4)


def test_what_stays_on_the_chip_is_no_traffic():
  program = hlo.parse(_TEXT)
  moved = {
      x.instruction.name: hlo.traffic(program, x)
      for x in hlo.executed(program)
  }
  assert moved['start'] == 128  # Read; the result is in memory space 1.
  assert moved['done'] == moved['loop'] == moved['init'] == 0
  assert moved['r'] == 2 * 128
  assert hlo.num_bytes('(bf16[2,3]{1,0:S(1)}, s4[8]{0}, pred[])') == 12 + 4 + 1
  assert hlo.num_bytes('(bf16[2,3]{1,0:S(1)}, s32[])', on_chip=False) == 4


def test_a_phase_takes_the_longest_of_its_three_times():
  chip = chips.Chip('x', 100.0, 1, 10.0, 6.0, 3, '')
  phase = roofline.Phase('learn', 300.0, 50.0, 8.0, {})
  assert phase.seconds(chip) == {'compute': 3.0, 'memory': 5.0, 'network': 4.0}
  assert phase.bound(chip) == ('memory', 5.0)
  assert roofline.step_seconds([phase, phase], chip) == 10.0


def test_expected_lengths_make_the_loops():
  config = default.get_config()
  config.update_from_flattened_dict({
      'num_prompts': 32, 'group_size': 8, 'max_prompt_length': 20,
      'max_completion_length': 80, 'learner.num_microbatches': 8,
  })
  assert plan_lib.expect(config, 0).decode_steps == 79
  config.sampling.num_slots = 32  # 256 completions of 41 tokens, 8 a slot.
  found = plan_lib.expect(config, 41)
  assert found.decode_steps == 8 * 40
  assert found.microbatches == 8 * (20 + 41) / 100
  assert found.chunks == 1  # All logits at once.
  config.learner.chunk_size = 100
  # 256 / (4 * 8) completions of 41 tokens in a micro-batch.
  parts = config.learner.num_minibatches * 8
  assert plan_lib.expect(config, 41).chunks == -(-256 * 41 // (parts * 100))
  assert plan_lib.expect(config, 41, 2).chunks == -(-256 * 41 // (parts * 200))
  with pytest.raises(ValueError, match='--mean_length=81'):
    plan_lib.expect(config, 81)


def tiny_config(**changes):
  config = default.get_config('dppo_binary_tv')
  config.update_from_flattened_dict({
      'num_prompts': 8, 'group_size': 2, 'max_prompt_length': 9,
      'max_completion_length': 13, 'learner.num_minibatches': 2,
      'eval.num_prompts': 8, 'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.tensor': 2,
      'model.dtype': 'bfloat16', 'sampling.dtype': 'bfloat16',
  } | changes)
  return config


@pytest.fixture(scope='module')
def topology():
  # Without a device nothing can be read back.
  before = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # Or it remembers that there is one.
  yield plan_lib.make_topology('v5e:2x2')
  jax.config.update('jax_enable_compilation_cache', before)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def plan(topology):
  return plan_lib.make_plan(tiny_config(), topology, tiny_model.MODEL)


@needs_libtpu
@pytest.mark.slow
def test_kinds_of_memory_add_up_to_what_xla_says(plan):
  sizes = plan.sizes
  other = sizes['arguments'] - sum(plan.lasting.values())
  # Counters, keys, prompts, and what XLA pads small arrays with.
  assert 0 <= other < 2**20
  assert sum(plan.temporary.values()) == sizes['temporary']
  assert min(plan.temporary.values()) >= 0
  config = tiny_model.CONFIG
  # 8 completions of 13 tokens and 4 prompts of 9 on each of two shards; keys
  # and values, one of two heads, bfloat16.
  numbers = (8 * 13 + 4 * 9) * 2 * config.head_dim * config.num_hidden_layers
  assert plan.temporary['keys and values'] == 2 * numbers


@needs_libtpu
@pytest.mark.slow
def test_no_weight_moves_while_decoding(plan):
  learn, _, decode = plan.phases
  assert 'all-gather' in learn.collectives
  assert decode.sent > 0  # Heads and vocabulary are split.
  weights = plan.temporary["sampler's weights"]
  steps = plan.expected.decode_steps
  assert weights > 0
  assert decode.sent / steps < weights
  assert not plan.unknown_loops


@needs_libtpu
@pytest.mark.slow
def test_a_head_in_chunks_multiplies_no_more_than_one_at_once(topology, plan):
  # A device has 4 completions of 13 tokens in an update.
  chunks = plan_lib.make_plan(
      tiny_config(**{'learner.chunk_size': 13}), topology, tiny_model.MODEL
  )
  assert chunks.expected.chunks == 4 and not chunks.unknown_loops
  learn, others = plan.phases[0], chunks.phases[0]
  assert learn.flops == others.flops


@needs_libtpu
@pytest.mark.slow
def test_loops_over_fewer_slots_add_no_operation(topology):
  in_slots, halved = (
      plan_lib.make_plan(
          tiny_config(**{
              'sampling.num_slots': 8, 'sampling.num_halvings': halvings
          }),
          topology, tiny_model.MODEL,
      )
      for halvings in (0, 1)
  )
  operations = lambda plan: [phase.flops for phase in plan.phases]
  assert operations(halved) == operations(in_slots)
  assert not halved.unknown_loops


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize('row_length', [0, 21])
def test_a_recomputed_anchor_is_as_dear_in_any_number_of_updates(
    topology, row_length
):
  learned = [
      plan_lib.make_plan(
          tiny_config(**{
              'anchor': 'recomputed', 'learner.num_minibatches': updates,
              'learner.num_microbatches': 2, 'learner.row_length': row_length,
          }),
          topology, tiny_model.MODEL,
      ).phases[0].flops
      for updates in (1, 2)
  ]
  # Rows as sampled: 16 in parts of 8 or 4. Packed: a part is 4 rows or 2.
  assert learned[0] == pytest.approx(learned[1], rel=1e-6)


@needs_libtpu
@pytest.mark.slow
def test_a_cache_in_stages_is_multiplied_less_in_as_many_steps(topology):
  one, two = (
      plan_lib.make_plan(
          tiny_config(**{
              'max_completion_length': 128, 'sampling.num_stages': stages
          }),
          topology, tiny_model.MODEL,
      )
      for stages in (1, 2)
  )
  assert not two.unknown_loops
  assert two.temporary['keys and values'] == one.temporary['keys and values']
  learn, sample, decode = zip(one.phases, two.phases, strict=True)
  assert learn[0].flops == learn[1].flops
  assert sample[0].flops == sample[1].flops
  # Products with kernels are the same, those with what is cached are fewer.
  assert decode[1].flops < decode[0].flops
  assert decode[1].collectives == decode[0].collectives


@needs_libtpu
@pytest.mark.slow
def test_a_plan_prints_what_it_knows(plan):
  text = '\n'.join(plan_text.describe(plan))
  assert 'it fits' in text and 'all-reduce' in text
  assert 'fsdp=2 tensor=2' in text
  assert chips.CHIPS['v5e'].source in plan_text.assumptions(plan)
  header, _, row = plan_text.table([plan])
  assert header.count('|') == row.count('|')
  # A model of a few thousand parameters: nothing of it is shown as zero.
  assert re.search(r'[1-9]\S* us \|', row), row
  zero = re.compile(r'(?<![\d.])0(\.0+)? (m|u|k|M|G|T)?(s|B|FLOP)\b')
  assert not zero.search(row) and not zero.search(text), text


@needs_libtpu
@pytest.mark.slow
def test_a_plan_has_room_for_evaluation_or_says_what_is_missing(topology, plan):
  needed, held = plan.evaluate()
  # A device holds what lasts, and parameters count once.
  assert held == sum(plan.lasting.values())
  assert needed > 0
  _, line = plan_lib.with_room_to_evaluate([plan])
  assert f'{held / 1e3:.2f} kB of a run: it fits' in line
  # More completions than can stand on a device beside a run of 16.
  many = tiny_config(**{'eval.num_prompts': 512, 'eval.num_samples': 64})
  total = plan.sizes['total'] + 10**6
  small = topology._replace(chip=topology.chip._replace(memory=total))
  tight = plan_lib.make_plan(many, small, tiny_model.MODEL)
  with pytest.raises(ValueError, match='Held-out evaluation needs .* beside .*'
                     'To lower it: set config.eval.num_slots'):
    tight.evaluate()


def test_the_best_plan_is_the_best_that_can_evaluate():
  told = iter([refuse, lambda *_: (10**9, 2 * 10**9), refuse])
  answer = lambda ask: lambda: ask('no room')
  plans = [
      plan_types.Plan(
          None, None, {'data': 2**place}, None, {}, {}, {}, [], 0, 1.0,
          answer(ask),
      )
      for place, ask in enumerate(told)
  ]
  said = []
  found, line = plan_lib.with_room_to_evaluate(plans, said.append)
  assert found is plans[1] and said == ['one device: no room']
  assert '1.00 GB beside the 2.00 GB of a run: it fits' in line
  with pytest.raises(ValueError, match='no room'):
    plan_lib.with_room_to_evaluate(plans[2:], said.append)


@needs_libtpu
def test_what_cannot_last_is_refused_before_it_is_compiled(topology):
  small = topology._replace(chip=topology.chip._replace(memory=1000))
  with pytest.raises(ValueError, match='lasts from step to step'):
    plan_lib.make_plan(
        tiny_config(), small, tiny_model.MODEL,
        on_compile=lambda: pytest.fail('compiled'),
    )


def fake_search(monkeypatch, seconds, config=None, **options):
  """A search whose plans take `seconds(mesh, number)`, which may refuse.

  Returns (fsdp, tensor, micro-batches) in their order, and what was said.
  """

  def make_plan(config, topology, model, *, mean_length, on_compile):
    on_compile()
    mesh, number = config.mesh.to_dict(), config.learner.num_microbatches
    work = roofline.Phase('learn', 197e12 * seconds(mesh, number), 0, 0, {})
    return plan_types.Plan(
        config, chips.CHIPS['v5e'], mesh, None, {}, {}, {'total': 1}, [work],
        0, 1.0, lambda: pytest.fail('not asked for'),
    )

  monkeypatch.setattr(
      plan_search.sharding, 'make_mesh',
      lambda devices, **mesh: jax.sharding.AbstractMesh(
          tuple(mesh.values()), tuple(mesh)
      ),
  )
  said = []
  plans = plan_search.search(
      config or tiny_config(),
      plan_types.Topology('v5e:2x2', chips.CHIPS['v5e'], list(range(4))),
      tiny_model.MODEL, make_plan=make_plan, say=said.append,
      **{'max_compilations': 99} | options,
  )
  return [
      (plan.mesh['fsdp'], plan.mesh['tensor'],
       plan.config.learner.num_microbatches)
      for plan in plans
  ], said


def refuse(message):
  raise ValueError(message)


def test_a_search_ranks_what_fits(monkeypatch):
  found, said = fake_search(
      monkeypatch,
      lambda mesh, number: refuse('does not fit') if mesh['data'] > 1
      else 10 - mesh['fsdp'] + number,
  )
  # Two heads are split by two at most; nobody has experts.
  assert found == [(4, 1, 1), (2, 2, 1)]
  assert 'data=4, num_microbatches=1: does not fit' in said


def test_a_search_takes_more_microbatches_where_few_do_not_fit(monkeypatch):
  # 8 completions in a mini-batch, two shards: 1, 2 or 4 parts.
  seconds = lambda mesh, number: (
      number if mesh['tensor'] == 2 and number >= 2 else refuse('too large')
  )
  for start, tried in ((1, [1, 2]), (4, [4, 2, 1]), (2, [2, 1])):
    found, said = fake_search(
        monkeypatch, seconds, tiny_config(**{'learner.num_microbatches': start})
    )
    assert (2, 2, 2) in found
    assert [
        int(line.rpartition('=')[2]) for line in said
        if line.startswith('compiling') and 'fsdp=2 tensor=2' in line
    ] == tried


def test_a_search_compiles_no_more_than_it_may(monkeypatch):
  found, said = fake_search(
      monkeypatch, lambda mesh, number: 1, max_compilations=2
  )
  assert len(found) == 2
  # The config's own mesh comes first.
  assert said[0] == (
      'compiling 1 of at most 2: fsdp=2 tensor=2, num_microbatches=1'
  )
  assert re.fullmatch(r'\d+ of \d+ meshes are not done\.', said[-1])


def test_a_search_that_finds_nothing_says_why(monkeypatch):
  with pytest.raises(ValueError, match='Nothing fits v5e:2x2.*needs 9 GB'):
    fake_search(monkeypatch, lambda *_: refuse('needs 9 GB'))
  with pytest.raises(ValueError, match='config.num_prompts=3'):
    fake_search(monkeypatch, lambda *_: 1, tiny_config(
        **{'num_prompts': 3, 'learner.num_minibatches': 5}
    ))


@pytest.mark.parametrize('name, said', [
    ('v9:2x2', 'v4, v5e, v5p, v6e'),
    ('v5p', 'for example v5p:4x4x4'),
    ('v5p:4x4', 'has 3 sizes'),
    ('v5e:2xtwo', 'for example v5e:4x4'),
])
def test_an_unknown_slice_is_refused_with_the_known(name, said):
  with pytest.raises(ValueError, match=said):
    plan_lib.make_topology(name)


@needs_libtpu
def test_a_slice_that_nobody_builds_is_refused():
  with pytest.raises(ValueError, match='--topology=v5p:3x2x1: .*divisible'):
    plan_lib.make_topology('v5p:3x2x1')


@needs_libtpu
@pytest.mark.parametrize('name, shape', [
    ('v4', '2x2x1'), ('v5e', '2x2'), ('v5p', '2x2x1'), ('v6e', '2x2'),
])
def test_a_chip_is_a_device(name, shape):
  assert len(plan_lib.make_topology(f'{name}:{shape}').devices) == 4


@needs_libtpu
@pytest.mark.parametrize(
    'name', ['v4:1x1x1', 'v5e:1x1', 'v5p:1x1x1', 'v6e:1x1']
)
def test_one_chip_can_be_planned_for(name):
  assert len(plan_lib.make_topology(name).devices) == 1


@needs_libtpu
def test_an_axis_may_be_a_part_of_two_axes_of_the_torus():
  devices = plan_lib.make_topology('v5p:4x4x4').devices
  mesh = sharding.make_mesh(
      data=-1, fsdp=8, tensor=1, expert=1, devices=devices
  )
  assert dict(mesh.shape) | {'data': 8, 'fsdp': 8} == dict(mesh.shape)
  assert set(mesh.devices.flat) == set(devices)
  # The eight of an axis are neighbours: within 2 x 4 or 2 x 2 x 2 chips.
  for row in mesh.devices.reshape(8, 8):
    coords = np.array([device.coords for device in row])
    assert np.prod(np.ptp(coords, axis=0) + 1) == 8


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match=r'pip install .*\[tpu\]'):
    plan_lib.make_topology('v5e:2x2')


def test_the_command_line_refuses_in_one_line():
  done = subprocess.run(
      [sys.executable, '-m', 'dppo_jax.plan', '--config=configs/tv_topk.py',
       '--topology=v9:2x2'],
      cwd=pathlib.Path(__file__).parents[1],
      env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
      capture_output=True, text=True, check=False,
  )
  assert done.returncode == 2
  [line] = done.stderr.strip().splitlines()
  assert line.startswith("error: Unknown chip of --topology 'v9'")


def test_published_sizes_need_no_network(monkeypatch):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  for name in sizes.PUBLISHED:
    family, config = plan_lib.load.read_sizes(name)
    assert config.model_type == family.__name__.rsplit('.', maxsplit=1)[-1]


@pytest.mark.parametrize('name', plans.PLANS)
def test_every_kept_plan_passes_the_checks_of_its_config(name):
  _, _, _, config_flag, topology, *rest = plans.PLANS[name]
  path, _, argument = config_flag.removeprefix('--config=').partition(':')
  module = importlib.import_module(path.removesuffix('.py').replace('/', '.'))
  config = module.get_config(*filter(None, [argument]))
  changes = dict(x.removeprefix('--config.').split('=') for x in rest)
  config.update_from_flattened_dict({k: int(v) for k, v in changes.items()})
  sides = topology.rpartition(':')[2].split('x')
  num_devices = math.prod(map(int, sides))
  mesh = config.mesh.to_dict()
  for axis, size in mesh.items():
    if size == -1:
      mesh[axis] = num_devices // -math.prod(mesh.values())
  assert math.prod(mesh.values()) == num_devices
  checks.check(config, num_batch_shards=mesh['data'] * mesh['fsdp'])
