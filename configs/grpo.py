"""GRPO: PPO's ratio clip at 0.2, on the embedded arithmetic task."""

from configs import default


def get_config():
  """Run with: python -m dppo_jax.main --config=configs/grpo.py"""
  return default.get_config('grpo')
