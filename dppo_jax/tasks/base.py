"""What a task is: prompts to learn from, prompts to be tested on, a verifier.

A task is a factory whose keyword arguments are its config, like every other
choice here:

    task = tasks.build('arithmetic')
    task.train[0]                    # {'prompt': '26+34=', 'answer': '60'}
    task.score('26+34 is #### 60', '60')  # 1.0
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from dppo_jax import registry

register = registry.Registry('task')
build = register.build
names = register.names
config = register.config


class Source(Protocol):
  """Random access to rows {'prompt': str, 'answer': str}."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> dict[str, str]: ...


class Task(NamedTuple):
  """Rows and their verifier; no row of `test` may be in `train`.

  `score(completion, answer)` is the reward. A pool of processes can call it
  only if it can be pickled: a function of a module, or a partial of one.
  """

  train: Source
  test: Source
  score: Callable[[str, str], float]
