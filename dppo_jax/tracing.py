"""A profiler trace of some steps of a run, on request."""

import pathlib

from absl import logging
import jax

_FIRST = 2  # Steps that are let pass: the first ones of a run are not typical.


class Tracer:
  """Traces `num_steps` steps in a row, from the third of the process on.

  Open the folder in XProf or TensorBoard, or the .json.gz in it in Perfetto.
  """

  def __init__(self, folder: pathlib.Path, *, num_steps: int, first: int):
    """first: number of the step at which the process starts."""
    self._folder = folder
    self._start = first + _FIRST
    self._end = self._start + num_steps if num_steps else -1
    self._tracing = self._traced = False

  def at(self, step: int) -> None:
    """To be called before a step is dispatched."""
    if step == self._end:
      self.close()
    elif step == self._start and self._end >= 0:
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._tracing = self._traced = True

  def close(self) -> None:
    """Writes what was traced, also if the run ends earlier."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
      logging.info('Profiler trace: %s', self._folder)
    elif self._end >= 0 and not self._traced:
      logging.warning(
          'Nothing was traced: config.profile_steps begins with step %d, the '
          'third of this start, and the run ended before.', self._start
      )
