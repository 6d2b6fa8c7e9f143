"""A run as a process of its own, with the command that a user would type."""

from collections.abc import Mapping
import pathlib
import subprocess
import sys
from typing import Any


def train(
    config: str,
    flags: Mapping[str, Any],
    workdir: pathlib.Path,
    log: pathlib.Path | None = None,
) -> None:
  """`python -m dppo_jax.main` until its last step.

  Args:
    config: file, with its argument.
    flags: what follows `--config.`.
    workdir: of the run.
    log: what it prints goes there; to the terminal if not given.
  """
  command = [
      sys.executable, '-m', 'dppo_jax.main', f'--config={config}',
      f'--workdir={workdir}',
      *(f'--config.{name}={value}' for name, value in flags.items()),
  ]
  if log is None:
    subprocess.run(command, check=True)
    return
  with open(log, 'w') as file:
    subprocess.run(command, check=True, stdout=file, stderr=file)
