"""Configs of the papers' sizes build and trace; nothing of that size is made.

Numbers of parameters are those that the models' authors publish
(arXiv:2505.09388 Tables 1 and 2, and the model cards).
"""

import importlib
import types

import jax
import pytest

from dppo_jax import checks
from dppo_jax import main
from dppo_jax import memory
from dppo_jax import program as program_lib
from dppo_jax import sharding
from dppo_jax.models import load
from dppo_jax.models import sizes
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import ScoredRollout

# Name -> parameters and those that a token meets, in units of 1e9.
PARAMETERS = {
    'Qwen/Qwen3-30B-A3B-Base': (30.5, 3.3),
    'Qwen/Qwen3-8B': (8.2, 8.2),
    'Qwen/Qwen3-30B-A3B': (30.5, 3.3),
    'Qwen/Qwen3-8B-Base': (8.2, 8.2),
    'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B': (1.78, 1.78),
}
CASES = [
    ('sanity', 'dppo_binary_tv'),
    ('scaling', 'dense_base'),
    ('scaling', 'moe_base_r3'),
    ('scaling', 'moe_base_lora'),
    *(
        pytest.param('scaling', name, marks=pytest.mark.slow)
        for name in ('moe_base', 'moe_thinking', 'dense_base,cispo',
                     'dense_base,grpo_clip_higher', 'dense_base,dppo_binary_kl')
    ),
]


def num_parameters(name):
  """All, and those that a token meets."""
  family, config = load.read_sizes(name)
  return CausalLM(config=config, family=family).num_parameters()


@pytest.mark.parametrize('name', sizes.PUBLISHED)
def test_models_have_the_number_of_parameters_that_is_published(name):
  for count, published in zip(
      num_parameters(name), PARAMETERS[name], strict=True
  ):
    assert count / 1e9 == pytest.approx(published, rel=0.02)


def abstract_run(config):
  """(step, state, scored, prompts): a function and the shapes it takes."""
  mesh = jax.sharding.AbstractMesh(
      tuple(config.mesh[axis] for axis in sharding.AXES),
      sharding.AXES,
      axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
  )
  checks.check(config, num_batch_shards=sharding.num_row_shards(mesh))
  model = program_lib.architecture(config, *load.read_sizes(config.model.name))
  program = program_lib.make_program(
      config, mesh, main.make_method(config), model,
      types.SimpleNamespace(eos_token_id=1, pad_token_id=0),
  )
  arguments = program_lib.abstract_arguments(config, mesh, program)
  return program.train_step, *arguments


def get_config(module, which):
  return importlib.import_module(f'configs.paper.{module}').get_config(which)


@pytest.mark.parametrize('module, which', CASES)
def test_the_step_of_a_paper_config_traces(module, which):
  config = get_config(module, which)
  step, state, scored, prompts = abstract_run(config)
  new_state, rollout, metrics = jax.eval_shape(step, state, scored, prompts)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(new_state) == shapes(state)
  # What is sampled is what is learned from next.
  assert isinstance(scored, ScoredRollout)
  assert shapes(rollout) == shapes(scored.rollout)
  assert metrics['loss'].shape == ()
  replays = which == 'moe_base_r3'
  assert ('router/changed_sets' in metrics) == replays
  if replays:  # 48 layers, 8 of 128 experts, a byte each.
    routing = rollout.routing
    assert (routing.shape[2:], routing.dtype) == ((48, 8), 'uint8')
  kinds = memory.by_kind(state, scored)
  # Parameters and two moments in float32, over all devices.
  total, _ = num_parameters(config.model.name)
  devices = config.mesh.fsdp * config.mesh.tensor
  loaded = 'frozen parameters' if config.lora.rank else 'parameters'
  assert kinds[loaded] == pytest.approx(4 * total / devices, rel=0.01)
  if config.lora.rank:
    assert 0 < kinds['parameters'] < kinds[loaded] / 100
  assert kinds['optimizer state'] == pytest.approx(
      2 * kinds['parameters'], rel=0.01
  )


# What Table 1 of App. E says of updates per rollout and sequences per update.
@pytest.mark.parametrize('column, updates, sequences', [
    ('moe_base', 8, 32 * 16),
    ('moe_base_r3', 8, 32 * 16),
    ('moe_thinking', 8, 32 * 16),
    ('dense_base', 4, 32 * 8),
    ('moe_base_lora', 8, 16 * 8),
])
def test_updates_have_the_size_that_the_paper_says(column, updates, sequences):
  config = get_config('scaling', column)
  count = config.learner.num_minibatches * config.learner.num_epochs
  assert count == updates
  assert config.num_prompts * config.group_size == count * sequences


def test_the_sanity_test_takes_4_updates_of_128_sequences():
  config = get_config('sanity', 'dppo_binary_tv')
  sequences = config.num_prompts * config.group_size
  assert sequences / config.learner.num_minibatches == 128
  assert config.max_prompt_length + config.max_completion_length == 8000


def test_an_unknown_column_or_algorithm_is_named():
  for which, name in (('moe', 'moe'), ('moe_base,ppo', 'ppo')):
    with pytest.raises(ValueError, match=f"has no '{name}'"):
      get_config('scaling', which)
