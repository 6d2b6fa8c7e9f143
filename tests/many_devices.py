"""Several devices of a CPU, which need a process of their own."""

import os
import pathlib
import subprocess
import sys
import textwrap

import jax

HERE = pathlib.Path(__file__).resolve().parent
# Tests compile often and run once: a third of the compile time, and the same
# numbers. Later versions of XLA have no other emitters.
QUICK = {'xla_backend_optimization_level': 0} | (
    {'xla_cpu_use_fusion_emitters': False}
    if jax.__version_info__ < (0, 11) else {}
)
QUICK_FLAGS = [f'--{name}={value}'.lower() for name, value in QUICK.items()]


def run(code, *arguments, num_devices=8, optimized=True):
  """The lines that Python code prints where JAX sees so many devices.

  Args:
    code: may be indented, and may import what stands beside this file.
    *arguments: of the code, as `sys.argv[1:]`.
    num_devices: of a CPU.
    optimized: as in a run; otherwise by QUICK.
  """
  flags = [f'--xla_force_host_platform_device_count={num_devices}']
  if not optimized:
    flags += QUICK_FLAGS
  done = subprocess.run(
      [sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)],
      cwd=HERE.parent,
      env=os.environ | {
          # Each compiles what no other does, and writing takes a tenth of it.
          'JAX_ENABLE_COMPILATION_CACHE': 'false',
          'JAX_PLATFORMS': 'cpu',
          # As in a run, see `processes.allow_threads`.
          'PJRT_NPROC': str(4 * num_devices),
          'PYTHONPATH': os.pathsep.join(map(str, (HERE.parent, HERE))),
          'XLA_FLAGS': ' '.join(flags),
      },
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout.splitlines()
