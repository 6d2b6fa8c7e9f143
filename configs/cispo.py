"""CISPO: truncated importance weights, no mask, embedded arithmetic task."""

from configs import default


def get_config():
  """Run with: python -m dppo_jax.main --config=configs/cispo.py"""
  return default.get_config('cispo')
