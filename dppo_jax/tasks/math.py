"""Mathematical problems with an answer in a box, from published data sets.

A preset is a row of settings, each of which is printed and can be changed:

    tasks.config('math', **tasks.math.preset('gsm8k'))

or `--config=configs/math.py:gsm8k`. Each problem is used once, however often
the data set repeats it, and those of the test set are taken out of training.
"""

import hashlib
from math import isfinite
from typing import Any, NamedTuple

from absl import logging

from dppo_jax import registry
from dppo_jax.tasks import base
from dppo_jax.tasks import boxed
from dppo_jax.tasks import own_verifier
from dppo_jax.tasks import readers
from dppo_jax.tasks import scoring

# Of Qwen's model cards for their mathematical models.
INSTRUCTION = (
    r'Please reason step by step, and put your final answer within \boxed{}.'
)


class DataSet(NamedTuple):
  """Where rows lie and what in them is question and answer."""

  source: str = 'file'  # hub, tfds or file: see readers.py.
  name: str = ''  # Of the data set, or a path.
  config: str = ''  # Which variant of it.
  split: str = ''
  question: str = 'question'  # A field; dots go into nested ones.
  answer: str = 'answer'  # A field.
  extract: str = 'whole'  # The answer of it: whole, after_hashes, last_boxed.


_GSM8K = DataSet(
    'hub', 'openai/gsm8k', 'main', 'train', extract='after_hashes'
)
_AIME_2024 = DataSet(
    'hub', 'HuggingFaceH4/aime_2024', split='train', question='problem'
)
# Fields and splits as published. DAPO-Math-17k is the copy of open-r1: the
# original (BytedTsinghua-SIA/DAPO-Math-17k) repeats each problem a hundred
# times, inside a prompt that asks for `Answer:` and not for a box.
_PRESETS: dict[str, tuple[DataSet, DataSet]] = {
    'gsm8k': (_GSM8K, _GSM8K._replace(split='test')),
    'gsm8k_tfds': (
        DataSet('tfds', 'gsm8k', split='train', answer='short_answer'),
        DataSet('tfds', 'gsm8k', split='test', answer='short_answer'),
    ),
    'math': (
        DataSet(
            'hub', 'DigitalLearningGmbH/MATH-lighteval', split='train',
            question='problem', answer='solution', extract='last_boxed',
        ),
        DataSet(
            'hub', 'HuggingFaceH4/MATH-500', split='test', question='problem'
        ),
    ),
    'dapo_math_17k': (
        DataSet(
            'hub', 'open-r1/DAPO-Math-17k-Processed', 'all', 'train',
            question='prompt', answer='solution',
        ),
        _AIME_2024,
    ),
    'aime': (
        DataSet(
            'hub', 'di-zhang-fdu/AIME_1983_2024', split='train',
            question='Question', answer='Answer',
        ),
        DataSet('hub', 'math-ai/aime25', split='test', question='problem'),
    ),
}


def presets() -> list[str]:
  """The names of `preset`."""
  return sorted(_PRESETS)


def preset(name: str) -> dict[str, dict[str, str]]:
  """Options of the task for a published data set.

  Raises:
    ValueError: there is none of that name.
  """
  if name not in _PRESETS:
    raise ValueError(registry.unknown('preset', name, _PRESETS))
  train, test = _PRESETS[name]
  return {'train': train._asdict(), 'test': test._asdict()}


