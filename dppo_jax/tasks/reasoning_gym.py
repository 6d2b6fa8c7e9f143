"""Any task of reasoning-gym: problems made by a program, and its verifier.

    pip install 'dppo_jax[reasoning-gym]'
    tasks.config('reasoning_gym', dataset='chain_sum',
                 dataset_options='{"min_terms": 2, "max_terms": 2}')

Problems follow from a seed. Training and test problems have seeds of their own,
and those that occur in both, or among the examples, are taken out of training.

Some data sets also draw from Python's global random numbers, or go through sets
of strings, whose order differs from process to process: made twice, a problem
is not the same. So problems are made once, in a process where those are fixed,
and the verifier holds them.
"""

import functools
import json
import os
import pickle
import re
import subprocess
import sys
from typing import Any, NamedTuple

from absl import logging

from dppo_jax import registry
from dppo_jax.tasks import base
from dppo_jax.tasks import own_verifier

INSTRUCTION = 'Give the final answer between <answer> and </answer>.'

_TAGS = re.compile(r'<answer>((?:(?!<answer>).)*?)</answer>', re.DOTALL)
# Problem i of seed s is often problem i - 1 of seed s + 1, so the seeds of the
# parts are further apart than any of them is large.
_SEEDS_APART = 10_000_019

# Reads data sets, writes their problems. What they print is no problem.
_MAKE = """
import json, pickle, random, sys
import numpy as np
out, sys.stdout = sys.stdout.buffer, sys.stderr
import reasoning_gym
made = []
for name, options, seed, size in pickle.load(sys.stdin.buffer):
  data_set = reasoning_gym.create_dataset(
      name, seed=seed, size=size, **json.loads(options))
  made.append([])
  for index in range(size):
    random.seed(seed + index)
    np.random.seed((seed + index) % 2**32)
    made[-1].append(data_set[index])
pickle.dump(made, out)
"""


class Part(NamedTuple):
  """Problems that follow from these four."""

  dataset: str
  options: str  # JSON.
  seed: int
  size: int


@base.register
def reasoning_gym(
    *,
    dataset: str = 'chain_sum',
    dataset_options: str = '{}',
    train_size: int = 2000,
    test_size: int = 200,
    seed: int = 0,
    num_shots: int = 0,
    instruction: str = INSTRUCTION,
    answer_in: str = 'tags',
    partial_credit: bool = False,
    chat_template: bool = False,
    system_prompt: str = '',
    drop_long_prompts: bool = False,
    verifier: str = '',
) -> base.Task:
  """A data set of reasoning-gym by name.

  Args:
    dataset: its name in reasoning-gym, for example 'countdown'.
    dataset_options: its options as a JSON object.
    train_size: problems made to learn from, before what is repeated and what
      the test set holds are taken out.
    test_size: problems made to be tested on; repeated ones are taken out.
    seed: of all problems.
    num_shots: solved examples before the problem, a line each, the same for
      all. The prompt is then `question answer` so many times and the question.
    instruction: follows the question on a line of its own; may be empty.
    answer_in: where the answer stands: in the last <answer></answer> ('tags'),
      on the first line ('first_line'), or the whole completion ('all').
    partial_credit: pass on what the data set gives for answers that are almost
      right. Off, only full credit counts: many data sets pay for a long text
      that holds the answer somewhere, or for any text, and a policy finds out.
    chat_template: put prompts into the words of the tokenizer's chat template.
    system_prompt: first message of the conversation.
    drop_long_prompts: leave out prompts of more than max_prompt_length tokens.
    verifier: your own verifier, 'module:function' or 'file.py:function'; it
      gets the whole completion, and the data set's answer ('' if it has none).

  Raises:
    ImportError: reasoning-gym is not installed.
    ValueError: an unknown data set or option, or no problem is left.
  """
  if answer_in not in _ANSWER_IN:
    raise ValueError(registry.unknown('answer_in', answer_in, _ANSWER_IN))
  for name, value, least in (
      ('train_size', train_size, 1),
      ('test_size', test_size, 1),
      ('num_shots', num_shots, 0),
      ('seed', seed, 0),
  ):
    if value < least:
      raise ValueError(f'config.task.{name}={value} must be at least {least}.')
  parts = [
      Part(dataset, dataset_options, (3 * seed + i) * _SEEDS_APART, size)
      for i, size in enumerate((train_size, test_size, num_shots))
  ]
  problems = _problems(tuple(part for part in parts if part.size))
  train, test, *shots = map(_by_question, problems)
  shots = shots[0] if shots else {}
  test = {key: row for key, row in test.items() if key not in shots}
  num_made = len(train)
  train = {
      key: row for key, row in train.items()
      if key not in test and key not in shots
  }
  if not train or not test:
    raise ValueError(
        f'Of {num_made} different problems of {dataset!r} {len(train)} are '
        f'left to learn from and {len(test)} to test on; lower '
        f'test_size={test_size} or change dataset_options so that there are '
        'more.'
    )
  logging.info('%d training and %d test problems.', len(train), len(test))
  as_rows = functools.partial(
      _rows, shots=shots, instruction=instruction, answer_in=answer_in,
      plain_answers=bool(verifier),
  )
  return base.Task(
      as_rows(train, part=parts[0]),
      as_rows(test, part=parts[1]),
      own_verifier.load(verifier) if verifier
      else GymScore(parts[:2], problems[:2], answer_in, partial_credit),
      chat=base.chat_options(chat_template, system_prompt),
      drop_long_prompts=drop_long_prompts,
  )


