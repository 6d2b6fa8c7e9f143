"""Flags that sweeps have in common."""

from collections.abc import Iterable, Sequence

from absl import flags

WORKERS = flags.DEFINE_integer('workers', 2, 'Runs or programs at a time.')
SEEDS = flags.DEFINE_list(
    'seeds', [], 'Of the runs; those of the results if empty.'
)
METHODS = flags.DEFINE_list('methods', [], 'Only these; all if empty.')
RATES = flags.DEFINE_list(
    'rates', [], 'Learning rates; those of the results if empty.'
)
FILE = flags.DEFINE_string('file', 'runs.csv', 'In the folder of the sweep.')


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
