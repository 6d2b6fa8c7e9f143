"""Trains a language model: the only place where a name becomes a function.

    python -m dppo_jax.main --config=configs/tv_topk.py --workdir=DIR

A run that was stopped, however, continues when it is started again with the
same command.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import json
import logging as python_logging
import pathlib
import re
import signal
import sys
import time
from typing import Any, NamedTuple

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags
import numpy as np

from dppo_jax import advantages
from dppo_jax import algorithms
from dppo_jax import checks
from dppo_jax import divergences
from dppo_jax import duals
from dppo_jax import evaluate
from dppo_jax import fitting
from dppo_jax import learner
from dppo_jax import lora
from dppo_jax import losses
from dppo_jax import memory
from dppo_jax import normalizers
from dppo_jax import objective
from dppo_jax import optim
from dppo_jax import packing
from dppo_jax import replay as replay_lib
from dppo_jax import report
from dppo_jax import rollout as rollout_lib
from dppo_jax import sampling
from dppo_jax import shaping
from dppo_jax import sharding
from dppo_jax import tasks
from dppo_jax import train_step as train_step_lib
from dppo_jax import trainable as trainable_lib
from dppo_jax import trust_regions
from dppo_jax import workdir as workdir_lib
from dppo_jax.backlog import Backlog
from dppo_jax.backlog import Scored
from dppo_jax.checkpoint import Checkpoints
from dppo_jax.logbook import Logbook
from dppo_jax.metrics import MetricsWriter
from dppo_jax.metrics import Progress
from dppo_jax.models import load
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.tasks.prompts import end_ids
from dppo_jax.tasks.prompts import evaluation_batches
from dppo_jax.tasks.prompts import prepare
from dppo_jax.tasks.prompts import PromptBatch
from dppo_jax.tasks.prompts import PromptIterator
from dppo_jax.tasks.scoring import may_hang
from dppo_jax.tasks.scoring import Scorer
from dppo_jax.tasks.verify import make_verify_fn
from dppo_jax.tasks.verify import VerifyFn
from dppo_jax.tracing import Tracer
from dppo_jax.types import Divergence
from dppo_jax.types import LossFn
from dppo_jax.types import Prompts
from dppo_jax.types import PyTree
from dppo_jax.types import Rollout
from dppo_jax.types import ScoredRollout
from dppo_jax.types import TrainState

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, for example configs/tv_topk.py.'
)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the run; runs/NAME_OF_CONFIG if not given.'
)

# What a shell reports for a process that SIGTERM ended: it did not finish.
EXIT_INTERRUPTED = 128 + signal.SIGTERM

_NUM_TIMED_CALLS = 3


class Method(NamedTuple):
  """What the config says about learning, built before any weights are read."""

  divergence: Divergence
  region_fn: trust_regions.RegionFn
  loss_fn: LossFn
  advantage_fn: advantages.AdvantageFn
  shaping_fn: shaping.ShapingFn
  normalizer: normalizers.NormalizerFn
  dual: duals.Dual | None
  extras: objective.Extras
  optimizer: optim.Optimizer


class Parts(NamedTuple):
  """Everything a run is made of, built from its config."""

  method: Method
  model: CausalLM  # Without parameters: those are in the state.
  trainable: trainable_lib.Trainable
  tokenizer: Any
  scorer: Scorer
  verify: VerifyFn
  prompts: PromptIterator
  evaluate_fn: Callable[..., Any]
  rollout_fn: rollout_lib.RolloutFn
  learn: Callable[..., Any]
  train_step: train_step_lib.TrainStep
  state: TrainState  # Before the first update.
  prompt_shapes: Prompts
  mesh: Any
  compile_s: float  # Spent on compiling the step.


def build(config: Any, *, to_train: bool = True) -> Parts:
  """Turns names into functions and puts the parameters on their devices.

  Args:
    config: of the run.
    to_train: False if no step will be taken: it is not compiled then.

  Raises:
    ValueError: something cannot work, or has no room on the devices.
  """
  _use_compilation_cache(config.compilation_cache)
  mesh = sharding.make_mesh(**config.mesh)
  checks.check(config, num_batch_shards=sharding.num_row_shards(mesh))
  method = make_method(config)
  task = _build(tasks, config.task)
  checks.check_verifier(config, may_hang=may_hang(task.score))
  tokenizer = load.load_tokenizer(config.model.name)
  task = prepare(
      task, tokenizer, max_prompt_length=config.max_prompt_length
  )
  model = _architecture(config)
  scorer = Scorer(task.score, **config.scoring)
  verify = make_verify_fn(tokenizer, scorer)
  key_state, key_eval, key_adapters = jax.random.split(
      jax.random.key(config.seed), 3
  )
  prompts = PromptIterator(
      task.train,
      tokenizer,
      num_prompts=config.num_prompts,
      max_prompt_length=config.max_prompt_length,
      seed=config.seed,
      add_special_tokens=task.chat is None,
  )
  evaluate_fn = _make_evaluate_fn(
      config, mesh, model, tokenizer, task, verify, key_eval
  )
  program, compile_s = fitting.make_program(
      config,
      lambda config: make_program(config, mesh, method, model, tokenizer),
      lambda x: x.train_step.lower(*abstract_arguments(config, mesh, x)),
      limit=memory.limit(),
      num_batch_shards=sharding.num_row_shards(mesh),
      to_train=to_train,
  )
  params = load.from_pretrained(
      config.model.name,
      dtype=config.model.params_dtype,
      shardings=lambda tree: sharding.of_params(tree, mesh),
  ).params
  return Parts(
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
      prompt_shapes=_prompt_shapes(config),
      mesh=mesh,
      compile_s=compile_s,
  )


def _use_compilation_cache(folder: str) -> None:
  """Keeps compiled programs for the next start; '' does not.

  What JAX_COMPILATION_CACHE_DIR says goes before.
  """
  if folder and not jax.config.jax_compilation_cache_dir:
    folder = pathlib.Path(folder).expanduser()
    jax.config.update('jax_compilation_cache_dir', str(folder))


class Program(NamedTuple):
  """What is compiled, and the shape of what it works on."""

  # From parameters, the state's key, and one for adapters.
  init: Callable[[PyTree, jax.Array, jax.Array], TrainState]
  trainable: trainable_lib.Trainable
  shardings: TrainState
  state: TrainState  # Shapes, placed by them.
  rollout_fn: rollout_lib.RolloutFn
  learn: Callable[..., Any]
  train_step: train_step_lib.TrainStep


def make_program(
    config: Any, mesh: Any, method: Method, model: CausalLM, tokenizer: Any
) -> Program:
  """The functions of a run. Needs no weights, and no devices in the mesh.

  Of the tokenizer only `eos_token_id` and `pad_token_id` are looked at.

  Raises:
    ValueError: if the number of micro-batches is still to be found, which is
      for `fitting.make_program`.
  """
  if not config.learner.num_microbatches:
    raise ValueError(
        'config.learner.num_microbatches=0 is found by fitting.make_program; '
        'a program needs a number.'
    )
  shapes = abstract_params(config, model)
  trainable = trainable_lib.make_trainable(
      shapes, rules=config.learning_rates, **config.lora
  )
  method = method._replace(
      optimizer=_for_trainable(config, method.optimizer, trainable)
  )
  rollout_fn = _make_rollout_fn(
      config, model, tokenizer, method.divergence, mesh
  )
  place = functools.partial(
      jax.lax.with_sharding_constraint, shardings=sharding.batch(mesh)
  )
  spread = model.replace(place=place)  # The sampler has its own rows already.
  arrange = _make_arrange(config, mesh)
  learn = _make_learner(config, spread, method, trainable, arrange, place)
  replay = _make_replay(config, spread, arrange)

  def init(params, key, key_adapters):
    params, frozen = trainable.split(params, key_adapters)
    state = train_step_lib.init_state(
        params,
        method.optimizer,
        key,
        frozen=frozen,
        # Adapters stand beside what they started from.
        with_reference=method.extras.needs_reference and not config.lora.rank,
        dual=method.dual,
    )
    if replay is None:
      return state
    return state._replace(replay=replay.init(train_step_lib.blank(
        rollout_fn, state, _prompt_shapes(config), trainable
    )))

  key = jax.random.key(0)
  state = jax.eval_shape(init, shapes, key, key)
  shardings = train_step_lib.state_shardings(state, mesh)
  return Program(
      init=init,
      trainable=trainable,
      shardings=shardings,
      state=jax.tree.map(_placed, state, shardings),
      rollout_fn=rollout_fn,
      learn=learn,
      train_step=train_step_lib.make_train_step(
          learn=learn,
          rollout_fn=rollout_fn,
          threshold=method.divergence.threshold,
          group_size=config.group_size,
          vocab_size=model.config.vocab_size,
          state_shardings=shardings,
          mesh=mesh,
          replay=replay,
          trainable=trainable,
      ),
  )


def abstract_arguments(
    config: Any, mesh: Any, program: Program
) -> tuple[TrainState, ScoredRollout, Prompts]:
  """Shapes of what a run calls its step with, where they will be."""
  rows = sharding.batch(mesh)
  prompts = _prompt_shapes(config)  # They come from the host.
  blank = functools.partial(
      train_step_lib.blank, program.rollout_fn, trainable=program.trainable
  )
  scored = jax.eval_shape(blank, program.state, prompts)
  scored = jax.tree.map(lambda x: _placed(x, rows), scored)
  return program.state, scored, prompts


def _placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def abstract_params(config: Any, model: CausalLM) -> PyTree:
  """Shapes and dtypes of the parameters."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  dtype = jax.numpy.dtype(config.model.params_dtype)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def train(config: Any, workdir: str) -> bool:
  """Trains until `config.total_steps`; False if a signal ended it before."""
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(_stop_on_signals())
    workdir_lib.check(workdir, config)  # Before anything compiles.
    parts = build(config)
    stack.enter_context(contextlib.closing(parts.scorer))
    workdir = workdir_lib.prepare(workdir, config)
    stack.enter_context(workdir_lib.locked(workdir))
    checkpoints = Checkpoints(
        workdir / 'checkpoints', keep=config.keep_checkpoints
    )
    stack.enter_context(contextlib.closing(checkpoints))
    writer = stack.enter_context(_make_writer(config, workdir))
    run = _start(config, parts, checkpoints, writer)
    state, backlog, logbook = run.state, run.backlog, run.logbook
    del run  # Its state is donated to the first step.
    stack.callback(logbook.flush)
    first = int(state.step) + 1
    bar = stack.enter_context(Progress(
        config.total_steps, first, is_main_process=jax.process_index() == 0
    ))

    tracer = stack.enter_context(contextlib.closing(Tracer(
        workdir / 'profile', num_steps=config.profile_steps, first=first
    )))

    for step in range(first, config.total_steps + 1):
      tracer.at(step)
      start = time.perf_counter()
      batch = next(parts.prompts)
      state, rollout, metrics = parts.train_step(
          state, backlog.pop(), batch.prompts
      )
      logbook.flush()  # The previous step, while the device works.
      backlog.score()  # So too, unless it was learned from at once.
      jax.block_until_ready(rollout)
      sampled = time.perf_counter()
      backlog.push(rollout, batch)
      if not config.staleness:
        backlog.score()
      times = {
          'device_s': sampled - start,
          'score_s': time.perf_counter() - sampled,
      }
      bar.update(step, logbook.add(step, metrics, **times))
      healthy = _check_finite(config, step, metrics, checkpoints)
      last = step == config.total_steps
      if step % config.eval.every == 0 or last:
        _note_samples(logbook, step, backlog.newest())
        _evaluate(parts, state, logbook, step)
      logbook.add_scalars(step, parts.scorer.take_counts())
      due = step % config.checkpoint_every == 0 or last or stop.requested
      if due and healthy:
        logbook.flush()  # A checkpoint never knows more than the log.
        _save(checkpoints, parts, step, state, backlog, logbook)
      if stop.requested:
        logging.warning('Stopped by a signal; the same command continues.')
        return False

    logbook.write_masked_tokens(workdir / 'masked_tokens.json', parts.tokenizer)
    logbook.write_scatter(workdir / 'scatter.json')
    _export(config, parts, state, workdir)
  path = report.write_report(workdir)
  logging.info('Done. Report: %s  Model: %s', path, workdir / 'model')
  return True


