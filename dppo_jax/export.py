"""The model of a run that has not ended, as a Hugging Face folder.

    python -m dppo_jax.export --config=configs/tv_topk.py --workdir=DIR

takes the latest checkpoint in DIR and writes DIR/model, and DIR/adapter where
adapters are trained: what a run writes when it ends. Pass the run's own flags;
without --workdir it is the directory that the run would take.
"""

import contextlib
import pathlib
from typing import Any

from absl import logging

from dppo_jax import command_line
from dppo_jax import main
from dppo_jax import training
from dppo_jax import workdir as workdir_lib


def export(config: Any, workdir: str | pathlib.Path) -> None:
  """Writes the folders.

  Args:
    config: ConfigDict, of the run.
    workdir: of the run.

  Raises:
    FileNotFoundError: there is no checkpoint.
    ValueError: the directory belongs to a run with another config.
  """
  workdir_lib.check_same_start(config)
  workdir_lib.check_same_run(workdir)
  workdir_lib.check(workdir, config, way_out=training.OWN_FLAGS)
  workdir = pathlib.Path(workdir).expanduser()
  parts = main.build(config, to_train=False)
  with contextlib.closing(parts.scorer):
    state = training.latest_state(config, parts, workdir)
    training.write_model(config, parts, state, workdir)
  logging.info('Step %d: %s', int(state.step), workdir / 'model')


def _body(config, workdir):
  export(config, workdir or command_line.default_workdir())
  return True


if __name__ == '__main__':
  command_line.run(_body)
