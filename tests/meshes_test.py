"""A mesh changes where a step is computed, and no number of it.

Every family takes three steps of the real program, learning and sampling, on
one device and on meshes of eight. In some families heads, widths, vocabulary
and experts divide by eight, in others by none of its factors: then the rule
leaves an axis whole.
"""

import dataclasses
import functools
import json

import jax
import many_devices
import numpy as np
import pytest
import tiny_model
import whole_step

from dppo_jax.models import layers
from dppo_jax.models import load
from dppo_jax.models.causal_lm import CausalLM

MESHES = {
    'data': {'data': 8},
    'fsdp': {'data': 2, 'fsdp': 4},
    'all': {'data': 2, 'fsdp': 2, 'tensor': 2},
    'tensor': {'tensor': 8},
    'expert': {'fsdp': 2, 'expert': 4},
}
DIVIDES = {
    'vocab_size': 128,
    'hidden_size': 64,
    'intermediate_size': 128,
    'num_attention_heads': 8,
    'num_key_value_heads': 8,
}
ODD = {
    'vocab_size': 61,
    'hidden_size': 36,
    'intermediate_size': 45,
    'num_attention_heads': 6,
    'num_key_value_heads': 3,
    'head_dim': 6,
}
EXPERTS = {
    'num_experts_per_tok': 2,
    'moe_intermediate_size': 24,
    'norm_topk_prob': True,
}
WINDOW = {
    'sliding_window': 3, 'layer_types': (layers.SLIDING, layers.FULL)
}
GEMMA = {
    'head_dim': 16,
    'hidden_act': 'gelu_pytorch_tanh',
    'query_pre_attn_scalar': 24.0,
    'embedding_multiplier': 32**0.5,
}
# What differs from `tiny_model.CONFIG`: two key heads, which 8 does not split.
SIZES = {
    'llama': DIVIDES | {'tie_word_embeddings': False},
    'mistral': WINDOW,
    'qwen2': ODD | {'tie_word_embeddings': False},
    'qwen3': {},
    'qwen3_moe': DIVIDES | EXPERTS | {'num_experts': 8},
    'mixtral': EXPERTS | {'num_experts': 5},
    'gemma2': GEMMA | WINDOW | {
        'attn_logit_softcapping': 4.0, 'final_logit_softcapping': 6.0
    },
    'gemma3_text': GEMMA | WINDOW | {'rope_local_base_freq': 100.0},
}


@functools.cache
def model_of(family):
  """A model and its parameters, whose logits differ enough to sample."""
  config = dataclasses.replace(
      tiny_model.CONFIG, model_type=family, **SIZES[family]
  )
  model = CausalLM(config=config, family=load.FAMILIES[family])
  params = tiny_model.jit(model.init)(jax.random.key(0))
  for name in {'embed', 'head'} & params.keys():
    params[name] = jax.tree.map(lambda x: 20 * x, params[name])
  return model, params


def on_eight_devices(family, names):
  """Prints three steps on each mesh, the first of them of one device."""
  for name in names:
    steps = whole_step.three_steps(
        *model_of(family),
        mesh=MESHES.get(name),
        num_prompts=8,
        group_size=2,
        learner__num_minibatches=1,
        divergence__k=8,
    )
    print(json.dumps({'name': name, **steps}))


@functools.cache
def run_on(family, *names):
  """By mesh: one process for a family, in which eight devices are found."""
  printed = many_devices.run(
      f'import meshes_test; meshes_test.on_eight_devices({family!r}, {names})'
  )
  return {line.pop('name'): line for line in map(json.loads, printed)}


def check(one, many):
  """Tokens exactly, every metric to 1e-4."""
  assert (one['devices'], many['devices']) == (1, 8)
  assert many['tokens'] == one['tokens']
  first, *_, last = one['tokens']
  assert first != last  # Sampled by another policy, with another key.
  for ours, theirs in zip(many['metrics'], one['metrics'], strict=True):
    assert abs(theirs['loss']) > 1e-4 and theirs['optimizer/grad_norm'] > 1e-2
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      np.testing.assert_allclose(
          ours[name], value, rtol=1e-4, atol=1e-4, err_msg=name
      )
  np.testing.assert_allclose(
      many['parameters'], one['parameters'], rtol=1e-4
  )


def test_every_family_is_here():
  assert SIZES.keys() == load.FAMILIES.keys()


def test_a_mesh_of_all_axes_takes_the_steps_of_one_device():
  steps = run_on('qwen3', 'one', 'all')
  check(steps['one'], steps['all'])


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('family', SIZES)
def test_three_steps_on_a_mesh_are_those_of_one_device(family, mesh):
  steps = run_on(family, 'one', *MESHES)
  check(steps['one'], steps[mesh])
