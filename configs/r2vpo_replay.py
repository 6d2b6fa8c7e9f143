"""R2VPO with replay: half of what is learned from was sampled before.

As many completions are learned from in a step as in the other configs, and half
as many sampled.
"""

from configs import default


def get_config():
  """Run with: python -m dppo_jax.main --config=configs/r2vpo_replay.py"""
  config = default.get_config('r2vpo')
  config.num_prompts //= 2
  config.replay.capacity = 4
  return config
