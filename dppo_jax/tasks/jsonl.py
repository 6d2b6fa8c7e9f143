"""Your own prompts: JSON-lines files of prompts and answers.

One row a line: `{"prompt": "Capital of France?", "answer": "Paris"}`. An answer
may also be an integer, a prompt a list of messages `{"role": "user", "content":
"Capital of France?"}`. Other fields are ignored, and so are empty lines.
"""

import json
import os
import pathlib
import sys
from typing import Any

from absl import logging

from dppo_jax.tasks import base
from dppo_jax.tasks import own_verifier
from dppo_jax.tasks import scoring


@base.register
def jsonl(
  *,
  train_path: str = '',
  test_path: str = '',
  scorer: str = 'answer_after_hashes',
  verifier: str = '',
  chat_template: bool = False,
  system_prompt: str = '',
  drop_long_prompts: bool = False,
) -> base.Task:
  """Prompts and answers of two JSON-lines files.

  Args:
    train_path: rows to learn from.
    test_path: rows to be tested on, another file.
    scorer: how a completion is judged, 'answer_after_hashes' (the completion
      ends in `#### 85`; every answer must be an integer of at most 1,000
      digits), 'boxed_math' or 'exact'.
    verifier: your own in its place, 'module:function' or 'file.py:function'.
      An answer may then be any JSON, also an empty text; what is not text
      reaches it as JSON text.
    chat_template: put prompts into the words of the tokenizer's chat template.
    system_prompt: first message of the conversation.
    drop_long_prompts: leave out prompts of more than max_prompt_length tokens;
      if False, one of them is an error.

  Raises:
    FileNotFoundError: a file is missing.
    ImportError: the scorer needs a package; says which.
    ValueError: a path is not given, or a row is malformed; the message names
      file and line.
  """
  score = own_verifier.load(verifier) if verifier else scoring.scorer(scorer)
  for option, path in (('train_path', train_path), ('test_path', test_path)):
    if not path:
      raise ValueError(
        f'Task jsonl has no {option}; give config.task.{option}, '
        'a file with one {"prompt": ..., "answer": ...} a line.'
      )
    try:
      base.require_file(_path(path))
    except FileNotFoundError as error:
      raise FileNotFoundError(f'config.task.{option}: {error}') from error
  train = read(train_path, score=score)
  test = read(test_path, score=score)
  if os.path.samefile(_path(train_path), _path(test_path)):
    raise ValueError(
      f'train_path and test_path are the same file, {test_path}; '
      'a policy is not tested on what it learned from. Split it in two.'
    )
  learned = {json.dumps(row['prompt']) for row in train}  # Some are messages.
  common = sum(json.dumps(row['prompt']) in learned for row in test)
  if common:
    logging.warning(
      '%d of the %d prompts of %s are in %s too; accuracy on what was learned '
      'from says little.', common, len(test), test_path, train_path,
    )
  return base.Task(
    train,
    test,
    score,
    chat=base.chat_options(chat_template, system_prompt),
    drop_long_prompts=drop_long_prompts,
  )


def read(path: str, *, score: scoring.ScoreFn) -> list[dict[str, Any]]:
  """All rows of a file, checked.

  Args:
    path: a JSON-lines file in UTF-8.
    score: the verifier; a row whose answer it refuses is malformed.

  Returns:
    a list of {'prompt': str or messages, 'answer': str}.

  Raises:
    OSError: no such file, or a folder.
    ValueError: a malformed row, or no row at all.
  """
  rows = []
  for number, line in enumerate(_path(path).read_bytes().splitlines(), 1):
    if line.strip():
      try:
        rows.append(_row(line, score))
      except ValueError as error:
        raise ValueError(f'{path}, line {number}: {error}') from error
  if not rows:
    raise ValueError(
      f'{path} has no rows; write one {{"prompt": ..., "answer": ...}} a line.'
    )
  return rows


def _path(path: str) -> pathlib.Path:
  return pathlib.Path(path).expanduser()


def _row(line: bytes, score: scoring.ScoreFn) -> dict[str, Any]:
  """One row, or a ValueError that says what is wrong with it."""
  fields = _parse(line)
  for field in ('prompt', 'answer'):
    if field not in fields:
      raise ValueError(
        f'field {field!r} is missing; there is {", ".join(fields) or "none"}.'
      )
  prompt, answer = fields['prompt'], fields['answer']
  own = isinstance(score, own_verifier.OwnVerifier)
  if type(answer) is int:  # Not isinstance: True is an int too.
    answer = str(answer)
  elif own and not isinstance(answer, str):
    answer = json.dumps(answer)
  if not (isinstance(prompt, str) and prompt or base.is_conversation(prompt)):
    raise ValueError(
      f'prompt {prompt!r} must be a string that is not empty, or a list of '
      'messages {"role": ..., "content": ...}.'
    )
  # For a verifier of one's own, no answer may be one.
  if not isinstance(answer, str) or not (own or answer.strip()):
    nothing = answer is None or isinstance(answer, str)
    raise ValueError(
      f'answer {json.dumps(answer)} must be an integer or a string that is not '
      'empty'
      + ('.' if nothing else '; put it in quotes if it is meant as text.')
    )
  for text in base.texts(prompt):
    base.require_unicode('prompt', text)
  base.require_unicode('answer', answer)
  if own:  # It may raise at will: that is counted while it scores.
    return {'prompt': prompt, 'answer': answer}
  try:
    score('', answer)
  except ValueError as error:
    raise ValueError(
      f'answer {base.shown(answer)} does not suit scorer {score.__name__!r} '
      f'({error}); use another one: {", ".join(scoring.names())}, or your own '
      'by config.task.verifier.'
    ) from error
  return {'prompt': prompt, 'answer': answer}


def _parse(line: bytes) -> dict:
  try:
    fields = json.loads(line.decode('utf-8-sig'))
  except UnicodeDecodeError as error:
    raise ValueError(f'not UTF-8 ({error}); save the file as UTF-8.') from error
  except json.JSONDecodeError as error:
    raise ValueError(
      f'not JSON ({error}); one {{"prompt": ..., "answer": ...}} a line.'
    ) from error
  except ValueError as error:  # Of Python's own limit to the length.
    raise ValueError(
      f'a number has more than {sys.get_int_max_str_digits():,} digits; put it '
      'in quotes if it is meant as text.'
    ) from error
  if not isinstance(fields, dict):
    raise ValueError(
      f'is a {type(fields).__name__}; write {{"prompt": ..., "answer": ...}}.'
    )
  return fields
