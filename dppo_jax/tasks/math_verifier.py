"""Mathematical answers in `\boxed{}`, compared by math-verify.

The package parses both sides with SymPy, which can take for ever on what a
policy writes (`9^{9^{9^{9}}}`). Its own limit is a signal, which only the main
thread can receive; so it is switched off, and the limit is that of the worker
process, see `scoring.Scorer`.

    pip install 'dppo_jax[verifiers]'
"""

import functools
import logging
import re

import math_verify

from dppo_jax.tasks import boxed

# It warns that nothing limits the time; the worker process does.
logging.getLogger('math_verify').setLevel(logging.ERROR)

# A boxed answer is short; SymPy's time grows fast with the length.
_MAX_CHARACTERS = 1_000
# "42 or 43" is no answer, whichever of the two is right.
_ALTERNATIVES = re.compile(r'\b(?:or|and)\b|\\l?or\b|\\vee', re.IGNORECASE)
# Spaces in a number, 10\,000, and the full stop of a sentence; that of \right.
# is a delimiter. math-verify reads neither.
_NOT_READ = re.compile(r'(?<=\d)\\[,!](?=\d)|(?<!\\right)\.\s*\Z')
_CONFIG = (math_verify.LatexExtractionConfig(boxed_match_priority=0),)


def boxed_math(completion: str, answer: str) -> float:
  r"""1 if the last `\boxed{...}` holds something equal to the answer, else 0.

  Equal is what SymPy finds equal: 0.5 and \frac{1}{2}, (x+1)^2 and x^2+2x+1,
  1,000 and 1000 and 1\,000; units behind a number are ignored, and so is one
  full stop at the end. Several values are a set, equal only to the same set, so
  that listing guesses earns nothing.

  Two things are left as math-verify has them. 50\% equals both 50 and 0.5. The
  base of a number is ignored: 101_2 equals 101 and 101_3.

  Args:
    completion: any text.
    answer: the right answer in LaTeX or plain, boxed or not.

  Raises:
    ValueError: the answer cannot be parsed.
  """
  gold = _gold(answer)
  given = boxed.last_boxed(completion)
  if not given or len(given) > _MAX_CHARACTERS:
    return 0.0
  if _ALTERNATIVES.search(given) and not _ALTERNATIVES.search(answer):
    return 0.0
  # Gold first: the comparison is not symmetric.
  return float(math_verify.verify(
      gold, _parse(given), timeout_seconds=None, raise_on_error=True
  ))


# The pool refuses to run without a time limit.
boxed_math.may_hang = True


@functools.lru_cache(maxsize=1024)
def _gold(answer: str) -> list:
  content = boxed.last_boxed(answer)
  gold = _parse(answer.strip().strip('$') if content is None else content)
  if not gold:
    raise ValueError(f'math-verify cannot read the answer {answer!r}')
  return gold


def _parse(latex: str) -> list:
  # In a box again, for without one a bare expression is not recognised.
  return math_verify.parse(
      rf'\boxed{{{_NOT_READ.sub("", latex)}}}',
      extraction_config=_CONFIG,
      parsing_timeout=None,
      raise_on_error=True,
  )
