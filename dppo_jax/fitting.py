"""Says before the first step that it does not fit, or makes it fit.

XLA plans all memory of a step when it compiles it, so what is missing is known
while nothing has run. An error names it, and the settings that lower it now.
Where the config leaves the number of micro-batches open, a few are compiled, on
shapes alone: with k of them, temporary memory is about a + b / k.

In all of this file a limit is the bytes that a device has, None if unknown (and
everything fits), and shards are the devices over which a batch is split.
"""

from collections.abc import Callable
import time
from typing import Any

from absl import logging
import jax

from dppo_jax import checks
from dppo_jax import evaluate
from dppo_jax import memory
from dppo_jax import processes
from dppo_jax import trainable as trainable_lib
from dppo_jax.types import PyTree
from dppo_jax.types import TrainState

# 'arguments', 'temporary', 'results' and 'total' of `memory.of_step`, in bytes
# per device; empty where XLA does not tell.
Sizes = dict[str, int]


class Refused(ValueError):
  """The compiler has found no room."""


def fits(sizes: Sizes, limit: int | None) -> bool:
  """Whether a step has room, as far as one knows."""
  return limit is None or not sizes or sizes['total'] <= limit


def check(
    config: Any, sizes: Sizes, *, limit: int | None, num_batch_shards: int
) -> None:
  """Raises a ValueError if a step that was built from `config` does not fit."""
  if fits(sizes, limit):
    return
  biggest = max(('arguments', 'temporary'), key=sizes.get)
  parts = {k: x for k, x in sizes.items() if k not in (biggest, 'total')}
  arguments = _for_arguments(config, num_batch_shards)
  temporary = _for_temporary(config, num_batch_shards)
  if sizes['arguments'] >= limit:
    ways = arguments
  elif biggest == 'arguments':
    ways = arguments + temporary
  else:
    ways = temporary or arguments
  raise ValueError(
      f'The training step needs {memory.readable(sizes["total"])} on each '
      f'device, which has {memory.readable(limit)}. Most of it is {biggest}, '
      f'{memory.readable(sizes[biggest])} ({memory.listed(parts)}). To lower '
      f'it: {_joined(ways)}.'
  )


def check_lasting(
    config: Any,
    kinds: dict[str, int],
    *,
    limit: int | None,
    num_batch_shards: int,
) -> None:
  """Raises a ValueError if not even what lasts between steps has room.

  Nothing need be compiled for it; what passes may still not fit.

  Args:
    config: of the run.
    kinds: from `memory.by_kind`, bytes per device.
    limit: see above.
    num_batch_shards: see above.
  """
  total = sum(kinds.values())
  if limit is None or total <= limit:
    return
  ways = _for_arguments(config, num_batch_shards)
  biggest = max(kinds, key=kinds.get)
  raise ValueError(
      f'What lasts from step to step takes {memory.readable(total)} on each '
      f'device, which has {memory.readable(limit)}. Most of it is {biggest}, '
      f'{memory.readable(kinds[biggest])}. To lower it: {_joined(ways)}.'
  )


def compile_step(
    lowered: jax.stages.Lowered, config: Any, *, num_batch_shards: int
) -> jax.stages.Compiled:
  """Compiles a step that was built from `config`.

  Raises:
    Refused: the compiler ran out of memory.
  """
  return _compile(
      lowered, 'the training step', lambda: _for_temporary(
          config, num_batch_shards
      )
  )


def _compile(lowered, what, ways) -> jax.stages.Compiled:
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    said = str(error).strip().splitlines()[0].rstrip('.')
    raise Refused(
        f'The compiler finds no room for {what}: {said}. To lower what it '
        f'needs: {_joined(ways())}.'
    ) from error


def check_evaluation(
    program: evaluate.Program,
    config: Any,
    *,
    trainable: trainable_lib.Trainable,
    state: TrainState,
    pending: PyTree,
    mesh: Any,
    limit: int | None,
) -> tuple[int, int]:
  """Raises a ValueError if held-out evaluation does not fit beside a run.

  Args:
    program: of the evaluation.
    config: of the run.
    trainable: what makes a policy of its state.
    state: of which the policy is evaluated; shapes will do.
    pending: rollouts that wait meanwhile, or their shapes.
    mesh: of the learner.
    limit: see above.

  Returns:
    bytes per device that it needs, and that the run holds beside it.
  """
  params = trainable_lib.placed_policy(
      trainable, state.params, state.frozen, mesh
  )
  merged, shared = trainable is not trainable_lib.EVERYTHING, 0
  if program.apart:
    held = 0  # But for what is sampled with meanwhile, below.
  else:
    held = sum(memory.by_kind(state, pending).values())
    if merged and program.copies:
      held += memory.per_device(params)
    elif not merged and not program.copies:
      shared = memory.per_device(params)
  if config.mode == 'split' and config.staleness:  # The sampler goes on.
    held += memory.per_device(program.there(params))
  needed = check_beside(
      program.lower(params), config, limit=limit, held=held, shared=shared
  )
  return needed, held


