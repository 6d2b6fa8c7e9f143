"""Runs of one algorithm in one program: seeds and numbers side by side.

The whole train step of `main`, the verifier, the order of prompts and the
held-out evaluation are those of a run of its own; here they work on the states
of several runs at once. Runs that differ by seed, learning rate and threshold
share a program, for these are numbers that the program takes as arguments;
whatever else differs makes another program.
"""

from collections.abc import Callable, Sequence
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax import divergences
from dppo_jax import main
from dppo_jax import program as program_lib
from dppo_jax import training
from dppo_jax.backlog import Backlog
from dppo_jax.program import Method
from dppo_jax.tasks.prompts import PromptBatch
from dppo_jax.types import Prompts
from dppo_jax.types import Rollout
from dppo_jax.types import ScoredRollout
from experiments.lib import pool
from experiments.lib import table
from experiments.small import config as small

# What may differ between runs of one program.
FREE = (
    'seed',
    'optimizer.learning_rate',
    'divergence.threshold',
    'divergence.threshold_low',
    'divergence.threshold_high',
)

# Name of a column -> metric of the step, and what is kept of several steps.
Columns = dict[str, tuple[str, Callable[[np.ndarray], Any]]]


class Cell(NamedTuple):
  """A run of a sweep. All text, so that a row of a CSV file tells it again."""

  setting: str  # A name for what all methods of a comparison share.
  method: str  # A name for the rest.
  seed: str
  config: str  # Row of the table of algorithms, then name=JSON of the rest.


def make_cell(
    setting: str, method: str, algorithm: str, seed: int, **options: Any
) -> Cell:
  """A run of row `algorithm`; options as `learner__num_epochs=4`."""
  names = {name.replace('__', '.'): x for name, x in options.items()}
  words = [f'{name}={json.dumps(x)}' for name, x in sorted(names.items())]
  return Cell(setting, method, str(seed), ' '.join([algorithm, *words]))


def config_of(cell: Cell) -> Any:
  """The config of a run: that of `experiments/small`, with its changes."""
  algorithm, *words = cell.config.split(' ')
  changes = {
      name: json.loads(x)
      for name, x in (word.split('=', 1) for word in words)
  }
  config = small.get_config(algorithm)
  config.update_from_flattened_dict(changes | {'seed': int(cell.seed)})
  return config


def programs(cells: Sequence[Cell], largest: int) -> list[list[Cell]]:
  """Cells that share a program, at most `largest` of them together."""
  groups = {}
  for cell in cells:
    config = config_of(cell).to_dict()
    for name in FREE:
      section, _, option = name.rpartition('.')
      (config[section] if section else config).pop(option, None)
    groups.setdefault(json.dumps(config, sort_keys=True), []).append(cell)
  return [
      group[start : start + largest]
      for group in groups.values()
      for start in range(0, len(group), largest)
  ]


class Free(NamedTuple):
  """What a program takes as arguments. [] each, or [cells]."""

  learning_rate: jax.Array
  threshold_low: jax.Array
  threshold_high: jax.Array


class Batches(NamedTuple):
  """A batch of prompts for each of S cells."""

  prompts: Prompts  # [S, N, P]
  each: list[PromptBatch]


class Together(NamedTuple):
  """Runs side by side; what `training.fill` wants to see of a run.

  Every array has a leading axis of S cells.
  """

  cells: Sequence[Cell]
  config: Any  # Of the first; the others differ in what is free.
  parts: list[training.Parts]  # Of each run by itself; they share no state.
  prompts: Any  # Iterator of `Batches`.
  train_step: Callable[..., Any]
  state: Any  # A `TrainState`, which the first step takes over.
  blank: ScoredRollout


def together(cells: Sequence[Cell], how: str) -> Together:
  """Makes the runs, as `main.build` makes each by itself.

  Args:
    cells: which share a program.
    how: 'vmap', all at once; or 'map', one after the other in a loop of the
      program.
  """
  configs = [config_of(cell) for cell in cells]
  parts = [main.build(config, to_train=False) for config in configs]
  free = [
      free_of(config, x.method.divergence.threshold)
      for config, x in zip(configs, parts, strict=True)
  ]
  step = make_step(configs[0], parts[0], how)
  return Together(
      cells=cells,
      config=configs[0],
      parts=parts,
      prompts=_batches(parts),
      train_step=functools.partial(step, stack(free)),
      state=stack([x.state for x in parts]),
      blank=stack([training.blank_rollout(x) for x in parts]),
  )


def free_of(config: Any, threshold: Any) -> Free:
  low, high = divergences.low_high(threshold)
  values = (config.optimizer.learning_rate, low, high)
  return Free(*(jnp.float32(x) for x in values))