class _Run(NamedTuple):
  """Where a run stands before its loop."""

  state: TrainState
  backlog: Backlog
  logbook: Logbook


def _start(
    config: Any, parts: Parts, checkpoints: Checkpoints, writer: MetricsWriter
) -> _Run:
  """The latest checkpoint, or step 0 with first rollouts and evaluation."""
  batch = next(parts.prompts)
  state, blank = parts.state, blank_rollout(parts)
  backlog = Backlog(functools.partial(score, parts))
  restored = _restore(config, parts, checkpoints, blank)
  if restored is not None:
    step, arrays, host = restored
    state = arrays['state']
    backlog.set_state(arrays['pending'])
    parts.prompts.set_state(host['prompts'])
    writer.truncate_after(step)
    logging.info('Continuing after step %d.', step)
  state, rollout, times = warm_up(parts, state, blank, batch)
  logbook = Logbook(
      writer,
      vocab_size=parts.model.config.vocab_size,
      seconds_per_decode_step=times['seconds_per_decode_step'],
  )
  if restored is not None:
    logbook.set_state(host['masked_tokens'])
  else:
    writer.truncate_after(-1)  # A run killed before its first checkpoint.
    state = _fill(config, parts, state, blank, backlog, rollout, batch)
    logbook.add_scalars(0, {'time/compile_s': times['compile_s']})
    _note_samples(logbook, 0, backlog.newest())
    _evaluate(parts, state, logbook, 0)
    logbook.add_scalars(0, parts.scorer.take_counts())
    logbook.flush()
  return _Run(state, backlog, logbook)


