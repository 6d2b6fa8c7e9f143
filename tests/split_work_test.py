"""Each device of a mesh learns its part of a step, and only its part."""

import functools
import json
import re

import jax
import many_devices
import numpy as np
import pytest
import tiny_model
import whole_step

from dppo_jax import program as program_lib

MESHES = {
    'data': {'data': 8},
    'fsdp': {'fsdp': 8},
    'tensor': {'data': 2, 'fsdp': 2, 'tensor': 2},
}
SIZES = {
    'num_prompts': 32,
    'max_prompt_length': 16,
    'max_completion_length': 48,
    'learner__num_minibatches': 2,
    'learner__num_microbatches': 2,
    'learner__chunk_size': 64,
}
LAYOUTS = {'as sampled': 0, 'packed': 128}


def compile_learner(mesh, **options):
  """The half of a step that learns, without weights or data."""
  config, mesh = whole_step.make_config(**options), whole_step.make_mesh(**mesh)
  program = whole_step.make_program(config, mesh, tiny_model.MODEL)
  state, scored, _ = program_lib.abstract_arguments(config, mesh, program)
  return jax.jit(program.learn).lower(
      state, scored, jax.random.key(0)
  ).compile(many_devices.QUICK)


def facts(mesh, row_length):
  """FLOP of a device, loops counted once, and its largest matmul."""
  compiled = compile_learner(mesh, learner__row_length=row_length, **SIZES)
  dots = re.findall(r'= f32\[(\d+),\d+\]\S* dot\(', compiled.as_text())
  return {
      'flops': compiled.cost_analysis()['flops'],
      'rows': max(map(int, dots)),  # Of an activation: tokens.
  }


def bytes_of_long_rows(mesh, **options):
  """Temporary memory of a device that learns from rows of 8,192 tokens."""
  compiled = compile_learner(mesh, **{
      'num_prompts': 8,
      'group_size': 2,
      'max_prompt_length': 1025,
      'max_completion_length': 7168,
      'learner__num_minibatches': 1,
      'learner__chunk_size': 128,
      'model__remat': 'full',
      **options,
  })
  return compiled.memory_analysis().temp_size_in_bytes


def long_rows_on_eight_devices():
  # A micro-batch is a row on each device, or one row on all of them.
  print(json.dumps([
      bytes_of_long_rows({'fsdp': 8}, learner__num_microbatches=2),
      bytes_of_long_rows({'sequence': 8}, learner__num_microbatches=16),
  ]))


def on_eight_devices():
  packed = {'learner__row_length': 25, 'learner__num_microbatches': 2}
  for name, mesh, options in (
      ('one device', {}, {}),
      ('packed on eight', {'data': 2, 'fsdp': 2, 'tensor': 2}, packed),
      ('packed on four', {'fsdp': 4}, packed),
  ):
    learned = whole_step.three_steps(
        tiny_model.MODEL, tiny_model.params(), mesh=mesh, **options
    )
    print(json.dumps({'name': name, **learned}))
  for name, mesh in MESHES.items():
    for layout, row_length in LAYOUTS.items():
      line = {'name': f'{name}, {layout}', **facts(mesh, row_length)}
      print(json.dumps(line))


@functools.cache
def one_device(layout):
  return facts({}, LAYOUTS[layout])


@pytest.fixture(scope='module')
def eight_devices():
  printed = many_devices.run(
      'import split_work_test; split_work_test.on_eight_devices()',
      optimized=False,
  )
  lines = map(json.loads, printed)
  return {line.pop('name'): line for line in lines}


@pytest.mark.several_devices
@pytest.mark.slow
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', MESHES)
def test_eight_devices_share_the_work(eight_devices, name, layout):
  one = one_device(layout)
  eight = eight_devices[f'{name}, {layout}']
  # What every device does by itself, mostly the update, is the rest.
  assert one['flops'] / 8 < eight['flops'] < one['flops'] / 5
  # Tokens are split over data and fsdp; weights go to them.
  shards = MESHES[name].get('data', 1) * MESHES[name].get('fsdp', 1)
  assert eight['rows'] == pytest.approx(one['rows'] / shards, rel=0.1)


@pytest.mark.several_devices
@pytest.mark.slow
@pytest.mark.parametrize('name', ['packed on eight', 'packed on four'])
def test_packed_rows_on_a_mesh_teach_what_one_device_learns(
    eight_devices, name
):
  one, many = eight_devices['one device'], eight_devices[name]
  assert many['tokens'] == one['tokens']
  losses = [
      [metrics['loss'] for metrics in line['metrics']] for line in (one, many)
  ]
  assert max(map(abs, losses[0])) > 1e-3
  np.testing.assert_allclose(*losses, atol=1e-5)
  np.testing.assert_allclose(many['parameters'], one['parameters'], rtol=1e-4)


@pytest.mark.several_devices
@pytest.mark.slow
def test_rows_split_by_tokens_need_a_part_of_the_memory():
  [line] = many_devices.run(
      'import split_work_test; split_work_test.long_rows_on_eight_devices()'
  )
  whole, split = json.loads(line)
  assert split < whole / 5
