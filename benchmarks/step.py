"""What a training step costs, and where its time goes.

    python benchmarks/step.py --config=configs/tv_topk.py --name=step-tv_topk

The compiled step learns and samples in one program, so nobody can stop a watch
between the two. Training splits its time by a call that only samples
(`dppo_jax.logbook`): decode steps times the seconds per decode step of that
call are sampling, the rest is learning. So does `split` here. `check` then
puts next to each other, in turns on the same arrays,

  step     the compiled step,
  blank    the same program with nothing to learn from,
  learn    the step with a sampler that samples nothing,
  sample   the sampler, jitted by itself.

If the split is right, all three ratios are near 1.
Every option of the config is a flag, for example --config.num_prompts=8.
"""

# ruff: noqa: E402
import time

_START = time.perf_counter()  # Before the imports: they are in the cold start.

import contextlib
import pathlib
import sys
from typing import Any, NamedTuple

# Neither configs/ nor benchmarks/ is installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from dppo_jax import main as main_lib
from dppo_jax import train_step as train_step_lib
from dppo_jax import training
from dppo_jax.rollout import SamplingAux

_IMPORTED = time.perf_counter()

# --config is defined by dppo_jax.main.
_NAME = flags.DEFINE_string('name', None, 'Keeps the result under it.')
_STEPS = flags.DEFINE_integer(
    'steps', 20, 'Training steps to time, twice.', lower_bound=1
)
_SIZES = (
    'num_prompts',
    'group_size',
    'max_prompt_length',
    'max_completion_length',
)


class Run(NamedTuple):
  """A run between two steps."""

  parts: training.Parts
  state: Any
  pending: Any  # Sampled and scored, not yet learned from.


class Timed(NamedTuple):
  """One step."""

  device_s: float
  score_s: float
  decode_steps: int
  sampled: int  # Tokens.


def measure(config: Any, *, num_steps: int) -> dict[str, Any]:
  """Everything this file measures, on one config."""
  run, result = cold_start(config)
  with contextlib.closing(run.parts.scorer):
    steps = []
    for _ in range(num_steps):
      run, step = timed_step(run)
      steps.append(step)
    result |= summarize(steps, result['seconds_per_decode_step'])
    memory = {
        'peak_host_bytes': machine.peak_host_bytes(),
        'peak_device_bytes': machine.peak_device_bytes(),
    }
    run, check = check_split(config, run, num_steps)
    memory['step_temporary_bytes'] = temporary_bytes(run)
  return result | {'memory': memory, 'check': check}


def cold_start(config: Any) -> tuple[Run, dict[str, Any]]:
  """All that comes before and with the first update, in the order of `main`."""
  building = time.perf_counter()
  parts = main_lib.build(config)
  built = time.perf_counter()
  batch = next(parts.prompts)
  state, rollout, times = training.warm_up(
      parts, parts.state, training.blank_rollout(parts), batch
  )
  pending, _ = training.score(parts, rollout, batch)
  warm = time.perf_counter()
  parts.evaluate_fn(state.params)
  evaluated = time.perf_counter()
  # The state that `build` made was donated to the first call.
  run, _ = timed_step(Run(parts._replace(state=None), state, pending))
  return run, {
      'compile_s': _round(times['compile_s']),
      'seconds_per_decode_step': times['seconds_per_decode_step'],
      'cold_start_s': {
          'import': _round(_IMPORTED - _START),
          # Which compiles too.
          'build': _round(built - building - parts.compile_s),
          'compile_and_sample': _round(warm - built + parts.compile_s),
          'evaluate': _round(evaluated - warm),
          'first_update': _round(time.perf_counter() - evaluated),
          'total': _round(time.perf_counter() - building + _IMPORTED - _START),
      },
  }


def timed_step(run: Run) -> tuple[Run, Timed]:
  """One step as training takes it: learn, sample, score."""
  parts = run.parts
  start = time.perf_counter()
  batch = next(parts.prompts)
  state, rollout, metrics = parts.train_step(
      run.state, run.pending, batch.prompts
  )
  jax.block_until_ready(rollout)
  sampled = time.perf_counter()
  pending, _ = training.score(parts, rollout, batch)
  end = time.perf_counter()
  return Run(parts, state, pending), Timed(
      device_s=sampled - start,
      score_s=end - sampled,
      decode_steps=int(metrics['sample/decode_steps']),
      sampled=int(jnp.sum(rollout.token_mask)),
  )