def _fill(config, parts, state, blank, backlog, rollout, batch) -> TrainState:
  """The start model samples what the first steps learn from.

  As if in steps before the first one, so that each has a key of its own.
  """
  if not config.staleness:
    backlog.push(rollout, batch)
  for early in range(-config.staleness, 1 if config.staleness else 0):
    state, rollout, _ = parts.train_step(
        state._replace(step=jax.numpy.full_like(state.step, early)),
        blank,
        batch.prompts,
    )
    backlog.push(rollout, batch)
    if early:
      batch = next(parts.prompts)
  return state


def _checkpointed(config: Any, state: TrainState, rollout: ScoredRollout):
  """The arrays of a checkpoint: all that is not there at every start."""
  return {
      'state': state._replace(frozen=()),
      'pending': [rollout] * (1 + config.staleness),
  }


def _restore(config, parts, checkpoints, blank):
  """The latest checkpoint, beside the frozen parameters it was made with."""
  restored = checkpoints.restore_latest(
      _checkpointed(config, parts.state, blank)
  )
  if restored is None:
    return None
  step, arrays, host = restored
  frozen = parts.state.frozen
  if host['frozen'] != trainable_lib.fingerprint(frozen):
    raise ValueError(
        f'config.model.name={config.model.name!r} has other weights than when '
        f'the checkpoint of step {step} was saved, and a checkpoint does not '
        'hold what is frozen. Use the same model, or another --workdir.'
    )
  state = arrays['state']._replace(frozen=frozen)
  return step, arrays | {'state': state}, host


