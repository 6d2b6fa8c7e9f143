"""GSM8K, Qwen2.5-0.5B-Instruct: grade-school problems with boxed answers.

    pip install -e '.[verifiers,hub]'
    python -m dppo_jax.main --config=configs/gsm8k.py

The same as configs/math.py:gsm8k; not run yet, no result is stated.
"""

from configs import math


def get_config():
  """Run with: python -m dppo_jax.main --config=configs/gsm8k.py"""
  return math.get_config('gsm8k')
