"""DPPO with binary total variation on the embedded arithmetic task."""

from configs import default


def get_config():
  """Run with: python -m dppo_jax.main --config=configs/tv_binary.py"""
  return default.get_config('dppo_binary_tv')
