"""What a number was measured on, and where a result goes."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

_ROOT = pathlib.Path(__file__).parents[1]
RESULTS = _ROOT / 'benchmarks' / 'results'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')


def describe() -> dict[str, Any]:
  """The machine, its software, the commit, and how busy it is."""
  return {
      'date': datetime.date.today().isoformat(),
      'commit': commit(),
      'cpu': _cpu_model(),
      'cpus': os.cpu_count(),
      'device': jax.devices()[0].device_kind,
      'devices': jax.device_count(),
      'load_average': round(os.getloadavg()[0], 2),
      'platform': f'{platform.system()} {platform.machine()}',
      'python': platform.python_version(),
      'versions': {x: importlib.metadata.version(x) for x in _PACKAGES},
  }


def peak_host_bytes() -> int:
  """Largest resident set of this process so far."""
  if (size := _of_status('VmHWM')) is not None:
    return size
  # Elsewhere it may be that of the process which started this one.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024


def resident_bytes() -> int:
  """Resident set of this process now; the largest so far if not known."""
  size = _of_status('VmRSS')
  return peak_host_bytes() if size is None else size


def _of_status(name: str) -> int | None:
  """A size that Linux tells of this process, in bytes."""
  status = pathlib.Path('/proc/self/status')
  if not status.exists():
    return None
  [line] = [x for x in status.read_text().splitlines() if name in x]
  return int(line.split()[1]) * 1024


def peak_device_bytes() -> int | None:
  """Largest allocation on the first device; None where it keeps no count."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use')


def spread(seconds: list[float]) -> dict[str, float]:
  """Median, smallest and largest of some times."""
  values = {
      'median': np.median(seconds),
      'min': min(seconds),
      'max': max(seconds),
  }
  return {name: float(f'{value:.4g}') for name, value in values.items()}


def best_of(fn, *arguments, rounds=3) -> float:
  """Seconds of the fastest of some runs, compiled before."""
  jax.block_until_ready(fn(*arguments))
  seconds = []
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(fn(*arguments))
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def path_of(name: str, described: dict[str, Any]) -> pathlib.Path:
  """.../results/2-amd-epyc/rollout-tiny-2026-11-23.json.

  The folder is the kind of the devices, and how many if there are several; on
  a CPU these are its cores. table.py looks for an older file beside a new one.
  """
  if described['device'] == 'cpu':
    count, kind = described['cpus'], described['cpu']
  else:
    count, kind = described['devices'], described['device']
  words = re.findall('[a-z0-9]+', kind.lower())
  folder = '-'.join(([str(count)] if count > 1 else []) + words)
  return RESULTS / folder / f'{name}-{described["date"]}.json'


def report(result: dict[str, Any], name: str | None) -> None:
  """Keeps a result that has a name, and prints it on one last line."""
  if name:
    path = path_of(name, result['machine'])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + '\n')
    print(path)
  print(json.dumps(result), flush=True)


# What measuring writes and reading does not change.
_RESULTS = (
    'benchmarks/results', 'experiments/*/*.csv', 'experiments/*/*.json',
    'experiments/*/*.png', '*.md',
)


def commit() -> str | None:
  """The commit that was measured, with '-dirty' if code differs from it.

  Results and texts may differ: one experiment writes what the next would find.
  A copy without its history takes it from DPPO_JAX_COMMIT.
  """
  if given := os.environ.get('DPPO_JAX_COMMIT'):
    return given
  try:
    name = _git('describe', '--always')
    changes = _git(
        'status', '--porcelain', '--untracked-files=no', '--', '.',
        *(f':(exclude){x}' for x in _RESULTS),
    )
  except FileNotFoundError:
    return None
  return f'{name}-dirty' if changes else name or None


def _git(*arguments: str) -> str:
  # Read only: no lock, so it never disturbs a git command beside it.
  return subprocess.run(
      ['git', '--no-optional-locks', *arguments],
      cwd=_ROOT, capture_output=True, text=True, check=False,
  ).stdout.strip()


def _cpu_model() -> str:
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if not cpuinfo.exists():
    return platform.processor() or platform.machine()
  lines = (line.partition(':') for line in cpuinfo.read_text().splitlines())
  found = {name.strip(): value.strip() for name, _, value in lines}
  name = found.get('model name') or platform.machine()
  if 'cpu family' not in found:
    return name
  # What a virtual machine calls itself may be several generations.
  return f'{name}, family {found["cpu family"]} model {found["model"]}'
