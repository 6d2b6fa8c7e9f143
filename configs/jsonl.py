"""Your own prompts and answers, from two JSON-lines files.

One row a line: {"prompt": "47+38=", "answer": "85"}. The default scorer wants a
completion to end in `#### 85`; `exact` compares the whole of it.
"""

from configs import default
from dppo_jax import tasks


def get_config(algorithm: str = 'dppo_topk_tv'):
  """Run with:

  python -m dppo_jax.main --config=configs/jsonl.py \
      --config.task.train_path=train.jsonl --config.task.test_path=test.jsonl
  """
  config = default.get_config(algorithm)
  config.unlock()
  config.task = tasks.config('jsonl')
  config.lock()
  return config
