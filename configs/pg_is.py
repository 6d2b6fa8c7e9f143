"""Importance-weighted policy gradient, no mask, embedded arithmetic task."""

from configs import default


def get_config():
  """Run with: python -m dppo_jax.main --config=configs/pg_is.py"""
  return default.get_config('pg_is')
