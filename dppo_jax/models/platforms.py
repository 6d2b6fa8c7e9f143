"""The platform that programs are traced for, which need not be here."""

from collections.abc import Iterator
import contextlib
import contextvars

import jax

_platform = contextvars.ContextVar('_platform', default=None)


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
  """Within it, programs are traced for a platform that need not be here."""
  token = _platform.set(platform)
  try:
    yield
  finally:
    _platform.reset(token)


def current() -> str:
  """That programs are traced for: cpu, tpu, gpu, or another of JAX."""
  return _platform.get() or jax.default_backend()