def blank_rollout(parts: Parts) -> ScoredRollout:
  """A rollout in which nothing was sampled, on its devices."""
  return jax.device_put(
      train_step_lib.blank(
          parts.rollout_fn, parts.state, parts.prompt_shapes, parts.trainable
      ),
      sharding.batch(parts.mesh),
  )


def warm_up(parts, state, blank, batch):
  """Tells what the step needs, times sampling, leaves the state as it is.

  All calls learn from nothing, so they sample the same rollout each time.
  """
  start = time.perf_counter()
  # Found if `build` compiled it, as the calls below do: it happens once.
  compiled = parts.train_step.lower(state, blank, batch.prompts).compile()
  compile_s = parts.compile_s + time.perf_counter() - start
  logging.info('Compiled the training step in %.1f s.', compile_s)
  for line in memory.describe(parts.model, state, blank, compiled):
    logging.info(line)
  seconds = []
  for _ in range(1 + _NUM_TIMED_CALLS):
    start = time.perf_counter()
    state, rollout, metrics = parts.train_step(state, blank, batch.prompts)
    jax.block_until_ready(rollout)
    seconds.append(time.perf_counter() - start)
  sampling_s = min(seconds[1:])  # The others were disturbed.
  return state, rollout, {
      'compile_s': compile_s,
      'seconds_per_decode_step': sampling_s
      / int(metrics['sample/decode_steps']),
  }