class GymScore:
  """The verifier of a data set, with its problems.

  An answer is JSON, for example `{"answer": "7", "seed": 0, "index": 3}`: some
  data sets judge by more of a problem than its answer.
  """

  # Some evaluate what a policy writes as an expression.
  may_hang = True

  def __init__(
      self,
      parts: list[Part],
      problems: list[list[dict[str, Any]]],
      answer_in: str,
      partial_credit: bool,
  ):
    self._part = parts[0]
    self._problems = {
        part.seed: of_part
        for part, of_part in zip(parts, problems, strict=True)
    }
    self._answer_in = answer_in
    self._partial_credit = partial_credit

  def __setstate__(self, state: dict[str, Any]) -> None:
    """Imports the package where a worker starts, before time is counted."""
    self.__dict__.update(state)
    _data_set(self._part)

  def __call__(self, completion: str, answer: str) -> float:
    given = _ANSWER_IN[self._answer_in](completion)
    if not given:  # Some data sets give credit for saying nothing.
      return 0.0
    row = json.loads(answer)
    problem = self._problems[row['seed']][row['index']]
    credit = _data_set(self._part).score_answer(given, problem)
    return float(credit) if self._partial_credit else float(credit >= 1.0)


def _last_tags(completion: str) -> str:
  found = _TAGS.findall(completion)
  return found[-1].strip() if found else ''


_ANSWER_IN = {
    'tags': _last_tags,
    # The first that is written: white space before it is no line.
    'first_line': lambda text: text.strip().partition('\n')[0].strip(),
    'all': str.strip,
}


@functools.lru_cache(maxsize=16)
def _problems(parts: tuple[Part, ...]) -> list[list[dict[str, Any]]]:
  """The problems of each part, the same in any process: see the module."""
  for part in parts:
    _data_set(part)  # Names what is wrong with it.
  done = subprocess.run(
      [sys.executable, '-P', '-c', _MAKE],
      input=pickle.dumps([tuple(part) for part in parts]),
      capture_output=True,
      env=os.environ | {'PYTHONHASHSEED': '0'},
      check=False,
  )
  if done.returncode:
    raise RuntimeError(
        f'{parts[0].dataset!r} of reasoning-gym made no problems:\n'
        + done.stderr.decode(errors='replace')
    )
  return pickle.loads(done.stdout)


def _by_question(
    problems: list[dict[str, Any]]
) -> dict[str, tuple[int, dict[str, Any]]]:
  """(index, problem) by question; the first counts where one is repeated."""
  found: dict[str, tuple[int, dict[str, Any]]] = {}
  for index, problem in enumerate(problems):
    found.setdefault(problem['question'], (index, problem))
  return found


def _rows(
    problems, *, part: Part, shots, instruction, answer_in, plain_answers
) -> list[dict[str, str]]:
  asked = f'\n{instruction}' if instruction else ''
  before = ''.join(
      f'{question}{asked} {_shown(problem["answer"], answer_in)}\n'
      for question, (_, problem) in shots.items()
  )
  return [
      {
          'prompt': f'{before}{question}{asked}',
          'answer': problem['answer'] or '' if plain_answers else json.dumps({
              'answer': problem['answer'], 'seed': part.seed, 'index': index,
          }),
      }
      for question, (index, problem) in problems.items()
  ]


def _shown(answer: str | None, answer_in: str) -> str:
  if answer is None:
    raise ValueError(
        'This data set has no answers to show; use config.task.num_shots=0.'
    )
  return f'<answer>{answer}</answer>' if answer_in == 'tags' else answer


@functools.lru_cache(maxsize=16)
def _data_set(part: Part) -> Any:
  try:
    import reasoning_gym as gym  # Slow to import, and optional.
    from reasoning_gym import factory
  except ImportError as error:
    raise ImportError(
        'Task reasoning_gym needs the package reasoning-gym; '
        "pip install 'dppo_jax[reasoning-gym]'."
    ) from error
  if part.dataset not in factory.DATASETS:
    raise ValueError(
        registry.unknown('data set', part.dataset, factory.DATASETS)
    )
  try:
    options = json.loads(part.options)
  except json.JSONDecodeError as error:
    raise ValueError(
        f'config.task.dataset_options={part.options!r} is not JSON: {error}.'
    ) from error
  if not isinstance(options, dict) or {'seed', 'size'} & set(options):
    raise ValueError(
        f'config.task.dataset_options={part.options!r} must be a JSON object '
        'without seed and size; config.task has those.'
    )
  try:
    return gym.create_dataset(
        part.dataset, seed=part.seed, size=part.size, **options
    )
  except (AssertionError, TypeError, ValueError) as error:
    raise ValueError(
        f'reasoning-gym refuses dataset_options={part.options} for '
        f'{part.dataset!r}: {error}'
    ) from error
