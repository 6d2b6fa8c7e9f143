"""Your own prompts and answers, from two JSON-lines files.

One row a line: {"prompt": "47+38=", "answer": "85"}. The default scorer wants a
completion to end in `#### 85`; `exact` compares the whole of it, and
--config.task.verifier=my_file.py:my_function is your own; docs/tasks.md has
the other options. Prompts and completions of up to 64 tokens and 32 test rows,
all to be changed by flag.
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
  config.max_prompt_length = 64
  config.max_completion_length = 64
  config.eval.num_prompts = 32
  config.lock()
  return config
