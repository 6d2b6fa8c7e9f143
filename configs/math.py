"""Mathematical problems with boxed answers: gsm8k, math, dapo_math_17k or aime.

    pip install -e '.[verifiers,hub]'
    python -m dppo_jax.main --config=configs/math.py:gsm8k

reads the data sets from the Hugging Face hub; docs/tasks.md says how to read
the same rows from files. Qwen2.5-0.5B-Instruct needs an accelerator of 24 GB or
more. Not run yet: no result is stated.
"""

from configs import default
from dppo_jax import tasks


def get_config(preset: str = 'gsm8k'):
  """The config of one preset of `dppo_jax.tasks.math`."""
  config = default.get_config()
  config.unlock()
  config.model.name = 'Qwen/Qwen2.5-0.5B-Instruct'
  config.model.dtype = 'bfloat16'
  config.model.remat = 'full'
  config.sampling.dtype = 'bfloat16'
  config.task = tasks.config('math', **tasks.math.preset(preset))
  config.scoring.num_workers = 8
  config.max_prompt_length = 256
  config.max_completion_length = 512 if preset.startswith('gsm8k') else 2048
  config.learner.num_microbatches = 8
  config.learner.chunk_size = 512
  config.optimizer.learning_rate = 1e-6
  config.optimizer.schedule = 'constant'
  config.total_steps = 200
  config.eval.num_prompts = 30 if preset in ('aime', 'dapo_math_17k') else 128
  config.lock()
  return config
