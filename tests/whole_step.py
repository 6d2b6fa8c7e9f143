"""The compiled program of a whole training step, without weights or data."""

import types

import tiny_model

from configs import default
from dppo_jax import main
from dppo_jax import sharding


def compile_step(
    model,
    *,
    algorithm='dppo_topk_tv',
    mesh=(1, 1, 1, 1),
    optimized=False,
    **sizes,
):
  """The step of `model` with options of a config set.

  Args:
    model: of tiny_model.py, or like it.
    algorithm: a row of the table.
    mesh: sizes of `sharding.AXES`.
    optimized: as in a run, which takes longer to compile.
    **sizes: config fields, with '__' for '.'.
  """
  config = default.get_config(algorithm)
  config.update_from_flattened_dict(
      {name.replace('__', '.'): value for name, value in sizes.items()}
  )
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, mesh, strict=True)))
  program = main.make_program(
      config, mesh, main.make_method(config), model,
      types.SimpleNamespace(eos_token_id=1, pad_token_id=0),
  )
  arguments = main.abstract_arguments(config, mesh, program)
  lowered = program.train_step.lower(*arguments)
  if optimized:
    return lowered.compile()
  with tiny_model.quick_compilation():
    return lowered.compile()
