"""Flags that sweeps have in common; each defines those that it reads."""

from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

_LISTS = {
    'seeds': 'Of the runs; those of the results if empty.',
    'methods': 'Only these; all if empty.',
    'rates': 'Learning rates; those of the results if empty.',
}


def define(*names: str) -> None:
  """Defines flags, if no other module of this process has yet.

  Args:
    *names: of `seeds`, `methods`, `rates`, `file` and `workers`.
  """
  for name in names:
    if name in flags.FLAGS:
      continue
    if name in _LISTS:
      flags.DEFINE_list(name, [], _LISTS[name])
    elif name == 'file':
      flags.DEFINE_string(name, 'runs.csv', 'In the folder of the sweep.')
    elif name == 'workers':
      flags.DEFINE_integer(name, 2, 'Runs or programs at a time.')
    else:
      raise ValueError(f'{name!r} is none of the flags of sweeps.')


def given(name: str) -> Any:
  """What the command line gives a flag, each once if it is a list."""
  value = getattr(flags.FLAGS, name)
  return list(dict.fromkeys(value)) if isinstance(value, list) else value


def chosen(
    flag: str, names: Sequence[str], known: Iterable[str]
) -> list[str]:
  """What a flag names, or all that it may name.

  Raises:
    ValueError: a name is not known.
  """
  known = list(known)
  for name in names:
    if name not in known:
      raise ValueError(
          f'--{flag} has {name!r}, which is none of {", ".join(known)}.'
      )
  return list(names) or known
