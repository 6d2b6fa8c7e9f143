"""The loop: a run from its first rollout, or its last checkpoint, to its end.

The device works on a step while the host scores, logs and saves the one before.
"""

from collections.abc import Callable
import contextlib
import functools
import json
import os
import pathlib
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np

from dppo_jax import evaluate
from dppo_jax import fitting
from dppo_jax import lora
from dppo_jax import memory
from dppo_jax import processes
from dppo_jax import report
from dppo_jax import rollout as rollout_lib
from dppo_jax import sharding
from dppo_jax import train_step as train_step_lib
from dppo_jax import trainable as trainable_lib
from dppo_jax import workdir as workdir_lib
from dppo_jax.backlog import Backlog
from dppo_jax.backlog import Scored
from dppo_jax.checkpoint import Checkpoints
from dppo_jax.logbook import Logbook
from dppo_jax.metrics import MetricsWriter
from dppo_jax.metrics import Progress
from dppo_jax.models import load
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.program import Method
from dppo_jax.tasks.prompts import PromptBatch
from dppo_jax.tasks.prompts import PromptIterator
from dppo_jax.tasks.scoring import Scorer
from dppo_jax.tasks.verify import VerifyFn
from dppo_jax.tracing import Tracer
from dppo_jax.types import Prompts
from dppo_jax.types import Rollout
from dppo_jax.types import ScoredRollout
from dppo_jax.types import TrainState

_NUM_TIMED_CALLS = 3
OWN_FLAGS = "Pass the run's own --config and --config.NAME flags."


class Parts(NamedTuple):
  """Everything a run is made of, built from its config."""

  method: Method  # Divergence, losses, optimizer.
  model: CausalLM  # Without parameters: those are in the state.
  trainable: trainable_lib.Trainable
  tokenizer: Any
  scorer: Scorer
  verify: VerifyFn
  prompts: PromptIterator
  evaluate_fn: evaluate.Evaluation
  rollout_fn: rollout_lib.RolloutFn
  learn: Callable[..., Any]
  train_step: train_step_lib.TrainStep
  state: TrainState  # Before the first update.
  prompt_shapes: Prompts
  own: np.ndarray  # Rows of a rollout that this process scores.
  mesh: Any
  compile_s: float  # Spent on compiling the step.


