"""Qwen3-30B-A3B on DAPO-Math with DPPO binary TV; 64 TPU v5p chips.

    pip install -e '.[tpu,verifiers,hub]'
    python -m dppo_jax.main --config=configs/qwen3_30b_a3b.py

Learns with the experts that were taken while sampling. Nobody has trained it
here: docs/plans.md says what it needs, as planned by

    python -m dppo_jax.plan \\
        --config=configs/qwen3_30b_a3b.py --topology=v5p:4x4x4
"""

from configs import default
from dppo_jax import tasks


def get_config():
  """128 prompts x 8, a context of 9,216 tokens, 4 updates."""
  config = default.get_config('dppo_binary_tv')
  config.unlock()
  config.model.name = 'Qwen/Qwen3-30B-A3B-Base'
  config.model.dtype = config.sampling.dtype = 'bfloat16'
  config.model.remat = 'full'
  config.model.router_replay = True
  config.task = tasks.config('math', **tasks.math.preset('dapo_math_17k'))
  config.scoring.num_workers = 16
  config.max_prompt_length = 1024
  config.max_completion_length = 8192
  config.num_prompts, config.group_size = 128, 8
  config.sampling.num_slots = 512
  config.learner.num_minibatches = 4
  config.learner.num_microbatches = 16
  config.learner.chunk_size = 2048
  config.optimizer.learning_rate = 1e-6
  config.optimizer.schedule = 'constant'
  config.total_steps = 400
  config.eval.num_prompts = 64
  # Four is all that key and value heads can be split into.
  config.mesh.update({'data': 1, 'fsdp': 16, 'tensor': 4, 'expert': 1})
  config.lock()
  return config
