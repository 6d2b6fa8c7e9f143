"""What a run holds on each device, told before its first step.

By kind from the arrays' shardings, and of the compiled step from XLA, which
plans all of its memory ahead. Bytes of the fullest device; shards are of equal
size. And what a device has.
"""

from collections.abc import Iterator
import math
import os
import pathlib
from typing import Any

import jax

from dppo_jax import processes
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import PyTree
from dppo_jax.types import ScoredRollout
from dppo_jax.types import TrainState


def per_device(tree: PyTree) -> int:
  """Bytes of a tree of arrays, or of their shapes, that have shardings."""
  return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
  )


def by_kind(state: TrainState, scored: ScoredRollout) -> dict[str, int]:
  """Bytes per device of what lasts from step to step."""
  kinds = {
      'parameters': state.params,
      'frozen parameters': state.frozen,
      'optimizer state': state.opt_state,
      'reference': state.reference,
      'replay': state.replay,
      'products': state.products,
      'rollouts': scored,
  }
  return {name: per_device(tree) for name, tree in kinds.items()}


def of_step(compiled: Any) -> dict[str, int]:
  """Bytes per device of a compiled step; empty where XLA does not tell.

  Results that take an argument's place (donation) count as arguments. The total
  is what a device must have free.
  """
  analysis = compiled.memory_analysis()
  if analysis is None:
    return {}
  arguments = analysis.argument_size_in_bytes
  temporary = analysis.temp_size_in_bytes
  results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  return {
      'arguments': arguments,
      'temporary': temporary,
      'results': results,
      'total': arguments + temporary + results,
  }


def limit() -> int | None:
  """Bytes that a device has; the same on every host, None if one cannot tell.

  The smallest device counts. Devices of a CPU share the memory of their host.
  """
  devices = jax.local_devices()
  if devices[0].platform == 'cpu':
    physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    found = _of_host(physical) // len(devices)
  else:
    found = min(
        (x.memory_stats() or {}).get('bytes_limit', 0) for x in devices
    )
  return min(processes.gather(found)) or None  # All must decide the same.


def _of_host(physical: int, root: pathlib.Path = pathlib.Path('/')) -> int:
  """Bytes that a process may have: the host's, or what its cgroups leave.

  Args:
    physical: memory of the host.
    root: where `proc` and `sys` are.
  """
  found = [physical]
  try:
    lines = (root / 'proc/self/cgroup').read_text().splitlines()
  except OSError:  # Not Linux.
    return physical
  for line in lines:
    _, controllers, path = line.split(':', 2)
    mount, name = 'sys/fs/cgroup', 'memory.max'
    if controllers:  # Version 1 has a hierarchy for each of them.
      if 'memory' not in controllers.split(','):
        continue
      mount, name = 'sys/fs/cgroup/memory', 'memory.limit_in_bytes'
    inner = pathlib.PurePosixPath(path.lstrip('/'))
    # In a container the path may be the host's, and only the mount be there.
    for folder in (inner, *inner.parents):
      try:
        found.append(int((root / mount / folder / name).read_text()))
      except (OSError, ValueError):  # Not there, or 'max'.
        continue
  return min(found)


def describe(
    model: CausalLM, state: TrainState, scored: ScoredRollout, compiled: Any
) -> Iterator[str]:
  """Lines about the size of a model and what its run needs."""
  total, active = model.num_parameters()
  meets = '' if active == total else f', {_count(active)} of them for a token'
  yield f'{_count(total)} parameters{meets}.'
  yield f'Memory per device: {listed(by_kind(state, scored))}.'
  step = of_step(compiled)
  if step:
    yield f'Memory per device of the compiled step: {listed(step)}.'


def listed(sizes: dict[str, int]) -> str:
  """'arguments 1.20 GB, temporary 30.50 GB'."""
  return ', '.join(f'{name} {readable(size)}' for name, size in sizes.items())


def _count(number: int) -> str:
  """'1.2 M' or '30.5 B'."""
  return f'{number / 1e9:.2f} B' if number >= 1e9 else f'{number / 1e6:.2f} M'


def readable(size: int) -> str:
  """'1.20 MB' or '30.50 GB'."""
  return f'{size / 1e9:.2f} GB' if size >= 1e9 else f'{size / 1e6:.2f} MB'
