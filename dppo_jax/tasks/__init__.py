"""Prompts with verifiable answers."""

from dppo_jax.tasks import arithmetic
from dppo_jax.tasks import base
from dppo_jax.tasks import few_shot_arithmetic
from dppo_jax.tasks import jsonl
from dppo_jax.tasks import math
from dppo_jax.tasks import reasoning_gym
from dppo_jax.tasks.base import build
from dppo_jax.tasks.base import config
from dppo_jax.tasks.base import names
from dppo_jax.tasks.base import register
from dppo_jax.tasks.base import Task

__all__ = [
  'Task',
  'arithmetic',
  'base',
  'build',
  'config',
  'few_shot_arithmetic',
  'jsonl',
  'math',
  'names',
  'reasoning_gym',
  'register',
]
