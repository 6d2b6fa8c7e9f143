"""Turns a config into a run: the only place where a name becomes a function.

    python -m dppo_jax.main --config=configs/tv_topk.py --workdir=DIR

A run that was stopped, however, continues when it is started again with the
same command.
"""

import contextlib
import functools
import json
import pathlib
from typing import Any

from absl import logging
import jax

from dppo_jax import advantages
from dppo_jax import checks
from dppo_jax import command_line
from dppo_jax import divergences
from dppo_jax import duals
from dppo_jax import evaluate
from dppo_jax import fitting
from dppo_jax import losses
from dppo_jax import memory
from dppo_jax import meshes
from dppo_jax import metrics as metrics_lib
from dppo_jax import normalizers
from dppo_jax import objective
from dppo_jax import optim
from dppo_jax import processes
from dppo_jax import program as program_lib
from dppo_jax import run_attention
from dppo_jax import shaping
from dppo_jax import sharding
from dppo_jax import tasks
from dppo_jax import training
from dppo_jax import trust_regions
from dppo_jax import workdir as workdir_lib
from dppo_jax.models import load
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.tasks.prompts import check_same_rows
from dppo_jax.tasks.prompts import evaluation_batches
from dppo_jax.tasks.prompts import prepare
from dppo_jax.tasks.prompts import PromptBatch
from dppo_jax.tasks.prompts import PromptIterator
from dppo_jax.tasks.scoring import may_hang
from dppo_jax.tasks.scoring import Scorer
from dppo_jax.tasks.verify import make_verify_fn


def build(
    config: Any,
    *,
    to_train: bool = True,
    workdir: pathlib.Path | None = None,
) -> training.Parts:
  """Turns names into functions and puts the parameters on their devices.

  Args:
    config: of the run.
    to_train: False if no step will be taken: it is not compiled then.
    workdir: of a run that may go on, with the rows that it was made with.

  Raises:
    ValueError: something cannot work, or has no room on the devices.
  """
  _use_compilation_cache(config.compilation_cache)
  checks.check_mode(
      config,
      num_devices=jax.device_count(),
      num_processes=jax.process_count(),
  )
  mesh = meshes.make_mesh(config)
  rows = sharding.batch(mesh)
  checks.check(
      config,
      num_batch_shards=sharding.num_batch_shards(mesh),
      **meshes.row_shards(config, mesh),
  )
  method = make_method(config)
  share = processes.share(rows, config.num_prompts)
  tokenizer = load.load_tokenizer(config.model.name)
  model = program_lib.architecture(
      config, *load.read_config(load.resolve(config.model.name))
  )
  task, prompts, held_out = _read(
      config,
      tokenizer,
      workdir,
      model.config.vocab_size,
      share=share,
      place=lambda x: processes.place(x, rows, config.num_prompts),
  )
  _warn(config, mesh, model)
  scorer = Scorer(task.score, **config.scoring, total=processes.total)
  verify = make_verify_fn(tokenizer, scorer)
  key_state, key_eval, key_adapters = jax.random.split(
      jax.random.key(config.seed), 3
  )
  evaluate_fn = _make_evaluation(
      config, mesh, model, tokenizer, held_out, verify, key_eval
  )
  program, compile_s = fitting.make_program(
      config,
      lambda config: program_lib.make_program(
          config, mesh, method, model, tokenizer
      ),
      lambda x: x.train_step.lower(
          *program_lib.abstract_arguments(config, mesh, x)
      ),
      limit=memory.limit(),
      num_batch_shards=sharding.num_batch_shards(mesh),
      to_train=to_train,
  )
  params = load.from_pretrained(
      config.model.name,
      dtype=config.model.params_dtype,
      shardings=lambda tree: sharding.of_params(tree, mesh),
  ).params
  parts = training.Parts(
      method=method,
      model=model,
      trainable=program.trainable,
      tokenizer=tokenizer,
      scorer=scorer,
      verify=verify,
      prompts=prompts,
      evaluate_fn=evaluate_fn,
      rollout_fn=program.rollout_fn,
      learn=program.learn,
      train_step=program.train_step,
      # Parameters keep their memory; all else is made where it belongs.
      state=jax.jit(
          program.init, out_shardings=program.shardings, donate_argnums=0
      )(params, key_state, key_adapters),
      prompt_shapes=program_lib.prompt_shapes(config),
      own=processes.of_groups(share.own, config.group_size),
      mesh=mesh,
      compile_s=compile_s,
  )
  if to_train:
    _, pending, _ = program_lib.abstract_arguments(config, mesh, program)
    training.check_evaluation(
        config, parts, parts.state, [pending] * (1 + config.staleness)
    )
  return parts


def _read(
    config: Any,
    tokenizer: Any,
    workdir: pathlib.Path | None,
    vocab_size: int,
    **where: Any,
) -> tuple[tasks.Task, PromptIterator, PromptBatch]:
  """The task, its prompts to learn from, and all that are held out.

  What one process cannot read fails on all, and so do rows that differ, also
  from those of the run in `workdir`.
  """
  with processes.failing_together():
    task = _build(tasks, config, 'task')
    checks.check_verifier(config, may_hang=may_hang(task.score))
    task = prepare(
        task, tokenizer, max_prompt_length=config.max_prompt_length
    )
    encoding = {
        'max_prompt_length': config.max_prompt_length,
        'add_special_tokens': task.chat is None,
        'vocab_size': vocab_size,
    }
    prompts = PromptIterator(
        task.train,
        tokenizer,
        num_prompts=config.num_prompts,
        seed=config.seed,
        **encoding,
        **where,
    )
    [held_out] = evaluation_batches(
        task.test, tokenizer, num_prompts=config.eval.num_prompts, **encoding
    )
  check_same_rows(prompts, held_out)
  if workdir is not None:
    training.check_rows(prompts, workdir)
  return task, prompts, held_out


