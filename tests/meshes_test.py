"""A mesh changes where a step is computed, and no number of it.

Every family takes three steps of the real program, learning and sampling, on
one device and on meshes of eight. In some families heads, widths, vocabulary
and experts divide by eight, in others by none of its factors: then the rule
leaves an axis whole.
"""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
import tiny_model
import whole_step

from dppo_jax import program as program_lib
from dppo_jax import sharding
from dppo_jax.models import layers
from dppo_jax.models import load
from dppo_jax.models.causal_lm import CausalLM

MESHES = {
    'data': {'data': 8},
    'fsdp': {'data': 2, 'fsdp': 4},
    'all': {'data': 2, 'fsdp': 2, 'tensor': 2},
    'tensor': {'tensor': 8},
    'expert': {'fsdp': 2, 'expert': 4},
    'slots': {'data': 2, 'fsdp': 2, 'tensor': 2},
}
# Four on each device of `data` and `fsdp`, then two, for eight rows.
SLOTS = {'sampling__num_slots': 16, 'sampling__num_halvings': 1}
# Beyond what every family does: (family, mesh, fields of the config).
LONG = {'fsdp': 2, 'sequence': 4}  # Ten tokens over four devices.
LAYOUTS = {
    'sequence': ('qwen3', LONG, {}),
    'sequence in windows': ('gemma2', LONG, {'learner__chunk_size': 4}),
    'sequence of experts': ('qwen3_moe', LONG, {}),
    'sequence, packed': (
        'qwen3',
        {'fsdp': 2, 'tensor': 2, 'sequence': 2},
        {'learner__row_length': 25, 'learner__num_microbatches': 2},
    ),
    'sequence, packed and halved': (
        'qwen3',
        {'fsdp': 2, 'tensor': 2, 'sequence': 2},
        # In the first step the last part is; a half has 25 slots, too.
        {
            'learner__row_length': 50,
            'learner__num_microbatches': 32,
            'learner__num_halvings': 1,
        },
    ),
    'packed in stretches': (
        'qwen3',
        {'data': 2, 'fsdp': 2, 'tensor': 2},
        # Long enough for three of them.
        {'learner__row_length': 192, 'learner__num_microbatches': 2},
    ),
    'shared prompts': (
        'qwen3', {'data': 2, 'fsdp': 2, 'tensor': 2},
        {'learner__share_prompts': True},
    ),
    'shared prompts of experts': (
        'qwen3_moe', {'fsdp': 2, 'expert': 4},
        {'learner__share_prompts': True},
    ),
    'slots of experts': (
        'qwen3_moe', {'data': 2, 'fsdp': 2, 'expert': 2}, SLOTS
    ),
    'sampler over tensor': (
        'qwen3', {'fsdp': 8}, {'sampling__mesh__tensor': 2}
    ),
    'sampler over experts': (
        'qwen3_moe', {'fsdp': 8},
        {'sampling__mesh__tensor': 2, 'sampling__mesh__expert': 4},
    ),
    'sampler over data': (
        'llama', {'fsdp': 2, 'tensor': 4}, {'sampling__mesh__tensor': 1}
    ),
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
# Of the quick suite.
QUICK = ('qwen3', 'all')
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


# Added to the logit of the end token, so that lengths differ: logits do, too.
ENDS = dict.fromkeys(SIZES, 3.0) | {'qwen3_moe': 8.0, 'gemma3_text': 6.0}


@dataclasses.dataclass(frozen=True)
class Ending(CausalLM):
  """Ends a completion now and then."""

  ends: float = 0.0

  def head(self, params, hidden):
    logits = super().head(params, hidden)
    ends = jnp.arange(logits.shape[-1]) == whole_step.EOS_ID
    return logits + jnp.broadcast_to(self.ends * ends, logits.shape)


@functools.cache
def model_of(family):
  """A model and its parameters, whose logits differ enough to sample."""
  config = dataclasses.replace(
      tiny_model.CONFIG, model_type=family, **SIZES[family]
  )
  model = Ending(
      config=config, family=load.FAMILIES[family], ends=ENDS[family]
  )
  params = tiny_model.jit(model.init)(jax.random.key(0))
  for name in {'embed', 'head'} & params.keys():
    params[name] = jax.tree.map(lambda x: 20 * x, params[name])
  return model, params


def options_of(name):
  """Fields of the config for a mesh or a layout."""
  if name in LAYOUTS:
    return LAYOUTS[name][2]
  return SLOTS if name == 'slots' else {}


def on_eight_devices(family, names):
  """Prints three steps on each mesh, or on one device."""
  for name in names:
    mesh = LAYOUTS[name][1] if name in LAYOUTS else MESHES.get(name)
    steps = whole_step.three_steps(
        *model_of(family),
        mesh=mesh,
        num_prompts=8,
        learner__num_minibatches=1,
        divergence__k=8,
        **options_of(name),
    )
    print(json.dumps({'name': name, **steps}))


def shardings_on_eight_devices():
  """Prints the leaves of a step that are not where they should be."""
  mesh = whole_step.make_mesh(data=2, fsdp=2, tensor=2)
  config = whole_step.make_config(
      num_prompts=8, learner__num_minibatches=1, replay__capacity=2
  )
  program = whole_step.make_program(config, mesh, tiny_model.MODEL)
  arguments = program_lib.abstract_arguments(config, mesh, program)
  lowered = program.train_step.lower(*arguments)
  compiled = lowered.compile(many_devices.QUICK)
  rows, everywhere = sharding.batch(mesh), sharding.replicated(mesh)
  state, rollout, metrics = lowered.out_info
  of = lambda tree, where: jax.tree.map(lambda _: where, tree)
  expected = (
      (program.shardings, *(of(x, rows) for x in arguments[1:])),
      (program.shardings, of(rollout, rows), of(metrics, everywhere)),
  )
  found = compiled.input_shardings[0], compiled.output_shardings
  shapes = arguments, (state, rollout, metrics)
  wrong = [
      (jax.tree_util.keystr(path), str(is_at))
      for (path, shape), is_at, should in zip(
          jax.tree_util.tree_leaves_with_path(shapes),
          jax.tree.leaves(found), jax.tree.leaves(expected), strict=True,
      )
      if not is_at.is_equivalent_to(should, len(shape.shape))
  ]
  parts = lambda x: x.size // math.prod(x.sharding.shard_shape(x.shape))
  print(json.dumps({
      'wrong': wrong,
      'record': parts(jax.tree.leaves(arguments[1].rollout.record)[0]),
      'replay': parts(arguments[0].replay.scored.rollout.tokens),
      'moments': max(map(parts, jax.tree.leaves(arguments[0].opt_state))),
  }))


@functools.cache
def run_on(family, *names):
  """By mesh: one process for all names, in which eight devices are found."""
  printed = many_devices.run(
      f'import meshes_test; meshes_test.on_eight_devices({family!r}, {names})',
      optimized=False,
  )
  return {line.pop('name'): line for line in map(json.loads, printed)}


def run_for(family, name):
  """What there is to compare for one name: all of the family, as it is cheap.

  But what the quick suite asks for is run by itself.
  """
  layouts = [name for name, (whose, *_) in LAYOUTS.items() if whose == family]
  names = ['one', *MESHES, *layouts]
  if family != QUICK[0]:
    return run_on(family, *names)
  quick = ['one', QUICK[1]]
  if name in quick:
    return run_on(family, *quick)
  others = (x for x in names if x not in quick)
  return run_on(family, *quick) | run_on(family, *others)


def check(one, many, apart_from=()):
  """Tokens exactly, every metric to 1e-4."""
  assert (one['devices'], many['devices']) == (1, 8)
  assert many['tokens'] == one['tokens']
  first, *_, last = one['tokens']
  assert first != last  # Sampled by another policy, with another key.
  # In some step a group has both rewards.
  assert max(abs(step['loss']) for step in one['metrics']) > 1e-3
  assert max(step['optimizer/grad_norm'] for step in one['metrics']) > 1e-2
  for ours, theirs in zip(many['metrics'], one['metrics'], strict=True):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      if not name.startswith(apart_from):
        np.testing.assert_allclose(
            ours[name], value, rtol=1e-4, atol=1e-4, err_msg=name
        )
  np.testing.assert_allclose(
      many['parameters'], one['parameters'], rtol=1e-4
  )


def check_run(family, name):
  """What one device and a mesh or layout did, by `check`."""
  found, options = run_for(family, name), options_of(name)
  one, many = found['one'], found[name]
  ended = [
      whole_step.EOS_ID in row[tiny_model.PROMPT_LENGTH:]
      for row in one['tokens'][-1]
  ]
  assert any(ended) and not all(ended)
  apart_from = ()
  # Rows of another layout have other numbers of slots.
  if {'learner__row_length', 'learner__share_prompts'} & options.keys():
    apart_from += ('learner/',)
  if 'sampling__num_slots' in options:  # Filled again, which takes more steps.
    apart_from += ('sample/decode_steps',)
    steps = [step['sample/decode_steps'] for step in many['metrics']]
    assert min(steps) > tiny_model.COMPLETION_LENGTH
  check(one, many, apart_from)


def test_every_family_is_here():
  assert SIZES.keys() == load.FAMILIES.keys()


@pytest.mark.several_devices
@pytest.mark.parametrize('family, mesh', [
    pytest.param(*x, marks=() if x == QUICK else pytest.mark.slow)
    for x in itertools.product(SIZES, MESHES)
])
def test_three_steps_on_a_mesh_are_those_of_one_device(family, mesh):
  check_run(family, mesh)


@pytest.mark.several_devices
@pytest.mark.slow
@pytest.mark.parametrize(
    'family, name', [(x[0], name) for name, x in LAYOUTS.items()]
)
def test_split_rows_and_a_sampler_of_its_own_change_no_number(family, name):
  check_run(family, name)


@pytest.mark.several_devices
@pytest.mark.slow
def test_the_step_pins_all_it_takes_and_returns():
  [line] = many_devices.run(
      'import meshes_test; meshes_test.shardings_on_eight_devices()'
  )
  found = json.loads(line)
  assert not found['wrong']
  # Over data and fsdp; moments over fsdp and tensor.
  assert found['record'] == found['replay'] == found['moments'] == 4