def score(
    parts: Parts, rollout: Rollout, batch: PromptBatch
) -> tuple[ScoredRollout, list[str]]:
  """Rewards of a rollout, on the devices, and its completions as text."""
  tokens, mask, truncated = jax.device_get(
      (rollout.tokens[:, 1:], rollout.token_mask, rollout.truncated)
  )
  texts, rewards = parts.verify(
      tokens=tokens,
      mask=mask,
      truncated=truncated,
      answers=_repeat(batch.answers, len(tokens)),
  )
  rewards = jax.device_put(rewards, sharding.batch(parts.mesh))
  return ScoredRollout(rollout, rewards), texts


def policy(parts: Parts, state: TrainState) -> Any:
  """The parameters of the policy; those of the state if all are trained."""
  return jax.jit(parts.trainable.merge)(state.params, state.frozen)


def _note_samples(logbook: Logbook, step: int, newest: Scored) -> None:
  batch, texts, scored = newest
  logbook.add_samples(
      step,
      'train',
      prompts=_repeat(batch.texts, len(texts)),
      completions=texts,
      answers=_repeat(batch.answers, len(texts)),
      rewards=np.asarray(scored.rewards),
  )


def _evaluate(
    parts: Parts, state: TrainState, logbook: Logbook, step: int
) -> None:
  """Held-out metrics and samples, written under `step`."""
  start = time.perf_counter()
  metrics, samples = parts.evaluate_fn(policy(parts, state))
  logbook.add_scalars(
      step, metrics | {'time/eval_s': time.perf_counter() - start}
  )
  logbook.add_samples(step, 'test', **samples)
  logging.info('step %d: %s', step, json.dumps(metrics))


def _save(checkpoints, parts, step, state, backlog, logbook) -> None:
  checkpoints.save(
      step,
      {
          'state': state._replace(frozen=()),
          'pending': backlog.get_state(),
      },
      {
          'frozen': trainable_lib.fingerprint(state.frozen),
          'prompts': parts.prompts.get_state(),
          'masked_tokens': logbook.get_state(),
      },
  )


def _check_finite(
    config: Any, step: int, metrics: Any, checkpoints: Checkpoints
) -> bool:
  """Whether the last update was applied; stops a run that skips too many.

  What was learned before a streak of skipped updates may be what broke the
  policy, so nothing is saved within one.
  """
  in_a_row = int(metrics['optimizer/nonfinite_in_a_row'])
  if in_a_row < config.max_nonfinite_updates:
    return in_a_row == 0
  saved = checkpoints.latest_step()
  kept = 'none was saved before' if saved is None else f'step {saved} is kept'
  raise FloatingPointError(
      f'{in_a_row} updates in a row had a loss, gradient or parameters that '
      f'are not finite, up to step {step}; all were skipped. Checkpoint: '
      f'{kept}. Start anew with another --workdir and a lower '
      'config.optimizer.learning_rate or a finite config.loss.ratio_cap, or '
      'raise config.max_nonfinite_updates to go on.'
  )


def _export(
    config: Any, parts: Parts, state: TrainState, workdir: pathlib.Path
) -> None:
  """The trained model as a Hugging Face folder; adapters for PEFT too."""
  load.save_pretrained(
      parts.model,
      workdir / 'model',
      params=jax.device_get(policy(parts, state)),
      tokenizer=parts.tokenizer,
  )
  if parts.trainable.adapters is not None:
    lora.save_pretrained(
        parts.model,
        parts.trainable.adapters(state.params, state.frozen),
        workdir / 'adapter',
        alpha=config.lora.alpha,
        base=config.model.name,
    )


def _for_trainable(
    config: Any, optimizer: optim.Optimizer, trainable: trainable_lib.Trainable
) -> optim.Optimizer:
  """With the factors of its learning rate, and float32 masters if needed."""
  if trainable.factors is not None:
    optimizer = optim.scaled(optimizer, trainable.factors)
  # Adapters are float32 beside a model of any precision.
  if config.model.params_dtype != 'float32' and not config.lora.rank:
    optimizer = optim.with_master_weights(optimizer)
  return optimizer


def _architecture(config: Any) -> CausalLM:
  """The model without parameters; refuses impossible sizes."""
  family, sizes = load.read_config(load.resolve(config.model.name))
  check_model(config, sizes)
  return configured(config, CausalLM(config=sizes, family=family))


