"""R2VPO with replay: three quarters of what it learns from was sampled before.

The setting of experiments/r2vpo_sample_efficiency: in a step 32 completions are
sampled, and 96 out of the last 32 rollouts are learned from beside them.
"""

from configs import default


def get_config():
  """Run with: python -m dppo_jax.main --config=configs/r2vpo_replay.py"""
  config = default.get_config('r2vpo')
  config.num_prompts = 4
  config.replay.capacity = 32
  config.replay.ratio = 3.0
  config.replay.max_age = 64
  config.learner.num_minibatches = 1
  config.optimizer.learning_rate = 1.5e-4
  config.optimizer.schedule = 'constant'
  config.total_steps = 300
  return config