def check_beside(
    lowered: jax.stages.Lowered,
    config: Any,
    *,
    limit: int | None,
    held: int,
    shared: int,
) -> int:
  """Raises a ValueError if an evaluation does not fit beside what is held.

  Args:
    lowered: its program.
    config: of the run.
    limit: see above.
    held: bytes per device that are there while it runs.
    shared: of them, those that are arguments of the program.

  Returns:
    bytes per device that it needs beside them; 0 where XLA does not tell.
  """
  ways = lambda: _for_evaluation(config)
  try:
    sizes = memory.of_step(_compile(lowered, 'held-out evaluation', ways))
  except Refused as error:  # Others may wait to hear of it.
    sizes = error
  sizes = _largest(sizes)
  if isinstance(sizes, Refused):
    raise sizes
  if not sizes:
    return 0
  needed = sizes['total'] - shared
  if limit is not None and held + needed > limit:
    raise ValueError(
        f'Held-out evaluation needs {memory.readable(needed)} on each device '
        f'beside the {memory.readable(held)} of a run, and there are '
        f'{memory.readable(limit)}. To lower it: {_joined(ways())}.'
    )
  return needed


def make_program(
    config: Any,
    make: Callable[[Any], Any],
    lower: Callable[[Any], jax.stages.Lowered],
    *,
    limit: int | None,
    num_batch_shards: int,
    to_train: bool = True,
) -> tuple[Any, float]:
  """A program with room for its state and, if it is to train, for its step.

  What is compiled here is found by who compiles the same step later.

  Args:
    config: of the run; its learner.num_microbatches may be 0.
    make: `make(config) -> program`, of another number than 0. `program.state`
      are shapes with shardings.
    lower: of a program, its step.
    limit: see above.
    num_batch_shards: see above.
    to_train: False if no step will be taken; then none is compiled.

  Returns:
    the program, and the seconds that compiling took.

  Raises:
    ValueError: it does not fit.
  """
  shards = {'num_batch_shards': num_batch_shards}
  given = config.learner.num_microbatches
  choices = [given] if given else checks.microbatch_choices(config, **shards)
  tried = checks.with_microbatches(config, choices[0])
  program = make(tried)
  kinds = memory.by_kind(program.state, ())
  check_lasting(tried, kinds, limit=limit, **shards)
  if not to_train:
    return program, 0.0
  number, trials, start = choices[0], {}, time.perf_counter()
  while number:
    tried = checks.with_microbatches(config, number)
    program = make(tried)
    try:
      sizes = memory.of_step(compile_step(lower(program), tried, **shards))
    except Refused as error:
      sizes = error
    sizes = trials[number] = _largest(sizes)
    if not given:
      _log_trial(number, sizes, limit)
    number = next_number(trials, choices, limit=limit)
  if isinstance(sizes, Refused):
    raise sizes
  check(tried, sizes, limit=limit, **shards)
  return program, time.perf_counter() - start


def _largest(sizes: Sizes | Refused) -> Sizes | Refused:
  """Of the process that needs most: all must decide the same."""
  refused = isinstance(sizes, Refused)
  found = processes.gather(str(sizes) if refused else sizes)
  if refused:
    return sizes
  for other in found:
    if isinstance(other, str):
      return Refused(other)
  return {name: max(x.get(name, 0) for x in found) for name in sizes}


def _log_trial(number, sizes, limit):
  refused = isinstance(sizes, Refused)
  logging.info(
      'learner.num_microbatches=%d: %s on each device, which has %s: %s.',
      number,
      'too much' if refused else memory.listed(sizes) or 'unknown',
      'unknown' if limit is None else memory.readable(limit),
      'chosen' if not refused and fits(sizes, limit) else 'does not fit',
  )


