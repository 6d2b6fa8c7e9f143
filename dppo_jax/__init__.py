"""Divergence Proximal Policy Optimization of language models, in JAX.

The mathematics (`divergences`, `trust_regions`, `losses`, `advantages`,
`normalizers`, `algorithms`) are pure functions of arrays that work in any JAX
program:

    from dppo_jax import divergences, losses

Everything else builds one compiled training step around them.
"""

import importlib

__version__ = '0.1.0'
__all__ = [
    'advantages',
    'algorithms',
    'divergences',
    'losses',
    'normalizers',
    'trust_regions',
]


def __getattr__(name: str):
  """Imports a module when it is first used: reports need no JAX."""
  if name in __all__:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