def check_model(config: Any, sizes: Any) -> None:
  """Refuses what a model of these sizes cannot do."""
  checks.check_model(
      config,
      vocab_size=sizes.vocab_size,
      max_positions=sizes.max_position_embeddings,
      num_experts=sizes.num_experts,
  )


def configured(config: Any, model: CausalLM) -> CausalLM:
  """The architecture without parameters, computing as the config says."""
  return model.replace(
      params=None,
      dtype=jax.numpy.dtype(config.model.dtype),
      remat=config.model.remat,
  )


def _make_rollout_fn(config, model, tokenizer, divergence: Divergence, mesh):
  settings = config.sampling.to_dict()
  num_slots = settings.pop('num_slots')
  sampler = sampling.make_sampler(
      model,
      group_size=config.group_size,
      max_completion_length=config.max_completion_length,
      eos_ids=end_ids(tokenizer, config.stop),
      pad_id=tokenizer.pad_token_id,
      record=divergence.record,
      num_slots=num_slots // sharding.num_row_shards(mesh),
      record_routing=config.model.router_replay,
      **settings,
  )
  return rollout_lib.make_rollout_fn(
      sharding.by_rows(sampler, mesh), group_size=config.group_size
  )


def make_method(config: Any) -> Method:
  """Builds what the config names."""
  known = {
      'group_size': config.group_size,
      'horizon': config.max_completion_length,
  }
  updates = config.learner.num_epochs * config.learner.num_minibatches
  return Method(
      divergence=_build(divergences, config.divergence),
      region_fn=_build(trust_regions, config.trust_region),
      loss_fn=_build(losses, config.loss),
      advantage_fn=_build(advantages, config.advantage, **known),
      shaping_fn=_build(shaping, config.shaping, **known),
      normalizer=_build(normalizers, config.normalizer, **known),
      dual=_build(duals, config.dual),
      extras=objective.Extras(**config.extras),
      optimizer=_build(
          optim, config.optimizer, total_updates=config.total_steps * updates
      ),
  )


def _make_arrange(config: Any, mesh: Any) -> packing.ArrangeFn:
  """How the learner lays out rows."""
  if not config.learner.row_length:
    return packing.as_sampled
  return packing.make_packed(
      row_length=config.learner.row_length,
      prompt_length=config.max_prompt_length,
      group_size=config.group_size,
      row_multiple=sharding.num_row_shards(mesh),
  )


def _make_replay(
    config: Any, model: CausalLM, arrange: packing.ArrangeFn
) -> replay_lib.Replay | None:
  sizes, settings = config.learner, config.replay
  return replay_lib.make_replay(
      capacity=settings.capacity,
      num_groups=checks.num_replayed_groups(config),
      group_size=config.group_size,
      sampling=settings.sampling,
      max_age=settings.max_age,
      num_updates=sizes.num_epochs * sizes.num_minibatches,
      logprobs_fn=objective.make_logprobs_fn(
          model=model,
          num_parts=sizes.num_minibatches * sizes.num_microbatches,
          temperature=config.sampling.temperature,
          chunk_size=sizes.chunk_size,
          prompt_length=_unpredicted(config),
          arrange=arrange,
      ),
  )


def _unpredicted(config: Any) -> int:
  """Slots of a prompt at the start of every row of the learner."""
  return 0 if config.learner.row_length else config.max_prompt_length


def _make_learner(
    config, model: CausalLM, method: Method, trainable, arrange, place
):
  sizes = config.learner
  options = {
      'model': model,
      'divergence': method.divergence,
      'extras': method.extras,
      'temperature': config.sampling.temperature,
      'chunk_size': sizes.chunk_size,
      'prompt_length': _unpredicted(config),
  }
  return learner.make_learner(
      weighted_loss=objective.make_loss_fn(
          region_fn=method.region_fn,
          loss_fn=method.loss_fn,
          dual=method.dual,
          **options,
      ),
      prepare=objective.make_prepare_fn(
          advantage_fn=method.advantage_fn,
          shaping_fn=method.shaping_fn,
          normalizer=method.normalizer,
          anchor=config.anchor,
          group_size=config.group_size,
          num_groups=config.num_groups,
          drop_groups_without_spread=config.drop_groups_without_spread,
          mask_truncated=config.mask_truncated,
          num_parts=sizes.num_minibatches * sizes.num_microbatches,
          arrange=arrange,
          **options,
      ),
      optimizer=method.optimizer,
      num_epochs=sizes.num_epochs,
      num_minibatches=sizes.num_minibatches,
      num_microbatches=sizes.num_microbatches,
      dual=method.dual,
      trainable=trainable,
      arrange=arrange,
      place=place,
  )


