"""Strict flags for every test: what JAX would forgive, the tests do not."""

import atexit
import os
import re
import shutil
import tempfile

# Not in the home directory of who runs the tests; subprocesses inherit it.
_CACHE = tempfile.mkdtemp(prefix='dppo_jax_compiled_')
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

# ruff: noqa: E402
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """As `--dist loadfile`, but the families of meshes_test.py may be apart."""
  if config.getvalue('dist') != 'loadfile':
    return None
  from xdist.scheduler import LoadFileScheduling  # Is there if this is called.

  class LoadFamilies(LoadFileScheduling):

    def _split_scope(self, nodeid):
      found = re.fullmatch(r'(.*\bmeshes_test\.py)::.*\[(\w+)-.*\]', nodeid)
      if found:
        return '::'.join(found.groups())
      return super()._split_scope(nodeid)

  return LoadFamilies(config, log)


@pytest.fixture
def no_nans():
  """Raises where a NaN is made. `pytestmark = usefixtures('no_nans')`."""
  with jax.debug_nans(True):
    yield
