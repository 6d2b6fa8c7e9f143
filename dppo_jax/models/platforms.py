"""The platform that programs are traced for, which need not be here."""

from collections.abc import Iterator
import contextlib
import contextvars

import jax

_platform = contextvars.ContextVar('_platform', default=None)


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
  """Within it, programs are traced for a platform that need not be here.

  Args:
    platform: cpu, tpu or cuda; gpu is one of which no more is known, without
      NVIDIA's kernels.
  """
  token = _platform.set(platform)
  try:
    yield
  finally:
    _platform.reset(token)


def current() -> str:
  """That programs are traced for: cpu, tpu, gpu, or what was given."""
  return _platform.get() or jax.default_backend()
