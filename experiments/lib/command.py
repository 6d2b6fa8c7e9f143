"""Sweeps whose runs are processes of their own, by the command of a user.

A job is a NamedTuple of texts; what tells its run from others is in its fields.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import pathlib
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

from absl import flags

from dppo_jax import metrics
from experiments.lib import options
from experiments.lib import pool
from experiments.lib import table

options.define('workers')
_RUNS = flags.DEFINE_string(
    'runs', '', 'Where work directories and logs go; runs/EXPERIMENT if empty.'
)


class Command(NamedTuple):
  """What a run is started with, and what is kept of it."""

  config: str  # File, with its argument.
  flags: Mapping[str, Any]  # What follows `--config.`.
  columns: Mapping[str, str]  # Of the CSV file -> metrics of the run.
  only: str = ''  # Keep the steps that have this metric; all if empty.
  workdir_stays: bool = True


def measure(
    jobs: Iterable[Any],
    command_of: Callable[[Any], Command],
    path: pathlib.Path,
    *,
    summarize: Callable[[list[dict[str, str]]], dict[str, Any]],
    folder: str = '',
) -> None:
  """Runs the jobs that have no row yet, see `pool.measure`; within `app.run`.

  Args:
    jobs: in the order in which they start.
    command_of: from a job to its command; can be pickled.
    path: of the CSV file: a row has the job's fields, its step, the columns.
    summarize: from the rows of the file to the results of the JSON file.
    folder: in that of the runs, for jobs that do not tell all of their names.
  """
  runs = pathlib.Path(_RUNS.value or f'runs/{path.parent.name}', folder)
  runs.mkdir(parents=True, exist_ok=True)
  pool.measure(
      [[job] for job in jobs],
      functools.partial(_rows, command_of=command_of, runs=runs),
      path,
      workers=options.given('workers'),
      summarize=summarize,
  )


def _rows(
    jobs: Sequence[Any],
    command_of: Callable[[Any], Command],
    runs: pathlib.Path,
) -> list[dict[str, Any]]:
  """Runs a single job, or what is left of it; its steps as rows.

  A run that ended and has no row is to be measured anew.
  """
  [job] = jobs
  command = command_of(job)
  workdir = runs / '-'.join(job).replace(' ', '_').lower()
  if (workdir / 'report.html').exists():
    shutil.rmtree(workdir)
  _train(command, workdir)
  pool.tick(1)
  rows = [
      job._asdict() | {'step': row['step']} | {
          name: table.short(row.get(key, ''), 6)
          for name, key in command.columns.items()
      }
      for row in metrics.read(workdir)
      if not command.only or command.only in row
  ]
  if not command.workdir_stays:
    shutil.rmtree(workdir)
  return rows


def _train(command: Command, workdir: pathlib.Path) -> None:
  """`python -m dppo_jax.main` until its last step; what it prints, beside."""
  line = [
      sys.executable, '-m', 'dppo_jax.main', f'--config={command.config}',
      f'--workdir={workdir}',
      *(f'--config.{name}={value}' for name, value in command.flags.items()),
  ]
  log = pathlib.Path(f'{workdir}.log')
  with open(log, 'a') as file:
    done = subprocess.run(line, check=False, stdout=file, stderr=file)
  if done.returncode:
    raise RuntimeError(f'Exit code {done.returncode}; {log} says why.')
