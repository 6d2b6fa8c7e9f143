"""A whole training step as a run builds it, without files, tasks or text."""

import collections
import math
import types

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import tiny_model

from configs import default
from dppo_jax import main
from dppo_jax import program as program_lib
from dppo_jax import sharding
from dppo_jax import train_step
from dppo_jax.types import ScoredRollout

EOS_ID = 3  # Of `make_small`.


def make_config(algorithm='dppo_topk_tv', **sizes):
  """The default config; `sizes` are its fields, with '__' for '.'."""
  config = default.get_config(algorithm)
  config.update_from_flattened_dict(
      {name.replace('__', '.'): value for name, value in sizes.items()}
  )
  return config


def make_mesh(**sizes):
  """Of the first devices, so many as the sizes need; 1 if not given."""
  sizes = dict.fromkeys(sharding.AXES, 1) | sizes
  return jax.make_mesh(
      tuple(sizes.values()), sharding.AXES,
      axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
      devices=jax.devices()[: math.prod(sizes.values())],
  )


def make_program(config, mesh, model, eos_id=1):
  """`program.make_program` without a tokenizer."""
  return program_lib.make_program(
      config, mesh, main.make_method(config), model,
      types.SimpleNamespace(eos_token_id=eos_id, pad_token_id=0),
  )


def compile_step(model, *, mesh=None, optimized=False, **options):
  """The compiled step of `model`, without weights or data.

  Args:
    model: of tiny_model.py, or like it.
    mesh: sizes of its axes, see `make_mesh`.
    optimized: as in a run, which takes longer to compile.
    **options: of `make_config`.
  """
  config, mesh = make_config(**options), make_mesh(**mesh or {})
  program = make_program(config, mesh, model)
  arguments = program_lib.abstract_arguments(config, mesh, program)
  lowered = program.train_step.lower(*arguments)
  if optimized:
    return lowered.compile()
  return lowered.compile(many_devices.QUICK)


def three_steps(model, params, *, mesh=None, **options):
  """What three steps sample, measure and learn on a mesh: see `take_steps`.

  Args:
    model: the architecture.
    params: of it, on any device.
    mesh: sizes of its axes, see `make_mesh`.
    **options: of `make_config`.
  """
  return take_steps(*make_small(model, mesh=mesh, **options), params)


def make_small(model, *, mesh=None, **options):
  """A config, its mesh and its program; arguments as of `three_steps`."""
  config = make_config(**{
      'num_prompts': 4,
      'group_size': 4,
      'max_prompt_length': tiny_model.PROMPT_LENGTH,
      'max_completion_length': tiny_model.COMPLETION_LENGTH,
      'learner__num_minibatches': 2,
      'optimizer__learning_rate': 3e-3,
      **options,
  })
  mesh = make_mesh(**mesh or {})
  return config, mesh, make_program(config, mesh, model, EOS_ID)


def take_steps(config, mesh, program, params, *, num_blank=1, on_rollout=None):
  """What three steps sample, measure and learn.

  Prompts are those of tiny_model.py; an odd first token has reward 1.

  Args:
    config: see `make_small`, also for the next two.
    mesh: of the learner.
    program: from `make_program`.
    params: of the model, on any device.
    num_blank: steps that only sample; with k + 1 of them, what is learned from
      is k steps old.
    on_rollout: called with each rollout as it is returned.

  Returns:
    lists and numbers: the tokens and scalar metrics of every step, the sum of
    the absolute values of each parameter, the devices that hold parameters.
  """
  rows = sharding.batch(mesh)
  prompts = jax.device_put(tiny_model.prompts(config.num_prompts), rows)
  steps = []
  with tiny_model.quick_compilation():
    state = jax.jit(program.init, out_shardings=program.shardings)(
        jax.tree.map(jnp.copy, params),
        *jax.random.split(jax.random.key(5)),
    )
    blank = train_step.blank(
        program.rollout_fn, state, prompts, program.trainable
    )
    # By the host, here and below: it compiles nothing for a mesh.
    blank = jax.device_put(jax.device_get(blank), rows)
    pending = collections.deque([blank] * num_blank)
    for _ in range(num_blank + 3):
      state, rollout, metrics = program.train_step(
          state, pending.popleft(), prompts
      )
      if on_rollout is not None:
        on_rollout(rollout)
      tokens = np.asarray(rollout.tokens)
      steps.append({
          'tokens': tokens.tolist(),
          'metrics': {k: float(v) for k, v in metrics.items() if not v.ndim},
      })
      rewards = tokens[:, config.max_prompt_length] % 2
      pending.append(jax.device_put(
          ScoredRollout(rollout, rewards.astype(np.float32)), rows
      ))
  leaves = jax.tree.leaves(state.params)
  return {
      'tokens': [step['tokens'] for step in steps],
      'metrics': [step['metrics'] for step in steps[num_blank:]],
      'parameters': [float(np.sum(np.abs(x))) for x in leaves],
      'devices': len({d for x in leaves for d in x.sharding.device_set}),
  }