def train(
    config: Any,
    parts: Parts,
    workdir: str,
    should_stop: Callable[[int], bool],
) -> bool:
  """Trains until `config.total_steps`.

  Args:
    config: of the run.
    parts: built from it.
    workdir: of the run; made, or its own, which no other run may be in.
    should_stop: asked after every step, whose number it gets, whether to save
      and end; the same answer on all processes.

  Returns:
    False if it was stopped before its last step.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.closing(parts.scorer))
    workdir = pathlib.Path(workdir).expanduser()
    with processes.failing_together():
      if processes.is_main():
        workdir_lib.prepare(workdir, config)
    checkpoints = Checkpoints(
        workdir / 'checkpoints', keep=config.keep_checkpoints
    )
    stack.enter_context(contextlib.closing(checkpoints))
    with processes.failing_together():
      writer = stack.enter_context(_make_writer(config, workdir))
    run = _start(config, parts, checkpoints, writer)
    state, backlog, logbook = run.state, run.backlog, run.logbook
    del run  # Its state is donated to the first step.
    stack.callback(logbook.flush)
    first = int(state.step) + 1
    if first > config.total_steps:
      logging.warning(
          '%s has taken %d steps, and config.total_steps=%d asks for no more: '
          'nothing is learned.', workdir, first - 1, config.total_steps,
      )
    bar = stack.enter_context(Progress(
        config.total_steps, first, is_main_process=processes.is_main()
    ))
    owed = False  # Whether a checkpoint is due that was not saved yet.
    tracer = stack.enter_context(contextlib.closing(Tracer(
        workdir / 'profile',
        num_steps=config.profile_steps if processes.is_main() else 0,
        first=first,
    )))

    for step in range(first, config.total_steps + 1):
      tracer.at(step)
      start = time.perf_counter()
      batch = next(parts.prompts)
      state, rollout, metrics = parts.train_step(
          state, backlog.pop(), batch.prompts
      )
      parts.prompts.prefetch()  # The next batch, while the device works.
      logbook.flush()  # So too, the previous step.
      backlog.score()  # And this, unless it was learned from at once.
      # Two programs: who has older rollouts need not wait for this one.
      jax.block_until_ready(state if config.staleness else rollout)
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
        _note_samples(parts, logbook, step, backlog.newest())
        _evaluate(parts, state, logbook, step)
      logbook.add_scalars(
          step, parts.scorer.take_counts() | backlog.take_seconds()
      )
      stopping = should_stop(step)
      owed |= step % config.checkpoint_every == 0 or last or stopping
      if last:  # Before its checkpoint, after which no step comes.
        _write_scatter(logbook, workdir)
      if owed and healthy:
        logbook.flush()  # A checkpoint never knows more than the log.
        _save(checkpoints, parts, step, state, backlog, logbook)
        owed = False
      if owed and (last or stopping):
        _warn_of_unsaved(step, checkpoints)
      if stopping:
        logging.warning('Stopped by a signal; the same command continues.')
        return False

    write_model(config, parts, state, workdir)
    _write_report(parts, logbook, workdir)
  return True


def check_rows(prompts: PromptIterator, workdir: pathlib.Path) -> None:
  """Raises a ValueError if the run in `workdir` was made with other rows.

  `train` does, too, but by then its step has been compiled.
  """
  with processes.failing_together():
    with contextlib.closing(Checkpoints(workdir / 'checkpoints')) as saved:
      host = saved.latest_host()
    if host is not None:
      prompts.check_state(host['prompts'])


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
  restored = _restore(config, parts, checkpoints, blank, goes_on=True)
  if restored is not None:
    step, arrays, host = restored
    state = arrays['state']
    backlog.set_state(arrays['pending'])
    parts.prompts.set_state(host['prompts'])
    _forget_after(step, writer)
    logging.info('Continuing after step %d.', step)
    products = state.products  # Of the rollout that waits.
    # Warming up writes over those of the start.
    state = state._replace(products=parts.state.products)
  state, rollout, times = warm_up(parts, state, blank, batch)
  logbook = Logbook(
      writer,
      vocab_size=parts.model.config.vocab_size,
      seconds_per_decode_step=times['seconds_per_decode_step'],
      overlapping=config.sampling.num_devices > 0 and config.staleness > 0,
  )
  if restored is not None:
    state = state._replace(products=products)
    logbook.set_state(host['masked_tokens'])
  else:
    _forget_after(-1, writer)  # A run killed before its first checkpoint.
    state = fill(config, parts, state, blank, backlog, rollout, batch)
    logbook.add_scalars(0, {'time/compile_s': times['compile_s']})
    _note_samples(parts, logbook, 0, backlog.newest())
    _evaluate(parts, state, logbook, 0)
    logbook.add_scalars(0, parts.scorer.take_counts() | backlog.take_seconds())
    logbook.flush()
  return _Run(state, backlog, logbook)


def _forget_after(step: int, writer: MetricsWriter) -> None:
  """Nobody goes on alone if a log cannot be read, or written anew."""
  with processes.failing_together():
    writer.truncate_after(step)


def fill(config, parts, state, blank, backlog, rollout, batch) -> TrainState:
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


def _restore(config, parts, checkpoints, blank, *, goes_on=False):
  """The latest checkpoint, beside the frozen parameters it was made with.

  Who goes on must have the same prompts, who only looks may have others.

  A device need not hold the state twice: in `parts.state`, only what is frozen
  and the products are left where there is a checkpoint.
  """
  start, frozen = parts.state, parts.state.frozen
  # Not arrays, of which the start's are deleted before others are read.
  wanted = sharding.shapes(_checkpointed(config, start, blank))

  def when_found(step, host):
    if host['frozen'] != trainable_lib.fingerprint(frozen):
      raise ValueError(
          f'config.model.name={config.model.name!r} has other weights than '
          f'when the checkpoint of step {step} was saved, and a checkpoint '
          'does not hold what is frozen. Use the same model, or another '
          '--workdir.'
      )
    if goes_on:
      parts.prompts.check_state(host['prompts'])
    jax.tree.map(lambda x: x.delete(), start._replace(frozen=(), products=()))

  restored = checkpoints.restore_latest(
      wanted, when_found=when_found, goes_on=goes_on
  )
  if restored is None:
    return None
  step, arrays, host = restored
  state = arrays['state']._replace(frozen=frozen)
  return step, arrays | {'state': state}, host


def latest_state(
    config: Any, parts: Parts, workdir: str | os.PathLike
) -> TrainState:
  """The state of the latest checkpoint; `parts.state` is deleted for it.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is of another model or config.
  """
  folder = pathlib.Path(workdir).expanduser() / 'checkpoints'
  # Nothing else of adapters tells what they are multiplied by.
  workdir_lib.check(workdir, config, only='lora.', way_out=OWN_FLAGS)
  if not folder.is_dir():
    raise FileNotFoundError(f'{folder} does not exist: no run was saved there.')
  with contextlib.closing(Checkpoints(folder)) as checkpoints:
    try:
      restored = _restore(config, parts, checkpoints, blank_rollout(parts))
    except ValueError as error:
      raise ValueError(f'{error} {OWN_FLAGS}') from error
  if restored is None:
    raise FileNotFoundError(f'{folder} holds no checkpoint yet.')
  return restored[1]['state']


def blank_rollout(parts: Parts) -> ScoredRollout:
  """A rollout in which nothing was sampled, made on its devices."""
  return jax.jit(
      lambda: train_step_lib.blank(
          parts.rollout_fn, parts.state, parts.prompt_shapes, parts.trainable
      ),
      out_shardings=sharding.batch(parts.mesh),
  )()


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
  # Gloo gives up on a group of CPUs that is not complete after 30 seconds.
  processes.wait_for_all()
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
  """Rewards of a rollout, on the devices, and own completions as text.

  The rollout is brought to the learner's devices if it was sampled on others.
  """
  rows = sharding.batch(parts.mesh)
  rollout = jax.device_put(rollout, rows)
  tokens, mask, truncated = processes.local_rows(
      (rollout.tokens, rollout.token_mask, rollout.truncated), parts.own
  )
  texts, rewards = parts.verify(
      tokens=tokens[:, 1:],
      mask=mask,
      truncated=truncated,
      answers=_repeat(batch.answers, len(tokens)),
  )
  num_rows = len(rollout.truncated)
  rewards = processes.place(
      processes.collect(rewards, parts.own, num_rows), rows, num_rows
  )
  return ScoredRollout(rollout, rewards), texts


def check_evaluation(
    config: Any, parts: Parts, state: TrainState, pending: Any = ()
) -> None:
  """Raises a ValueError if held-out evaluation has no room beside a run.

  Its program is compiled here, and found when it runs.

  Args:
    config: of the run.
    parts: built from it.
    state: of which the policy is evaluated.
    pending: rollouts that wait meanwhile, or their shapes.
  """
  fitting.check_evaluation(
      parts.evaluate_fn.program,
      config,
      trainable=parts.trainable,
      state=state,
      pending=pending,
      mesh=parts.mesh,
      limit=memory.limit(),
  )


def policy(parts: Parts, state: TrainState) -> Any:
  """The parameters of the policy: the state's own, or merged with the rest."""
  if parts.trainable is trainable_lib.EVERYTHING:
    return state.params  # A compiled function would copy them.
  shapes, treedef = jax.tree.flatten(
      sharding.shapes((state.params, state.frozen))
  )
  merge = _make_merge(
      parts.trainable.merge, parts.mesh, treedef, tuple(shapes)
  )
  return merge(state.params, state.frozen)


