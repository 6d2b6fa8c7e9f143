"""The collectives of a compiled program, and how much each of them moves."""

import math
import re

_NAMES = (
    'all-gather', 'all-reduce', 'all-to-all', 'collective-permute',
    'reduce-scatter', 'collective-broadcast', 'ragged-all-to-all',
)
_CALL = re.compile(rf' = (.*?) ({"|".join(_NAMES)})(?:-start)?\(')
_ARRAY = re.compile(r'[a-z]+\d*\[([\d,]*)\]')


def of(hlo):
  """(name, numbers in its largest array) of each in a program.

  Args:
    hlo: text of a compiled program.
  """
  return [
      (name, max(map(_size, _ARRAY.findall(shapes))))
      for shapes, name in _CALL.findall(hlo)
  ]


def in_loops(hlo):
  """(name, numbers in its largest array) of each that a loop calls.

  Args:
    hlo: text of a compiled program.
  """
  bodies = dict(re.findall(r'^%?([\w.-]+) .*?\{\n(.*?)^\}', hlo, re.M | re.S))
  assert len(bodies) > 3
  called = lambda text: re.findall(
      r'(?:to_apply|body|condition|calls|computations?)=\{?%?([\w.-]+)', text
  )
  reached = set(re.findall(r'(?:body|condition)=%?([\w.-]+)', hlo))
  assert reached
  for _ in range(len(bodies)):
    reached |= {name for x in reached for name in called(bodies.get(x, ''))}
  return [
      found for x in sorted(reached) for found in of(bodies.get(x, ''))
  ]


def _size(dimensions):
  """Of '16,32', or of '' for a scalar."""
  return math.prod(int(x) for x in dimensions.split(',') if x)
