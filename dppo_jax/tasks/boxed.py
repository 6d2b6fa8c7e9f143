"""Answers in a box: finding the last `\boxed{...}` of a text."""

import re

_BOXED = re.compile(r'\\(?:boxed|fbox)\s*\{')
# An escaped brace is a character of the answer and opens nothing; the brace
# after an escaped backslash, a line break, is a bare one.
_TOKEN = re.compile(r'\\.|[{}]')


def last_boxed(text: str) -> str | None:
  r"""What stands in the last `\boxed{...}`, whose braces must match.

  Only the last one counts: whoever writes several boxes has answered with the
  last of them. If that one is not closed there is no answer. In a box within a
  box the inner one is the last.

  Returns:
    the content without white space around it, or None.
  """
  start = None
  for match in _BOXED.finditer(text):
    start = match.end()
  if start is None:
    return None
  depth = 1
  for token in _TOKEN.finditer(text, start):
    depth += {'{': 1, '}': -1}.get(token[0], 0)
    if not depth:
      return text[start : token.start()].strip()
  return None
