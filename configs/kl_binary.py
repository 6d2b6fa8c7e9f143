"""DPPO with binary KL on the embedded arithmetic task."""

from configs import default


def get_config():
  """Run with: python -m dppo_jax.main --config=configs/kl_binary.py"""
  return default.get_config('dppo_binary_kl')