def make_step(config: Any, parts: training.Parts, how: str):
  """`step(free, state, scored, prompts)`, everything [S, ...].

  The state is donated. A cell that ends its rollout early waits for the last
  one under 'vmap'; there a conditional computes both of its branches, too.
  """
  if how not in ('vmap', 'map'):
    raise ValueError(f"how={how!r} is neither 'vmap' nor 'map'.")
  # Of rate 1, so that a cell's own rate is a factor.
  with_rate_1 = config.copy_and_resolve_references()
  with_rate_1.optimizer.learning_rate = 1.0
  method = main.make_method(with_rate_1)

  def one(free, state, scored, prompts):
    program = program_lib.make_program(
        config,
        parts.mesh,
        _with_free(method, free),
        parts.model,
        parts.tokenizer,
    )
    return program.train_step(state, scored, prompts)

  def all_of_them(*arguments):
    if how == 'vmap':
      return jax.vmap(one)(*arguments)
    return jax.lax.map(lambda x: one(*x), arguments)

  return jax.jit(all_of_them, donate_argnums=1)


def _with_free(method: Method, free: Free) -> Method:
  """The method with numbers that may be traced."""
  rate, optimizer = free.learning_rate, method.optimizer
  inner = optimizer.transformation

  def update(gradients, state, params=None):
    changes, state = inner.update(gradients, state, params)
    return jax.tree.map(lambda x: x * rate, changes), state

  return method._replace(
      divergence=method.divergence._replace(
          threshold=(free.threshold_low, free.threshold_high)
      ),
      optimizer=optimizer._replace(
          # Not a chain: the state of the optimizer stays what it is.
          transformation=inner._replace(update=update),
          schedule=lambda count: rate * optimizer.schedule(count),
      ),
  )


def _batches(parts: list[training.Parts]):
  """Iterates over `Batches`."""
  while True:
    each = [next(x.prompts) for x in parts]
    yield Batches(stack([x.prompts for x in each]), each)


def score(
    runs: Together, rollouts: Rollout, batches: Batches
) -> tuple[ScoredRollout, list[list[str]]]:
  """Rewards of the rollouts of all cells, and their completions as text."""
  scored, texts = zip(*(
      training.score(parts, take(rollouts, cell), batch)
      for cell, (parts, batch) in enumerate(
          zip(runs.parts, batches.each, strict=True)
      )
  ))
  return ScoredRollout(rollouts, stack([x.rewards for x in scored])), texts


def run(
    cells: Sequence[Cell],
    columns: Columns,
    *,
    how: str = 'map',
    observe: Callable[[int, Rollout, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
  """Trains cells that share a program; rows of what came of it.

  A row for each cell at each held-out evaluation, of the steps since the one
  before. Updates that are not finite are skipped and counted, as in `main`, but
  no number of them ends a run.

  Args:
    cells: see `programs`.
    columns: what a row has beside the fields of its cell, `step`, `accuracy`
      and `pass` at the number of held-out samples.
    how: see `together`.
    observe: called after every step with its number, the rollouts [S, ...] that
      it sampled and its metrics, on the host.
  """
  runs = together(cells, how)
  config, state = runs.config, runs.state
  runs = runs._replace(state=None)  # It is donated.
  backlog = Backlog(functools.partial(score, runs))
  batch = next(runs.prompts)
  state, rollout, _ = runs.train_step(state, runs.blank, batch.prompts)
  state = training.fill(
      config, runs, state, runs.blank, backlog, rollout, batch
  )
  rows = _rows(runs, state, 0, {})
  window = []
  for step in range(1, config.total_steps + 1):
    batch = next(runs.prompts)
    state, rollout, metrics = runs.train_step(
        state, backlog.pop(), batch.prompts
    )
    backlog.push(rollout, batch)
    if observe is not None:
      observe(step, rollout, jax.device_get(metrics))
    window.append({
        name: np.asarray(metrics[metric])
        for name, (metric, _) in columns.items()
        if metric in metrics
    })
    if step % config.eval.every == 0 or step == config.total_steps:
      kept = {
          name: columns[name][1](np.stack([x[name] for x in window]), axis=0)
          for name in window[0]
      }
      rows += _rows(runs, state, step, kept)
      window = []
    pool.tick(len(cells) / config.total_steps)
  for parts in runs.parts:
    parts.scorer.close()
  return [
      {name: row.get(name, '') for name in _names(columns)} for row in rows
  ]


def _names(columns: Columns) -> list[str]:
  return [*Cell._fields, 'step', 'accuracy', 'pass', *columns]


def _rows(runs, state, step, kept) -> list[dict[str, Any]]:
  """A row for each cell, with held-out metrics of now."""
  rows = []
  for number, (cell, parts) in enumerate(
      zip(runs.cells, runs.parts, strict=True)
  ):
    policy = training.policy(parts, take(state, number))
    held_out, _ = parts.evaluate_fn(policy)
    samples = runs.config.eval.num_samples
    values = {
        'accuracy': held_out[f'eval/avg@{samples}'],
        'pass': held_out[f'eval/pass@{samples}'],
    } | {name: x[number].item() for name, x in kept.items()}
    values = {name: table.short(x) for name, x in values.items()}
    rows.append(cell._asdict() | {'step': step} | values)
  return rows


def stack(trees: Sequence[Any]) -> Any:
  """Trees of equal shapes as one, with a leading axis."""
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def take(tree: Any, index: int) -> Any:
  """One of the trees that were stacked."""
  return jax.tree.map(lambda x: x[index], tree)
