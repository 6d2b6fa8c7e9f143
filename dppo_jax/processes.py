"""Several processes that run one program: how they start, and what they share.

Every process has some of the devices and calls the same compiled programs in
the same order. So a decision on which a program depends is taken from what all
of them know: `gather` and `total` make it so. Rows of a batch that several
processes have (those over which only parameters are split) have one owner, who
scores them: two verifiers of the same completion need not agree.

In a run of one process nothing here costs anything or waits for anybody.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import re
import threading
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

from dppo_jax.types import PyTree

# Of JAX; then it gives up, by SIGABRT.
_MEETING_TIMEOUT_S = 300
_QUIET_FOR_S = 10  # Before who waits says so.
# One that fails says so to the others by leaving, and they wait no longer.
_SHUTDOWN_TIMEOUT_S = 30
# Of the CPU, where it is to look like several devices.
_THREADS_PER_DEVICE = 4


def initialize(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout_s: int = 100,
) -> None:
  """Joins the other processes, if there are others. No device may be in use.

  Without arguments JAX finds out by itself on TPU pods, under SLURM, Open MPI,
  and in indexed jobs of Kubernetes; anywhere else this is a single process.

  Args:
    coordinator: host:port of process 0, where it listens.
    num_processes: how many there are; 1 does not look for others.
    process_id: number of this one, from 0.
    heartbeat_timeout_s: after which a process that says nothing is dead, and
      all others end.

  Raises:
    ValueError: arguments that do not belong together.
  """
  timeouts = {
      'heartbeat_timeout_seconds': heartbeat_timeout_s,
      'initialization_timeout': _MEETING_TIMEOUT_S,
      'shutdown_timeout_seconds': _SHUTDOWN_TIMEOUT_S,
  }
  _check_arguments(coordinator, num_processes, process_id)
  allow_threads()
  if coordinator is not None:
    with _saying_that_it_waits(coordinator, num_processes, process_id):
      jax.distributed.initialize(
          coordinator,
          num_processes,
          process_id,
          cluster_detection_method='deactivate',
          **timeouts,
      )
  elif num_processes is None and not _is_alone(os.environ):
    try:
      with _saying_that_it_waits():
        jax.distributed.initialize(**timeouts)
    except ValueError as error:
      # What it says where it knows no cluster, and nobody has named one.
      if 'coordinator_address' not in str(error):
        raise


@contextlib.contextmanager
def _saying_that_it_waits(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
  """A warning if the others take their time, of which JAX says nothing."""
  who = 'This process'
  if process_id is not None:
    who = f'Process {process_id} of {num_processes}'
  timer = threading.Timer(_QUIET_FOR_S, logging.warning, [
      '%s still waits for the others%s, at most %d s.',
      who, f' at {coordinator}' if coordinator else '', _MEETING_TIMEOUT_S,
  ])
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def allow_threads() -> None:
  """Lets XLA have threads enough for a CPU that looks like several devices.

  By itself it has one for each, if there are no more cores. All of them may
  wait for each other in collectives while what they wait for waits for a
  thread; after 40 s XLA ends the process. Call it before any device is used;
  `PJRT_NPROC` is kept if set.
  """
  asked = re.search(
      r'--xla_force_host_platform_device_count=(\d+)',
      os.environ.get('XLA_FLAGS', ''),
  )
  count = int(asked[1]) if asked else jax.config.jax_num_cpu_devices
  if count > 1:
    threads = max(_THREADS_PER_DEVICE * count, os.cpu_count() or 1)
    os.environ.setdefault('PJRT_NPROC', str(threads))


def _check_arguments(coordinator, num_processes, process_id) -> None:
  given = {
      'coordinator': coordinator,
      'num_processes': num_processes,
      'process_id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given) or given == {
      'coordinator': None, 'num_processes': 1, 'process_id': None
  }:
    return
  if missing:
    raise ValueError(
        f'--{missing[0]} is missing: several processes need --coordinator='
        'HOST:PORT, --num_processes=N and --process_id=I, all three.'
    )
  _, colon, port = coordinator.rpartition(':')
  if not colon or not port.isdigit():
    raise ValueError(
        f'--coordinator={coordinator} has no port; it is HOST:PORT of process '
        '0, for example 10.0.0.1:1234.'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
        f'--process_id={process_id} of --num_processes={num_processes} is '
        f'impossible: processes are numbered from 0 to {num_processes - 1}.'
    )


def _is_alone(environment: Any) -> bool:
  """Whether a scheduler has started this process, and no other beside it.

  JAX would let it see one GPU only, or ask for a job that it is not part of.
  """
  for count in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
    if environment.get(count) == '1':
      return True
  return 'KUBERNETES_SERVICE_HOST' in environment and not (
      {'JOB_COMPLETION_INDEX', 'TPU_WORKER_ID'} & environment.keys()
  )


def is_main() -> bool:
  """Whether this is the process that logs, and writes what one writes."""
  return jax.process_index() == 0


# What all must know.


def gather(value: Any) -> list[Any]:
  """What every process has, in their order; goes through JSON."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(data)))
  data = np.pad(data, (0, lengths.max() - len(data)))
  rows = multihost_utils.process_allgather(data)
  return [
      json.loads(row[:length].tobytes())
      for row, length in zip(rows, lengths, strict=True)
  ]