def next_number(
    trials: dict[int, Sizes | Refused], choices: list[int], *, limit: int | None
) -> int | None:
  """How many micro-batches to try next; None once it fits, or never will.

  One trial tells the fewest that could be enough, as if all of its temporary
  memory were split. A line through two of them, in 1 / k, tells how many are;
  if it says never, four times as many are next.

  Args:
    trials: number -> what came of it, at least one, in the order of trial.
    choices: all numbers, from the smallest.
    limit: see above.
  """
  *_, (latest, sizes) = trials.items()
  larger = [number for number in choices if number > latest]
  if isinstance(sizes, Refused):
    wanted = 2 * latest
  elif fits(sizes, limit):
    return None
  else:
    temporary = sizes['temporary']
    room = limit - (sizes['total'] - temporary)
    if room <= 0:
      return None
    wanted = latest * temporary / room
    before = [
        (k, x['temporary']) for k, x in trials.items()
        if k != latest and not isinstance(x, Refused)
    ]
    if before:
      k, more = before[-1]
      split = (more - temporary) / (1 / k - 1 / latest)
      rest = temporary - split / latest
      # Where the line says never, it may be wrong: another phase of the step
      # can be the largest.
      wanted = split / (room - rest) if rest < room else 4 * latest
  enough = [number for number in larger if number >= wanted]
  return next(iter(enough + larger[-1:]), None)


def _joined(ways: list[str]) -> str:
  return '; '.join(ways) or (
      'use more or larger devices, or lower config.num_prompts, group_size or '
      'max_completion_length'
  )


def _for_temporary(config: Any, num_batch_shards: int) -> list[str]:
  """What could still be set so that a step needs less temporary memory."""
  ways, sizes, sampling = [], config.learner, config.sampling
  number = sizes.num_microbatches
  choices = checks.microbatch_choices(config, num_batch_shards=num_batch_shards)
  if any(x > number for x in choices):
    ways.append(
        f'raise config.learner.num_microbatches (now {number}, and 0 finds how '
        'many fit)'
    )
  elif num_batch_shards > 1:  # A device has a row; it could have a part of one.
    ways.append(
        'split rows over devices by config.mesh.sequence (now '
        f'{config.mesh.sequence})'
    )
  if not sizes.chunk_size:
    ways.append('set learner.chunk_size (now 0, all logits at once)')
  if config.model.remat != 'full':
    ways.append(f"model.remat='full' (now {config.model.remat!r})")
  if config.model.unroll_layers:
    ways.append('model.unroll_layers=False (now True)')
  if not sampling.num_slots:
    ways.append('sampling.num_slots (now 0, all completions at once)')
  if sizes.reuse_forward:  # One dtype for both, without adapters at least.
    if config.model.dtype != 'bfloat16' and not config.lora.rank:
      ways.append(
          f"model.dtype='bfloat16' (now {config.model.dtype!r}) and the same "
          'for sampling'
      )
    return ways
  for name in ('model', 'sampling'):
    if config[name].dtype != 'bfloat16':
      ways.append(f"{name}.dtype='bfloat16' (now {config[name].dtype!r})")
  return ways


def _for_evaluation(config: Any) -> list[str]:
  """What could be set so that held-out evaluation needs less memory."""
  settings = config.eval
  number = settings.num_prompts * settings.num_samples
  ways = [
      f'lower config.eval.num_slots (now {settings.num_slots})'
      if settings.num_slots else
      f'set config.eval.num_slots (now 0, all {number} completions at once)',
      f'eval.num_prompts (now {settings.num_prompts})',
      f'eval.num_samples (now {settings.num_samples})',
  ]
  if config.sampling.dtype != 'bfloat16':
    ways.append(
        f"config.sampling.dtype='bfloat16' (now {config.sampling.dtype!r})"
    )
  return ways


def _for_arguments(config: Any, num_batch_shards: int) -> list[str]:
  """What could still be set so that less lasts from step to step."""
  ways, mesh = [], config.mesh
  if config.learner.reuse_forward:
    ways.append('config.learner.reuse_forward=False (now True)')
  split = mesh.fsdp if mesh.fsdp > 0 else num_batch_shards // mesh.data
  if split < num_batch_shards:
    ways.append(
        f'config.mesh.fsdp={num_batch_shards} and mesh.data=1 (now {split} and '
        f'{num_batch_shards // split} copies)'
    )
  if not config.lora.rank:
    ways.append('config.lora.rank (now 0, everything is trained)')
    if config.optimizer.mu_dtype != 'bfloat16':
      ways.append("optimizer.mu_dtype='bfloat16' (now 'float32')")
  # What is trained in bfloat16 has a float32 copy beside it.
  elif config.model.params_dtype != 'bfloat16':
    ways.append("config.model.params_dtype='bfloat16' (now 'float32')")
  if config.replay.capacity:
    ways.append(f'lower replay.capacity (now {config.replay.capacity})')
  return ways
