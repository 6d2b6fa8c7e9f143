"""Integer arithmetic whose answer is checked exactly.

All sums and differences of two numbers from 10 to 99 and all products of a
digit and such a number, as long as every number stays between 0 and 199. A
prompt reads `47+38=`; a completion may write what it likes as long as it ends
in `#### 85`. Train and test problems are disjoint, by a hash of the prompt.
"""

import hashlib

from dppo_jax.tasks import base
from dppo_jax.tasks import own_verifier
from dppo_jax.tasks import scoring

LARGEST = 199

# 1 if the completion ends in `#### answer`, else 0.
score = scoring.answer_after_hashes


@base.register
def arithmetic(
    *,
    data_dir: str = '',
    verifier: str = '',
    chat_template: bool = False,
    system_prompt: str = '',
) -> base.Task:
  """The problems of this file, read through TensorFlow Datasets.

  Args:
    data_dir: where the prepared problems (under 2 MB) are kept. If empty, the
      folder that TFDS uses: the environment variable TFDS_DATA_DIR, or else
      ~/tensorflow_datasets. The first use prepares them, in about a second.
    verifier: your own, 'module:function' or 'file.py:function', instead of the
      integer after `####`.
    chat_template: put prompts into the words of the tokenizer's chat template.
    system_prompt: first message of the conversation.

  Raises:
    OSError: the folder cannot be written.
    ValueError: the folder holds something else or only a part.
  """
  # Slow to import, and the problems themselves need no TFDS.
  from dppo_jax.tasks import arithmetic_tfds

  sources = arithmetic_tfds.sources(data_dir)
  return base.Task(
    sources['train'],
    sources['test'],
    own_verifier.load(verifier) if verifier else score,
    chat=base.chat_options(chat_template, system_prompt),
  )


def problems(split: str) -> list[dict[str, str]]:
  """All problems of a split, always in the same order.

  Args:
    split: 'train' (nine tenths) or 'test' (one tenth).

  Returns:
    a list of {'prompt': '47+38=', 'answer': '85'}.
  """
  if split not in ('train', 'test'):
    raise ValueError(f"split={split!r} is neither 'train' nor 'test'.")
  numbers = range(10, 100)
  results = {}
  for a in numbers:
    for b in numbers:
      results[f'{a}+{b}='] = a + b
      results[f'{a}-{b}='] = a - b
    for digit in range(2, 10):
      results[f'{a}*{digit}='] = a * digit
      results[f'{digit}*{a}='] = a * digit
  return [
    {'prompt': prompt, 'answer': str(result)}
    for prompt, result in results.items()
    if 0 <= result <= LARGEST and _split_of(prompt) == split
  ]


def _split_of(prompt: str) -> str:
  first_byte = hashlib.sha256(prompt.encode()).digest()[0]
  return 'test' if first_byte % 10 == 0 else 'train'
