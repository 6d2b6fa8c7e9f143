"""The subject of the small experiments: `default.py` in a tenth of the size.

    python -m dppo_jax.main --config=experiments/small/config.py:grpo

A Qwen3 of 127,808 parameters, trained as the embedded one was, and problems
that it solves between 20 and 80 % of the time: README.md beside this file.
"""

import pathlib

from configs import default
from dppo_jax import tasks

HERE = pathlib.Path(__file__).parent


def get_config(algorithm: str = 'dppo_topk_tv'):
  config = default.get_config(algorithm)
  config.unlock()
  config.model.name = str(HERE / 'model')
  config.task = tasks.config('jsonl')
  config.task.train_path = str(HERE / 'train.jsonl')
  config.task.test_path = str(HERE / 'test.jsonl')
  config.num_prompts = 8
  config.group_size = 8
  config.learner.num_minibatches = 4
  config.optimizer.schedule = 'constant'
  # Nothing but the methods that are compared keeps the policy where it is.
  config.optimizer.weight_decay = 0.0
  config.eval.every = 10
  config.tensorboard = False
  config.lock()
  return config