def _make_evaluate_fn(config, mesh, model, tokenizer, task, verify, key):
  settings = config.eval
  sampler = sampling.make_sampler(
      model,
      group_size=settings.num_samples,
      max_completion_length=config.max_completion_length,
      eos_ids=end_ids(tokenizer, config.stop),
      pad_id=tokenizer.pad_token_id,
      temperature=settings.temperature,
      top_p=settings.top_p,
      top_k=settings.top_k,
      dtype=config.sampling.dtype,
      num_slots=settings.num_slots // sharding.num_row_shards(mesh),
  )
  [batch] = evaluation_batches(
      task.test,
      tokenizer,
      num_prompts=settings.num_prompts,
      max_prompt_length=config.max_prompt_length,
      add_special_tokens=task.chat is None,
  )
  return evaluate.make_evaluate_fn(
      sampler=sharding.by_rows(sampler, mesh),
      batch=batch,
      num_samples=settings.num_samples,
      verify=verify,
      key=key,
      mesh=mesh,
  )


def _build(module: Any, section: Any, **known) -> Any:
  """Builds what a section of the config names.

  `known` are options that no config sets, for factories that require them.
  """
  options = section.to_dict()
  name = options.pop('name')
  required = module.register.required(name)
  return module.build(
      name, **options, **{k: v for k, v in known.items() if k in required}
  )


def _prompt_shapes(config: Any) -> Prompts:
  shape = (config.num_prompts, config.max_prompt_length)
  return Prompts(
      jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, bool)
  )


