"""Strict flags for every test: what JAX would forgive, the tests do not."""

import hypothesis
import jax
import pytest

# [B] + [B, T] is an error unless somebody wrote down what broadcasts.
jax.config.update('jax_numpy_rank_promotion', 'raise')

# The same examples in every run: a red test must be red again tomorrow.
hypothesis.settings.register_profile(
    'repeatable', derandomize=True, deadline=None
)
hypothesis.settings.load_profile('repeatable')


@pytest.fixture
def no_nans():
  """Raises where a NaN is made. `pytestmark = usefixtures('no_nans')`."""
  with jax.debug_nans(True):
    yield
