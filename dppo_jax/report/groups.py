"""Runs that differ by their seed alone are a group; what tells groups apart."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from dppo_jax.report import runs as runs_lib
from dppo_jax.report.runs import Run

# Beside the seed, what changes nothing that a run samples or learns.
_NEUTRAL = (
    'checkpoint_every',
    'compilation_cache',
    'keep_checkpoints',
    'profile_steps',
    'seed',
    'tensorboard',
    'wandb',
)
# Where a run comes from: of its entry `run`, without the command, which has
# seed and paths in it.
_PROVENANCE = ('commit', 'device', 'num_processes', 'versions')


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs of one config."""

  name: str  # Unlike that of any other group.
  runs: tuple[Run, ...]  # By seed.
  settings: Mapping[str, str]  # 'optimizer.learning_rate': '0.001'.

  @property
  def seeds(self) -> list[str]:
    """Of the runs, as text."""
    return [str(seed(run)) for run in self.runs]


def find(directory: Path) -> list[Path]:
  """The workdirs in a directory, or itself if it is one.

  Raises:
    ValueError: it is no directory, or there is none in it.
  """
  if not directory.is_dir():
    raise ValueError(f'{directory} is not a directory.')
  found = list(_workdirs(directory))
  if not found:
    raise ValueError(
        f'{directory} is not the directory of a run and holds none: there is '
        'no metrics.jsonl in it or below it.'
    )
  return found


def _workdirs(directory: Path) -> Iterable[Path]:
  if (directory / 'metrics.jsonl').exists():
    yield directory
    return
  for child in sorted(directory.iterdir()):
    if child.is_dir() and not child.name.startswith('.'):
      yield from _workdirs(child)


def of(runs: Sequence[Run]) -> list[Group]:
  """Puts runs into groups, in the order in which these first appear.

  Two runs of one config and seed are of different groups if their commits,
  devices or versions differ: before and after a change of the code.

  Raises:
    ValueError: a run has no config, or two cannot be told apart at all.
  """
  buckets: dict[str, list[Run]] = {}
  for run in runs:
    buckets.setdefault(json.dumps(_settings(run)), []).append(run)
  parts: list[tuple[dict[str, str], list[Run]]] = []
  for bucket in buckets.values():
    if _same_seed(bucket) is None:
      parts.append((_settings(bucket[0]), bucket))
    else:
      parts += _by_provenance(bucket)
  names = _names([
      settings | {'algorithm': algorithm(settings)}
      if 'algorithm' in settings
      else settings
      for settings, _ in parts
  ])
  return [
      Group(name, tuple(sorted(members, key=_by_seed)), settings)
      for name, (settings, members) in zip(names, parts, strict=True)
  ]


def _by_provenance(
    runs: Sequence[Run],
) -> list[tuple[dict[str, str], list[Run]]]:
  """Parts of one config, each with what it comes from as settings."""
  buckets: dict[str, list[Run]] = {}
  for run in runs:
    buckets.setdefault(json.dumps(provenance(run)), []).append(run)
  for bucket in buckets.values():
    same = _same_seed(bucket)
    if same is not None:
      raise ValueError(
          f'{same[0].workdir} and {same[1].workdir} cannot be told apart: the '
          f'same config, seed ({seed(same[0])}), commit and versions. Both '
          'would count as seeds of one group; leave one out.'
      )
  return [
      (_settings(bucket[0]) | provenance(bucket[0]), bucket)
      for bucket in buckets.values()
  ]


def _same_seed(runs: Sequence[Run]) -> tuple[Run, Run] | None:
  """The first two runs with one seed."""
  seen: dict[Any, Run] = {}
  for run in runs:
    if seed(run) in seen:
      return seen[seed(run)], run
    seen[seed(run)] = run
  return None


def seed(run: Run) -> Any:
  """The seed of the config, None if it has none."""
  return run.config.get('seed')


def _by_seed(run: Run) -> tuple[int, str]:
  text = str(seed(run))
  return len(text), text  # 2 before 10.


def provenance(run: Run) -> dict[str, str]:
  """What a run comes from, by name: 'commit', 'versions.jax'.

  'before' is what was otherwise at earlier starts: 'commit abc, jax 0.9'.
  """
  described = runs_lib.as_dict(run.config.get('run'))
  last = _origin(described)
  starts = map(_origin, described.get('before', []))
  others = dict.fromkeys(
      f'{name.removeprefix("versions.")} {value}'
      for start in starts for name, value in start.items()
      if last.get(name) != value
  )
  return last | ({'before': ', '.join(others)} if others else {})


def _origin(described: Mapping[str, Any]) -> dict[str, str]:
  return _flat({k: described[k] for k in _PROVENANCE if k in described})


def _settings(run: Run) -> dict[str, str]:
  if not run.config:
    raise ValueError(
        f'{run.workdir} has no config.json, which says what tells its run from '
        'others; leave it out or restore the file.'
    )
  own = {k: v for k, v in run.config.items() if k not in (*_NEUTRAL, 'run')}
  return _flat(own)