@functools.lru_cache(maxsize=8)
def _make_merge(merge, mesh, treedef, shapes):
  """Made once: JAX keeps something of each `jax.eval_shape` of a closure."""
  policy = jax.eval_shape(merge, *jax.tree.unflatten(treedef, shapes))
  return jax.jit(merge, out_shardings=sharding.of_params(policy, mesh))


def _note_samples(
    parts: Parts, logbook: Logbook, step: int, newest: Scored
) -> None:
  batch, texts, scored = newest
  logbook.add_samples(
      step,
      'train',
      prompts=_repeat(batch.texts, len(texts)),
      completions=texts,
      answers=_repeat(batch.answers, len(texts)),
      rewards=processes.local_rows(scored.rewards, parts.own),
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
  if metrics['eval/truncated'] == 1:
    logging.warning(
        'No held-out completion of step %d ended within '
        'config.max_completion_length, so all earn 0; raise it, or say by '
        'config.stop what ends one.', step,
    )


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
  kept = _kept(checkpoints)
  narrow = 'float16' in (config.model.dtype, config.sampling.dtype)
  raise FloatingPointError(
      f'{in_a_row} updates in a row had a loss, gradient or parameters that '
      f'are not finite, up to step {step}; all were skipped. Checkpoint: '
      f'{kept}. Start anew with another --workdir and a lower '
      'config.optimizer.learning_rate or a finite config.loss.ratio_cap, or '
      'raise config.max_nonfinite_updates to go on.' + (
          ' float16 ends at 65,504, where activations may overflow: bfloat16 '
          'has the range of float32.' if narrow else ''
      )
  )


def _warn_of_unsaved(step: int, checkpoints: Checkpoints) -> None:
  logging.warning(
      'Step %d is not saved, as its last update was skipped; it was not finite.'
      ' Checkpoint: %s.', step, _kept(checkpoints),
  )


def _kept(checkpoints: Checkpoints) -> str:
  checkpoints.wait()
  saved = checkpoints.latest_step()
  return 'none was saved before' if saved is None else f'step {saved} is kept'


def write_model(
    config: Any, parts: Parts, state: TrainState, workdir: pathlib.Path
) -> None:
  """The policy as a Hugging Face folder `model`, and adapters as `adapter`.

  All processes call it, and one writes.
  """
  params = processes.to_main(policy(parts, state))
  adapters = None
  if parts.trainable.adapters is not None:
    adapters = processes.to_main(
        parts.trainable.adapters(state.params, state.frozen)
    )
  with processes.failing_together():  # Nobody leaves while one still writes.
    if not processes.is_main():
      return
    load.save_pretrained(
        parts.model,
        workdir / 'model',
        params=params,
        tokenizer=parts.tokenizer,
    )
    if adapters is not None:
      lora.save_pretrained(
          parts.model,
          adapters,
          workdir / 'adapter',
          alpha=config.lora.alpha,
          base=config.model.name,
      )


def _write_scatter(logbook: Logbook, workdir: pathlib.Path) -> None:
  """For a plot; a checkpoint comes next, and does not wait for it."""
  if not processes.is_main():
    return
  path = workdir / 'scatter.json'
  try:
    logbook.write_scatter(path)
  except OSError as error:
    logging.warning('%s is not written: %s', path, error)


def _write_report(
    parts: Parts, logbook: Logbook, workdir: pathlib.Path
) -> None:
  """What the logbook still holds, and the page that shows it."""
  with processes.failing_together():
    if not processes.is_main():
      return
    logbook.write_masked_tokens(workdir / 'masked_tokens.json', parts.tokenizer)
    logbook.flush()
    path = report.write_report(workdir)
    logging.info('Done. Report: %s  Model: %s', path, workdir / 'model')


def _make_writer(config: Any, workdir: pathlib.Path) -> MetricsWriter:
  return MetricsWriter(
      workdir,
      tensorboard=config.tensorboard,
      wandb=config.wandb,
      run_config=workdir_lib.to_json(config),
      is_main_process=processes.is_main(),
  )


def _repeat(values: list[str], length: int) -> list[str]:
  """Each value once for every completion of its prompt."""
  return [x for x in values for _ in range(length // len(values))]
