"""Each device of a mesh computes its part of a step, and only its part."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import tiny_model
import whole_step

HERE = pathlib.Path(__file__).resolve().parent
MESHES = {
    'data': (8, 1, 1, 1), 'fsdp': (1, 8, 1, 1), 'tensor': (2, 2, 2, 1)
}
SIZES = {
    'num_prompts': 32,
    'max_prompt_length': 16,
    'max_completion_length': 48,
    'learner__num_minibatches': 2,
    'learner__num_microbatches': 2,
    'learner__chunk_size': 512,
}
LAYOUTS = {'as sampled': 0, 'packed': 128}


def facts(mesh, row_length):
  """FLOP of a device in a step, loops counted once, and its largest matmul."""
  compiled = whole_step.compile_step(
      tiny_model.MODEL, mesh=mesh, learner__row_length=row_length, **SIZES
  )
  dots = re.findall(r'= f32\[(\d+),\d+\]\S* dot\(', compiled.as_text())
  return {
      'flops': compiled.cost_analysis()['flops'],
      'rows': max(map(int, dots)),  # Of an activation: tokens.
  }


def on_eight_devices():
  for name, mesh in MESHES.items():
    for layout, row_length in LAYOUTS.items():
      line = {'name': f'{name}, {layout}', **facts(mesh, row_length)}
      print(json.dumps(line))


@pytest.fixture(scope='module')
def eight_devices():
  done = subprocess.run(
      [sys.executable, '-c',
       'import split_work_test; split_work_test.on_eight_devices()'],
      cwd=HERE.parent,
      env=os.environ | {
          'JAX_PLATFORMS': 'cpu',
          'PYTHONPATH': os.pathsep.join(map(str, (HERE.parent, HERE))),
          'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
      },
      capture_output=True,
      text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  lines = map(json.loads, done.stdout.splitlines())
  return {line.pop('name'): line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', MESHES)
def test_eight_devices_share_the_work(eight_devices, name, layout):
  one = facts((1, 1, 1, 1), LAYOUTS[layout])
  eight = eight_devices[f'{name}, {layout}']
  # What every device does by itself, mostly the update, is the rest.
  assert one['flops'] / 8 < eight['flops'] < one['flops'] / 5
  # Tokens are split over data and fsdp; weights go to them.
  shards = MESHES[name][0] * MESHES[name][1]
  assert eight['rows'] == pytest.approx(one['rows'] / shards, rel=0.1)
