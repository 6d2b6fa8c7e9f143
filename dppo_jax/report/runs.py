"""What a run has left in its workdir, and the numbers a page takes from it."""

from collections.abc import Iterable, Sequence
import dataclasses
import fnmatch
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from dppo_jax import metrics

# As `evaluate.summarize` counts for pass@k, which a page shows too. That module
# imports JAX, so the number stands here again, and a test holds them together.
CORRECT = 1.0


@dataclasses.dataclass(frozen=True)
class Run:
  """The logs of a workdir; what is not there is empty."""

  workdir: Path
  log: metrics.Columns  # From metrics.jsonl.
  config: dict[str, Any]
  sampled: list[int]  # Steps in samples.jsonl, ascending.
  masked_tokens: dict[str, list]  # Sign of the advantage: [text, count] pairs.
  points: list[list[float]]  # Of tokens: mu, ratio, |pi - mu|, dropped.


def read(workdir: str | os.PathLike[str]) -> Run:
  """Reads what is there, also of a run that still writes.

  Raises:
    ValueError: a file is damaged; the message has its path.
  """
  workdir = Path(workdir)
  return Run(
      workdir,
      metrics.read_columns(workdir),
      as_dict(_read_json(workdir / 'config.json')),
      metrics.steps_with_samples(workdir),
      as_dict(_read_json(workdir / 'masked_tokens.json')),
      _read_json(workdir / 'scatter.json') or [],
  )


def samples(run: Run, step: int) -> list[dict[str, Any]]:
  """Rows of samples.jsonl; a page shows a step or two of what may be many."""
  return metrics.read_samples(run.workdir, step=step)


def _read_json(path: Path) -> Any:
  """What the file holds, None if there is none."""
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(
        f'{path} is damaged ({error}). Restore or delete it.'
    ) from error


def matching(pattern: str, logs: Iterable[metrics.Columns]) -> list[str]:
  """The keys that `pattern` means and that have a value, pass@8 before @16."""
  found = {
      key for log in logs for key in fnmatch.filter(log.series, pattern)
      if len(finite(log, key))
  }
  return sorted(found, key=lambda key: (len(key), key))


def series(log: metrics.Columns, key: str) -> tuple[np.ndarray, np.ndarray]:
  """The steps that logged `key`, and its values, NaN where not finite."""
  steps, values = log.series.get(key, (np.zeros(0, np.int64), np.zeros(0)))
  return steps, np.where(np.isfinite(values), values, math.nan)


def finite(log: metrics.Columns, key: str) -> np.ndarray:
  """[at most number of steps] float64: the finite values of `key`."""
  _, values = series(log, key)
  return values[np.isfinite(values)]


def accuracy_key(logs: Sequence[metrics.Columns]) -> str:
  """The first held-out accuracy that has a value, '' if none has."""
  keys = matching('eval/avg@*', logs) or matching('eval/pass@*', logs)
  return keys[0] if keys else ''


def last_tenth(numbers: np.ndarray) -> np.ndarray:
  """The end of a run, at least one value of it."""
  return numbers[-max(1, len(numbers) // 10) :]


def thresholds(config: dict) -> list[float]:
  """One threshold, or two where they differ by the direction of the ratio."""
  divergence = as_dict(config.get('divergence'))
  default = divergence.get('threshold')
  sides = (divergence.get(f'threshold_{side}') for side in ('low', 'high'))
  found = {default if side is None else side for side in sides}
  numbers = (v for v in found if isinstance(v, (int, float)))
  return sorted(float(v) for v in numbers if 0 < v < math.inf)


def wall_minutes(log: metrics.Columns) -> float:
  """Compilation, steps and evaluations.

  The time of a logged step stands for all steps since the one logged before.
  """
  steps, per_step = series(log, 'time/step_s')
  timed = np.isfinite(per_step)
  seconds = np.sum(np.diff(steps[timed], prepend=0) * per_step[timed])
  for key in ('time/compile_s', 'time/eval_s'):
    seconds += np.sum(finite(log, key))
  return float(seconds) / 60


def verdict(sample: dict) -> str:
  """Of a row of samples.jsonl: 'correct', 'partly' or 'wrong'.

  Between 0 and 1 lies partial credit, and a bonus that is not for the answer.
  """
  reward = sample.get('reward') or 0
  if reward >= CORRECT:
    return 'correct'
  return 'partly' if reward > 0 else 'wrong'


def name(value: Any) -> str:
  """The name of a config entry that is a name or has one."""
  return str(value.get('name', '') if isinstance(value, dict) else value or '')


def as_dict(value: Any) -> dict:
  """The value if it is a dict, else an empty one."""
  return value if isinstance(value, dict) else {}
