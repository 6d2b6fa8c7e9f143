"""Scalars and samples of a run, as files that any tool can read.

`metrics.jsonl` is the truth: one JSON object a line, `{"step": 7, ...}`,
appended and flushed at once, so a killed run loses nothing that it logged.
TensorBoard and Weights & Biases are copies of it. `samples.jsonl` holds
prompts, completions and rewards in the same way.

JSON has no NaN and no infinity. A value that is not finite is written as null,
which every parser accepts, and `read` gives it back as NaN (TensorBoard gets
the value itself).
"""

import array
from collections.abc import Iterator
import contextlib
import json
import math
import os
from pathlib import Path
import re
import sys
import time
import types
from typing import Any, NamedTuple
import uuid

from absl import logging
import numpy as np
import tqdm

_METRICS = 'metrics.jsonl'
_SAMPLES = 'samples.jsonl'
_FLUSH_EVENTS_S = 30.0
_ODD_IN_A_TAG = re.compile(r'[^-/\w.]')  # To TensorBoard, such as '@'.


class MetricsWriter:
  """Appends to the logs of one run; a context manager.

  Every process may call every method: only the main one writes.
  """

  def __init__(
      self,
      workdir: str | os.PathLike[str],
      *,
      tensorboard: bool = True,
      wandb: bool = False,
      run_config: dict[str, Any] | None = None,
      is_main_process: bool = True,
  ):
    """Opens the logs in `workdir`, continuing those that are there.

    Args:
      workdir: directory of the run, made if missing.
      tensorboard: also write event files to `workdir/tensorboard`.
      wandb: also log to Weights & Biases, as one run across resumes. Project
        and mode come from its own variables WANDB_PROJECT and WANDB_MODE.
      run_config: what Weights & Biases shows as the run's config.
      is_main_process: False makes every method do nothing.
    """
    self._sinks: list[Any] = []
    if not is_main_process:
      return
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._metrics = _JsonLines(workdir / _METRICS)
    self._samples = _JsonLines(workdir / _SAMPLES)
    self._sinks = [self._metrics, self._samples]
    self._copies: list[Any] = []
    if tensorboard:
      self._copies.append(_TensorBoard(workdir / 'tensorboard'))
    if wandb:
      self._copies.append(_Wandb(workdir, run_config))
    self._sinks += self._copies

  def write(self, step: int, scalars: dict[str, Any]) -> None:
    """Logs scalars of Python, numpy or JAX. A step may be written in parts."""
    if not self._sinks:
      return
    if 'step' in scalars:
      raise ValueError(
          "'step' is not a metric: pass it as the first argument, "
          f'write({scalars["step"]!r}, ...).'
      )
    values = {key: _number(key, value) for key, value in scalars.items()}
    finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._metrics.append([{'step': int(step), **finite}])
    for copy in self._copies:
      copy.write(int(step), values)

  def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
    """Logs rows with `split`, `prompt`, `completion`, `answer`, `reward`."""
    if not self._sinks:
      return
    self._samples.append([_sample_row(step, sample) for sample in samples])

  def truncate_after(self, step: int) -> None:
    """Forgets every step after the restored one; call it on resume.

    A killed run has logged beyond its last checkpoint and may have died within
    a line. TensorBoard hides its later events; Weights & Biases cannot forget,
    and shows the repeated steps twice.
    """
    for sink in self._sinks:
      sink.truncate_after(int(step))

  def close(self) -> None:
    """Flushes and closes everything; may be called twice."""
    with contextlib.ExitStack() as stack:  # All of them, if one fails, too.
      for sink in reversed(self._sinks):
        stack.callback(sink.close)

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """One dict a step, sorted; a step written in parts is one dict again.

  Null becomes NaN. No file reads as no steps, and a run may be read while it
  writes.
  """
  merged: dict[int, dict[str, Any]] = {}
  for _, row in _read_lines(Path(workdir) / _METRICS):
    # Interned: else each of many thousand rows has keys of its own.
    merged.setdefault(row['step'], {}).update(
        {sys.intern(k): math.nan if v is None else v for k, v in row.items()}
    )
  return [merged[step] for step in sorted(merged)]


class Columns(NamedTuple):
  """What `read` returns, key by key: a tenth of the memory.

  A row of a run has a hundred numbers or two, and a run may have 100,000 rows.
  """

  steps: np.ndarray  # [n] int64, ascending.
  # Of each key, steps [m] int64 that logged it, and values [m] float64.
  series: dict[str, tuple[np.ndarray, np.ndarray]]


def read_columns(workdir: str | os.PathLike[str]) -> Columns:
  """The steps that were logged, and the values of each key."""
  steps = array.array('q')
  columns: dict[str, tuple[array.array, array.array]] = {}
  for _, row in _read_lines(Path(workdir) / _METRICS):
    step = row.pop('step')
    steps.append(step)
    for key, value in row.items():
      if key not in columns:
        columns[key] = array.array('q'), array.array('d')
      logged, values = columns[key]
      logged.append(step)
      values.append(math.nan if value is None else float(value))
  series = {}
  for key, (logged, values) in columns.items():
    # Of a step that has it twice the later counts.
    order = np.argsort(logged, kind='stable')
    known = np.frombuffer(logged, np.int64)[order]
    ends = np.append(known[1:] != known[:-1], True)
    series[key] = known[ends], np.frombuffer(values, np.float64)[order][ends]
  return Columns(np.unique(np.array(steps, np.int64)), series)