def _warn(config: Any, mesh: Any, model: CausalLM) -> None:
  """Says what works, but not as somebody who asked for it may think.

  Axes of parameters that stay whole where a rule would split them, attention
  without its kernel, and devices that wait.
  """
  params = program_lib.abstract_params(config, model)
  names = [
      x for mesh in meshes.both(config, mesh)
      for x in sharding.undivided(params, mesh)
  ]
  for name in dict.fromkeys(names):
    logging.warning('Not split, as it does not divide: %s', name)
  run_attention.warn_of_no_kernel(config, mesh, model)
  if config.sampling.num_devices and not config.staleness:
    logging.warning(
        'Learner and sampler have devices of their own, but with '
        'config.staleness=0 each waits for the other; from 1 on they overlap.'
    )


def _use_compilation_cache(folder: str) -> None:
  """Keeps compiled programs for the next start; '' does not.

  What JAX_COMPILATION_CACHE_DIR says goes before.
  """
  if folder and not jax.config.jax_compilation_cache_dir:
    folder = pathlib.Path(folder).expanduser()
    jax.config.update('jax_compilation_cache_dir', str(folder))


def make_method(config: Any) -> program_lib.Method:
  """Builds what the config names."""
  known = {
      'group_size': config.group_size,
      'horizon': config.max_completion_length,
  }
  updates = config.learner.num_epochs * config.learner.num_minibatches
  return program_lib.Method(
      divergence=_build(divergences, config, 'divergence', **known),
      region_fn=_build(trust_regions, config, 'trust_region', **known),
      limits_tokens=trust_regions.limits_tokens(config.trust_region.name),
      loss_fn=_build(losses, config, 'loss', **known),
      advantage_fn=_build(advantages, config, 'advantage', **known),
      shaping_fn=_build(shaping, config, 'shaping', **known),
      normalizer=_build(normalizers, config, 'normalizer', **known),
      dual=_build(duals, config, 'dual', **known),
      extras=_naming('extras', objective.Extras, **config.extras),
      optimizer=_build(
          optim, config, 'optimizer',
          total_updates=config.total_steps * updates
      ),
  )


def _make_evaluation(
    config: Any, mesh: Any, model: CausalLM, tokenizer: Any,
    batch: PromptBatch, verify: Any, key: jax.Array,
) -> evaluate.Evaluation:
  sampling_mesh = meshes.sampling_mesh(config, mesh)
  program = program_lib.evaluation_program(config, mesh, model, tokenizer)
  evaluate_fn = evaluate.make_evaluate_fn(
      sample=program.sample,
      batch=batch,
      num_samples=config.eval.num_samples,
      verify=verify,
      key=key,
      mesh=sampling_mesh,
  )
  bring = functools.partial(
      sharding.bring, mesh=mesh, sampling_mesh=sampling_mesh
  )
  return evaluate.Evaluation(lambda params: evaluate_fn(bring(params)), program)


def _build(module: Any, config: Any, section: str, **known) -> Any:
  """Builds what a section of the config names.

  `known` are options that no config sets, for factories that require them.
  """
  options = config[section].to_dict()
  name = options.pop('name')
  required = module.register.required(name)
  known = {k: v for k, v in known.items() if k in required}
  return _naming(section, module.build, name, **options, **known)


def _naming(section: str, make: Any, *arguments, **options) -> Any:
  """What `make` returns; its errors name the section of the config."""
  try:
    return make(*arguments, **options)
  except ValueError as error:
    if 'config.' in str(error):
      raise
    raise ValueError(f'config.{section}: {error}') from error


def train(config: Any, workdir: str) -> bool:
  """Trains until `config.total_steps`; False if a signal ended it before."""
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(command_line.stop_on_signals())
    workdir_lib.check_same_start(config)
    folder = pathlib.Path(workdir).expanduser()
    with processes.failing_together():  # Before anything compiles.
      if processes.is_main():
        if config.wandb:
          metrics_lib.import_wandb()
        workdir_lib.check(workdir, config)
        stack.enter_context(workdir_lib.locked(folder))
    workdir_lib.check_shared(folder)
    parts = build(config, workdir=folder)
    return training.train(config, parts, workdir, stop.after)


def run_train() -> None:
  """Command line of `dppo_jax.main`."""
  command_line.run(lambda config, workdir: train(
      config, workdir or command_line.default_workdir()
  ))


def run_evaluate() -> None:
  """Command line of `dppo_jax.evaluate`.

  With --workdir it evaluates the latest checkpoint there, without it the model
  that the config starts from. The last line printed is a JSON object.
  """

  def body(config, workdir):
    workdir_lib.check_same_start(
        config, **{'--workdir': 'a folder' if workdir else 'not given'}
    )
    if workdir:
      workdir_lib.check_same_run(workdir)
    parts = build(config, to_train=False)
    with contextlib.closing(parts.scorer):
      state = parts.state
      if workdir:
        try:
          state = training.latest_state(config, parts, workdir)
        except FileNotFoundError as error:
          raise FileNotFoundError(
              f'{error} Leave out --workdir to evaluate the model that the '
              'config starts from.'
          ) from error
      training.check_evaluation(config, parts, state)
      metrics, _ = parts.evaluate_fn(training.policy(parts, state))
    metrics |= parts.scorer.take_counts()
    if processes.is_main():
      print(json.dumps({'step': int(state.step)} | metrics), flush=True)
    return True

  command_line.run(body)


if __name__ == '__main__':
  run_train()
