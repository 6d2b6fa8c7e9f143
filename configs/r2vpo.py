"""R2VPO on fresh rollouts: a variance constraint in place of a clip."""

from configs import default


def get_config():
  """Run with: python -m dppo_jax.main --config=configs/r2vpo.py"""
  return default.get_config('r2vpo')
