"""Each device of a mesh computes its part of a step, and only its part."""

import json
import math
import re
import types

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import many_devices
import numpy as np
import pytest
import tiny_model
import whole_step

from configs import default
from dppo_jax import main
from dppo_jax import sharding
from dppo_jax import train_step
from dppo_jax.types import ScoredRollout

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
KEY = jax.random.key(5)
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


def learned(mesh, row_length):
  """Tokens, losses and summed parameters of three steps."""
  config = default.get_config('dppo_topk_tv')
  config.num_prompts, config.group_size = 4, 4
  config.max_prompt_length = tiny_model.PROMPT_LENGTH
  config.max_completion_length = tiny_model.COMPLETION_LENGTH
  config.learner.num_minibatches = 2
  config.learner.num_microbatches = 2 if row_length else 1
  config.learner.row_length = row_length
  config.optimizer.learning_rate = 3e-3
  mesh = jax.make_mesh(
      mesh, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES),
      devices=jax.devices()[: math.prod(mesh)],
  )
  program = main.make_program(
      config, mesh, main.make_method(config), tiny_model.MODEL,
      types.SimpleNamespace(eos_token_id=3, pad_token_id=0),
  )
  with tiny_model.quick_compilation():
    state = jax.jit(program.init, out_shardings=program.shardings)(
        jax.tree.map(jnp.copy, tiny_model.params()), *jax.random.split(KEY)
    )
    scored = jax.device_put(
        train_step.blank(
            program.rollout_fn, state, tiny_model.prompts(), program.trainable
        ),
        sharding.batch(mesh),
    )
    losses = []
    for _ in range(3):
      state, rollout, metrics = program.train_step(
          state, scored, tiny_model.prompts()
      )
      losses.append(float(metrics['loss']))
      rewards = (rollout.tokens[:, tiny_model.PROMPT_LENGTH] % 2) * 1.0
      scored = ScoredRollout(
          rollout, jax.device_put(rewards, sharding.batch(mesh))
      )
  return {
      'tokens': rollout.tokens.tolist(),
      'losses': losses,
      'parameters': [
          float(jnp.sum(jnp.abs(x))) for x in jax.tree.leaves(state.params)
      ],
  }


def on_eight_devices():
  for name, mesh, row_length in (
      ('one device', (1, 1, 1, 1), 0),
      ('packed on eight', (2, 2, 2, 1), 25),
      ('packed on four', (1, 4, 1, 1), 25),
  ):
    print(json.dumps({'name': name, **learned(mesh, row_length)}))
  for name, mesh in MESHES.items():
    for layout, row_length in LAYOUTS.items():
      line = {'name': f'{name}, {layout}', **facts(mesh, row_length)}
      print(json.dumps(line))


@pytest.fixture(scope='module')
def eight_devices():
  printed = many_devices.run(
      'import split_work_test; split_work_test.on_eight_devices()'
  )
  lines = map(json.loads, printed)
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


@pytest.mark.slow
@pytest.mark.parametrize('name', ['packed on eight', 'packed on four'])
def test_packed_rows_on_a_mesh_teach_what_one_device_learns(
    eight_devices, name
):
  one, many = eight_devices['one device'], eight_devices[name]
  assert many['tokens'] == one['tokens']
  assert max(map(abs, one['losses'])) > 1e-3
  np.testing.assert_allclose(many['losses'], one['losses'], atol=1e-5)
  np.testing.assert_allclose(many['parameters'], one['parameters'], rtol=1e-4)