class Difference(NamedTuple):
  """Something that a process has otherwise than process 0."""

  process: int
  name: str
  value: Any  # None if it has no such thing.
  of_first: Any


def differences(values: dict[str, Any]) -> list[Difference]:
  """In what a process differs from process 0; the same answer on all.

  Args:
    values: of this process, by name; they go through JSON.

  Returns:
    the differences of the first process that has any, in the order of names.
  """
  first, *others = gather(values)
  for process, other in enumerate(others, start=1):
    pairs = {
        name: (other.get(name), first.get(name))
        for name in sorted(first.keys() | other.keys())
    }
    found = [
        Difference(process, name, *pair)
        for name, pair in pairs.items()
        if len({json.dumps(x) for x in pair}) > 1  # NaN is as NaN.
    ]
    if found:
      return found
  return []


def total(values: np.ndarray) -> np.ndarray:
  """The sum over all processes, of 32-bit numbers."""
  if jax.process_count() == 1:
    return values
  return multihost_utils.process_allgather(values).sum(0, dtype=values.dtype)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """What fails on one process within this block fails on all, after it.

  No process may wait for another within it.
  """
  failure = None
  try:
    yield
  except Exception as error:
    failure = error
  messages = gather(None if failure is None else str(failure))
  if failure is not None:
    raise failure
  for index, message in enumerate(messages):
    if message is not None:
      raise OSError(f'Process {index} failed: {message}')


def wait_for_all() -> None:
  """Returns when every process is here."""
  gather(None)


# Whose rows are whose.


class Share(NamedTuple):
  """Which rows of a batch are a process's business, ascending."""

  held: np.ndarray  # On its devices; some on those of others too.
  own: np.ndarray  # Of these. Every row of the batch has one owner.


def share(
    batch: jax.sharding.Sharding, num_rows: int, process: int | None = None
) -> Share:
  """What a process, this one if not given, has of `num_rows` rows."""
  process = jax.process_index() if process is None else process
  holders: dict[tuple[int, int], set[int]] = {}
  for device, (rows,) in batch.devices_indices_map((num_rows,)).items():
    start, stop, _ = rows.indices(num_rows)
    holders.setdefault((start, stop), set()).add(device.process_index)
  held: dict[tuple[int, ...], list[int]] = {}
  for (start, stop), who in sorted(holders.items()):
    if process in who:
      held.setdefault(tuple(sorted(who)), []).extend(range(start, stop))
  own = [
      np.array_split(rows, len(who))[who.index(process)]
      for who, rows in held.items()
  ]
  return Share(np.sort(np.concatenate(list(held.values()))),
               np.sort(np.concatenate(own)))


def of_groups(prompts: np.ndarray, group_size: int) -> np.ndarray:
  """The completions of these prompts, as rows of a rollout."""
  return (prompts[:, None] * group_size + np.arange(group_size)).ravel()


def local_rows(tree: PyTree, rows: np.ndarray) -> PyTree:
  """Some rows that this process holds, as NumPy arrays.

  Args:
    tree: of arrays that are split on their leading axis, or not at all.
    rows: of the whole arrays.
  """

  def pick(x):
    parts = {
        shard.index[0].indices(len(x))[0]: shard.data
        for shard in x.addressable_shards
    }
    starts = sorted(parts)
    data = jax.device_get([parts[start] for start in starts])
    held = np.concatenate(
        [start + np.arange(len(part)) for start, part in zip(starts, data)]
    )
    return np.concatenate(data)[np.searchsorted(held, rows)]

  return jax.tree.map(pick, tree)


def place(
    tree: PyTree, batch: jax.sharding.Sharding, num_rows: int
) -> PyTree:
  """Arrays over the devices of all, of `num_rows` rows.

  Args:
    tree: of NumPy arrays, either of the rows that this process holds or of all.
    batch: where their rows go.
    num_rows: of all processes.
  """
  return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(
          batch, x, (num_rows, *x.shape[1:])
      ),
      tree,
  )


def collect(
    values: np.ndarray, rows: np.ndarray, num_rows: int
) -> np.ndarray:
  """The values of all rows, from those that each process has of its own."""
  whole = np.zeros((num_rows, *values.shape[1:]), values.dtype)
  whole[rows] = values
  if values.dtype == bool:
    return total(whole.astype(np.int32)).astype(bool)
  return total(whole)


def to_main(tree: PyTree) -> PyTree:
  """A tree of NumPy arrays on process 0; None in place of each elsewhere.

  One layer of a stacked parameter is moved at a time, so no device need have
  room for more.
  """
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_to_main, tree)


def _to_main(x: jax.Array) -> np.ndarray | None:
  if x.ndim < 3:
    whole = _whole(x)
    return whole if is_main() else None
  whole = np.empty(x.shape, x.dtype) if is_main() else None
  for i in range(len(x)):
    layer = _whole(_layer(x, np.int32(i)))
    if whole is not None:
      whole[i] = layer
  return whole


def _whole(x: jax.Array) -> np.ndarray:
  return multihost_utils.process_allgather(x, tiled=True)


@jax.jit
def _layer(x: jax.Array, index: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
