"""Runs the jobs of a sweep that are not in its file yet, some side by side.

A sweep has two files: PATH.csv with the rows of its runs, and PATH.json with
what they come to and what each call measured on.
"""

from collections.abc import Callable, Iterable, Sequence
import concurrent.futures
import multiprocessing
import os
import pathlib
import time
from typing import Any

import tqdm

from benchmarks import machine
from experiments.lib import table

# Of a worker: where it reports that a part of a job is done.
_ticks = None


def measure(
    batches: Iterable[Sequence[Any]],
    run: Callable[[Sequence[Any]], list[dict[str, Any]]],
    path: pathlib.Path,
    *,
    workers: int,
    summarize: Callable[[list[dict[str, str]]], dict[str, Any]],
) -> None:
  """Runs what is missing and says in a summary beside the file what came out.

  Args:
    batches: see `run_missing`, also for the next three.
    run: see there.
    path: of the CSV file.
    workers: see there.
    summarize: from all rows of the file to the results.

  Raises:
    ExceptionGroup: see there. What did not fail is in both files.
  """
  batches = list(batches)
  start, summary = time.perf_counter(), path.with_suffix('.json')
  waiting = _count_missing(batches, path)
  # Before rows change a file of the commit.
  on = _in_a_process(machine.describe) if waiting else {}
  try:
    run_missing(batches, run, path, workers=workers)
  finally:
    calls = table.read_summary(summary).get('calls', [])
    if measured := waiting - _count_missing(batches, path):
      calls.append({
          'runs': measured,
          'seconds': time.perf_counter() - start,
          'machine': on,
      })
    if rows := table.read(path):
      table.write_summary(
          summary, {'calls': calls, 'results': summarize(rows)}
      )


def _count_missing(batches, path) -> int:
  rows = table.read(path)
  return sum(len(not_in(rows, jobs)) for jobs in batches)


def _in_a_process(fn):
  """What `fn` returns in a process that ends: devices are free again."""
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
    return pool.submit(fn).result()


def run_missing(
    batches: Iterable[Sequence[Any]],
    run: Callable[[Sequence[Any]], list[dict[str, Any]]],
    path: pathlib.Path,
    *,
    workers: int,
) -> None:
  """Runs batches of jobs and appends their rows as soon as they are there.

  Each worker is a process on a core of its own. A job is done if a row has all
  of its fields; so a sweep may be stopped and started. A batch that fails keeps
  no other from running.

  Args:
    batches: jobs that run together, NamedTuples of one kind.
    run: from a batch of jobs to its rows, each of which holds the fields of its
      job; can be pickled.
    path: of the CSV file.
    workers: batches at a time, at most.

  Raises:
    ExceptionGroup: what batches raised, after all have ended.
  """
  rows = table.read(path)
  missing = [
      batch for jobs in batches if (batch := not_in(rows, jobs))
  ]
  # JAX has threads, which a fork would not survive.
  context = multiprocessing.get_context('spawn')
  ticks, cores = context.SimpleQueue(), context.SimpleQueue()
  allowed = sorted(os.sched_getaffinity(0))
  for worker in range(workers):
    cores.put(allowed[worker % len(allowed)])
  bar = tqdm.tqdm(
      total=sum(map(len, missing)),
      desc=path.stem,
      bar_format='{l_bar}{bar}| {n:.1f}/{total} runs '
      '[{elapsed}<{remaining}]',
  )
  with bar, concurrent.futures.ProcessPoolExecutor(
      workers, context, initializer=_start, initargs=(cores, ticks)
  ) as pool:
    waiting, errors = {pool.submit(run, batch) for batch in missing}, []
    while waiting:
      done, _ = concurrent.futures.wait(
          waiting, timeout=1, return_when=concurrent.futures.FIRST_COMPLETED
      )
      while not ticks.empty():
        bar.update(ticks.get())
      for future in done:
        waiting.remove(future)
        if error := future.exception():
          errors.append(error)
        else:
          table.append(path, future.result())
    bar.update(bar.total - bar.n)
  if errors:
    raise ExceptionGroup(f'{len(errors)} of {len(missing)} failed', errors)


def not_in(rows: list[dict[str, str]], jobs: Sequence[Any]) -> list[Any]:
  """The jobs that have no row."""
  fields = type(jobs[0])._fields
  done = {tuple(row[field] for field in fields) for row in rows}
  return [job for job in jobs if tuple(map(str, job)) not in done]


def tick(share: float) -> None:
  """Tells that so much of a job is done, 1 for all; does nothing elsewhere."""
  if _ticks is not None:
    _ticks.put(share)


def _start(cores, ticks):
  global _ticks  # noqa: PLW0603
  _ticks = ticks
  os.sched_setaffinity(0, {cores.get()})
