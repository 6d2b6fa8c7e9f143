"""The command line of a sweep: settings times methods times seeds.

    python experiments/NAME/sweep.py [--settings=A,B] [--methods=C] [--seeds=0]

appends to `runs.csv` what is not there yet and writes `runs.json`. A pilot goes
to a file of its own, with seeds that the results do not use:
`--file=pilots.csv --seeds=100,101 --rates=3e-4,1e-3`.
"""

from collections.abc import Callable, Iterable
import functools
import pathlib
from typing import Any, NamedTuple

from absl import app
from absl import flags

from experiments.lib import cells as cells_lib
from experiments.lib import options
from experiments.lib import pool
from experiments.lib import table

options.define('seeds', 'methods', 'rates', 'file', 'workers')
_PART = flags.DEFINE_string('part', 'runs', 'Of an experiment, if it has some.')
_SETTINGS = flags.DEFINE_list('settings', [], 'Only these; all if empty.')
_TOGETHER = flags.DEFINE_integer('together', 5, 'Runs in a program, at most.')
_HOW = flags.DEFINE_enum('how', 'map', ['map', 'vmap'], 'How they run there.')

SEEDS = ('0', '1', '2', '3', '4')
# What questions other than stability are asked in: a rollout of 64 completions
# is learned from 4 times in 4 mini-batches, so that trust regions are left.
BINDING = {'total_steps': 80, 'learner__num_epochs': 4, 'eval__every': 8}


class Method(NamedTuple):
  """What is compared within a setting."""

  algorithm: str  # Row of the table of algorithms.
  options: dict[str, Any] = {}
  settings: tuple[str, ...] = ()  # In which it takes part; () for all.


class Sweep(NamedTuple):
  """Every method in every setting with every seed."""

  folder: pathlib.Path
  settings: dict[str, dict[str, Any]]
  methods: dict[str, Method]
  columns: cells_lib.Columns
  # From the rows of the results to what the summary says of them.
  summarize: Callable[[list[dict[str, str]]], dict[str, Any]]


def cells_of(
    sweep: Sweep,
    seeds: Iterable[str],
    settings: Iterable[str] = (),
    methods: Iterable[str] = (),
    rates: Iterable[str] = (),
) -> list[cells_lib.Cell]:
  """The runs of a sweep, or of the settings and methods that are named."""
  settings = options.chosen('settings', list(settings), sweep.settings)
  methods = options.chosen('methods', list(methods), sweep.methods)
  return [
      cells_lib.make_cell(
          f'{setting} {rate}' if rate else setting,
          name,
          method.algorithm,
          int(seed),
          **sweep.settings[setting] | method.options | (
              {'optimizer__learning_rate': float(rate)} if rate else {}
          ),
      )
      for rate in rates or ('',)
      for setting in settings
      for name, method in sweep.methods.items()
      if name in methods
      if not method.settings or setting in method.settings
      for seed in seeds
  ]


def results(sweep: Sweep) -> list[dict[str, str]]:
  """The rows of `runs.csv`, in the order of the sweep, whoever ended first."""
  settings, methods = list(sweep.settings), list(sweep.methods)
  return sorted(
      table.read(sweep.folder / 'runs.csv'),
      key=lambda row: (
          settings.index(row['setting']), methods.index(row['method'])
      ),
  )


def run(sweep: Sweep) -> None:
  """Runs what the flags ask for and is not there yet; within `app.run`."""
  cells = cells_of(
      sweep,
      options.given('seeds') or SEEDS,
      _SETTINGS.value,
      options.given('methods'),
      options.given('rates'),
  )
  pool.measure(
      cells_lib.programs(cells, _TOGETHER.value),
      functools.partial(cells_lib.run, columns=sweep.columns, how=_HOW.value),
      sweep.folder / options.given('file'),
      workers=options.given('workers'),
      summarize=sweep.summarize,
  )


def run_part(
    folder: pathlib.Path, parts: dict[str, Callable[[], None]]
) -> None:
  """Does the part of an experiment that `--part` names, if it is not there.

  Each writes PART.csv in the folder; `runs` adds what is missing in it.
  """
  if _PART.value not in parts:
    raise app.UsageError(
        f'--part={_PART.value!r} is none of {", ".join(parts)}.'
    )
  path = folder / f'{_PART.value}.csv'
  if _PART.value != 'runs' and path.exists():
    print(f'{path} is there; delete it to measure anew.')
  else:
    parts[_PART.value]()
