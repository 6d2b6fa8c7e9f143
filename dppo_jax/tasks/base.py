"""What a task is: prompts to learn from, prompts to be tested on, a verifier.

A task is a factory whose keyword arguments are its config, like every other
choice here:

    task = tasks.build('arithmetic')
    task.train[0]                    # {'prompt': '26+34=', 'answer': '60'}
    task.score('26+34 is #### 60', '60')  # 1.0
"""

from collections.abc import Callable
import pathlib
from typing import Any, NamedTuple, Protocol

from dppo_jax import registry

register = registry.Registry('task')
build = register.build
names = register.names
config = register.config


class Source(Protocol):
  """Random access to rows {'prompt': str, 'answer': str}.

  A prompt may also be a list of messages {'role': str, 'content': str}, which
  `prompts.prepare` makes a text of.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class Chat(NamedTuple):
  """How a prompt becomes a conversation, in the words of the model's template.

  The template is the tokenizer's. Without a system prompt of one's own it may
  bring another, as those of Qwen2.5 and SmolLM2 do.
  """

  system_prompt: str = ''


class Task(NamedTuple):
  """Rows and their verifier; no row of `test` may be in `train`.

  `score(completion, answer)` is the reward. A pool of processes can call it
  only if it can be pickled: a function of a module, or a partial of one.
  """

  train: Source
  test: Source
  score: Callable[[str, str], float]
  chat: Chat | None = None  # None: prompts are continued as they are.
  drop_long_prompts: bool = False  # False: one that is too long is an error.


def require_file(path: pathlib.Path) -> None:
  """Raises a FileNotFoundError if there is none, or a folder in its place."""
  if path.is_dir():
    raise FileNotFoundError(f'{path} is a folder; give a file in it.')
  if not path.is_file():
    raise FileNotFoundError(f'There is no file {path}.')


def shown(text: str) -> str:
  """In quotes, and of a long one as much as a message has room for."""
  return repr(text if len(text) <= 60 else f'{text[:57]}...')


def is_conversation(value: Any) -> bool:
  """Whether it is a list of messages {'role': str, 'content': str}."""
  return bool(value) and isinstance(value, list) and all(
      isinstance(message, dict)
      and isinstance(message.get('role'), str)
      and isinstance(message.get('content'), str)
      for message in value
  )


def texts(prompt: Any) -> list[str]:
  """What a tokenizer reads of a prompt: itself, or what messages hold."""
  if isinstance(prompt, str):
    return [prompt]
  return [message['content'] for message in prompt]


def require_unicode(name: str, text: str) -> None:
  """Raises a ValueError for half a surrogate pair, which JSON may spell."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
        f'{name} {shown(text)} holds {text[error.start]!r}, half of a pair, '
        'which no tokenizer reads; write both halves, or leave it out.'
    ) from error


def chat_options(chat_template: bool, system_prompt: str) -> Chat | None:
  """The options of a task as a `Chat`.

  Raises:
    ValueError: a system prompt without a template that could hold it.
  """
  if system_prompt and not chat_template:
    raise ValueError(
        f'config.task.system_prompt={system_prompt!r} needs '
        'config.task.chat_template=True; a raw prompt has no system.'
    )
  return Chat(system_prompt) if chat_template else None
