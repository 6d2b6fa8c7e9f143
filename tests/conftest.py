"""Strict flags for every test: what JAX would forgive, the tests do not."""

import atexit
import gc
import os
import re
import shutil
import tempfile

# Not in the home directory of who runs the tests. The processes of one run, its
# subprocesses, and runs that are told the same folder share what they compile.
_COMPILED = 'DPPO_JAX_TESTS_COMPILED'
if _COMPILED not in os.environ:
  os.environ[_COMPILED] = tempfile.mkdtemp(prefix='dppo_jax_compiled_')
  atexit.register(shutil.rmtree, os.environ[_COMPILED], ignore_errors=True)
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ[_COMPILED]
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'

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


@pytest.fixture(scope='module', autouse=True)
def programs_of_a_file_end_with_it():
  """A process may map 65,530 regions of memory, a program a thousand."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture
def no_nans():
  """Raises where a NaN is made. `pytestmark = usefixtures('no_nans')`."""
  with jax.debug_nans(True):
    yield
