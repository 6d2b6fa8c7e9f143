"""Divergence Proximal Policy Optimization of language models, in JAX.

The mathematics (`divergences`, `losses`, `advantages`, `normalizers`,
`algorithms`) are pure functions of arrays that work in any JAX program:

    from dppo_jax import divergences, losses

Everything else builds one compiled training step around them.
"""

from dppo_jax import advantages
from dppo_jax import algorithms
from dppo_jax import divergences
from dppo_jax import losses
from dppo_jax import normalizers

__version__ = '0.1.0'
__all__ = [
    'advantages',
    'algorithms',
    'divergences',
    'losses',
    'normalizers',
]
