"""Qwen3-8B on DAPO-Math with DPPO binary TV; 8 TPU v5p chips or more.

    pip install -e '.[tpu,verifiers,hub]'
    python -m dppo_jax.main --config=configs/qwen3_8b.py

Parameters and batch are split over all chips; with more of them raise
num_prompts in proportion. Nobody has trained it here: docs/plans.md says what
it needs, as planned by

    python -m dppo_jax.plan --config=configs/qwen3_8b.py --topology=v5p:2x2x2
"""

from configs import default
from dppo_jax import tasks


def get_config():
  """64 prompts x 8, a context of 5,120 tokens, 2 updates."""
  config = default.get_config('dppo_binary_tv')
  config.unlock()
  config.model.name = 'Qwen/Qwen3-8B-Base'
  config.model.dtype = config.sampling.dtype = 'bfloat16'
  config.model.remat = 'full'
  config.task = tasks.config('math', **tasks.math.preset('dapo_math_17k'))
  config.scoring.num_workers = 16
  config.max_prompt_length = 1024
  config.max_completion_length = 4096
  config.num_prompts, config.group_size = 64, 8
  config.sampling.num_slots = 256
  config.learner.num_minibatches = 2
  config.learner.num_microbatches = 16
  config.learner.chunk_size = 1024
  config.optimizer.learning_rate = 1e-6
  config.optimizer.schedule = 'constant'
  config.total_steps = 400
  config.eval.num_prompts = 64
  config.mesh.update({'data': 1, 'fsdp': -1, 'tensor': 1, 'expert': 1})
  config.lock()
  return config
