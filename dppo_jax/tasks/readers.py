"""Rows of a published data set, from wherever it lies.

`source` is one of

- `hub`: a name on the Hugging Face hub, or a folder that the `datasets` package
  can read (`pip install 'dppo_jax[hub]'`);
- `tfds`: a name in TensorFlow Datasets, or a folder of a data set that it has
  prepared as ArrayRecord files; needs no TensorFlow;
- `file`: a Parquet (`pip install 'dppo_jax[parquet]'`) or JSON-lines file.

A row is a dictionary of what the data set has; rows are read one by one, so one
that repeats itself a hundred times need not fit into memory.
"""

from collections.abc import Iterator
import importlib
import itertools
import json
import pathlib
from typing import Any

from dppo_jax import registry
from dppo_jax.tasks import base

_PARQUET_ROWS = 1_000  # Read at once.


def read(
    *, source: str, name: str, config: str, split: str, data_dir: str = ''
) -> Iterator[dict[str, Any]]:
  """Yields the rows of one split.

  Args:
    source: 'hub', 'tfds' or 'file'.
    name: of the data set, or the path of a folder or file.
    config: which variant of it, if it has several; unused for files.
    split: of it, as the library writes it (`train[:90%]`); unused for files.
    data_dir: where the library keeps it; empty for the library's own choice.

  Raises:
    ValueError: an unknown source, or one that cannot be read.
    FileNotFoundError: no such file.
    ImportError: a package is missing; says how to install it.
  """
  if source not in _SOURCES:
    raise ValueError(registry.unknown('source', source, _SOURCES))
  if not name:
    raise ValueError(f'The source {source!r} needs a name, or a path.')
  rows = _SOURCES[source](name, config, split, data_dir)
  first = next(rows, None)
  if first is None:
    where = name if source == 'file' else f'Split {split!r} of {name}'
    raise ValueError(f'{where} has no rows.')
  yield from itertools.chain([first], rows)


def field(row: dict[str, Any], path: str) -> Any:
  """What stands in a row at `reward_model.ground_truth` or `answers.0`.

  Raises:
    ValueError: it is not there; names what is.
  """
  value: Any = row
  for depth, part in enumerate(path.split('.')):
    if isinstance(value, dict) and part in value:
      value = value[part]
    elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
      value = value[int(part)]
    else:
      above = '.'.join(path.split('.')[:depth])
      there = (
          ', '.join(map(str, value)) if isinstance(value, dict)
          else f'a {type(value).__name__}'
      )
      raise ValueError(
          f'There is no field {path!r}; ' + (f'in {above!r} ' if above else '')
          + f'there is {there}.'
      )
  return value


def _hub(name, config, split, data_dir):
  datasets = _package('datasets', 'hub')
  try:
    rows = datasets.load_dataset(
        name, config or None, split=split, cache_dir=data_dir or None
    )
  except Exception as error:  # Of the file system, network and hub alike.
    raise ValueError(
        f'Cannot load {name!r}, config {config!r}, split {split!r} with the '
        f'datasets package: {type(error).__name__}: {_one_line(error)}'
    ) from error
  yield from rows


def _tfds(name, config, split, data_dir):
  import tensorflow_datasets as tfds  # Slow to import.

  folder = pathlib.Path(name).expanduser()
  try:
    if folder.is_dir():
      builder = tfds.builder_from_directory(folder)
    else:
      builder = tfds.builder(
          f'{name}/{config}' if config else name,
          data_dir=data_dir or None,
          file_format='array_record',
      )
      builder.download_and_prepare()
    rows = builder.as_data_source(split=split)
  except Exception as error:  # Registry, network, disk, split names.
    raise ValueError(
        f'Cannot read {name!r}, split {split!r} with TensorFlow Datasets: '
        f'{type(error).__name__}: {_one_line(error)} Downloading one that is '
        'registered needs tensorflow; a folder of a prepared one does not.'
    ) from error
  for i in range(len(rows)):
    yield _decoded(rows[i])


def _file(name, config, split, data_dir):
  del config, split, data_dir
  path = pathlib.Path(name).expanduser()
  base.require_file(path)
  if path.suffix == '.parquet':
    parquet = _package('pyarrow.parquet', 'parquet')
    try:
      file = parquet.ParquetFile(path)
    except Exception as error:
      raise ValueError(
          f'{path} is not a Parquet file: {_one_line(error)}'
      ) from error
    with file:
      for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
        yield from batch.to_pylist()
  elif path.suffix in ('.jsonl', '.json'):
    yield from _json_lines(path)
  else:
    raise ValueError(f'{path} is neither .parquet nor .jsonl nor .json.')


_SOURCES = {'hub': _hub, 'tfds': _tfds, 'file': _file}


def _json_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  with path.open(encoding='utf-8-sig') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except json.JSONDecodeError as error:
        raise ValueError(
            f'{path}, line {number}: not JSON ({error}); one object a line.'
        ) from error
      if not isinstance(row, dict):
        raise ValueError(
            f'{path}, line {number}: is a {type(row).__name__}; write one '
            'object a line.'
        )
      yield row


def _decoded(value: Any) -> Any:
  """Bytes and NumPy values of TFDS as Python's own."""
  if isinstance(value, dict):
    return {name: _decoded(x) for name, x in value.items()}
  if isinstance(value, bytes):
    return value.decode()
  if hasattr(value, 'tolist'):
    return _decoded(value.tolist())
  if isinstance(value, list):
    return [_decoded(x) for x in value]
  return value


def _package(module: str, extra: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(
        f'This source needs the package {module.partition(".")[0]}; '
        f"pip install 'dppo_jax[{extra}]'."
    ) from error


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())[:300]