def summarize(steps: list[Timed], seconds_per_decode_step: float):
  """Times, and their split by the blank call."""
  sample = [
      min(x.device_s, seconds_per_decode_step * x.decode_steps) for x in steps
  ]
  learn = [x.device_s - s for x, s in zip(steps, sample, strict=True)]
  step = [x.device_s + x.score_s for x in steps]
  tokens = sum(x.sampled for x in steps)
  # What is learned from was sampled one step before: as many, on average.
  return {
      'step_s': machine.spread(step),
      'split': {
          'learn_s': machine.spread(learn),
          'sample_s': machine.spread(sample),
          'score_s': machine.spread([x.score_s for x in steps]),
      },
      'decode_steps': machine.spread([x.decode_steps for x in steps]),
      'tokens_per_step': tokens / len(steps),
      'tokens_per_s': {
          'whole_step': round(tokens / sum(step)),
          'sampled': round(tokens / max(sum(sample), 1e-9)),
          'learned': round(tokens / max(sum(learn), 1e-9)),
      },
  }


def check_split(config: Any, run: Run, num_steps: int):
  """Whole steps, each beside the same step in parts."""
  learn_alone, sample_alone = halves(config, run)
  parts = run.parts
  blank = training.blank_rollout(parts._replace(state=run.state))
  rounds = []
  for _ in range(num_steps + 1):
    prompts = next(parts.prompts).prompts
    copied = jax.tree.map(jnp.copy, (run.state, run.state))  # Both donated.
    key = jax.random.fold_in(run.state.key, run.state.step)
    # Before the step, which donates the state.
    products = jax.tree.map(jnp.copy, run.state.products)  # Donated, too.
    sample = _time(
        sample_alone, run.state.params, prompts, key, jnp.int32(0), products
    )
    blank_call = _time(parts.train_step, copied[0], blank, prompts)
    learn = _time(learn_alone, copied[1], run.pending, prompts)
    run, step = timed_step(run)
    rounds.append((step.device_s, blank_call, learn, sample))
  del rounds[0]  # It compiled.
  step, blank_call, learn, sample = np.array(rounds).T
  return run, {
      'step_s': machine.spread(step),
      'blank_s': machine.spread(blank_call),
      'learn_s': machine.spread(learn),
      'sample_s': machine.spread(sample),
      'learn / (step - blank)': machine.spread(learn / (step - blank_call)),
      'sample / blank': machine.spread(sample / blank_call),
      '(learn + sample) / step': machine.spread((learn + sample) / step),
  }


def halves(config: Any, run: Run):
  """The learner and the sampler of a run, each as a program of its own."""
  parts = run.parts
  learn_alone = train_step_lib.make_train_step(
      learn=parts.learn,
      rollout_fn=lambda *arguments: (
          (), SamplingAux(jnp.int32(0), arguments[-1])
      ),
      threshold=parts.method.outside_threshold,
      group_size=config.group_size,
      vocab_size=parts.model.config.vocab_size,
      state_shardings=train_step_lib.state_shardings(run.state, parts.mesh),
      mesh=parts.mesh,
  )
  return learn_alone, jax.jit(parts.rollout_fn, donate_argnums=4)


def temporary_bytes(run: Run) -> int | None:
  """What the compiled step needs besides its arguments and results."""
  prompts = next(run.parts.prompts).prompts
  compiled = run.parts.train_step.lower(
      run.state, run.pending, prompts
  ).compile()
  analysis = compiled.memory_analysis()
  return analysis and int(analysis.temp_size_in_bytes)


def _time(function, *arguments) -> float:
  """Seconds of a call."""
  jax.block_until_ready(arguments)
  start = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  return time.perf_counter() - start


def _round(value: float) -> float:
  return float(np.round(value, 3))


def main(argv):
  """Measures the config of the command line."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected argument {argv[1]!r}.')
  config = flags.FLAGS.config
  if config.mode != 'fused':
    raise app.UsageError(
        f'config.mode={config.mode!r} is not measured here, fused is.'
    )
  result = {
      'benchmark': 'step',
      'algorithm': config.algorithm,
      'model': config.model.name,
      'steps': _STEPS.value,
      'sizes': {name: config[name] for name in _SIZES},
  }
  result |= measure(config, num_steps=_STEPS.value)
  machine.report(result | {'machine': machine.describe()}, _NAME.value)


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  app.run(main)