def _flat(tree: Any, name: str = '') -> dict[str, str]:
  """Every leaf of a tree of dicts as text, by its dotted name."""
  if not isinstance(tree, dict):
    text = tree if isinstance(tree, str) and tree else json.dumps(tree)
    return {name: text}
  flat: dict[str, str] = {}
  for key, value in tree.items():
    flat |= _flat(value, f'{name}.{key}' if name else key)
  return flat


def algorithm(settings: Mapping[str, str]) -> str:
  """Its name, and which of its parts a run has exchanged.

  'dppo_topk_tv with divergence topk_kl' is not what the table of algorithms
  calls dppo_topk_tv. Options, as a threshold, are settings like others.
  """
  name = settings.get('algorithm', '')
  changed = [
      f'{part} {settings[part]}'
      for part, usual in _parts(name).items()
      if settings.get(part, usual) != usual
  ]
  text = ', '.join(changed).replace('.name', '')
  return f'{name} with {text}' if text else name


@functools.cache
def _parts(name: str) -> dict[str, str]:
  """What a row of the table is made of: 'divergence.name': 'topk_tv'.

  Nothing for a row that this version has not, or without JAX, which the table
  needs and a page does not.
  """
  try:
    from dppo_jax import algorithms  # Imports JAX, and starts no device.
  except (ImportError, RuntimeError):  # It refuses another jaxlib by this.
    return {}
  if name not in algorithms.names():
    return {}
  parts = algorithms.config(name)
  names = {
      f'{part}.name': options['name']
      for part, options in parts.items()
      if part not in ('algorithm', 'anchor')
  }
  return names | {'anchor': parts['anchor']}


def shared(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
  """The settings that are the same everywhere."""
  first, *others = settings
  return {
      name: value for name, value in first.items()
      if all(each.get(name) == value for each in others)
  }


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
  """Names of the settings that are not the same everywhere, algorithm first."""
  names = dict.fromkeys(name for each in settings for name in each)
  found = [n for n in names if len({each.get(n) for each in settings}) > 1]
  return sorted(found, key=lambda name: name != 'algorithm')


def _names(settings: Sequence[Mapping[str, str]]) -> list[str]:
  """As few of the differing settings as make all names different.

  The algorithm, then the setting that splits most of the groups that are still
  alike, and so on; a name has only those that matter to it.
  """
  fields = differing(settings)
  short = _short(fields)
  parts: list[list[str]] = [[] for _ in settings]
  alike = [list(range(len(settings)))]
  while fields and (alike := [x for x in alike if len(x) > 1]):
    splits = {field: _split(alike, settings, field) for field in fields}
    field = max(fields, key=lambda f: (f == 'algorithm', len(splits[f])))
    fields.remove(field)
    for members in alike:
      if len({settings[i].get(field) for i in members}) > 1:
        for i in members:
          value = settings[i].get(field, '–')
          is_name = field == 'algorithm'
          parts[i].append(value if is_name else f'{short[field]}={value}')
    alike = splits[field]
  common = settings[0].get('algorithm', 'runs') if settings else ''
  return [' '.join(words) or common for words in parts]


def _split(
    alike: Sequence[Sequence[int]],
    settings: Sequence[Mapping[str, str]],
    field: str,
) -> list[list[int]]:
  """Sets of groups that are still alike if `field` is told."""
  split: list[list[int]] = []
  for members in alike:
    by_value: dict[str | None, list[int]] = {}
    for i in members:
      by_value.setdefault(settings[i].get(field), []).append(i)
    split += by_value.values()
  return split


def _short(fields: Sequence[str]) -> dict[str, str]:
  """The last word of each dotted name, the whole where two share that."""
  last = [field.rpartition('.')[2] for field in fields]
  return {
      field: word if last.count(word) == 1 else field
      for field, word in zip(fields, last, strict=True)
  }


@dataclasses.dataclass(frozen=True)
class Curve:
  """A key over the seeds of a group.

  Mean and range exist at steps that all seeds logged that have the key at all;
  they are NaN where one of those seeds is not finite.
  """

  steps: np.ndarray  # [n]
  mean: np.ndarray  # [n]
  low: np.ndarray  # [n]
  high: np.ndarray  # [n]
  seeds: tuple[tuple[np.ndarray, np.ndarray], ...]  # (steps, values) of each.


def curve(seeds: Sequence[tuple[np.ndarray, np.ndarray]]) -> Curve:
  """Mean and range over curves, each (steps, values)."""
  common = set.intersection(*(set(steps.tolist()) for steps, _ in seeds))
  steps = np.array(sorted(common), np.int64)
  table = np.array(
      [values[np.isin(logged, steps)] for logged, values in seeds]
  )  # [seeds, n]; NaN spreads through mean, min and max.
  mean, low, high = (f(table, axis=0) for f in (np.mean, np.min, np.max))
  return Curve(steps, mean, low, high, tuple(seeds))
