"""One-digit arithmetic for models that only continue text.

A prompt shows solved problems, a line each, and ends in one that is not:

    1+6=7
    5+2=7
    3+8=11
    4+9=

A completion is right if its first line is the answer and nothing else. Train
and test have no problem in common, neither as a question nor turned around, and
the solved ones are of train: 4+9 or 9+4 of test stands in no prompt of train.
"""

import hashlib
import itertools
import operator
import random

from dppo_jax import registry
from dppo_jax.tasks import base

OPERATIONS = {'+': operator.add, '-': operator.sub, '*': operator.mul}
DIGITS = range(1, 10)


@base.register
def few_shot_arithmetic(
  *, operations: str = '+', num_shots: int = 3, num_variants: int = 8
) -> base.Task:
  """All problems of two digits from 1 to 9.

  Args:
    operations: one or several of + - *.
    num_shots: solved problems before the question.
    num_variants: how often each question is asked, with other ones before it.

  Raises:
    ValueError: an operation that is not known, or a number below 1.
  """
  for name, value in (('num_shots', num_shots), ('num_variants', num_variants)):
    if value < 1:
      raise ValueError(f'{name}={value} must be at least 1.')
  for symbol in operations or ' ':
    if symbol not in OPERATIONS:
      raise ValueError(registry.unknown('operation', symbol, OPERATIONS))
  train, test = (
    rows(split, operations, num_shots=num_shots, num_variants=num_variants)
    for split in ('train', 'test')
  )
  return base.Task(train, test, score)


def score(completion: str, answer: str) -> float:
  """1 if the first line is the answer, but for spaces around it, else 0."""
  return float(completion.split('\n', 1)[0].strip(' ') == answer)


def rows(
  split: str, operations: str, *, num_shots: int, num_variants: int
) -> list[dict[str, str]]:
  """Prompts and answers of 'train' (three quarters) or 'test' (the others)."""
  problems = [
    (a, symbol, b)
    for symbol, a, b in itertools.product(operations, DIGITS, DIGITS)
  ]
  solved = [x for x in problems if _split_of(x) == 'train']
  if num_shots > len(solved) - 2:  # Without the question, turned or not.
    raise ValueError(
      f'num_shots={num_shots}, but operations={operations!r} make only '
      f'{len(solved)} problems to show; use at most {len(solved) - 2}.'
    )
  made = []
  for problem in problems:
    if _split_of(problem) != split:
      continue
    others = [x for x in solved if _unordered(x) != _unordered(problem)]
    # The same shots in each run, for each number of variants.
    shuffler = random.Random(_question(problem))
    for _ in range(num_variants):
      shots = shuffler.sample(others, num_shots)
      lines = [_question(x) + _answer(x) for x in shots]
      prompt = '\n'.join([*lines, _question(problem)])
      made.append({'prompt': prompt, 'answer': _answer(problem)})
  return made


def _question(problem: tuple[int, str, int]) -> str:
  a, symbol, b = problem
  return f'{a}{symbol}{b}='


def _answer(problem: tuple[int, str, int]) -> str:
  a, symbol, b = problem
  return str(OPERATIONS[symbol](a, b))


def _unordered(problem: tuple[int, str, int]) -> tuple[int, str, int]:
  """4+9 and 9+4 are one problem; so are 4-9 and 9-4."""
  a, symbol, b = problem
  return min(a, b), symbol, max(a, b)


def _split_of(problem: tuple[int, str, int]) -> str:
  name = _question(_unordered(problem))
  return 'test' if hashlib.sha256(name.encode()).digest()[0] < 64 else 'train'