@base.register
def math(
    *,
    train: dict = DataSet()._asdict(),
    test: dict = DataSet()._asdict(),
    held_out: float = 0.0,
    instruction: str = INSTRUCTION,
    max_question_chars: int = 0,
    drop_long_prompts: bool = True,
    data_dir: str = '',
    chat_template: bool = True,
    system_prompt: str = '',
    scorer: str = 'boxed_math',
    verifier: str = '',
) -> base.Task:
  r"""Problems and answers of two data sets, or of two parts of one.

  Args:
    train: the fields of a `DataSet`, to learn from.
    test: the same, to be tested on; without a name if there is `held_out`.
    held_out: if not 0, this share of the training problems is the test set, by
      a hash of the problem, so it stays the same when rows are added.
    instruction: follows the problem on a line of its own; may be empty.
    max_question_chars: longer problems are left out; 0 for no limit.
    drop_long_prompts: leave out prompts of more than max_prompt_length tokens;
      if False, one of them is an error.
    data_dir: where a library keeps the data sets it downloads; empty for its
      own choice.
    chat_template: put prompts into the words of the tokenizer's chat template.
    system_prompt: first message of the conversation.
    scorer: a verifier of scoring.py; 'boxed_math' compares what stands in the
      last \boxed{} and runs in workers (config.scoring.num_workers).
    verifier: your own in its place, 'module:function' or 'file.py:function'.

  Raises:
    FileNotFoundError: a file is missing.
    ImportError: a package is missing; says how to install it.
    ValueError: an option makes no sense, or a data set lacks a field or rows.
  """
  if not 0 <= held_out < 1:
    raise ValueError(
        f'config.task.held_out={held_out} must be 0 (a test set of its own) or '
        'a share below 1.'
    )
  if held_out and test['name']:
    raise ValueError(
        f'config.task.held_out={held_out} and config.task.test.name='
        f'{test["name"]!r} both name a test set; leave one of them empty.'
    )
  score = own_verifier.load(verifier) if verifier else scoring.scorer(scorer)
  options = {'data_dir': data_dir, 'max_chars': max_question_chars}
  rows = _read('train', train, **options)
  if held_out:
    tested = {key: row for key, row in rows.items() if _share(key) < held_out}
  else:
    tested = _read('test', test, **options)
  learned = {key: row for key, row in rows.items() if key not in tested}
  for split, part in (('train', learned), ('test', tested)):
    if not part:
      raise ValueError(
          f'Of {len(rows)} training problems none is left to {split} on; '
          f'held_out={held_out}, max_question_chars={max_question_chars}, and '
          'problems of the test set are taken out of training.'
      )
  logging.info('%d training and %d test problems.', len(learned), len(tested))
  return base.Task(
      _with_instruction(learned, instruction),
      _with_instruction(tested, instruction),
      score,
      chat=base.chat_options(chat_template, system_prompt),
      drop_long_prompts=drop_long_prompts,
  )


def _read(
    which: str, options: dict[str, str], *, data_dir: str, max_chars: int
) -> dict[str, dict[str, Any]]:
  """Rows by their question; the first counts where one is repeated."""
  data_set = DataSet(**options)
  if not data_set.name:
    raise ValueError(
        f'Task math has no config.task.{which}.name; give the name of a data '
        f'set or the path of a file, or a preset ({", ".join(presets())}).'
    )
  if data_set.extract not in _EXTRACT:
    raise ValueError(
        registry.unknown('extract', data_set.extract, _EXTRACT)
    )
  rows: dict[str, dict[str, Any]] = {}
  found = readers.read(
      source=data_set.source,
      name=data_set.name,
      config=data_set.config,
      split=data_set.split,
      data_dir=data_dir,
  )
  for number, fields in enumerate(found, 1):
    try:
      question, prompt = _question(readers.field(fields, data_set.question))
      answer = _answer(readers.field(fields, data_set.answer), data_set.extract)
    except ValueError as error:
      raise ValueError(f'{data_set.name}, row {number}: {error}') from error
    if not max_chars or len(question) <= max_chars:
      row = {'prompt': prompt, 'answer': answer}
      rows.setdefault(' '.join(question.split()), row)
  return rows


def _question(value: Any) -> tuple[str, str | list[dict[str, str]]]:
  """The text of a question, and it as text or messages."""
  if isinstance(value, str) and value.strip():
    return value, value
  if base.is_conversation(value):
    return '\n'.join(message['content'] for message in value), value
  raise ValueError(
      f'question {value!r} must be a text that is not empty, or a list of '
      "messages {'role': ..., 'content': ...}."
  )


def _after_hashes(text: str) -> str | None:
  _, hashes, answer = text.rpartition('####')
  return answer if hashes else None


_EXTRACT = {
    'whole': lambda text: text,
    'after_hashes': _after_hashes,
    'last_boxed': boxed.last_boxed,
}


def _answer(value: Any, extract: str) -> str:
  if isinstance(value, float) and isfinite(value):
    # 4.0 is the integer 4: a column with a gap in it is read as floats, and the
    # gap itself as NaN, which is no answer.
    value = str(int(value) if value.is_integer() else value)
  elif isinstance(value, int) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str):
    raise ValueError(f'answer {value!r} must be a text or a finite number.')
  answer = _EXTRACT[extract](value)
  if answer is None or not answer.strip():
    shown = value if len(value) <= 60 else '...' + value[-57:]
    raise ValueError(f'answer {shown!r} holds nothing for extract={extract!r}.')
  return answer.strip()


def _share(key: str) -> float:
  """A number in [0, 1) that follows from the text alone."""
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def _with_instruction(
    rows: dict[str, dict[str, Any]], instruction: str
) -> list[dict[str, Any]]:
  """Rows whose last message ends with the instruction."""
  if not instruction:
    return list(rows.values())
  return [
      row | {'prompt': _instructed(row['prompt'], instruction)}
      for row in rows.values()
  ]


def _instructed(prompt, instruction: str):
  if isinstance(prompt, str):
    return f'{prompt}\n{instruction}'
  *before, last = prompt
  return [*before, last | {'content': f'{last["content"]}\n{instruction}'}]
