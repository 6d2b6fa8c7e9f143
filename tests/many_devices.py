"""Several devices of a CPU, which need a process of their own."""

import os
import pathlib
import subprocess
import sys
import textwrap

HERE = pathlib.Path(__file__).resolve().parent


def run(code, *arguments, num_devices=8, optimized=True):
  """The lines that Python code prints where JAX sees so many devices.

  Args:
    code: may be indented, and may import what stands beside this file.
    *arguments: of the code, as `sys.argv[1:]`.
    num_devices: of a CPU.
    optimized: as in a run; otherwise compiled in half of the time.
  """
  flags = [f'--xla_force_host_platform_device_count={num_devices}']
  if not optimized:
    flags.append('--xla_backend_optimization_level=0')
  done = subprocess.run(
      [sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)],
      cwd=HERE.parent,
      env=os.environ | {
          'JAX_PLATFORMS': 'cpu',
          'PYTHONPATH': os.pathsep.join(map(str, (HERE.parent, HERE))),
          'XLA_FLAGS': ' '.join(flags),
      },
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout.splitlines()