def read_samples(
    workdir: str | os.PathLike[str], *, step: int | None = None
) -> list[dict[str, Any]]:
  """Rows of `write_samples` in the order written, those of a step if given."""
  return [
      row for _, row in _read_lines(Path(workdir) / _SAMPLES)
      if step is None or row['step'] == step
  ]


def steps_with_samples(workdir: str | os.PathLike[str]) -> list[int]:
  """The steps that `read_samples` has rows of, ascending."""
  rows = _read_lines(Path(workdir) / _SAMPLES)
  return sorted({row['step'] for _, row in rows})


class Progress:
  """A bar on a terminal, a line of log now and then anywhere else.

  Where stderr is not a terminal (a cluster's log file, a pipe) nothing is drawn
  and one summary is logged every `log_every_s` seconds and at the last step.
  """

  def __init__(
      self,
      total_steps: int,
      first_step: int = 1,
      *,
      log_every_s: float = 10.0,
      is_main_process: bool = True,
  ):
    """Starts the clock; `first_step` is the first this process will run."""
    self._total = total_steps
    self._log_every_s = log_every_s
    self._is_main_process = is_main_process
    self._logged_at = time.monotonic()
    # (step, time) of the first update: the step before it was compilation.
    self._origin: tuple[int, float] | None = None
    self._bar = None
    if is_main_process and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
          total=total_steps,
          initial=first_step - 1,
          bar_format='{percentage:3.0f}% {bar} {n}/{total}{postfix}',
          dynamic_ncols=True,
          file=sys.stderr,
      )

  def update(self, step: int, scalars: dict[str, Any]) -> None:
    """Says that `step` is done; shows its reward, speed and the time left."""
    if not self._is_main_process:
      return
    now = time.monotonic()
    self._origin = self._origin or (step, now)
    facts = _facts(scalars) + [f'{self._time_left(step, now)} left']
    if self._bar is not None:
      self._bar.set_postfix_str(', '.join(facts), refresh=False)
      self._bar.update(step - self._bar.n)
    elif now - self._logged_at >= self._log_every_s or step == self._total:
      self._logged_at = now
      logging.info('step %d/%d, %s', step, self._total, ', '.join(facts))

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def _time_left(self, step: int, now: float) -> str:
    """As 1:02:03, from the mean time of a step; '?' before it is known."""
    if step == self._total:
      return '0:00'
    first, start = self._origin or (step, now)
    if step == first:
      return '?'
    remaining = (self._total - step) * (now - start) / (step - first)
    minutes, seconds = divmod(round(remaining), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
      return f'{hours}:{minutes:02d}:{seconds:02d}'
    return f'{minutes}:{seconds:02d}'


class _JsonLines:
  """A file of one JSON object a line, each with a `step`."""

  def __init__(self, path: Path):
    self._path = path
    if _is_whole(path):
      with _naming(path):
        self._file = open(path, 'a', encoding='utf-8')
    else:  # A line that a kill tore would swallow the first one after it.
      self._rewrite(math.inf)

  def append(self, rows: list[dict[str, Any]]) -> None:
    with _naming(self._path):
      self._file.write(''.join(_line(row) for row in rows))
      self._file.flush()

  def truncate_after(self, step: int) -> None:
    self.close()
    self._rewrite(step)

  def close(self) -> None:
    with _naming(self._path):  # What `append` could not write, it would.
      self._file.close()

  def _rewrite(self, last: float) -> None:
    """Replaces the file at once, so that being killed here loses nothing.

    Line by line: the log of a long run has more than fits beside a model.

    Args:
      last: step up to which rows are kept, as they were written.
    """
    new = self._path.with_suffix('.tmp')
    with _naming(self._path):
      with new.open('wb') as file:
        for line, row in _read_lines(self._path):
          if row['step'] <= last:
            file.write(line.rstrip() + b'\n')
      os.replace(new, self._path)
      self._file = open(self._path, 'a', encoding='utf-8')


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
  """An error of the file system says of which file, and what to do."""
  try:
    yield
  except OSError as error:
    raise OSError(
        f'{path} cannot be written: {error.strerror or error}. Free some space '
        'or make it writable; the same command goes on from the last '
        'checkpoint.'
    ) from error


class _TensorBoard:
  """Event files, opened at the first write so that a resume comes first.

  An event holds all values of a line. The library's own writer makes one of
  each, for a thread to write: if that dies, of a disk that was full for a
  moment, a run would wait for it for ever.
  """

  def __init__(self, directory: Path):
    self._directory = directory
    self._purge_step: int | None = None
    self._writer: Any = None
    self._flushed_at = 0.0

  def write(self, step: int, values: dict[str, float]) -> None:
    # Imported late: the protobufs it brings take longer than all the rest.
    from tensorboardX.proto import event_pb2
    from tensorboardX.proto import summary_pb2

    scalars = [
        summary_pb2.Summary.Value(
            tag=_ODD_IN_A_TAG.sub('_', key), simple_value=float(value)
        )
        for key, value in values.items()
    ]
    event = event_pb2.Event(
        wall_time=time.time(),
        step=step,
        summary=summary_pb2.Summary(value=scalars),
    )
    with _naming(self._directory):
      if self._writer is None:
        self._open()
      self._writer.write_event(event)
      if time.monotonic() - self._flushed_at > _FLUSH_EVENTS_S:
        self._writer.flush()
        self._flushed_at = time.monotonic()

  def truncate_after(self, step: int) -> None:
    self.close()
    self._purge_step = step + 1

  def close(self) -> None:
    writer, self._writer = self._writer, None
    if writer is not None:
      with _naming(self._directory):
        writer.close()

  def _open(self) -> None:
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2

    self._directory.mkdir(parents=True, exist_ok=True)
    self._writer = event_file_writer.EventsWriter(
        str(self._directory / 'events'),
        # Its own file names count seconds: a quick resume would overwrite.
        filename_suffix=f'.{time.time_ns()}',
    )
    if self._purge_step is not None:
      self._writer.write_event(event_pb2.Event(
          step=self._purge_step,
          session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
      ))


def import_wandb() -> types.ModuleType:
  """The package, which is optional; a run asks before it compiles anything."""
  try:
    import wandb
  except ImportError as error:
    raise ImportError(
        'wandb=True needs the package wandb, which is not installed: '
        "pip install 'dppo_jax[wandb]', or go on without it."
    ) from error
  return wandb


class _Wandb:
  """One Weights & Biases run per workdir, whose id is kept beside the logs."""

  def __init__(self, workdir: Path, run_config: dict[str, Any] | None):
    self._run = import_wandb().init(
        project=os.environ.get('WANDB_PROJECT', 'dppo_jax'),
        name=workdir.resolve().name,
        dir=str(workdir),
        config=run_config,
        id=_stored_id(workdir / 'wandb_id.txt'),
        resume='allow',
    )
    # Steps as an axis of our own: its counter refuses to go back on a resume.
    self._run.define_metric('*', step_metric='step')

  def write(self, step: int, values: dict[str, float]) -> None:
    self._run.log({'step': step, **values})

  def truncate_after(self, step: int) -> None:
    del step  # What was sent stays there.

  def close(self) -> None:
    self._run.finish()


def _stored_id(path: Path) -> str:
  """The id in `path`, which is made at the first call."""
  if not path.exists():
    path.write_text(uuid.uuid4().hex, encoding='utf-8')
  return path.read_text(encoding='utf-8').strip()


def _line(row: dict[str, Any]) -> str:
  # Escaped to ASCII, so that no completion can hold a line break of its own.
  return json.dumps(row, allow_nan=False) + '\n'


def _is_whole(path: Path) -> bool:
  """Whether a file ends where a line does."""
  if not path.exists() or not path.stat().st_size:
    return True
  with path.open('rb') as file:
    file.seek(-1, os.SEEK_END)
    return file.read() == b'\n'


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
  """All lines but a torn last one, and their rows.

  A bad line elsewhere is an error.
  """
  if not path.exists():
    return
  with path.open('rb') as file:
    for number, line in enumerate(file, start=1):
      try:
        row = json.loads(line)
      except ValueError as error:
        # What has no end yet is the last, though more may come meanwhile.
        if not line.endswith(b'\n') or not file.read(1):
          return
        raise ValueError(
            f'{path}:{number} is not JSON ({line[:60]!r}); remove the line.'
        ) from error
      yield line, row


def _number(key: str, value: Any) -> float | int:
  """A Python number, from Python's, numpy's or JAX's."""
  array = np.asarray(value)
  if array.ndim:
    raise ValueError(
        f'Metric {key!r} has shape {array.shape}; reduce it to a scalar.'
    )
  if array.dtype.kind in 'biu':
    return int(array)
  try:
    return float(array)
  except (TypeError, ValueError) as error:
    raise ValueError(f'Metric {key!r} is {value!r}, not a number.') from error


def _sample_row(step: int, sample: dict[str, Any]) -> dict[str, Any]:
  reward = float(_number('reward', sample['reward']))
  return {
      'step': int(step),
      **sample,
      'reward': reward if math.isfinite(reward) else None,
  }


def _facts(scalars: dict[str, Any]) -> list[str]:
  """What is shown of a step's scalars, as far as they are there."""
  shown = {'reward/mean': 'reward {:.3f}', 'tokens/s': '{:,.0f} tokens/s'}
  return [
      text.format(float(scalars[key]))
      for key, text in shown.items()
      if key in scalars
  ]
