"""GRPO with clip-higher, 0.2 and 0.28, on the embedded arithmetic task."""

from configs import default


def get_config():
  """Run with: python -m dppo_jax.main --config=configs/grpo_clip_higher.py"""
  return default.get_config('grpo_clip_higher')