def _repeat(values: list[str], length: int) -> list[str]:
  """Each value once for every completion of its prompt."""
  return [x for x in values for _ in range(length // len(values))]


def _make_writer(config: Any, workdir: pathlib.Path) -> MetricsWriter:
  return MetricsWriter(
      workdir,
      tensorboard=config.tensorboard,
      wandb=config.wandb,
      run_config=workdir_lib.to_json(config),
      is_main_process=jax.process_index() == 0,
  )


class _Stop:
  """Whether a signal has asked the run to end after its current step."""

  requested = False


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[_Stop]:
  """SIGTERM and the first Ctrl-C save and stop; a second Ctrl-C kills."""
  stop = _Stop()

  def request(number, _):
    stop.requested = True
    logging.warning('Got %s: stopping.', signal.Signals(number).name)
    signal.signal(number, signal.default_int_handler)

  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.signal(number, request) for number in numbers}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def run_evaluate() -> None:
  """Command line of `dppo_jax.evaluate`.

  With --workdir it evaluates the latest checkpoint there, without it the model
  that the config starts from. The last line printed is a JSON object.
  """

  def body(config):
    parts = build(config, to_train=False)
    with contextlib.closing(parts.scorer):
      state = parts.state
      if _WORKDIR.value:
        state = _latest_state(config, parts, pathlib.Path(_WORKDIR.value))
      metrics, _ = parts.evaluate_fn(policy(parts, state))
    metrics |= parts.scorer.take_counts()
    print(json.dumps({'step': int(state.step)} | metrics), flush=True)
    return True

  _run_cli(body)


def _latest_state(
    config: Any, parts: Parts, workdir: pathlib.Path
) -> TrainState:
  folder = workdir / 'checkpoints'
  if not folder.is_dir():
    raise FileNotFoundError(
        f'{folder} does not exist: no run to evaluate. Leave out --workdir to '
        'evaluate the model that the config starts from.'
    )
  with contextlib.closing(Checkpoints(folder)) as checkpoints:
    try:
      restored = _restore(config, parts, checkpoints, blank_rollout(parts))
    except ValueError as error:
      raise ValueError(
          f"{error} Pass the run's own --config and --config.NAME flags."
      ) from error
  if restored is None:
    raise FileNotFoundError(f'{folder} holds no checkpoint yet.')
  return restored[1]['state']


def _run_cli(body: Callable[[Any], bool]) -> None:
  """Runs `body(config)` and turns expected errors into one line."""

  def parse(argv):
    _make_configs_importable(argv)
    with _one_line_errors(Exception):
      return flags.FLAGS(argv)

  def main(argv):
    if len(argv) > 1:
      raise app.UsageError(f'Unexpected argument {argv[1]!r}.')
    with _one_line_errors(Exception):
      config = _config_from_flags()
    # Others are bugs of ours and keep their trace.
    with _one_line_errors(
        ValueError, OSError, ImportError, FloatingPointError
    ):
      finished = body(config)
    sys.exit(0 if finished else EXIT_INTERRUPTED)

  flags.mark_flag_as_required('config')
  # Absl turns every library's chatter on; only warnings of others are news.
  for name in ('jax', 'orbax', 'tensorflow_datasets'):
    python_logging.getLogger(name).setLevel(python_logging.WARNING)
  app.run(main, flags_parser=parse)


def _make_configs_importable(argv: list[str]) -> None:
  """Config files import `configs.default`, wherever the program is started."""
  for argument, following in zip(argv, [*argv[1:], '']):
    name, _, value = argument.lstrip('-').partition('=')
    if name == 'config':
      path = pathlib.Path((value or following).partition(':')[0]).resolve()
      folders = path.parent, *path.parent.parents
      named = [x for x in folders if x.name == 'configs']
      sys.path.append(str((named or folders)[0].parent))


def _config_from_flags() -> Any:
  """The config; --config.algorithm=NAME takes the row NAME, then the flags."""
  config = _CONFIG.value
  changed = config_flags.get_override_values(flags.FLAGS['config'])
  if 'algorithm' in changed:
    with config.unlocked():
      for name, value in algorithms.config(config.algorithm).items():
        config[name] = value
    config.lock()
    config.update_from_flattened_dict(changed)
  return config


@contextlib.contextmanager
def _one_line_errors(*expected: type[Exception]) -> Iterator[None]:
  """A mistake of the user's ends the program without a stack trace.

  `--verbosity=1` brings the trace back.
  """
  try:
    yield
  except expected as error:
    if flags.FLAGS.is_parsed() and flags.FLAGS.verbosity > 0:
      raise
    print(f'error: {_one_line(error)}', file=sys.stderr)
    sys.exit(2)


def _one_line(error: Exception) -> str:
  """The message on one line, without what the flag library wraps it in."""
  # A KeyError shows its message as a quoted string.
  message = str(error.args[0] if isinstance(error, KeyError) else error)
  if 'Traceback' in message:  # A config file raised: its last line says what.
    message = message.strip().splitlines()[-1]
    message = re.sub(r'^(\w+\.)*\w*Error: ', '', message)
  message = ' '.join(message.replace('\\n', ' ').split())
  if typo := re.search(r'Did you mean "(.*)" instead of "(.*?)"', message):
    return f'Unknown config field {typo[2]!r}. Did you mean {typo[1]!r}?'
  if re.fullmatch(r'\W*\w+\W*', message):
    name = re.sub(r'\W', '', message)
    return f'Unknown config field {name!r}. configs/default.py lists them all.'
  if unknown := re.match(r'Key "(.*?)" does not exist', message):
    return f'Unknown config field {unknown[1]!r} for this algorithm or task.'
  if 'Failed loading config file' in message:
    missing = re.search(r"No such file or directory: '(.*)'", message)
    if missing:
      return f'There is no file {missing[1]!r}. Configs are in configs/.'
  if '--config must have a value' in message:
    return 'Which config? For example --config=configs/tv_topk.py.'
  return message


def _default_workdir() -> str:
  """runs/tv_topk for --config=configs/tv_topk.py."""
  filename = config_flags.get_config_filename(flags.FLAGS['config'])
  path, _, argument = filename.partition(':')
  name = pathlib.Path(path).stem + (f'-{argument}' if argument else '')
  return str(pathlib.Path('runs', name))


def run_train() -> None:
  """Command line of `dppo_jax.main`."""
  _run_cli(lambda config: train(config, _WORKDIR.value or _default_workdir()))


if __name__ == '__main__':
  run_train()
