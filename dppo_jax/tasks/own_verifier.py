"""Your own verifier: one Python function, named in the config.

`config.task.verifier` is 'my_package.checks:is_right', which can be imported,
or 'checks.py:is_right', a file, for

    def is_right(completion: str, answer: str) -> float:
      return float(answer in completion)

A file may import modules that lie beside it.
"""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
from typing import Any


class OwnVerifier:
  """A function of a module or file; pickled by its name, not its code."""

  def __init__(self, spec: str):
    """Imports the function and looks at it; see `load` for what it raises."""
    self._spec, self._function = _resolve(spec)
    self.__name__ = spec

  def __call__(self, completion: str, answer: str) -> float:
    return self._function(completion, answer)

  def __reduce__(self):
    return OwnVerifier, (self._spec,)


def load(spec: str) -> OwnVerifier:
  """The verifier that `spec` names.

  Args:
    spec: 'module:function' or 'path/to/file.py:function'.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another form, the module cannot be imported, there is no such
      function, or it cannot be called with (completion, answer).
  """
  return OwnVerifier(spec)


def _resolve(spec: str) -> tuple[str, Any]:
  """The spec with an absolute path, and its function."""
  source, colon, name = spec.rpartition(':')
  if not (source and colon and name.isidentifier()):
    raise ValueError(
        f'config.task.verifier={spec!r} is neither module:function nor '
        'file.py:function.'
    )
  if source.endswith('.py'):
    path = pathlib.Path(source).expanduser().resolve()
    if not path.is_file():
      raise FileNotFoundError(
          f'config.task.verifier={spec!r}: there is no file {path}.'
      )
    source = str(path)
  try:
    module = _import(source)
  except (Exception, SystemExit) as error:  # The file may do anything.
    raise ValueError(
        f'config.task.verifier={spec!r} cannot be imported: '
        f'{type(error).__name__}: {error}'
    ) from error
  function = getattr(module, name, None)
  if function is None:
    raise ValueError(
        f'config.task.verifier={spec!r}: {source} has no function {name!r}.'
        + _suggestion(module, name)
    )
  _check_signature(spec, function)
  return f'{source}:{name}', function


@functools.cache  # It is executed once, whoever asks for it.
def _import(source: str) -> Any:
  if not source.endswith('.py'):
    return importlib.import_module(source)
  # At the end: a file beside it must not take the place of a package.
  folder = os.path.dirname(source)
  if folder not in sys.path:
    sys.path.append(folder)
  # Dataclasses and pickle look their module up by its name. The same one in a
  # worker, and not that of the file, which may be that of a package.
  name = f'_own_verifier_{hashlib.sha256(os.fsencode(source)).hexdigest()[:16]}'
  spec = importlib.util.spec_from_file_location(name, source)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    sys.modules.pop(name, None)
    raise
  return module


def _suggestion(module: Any, name: str) -> str:
  functions = [n for n, x in vars(module).items() if inspect.isfunction(x)]
  close = difflib.get_close_matches(name, functions, n=1)
  return f' Did you mean {close[0]!r}?' if close else ''


def _check_signature(spec: str, function: Any) -> None:
  if not callable(function):
    raise ValueError(
        f'config.task.verifier={spec!r} is a {type(function).__name__}, not a '
        'function of (completion, answer).'
    )
  try:
    signature = inspect.signature(function)
  except ValueError:
    return  # Some functions written in C do not tell.
  try:
    signature.bind('completion', 'answer')
  except TypeError as error:
    raise ValueError(
        f'config.task.verifier={spec!r} takes {signature}, but it is called '
        f'with (completion, answer): {error}.'
    ) from error
