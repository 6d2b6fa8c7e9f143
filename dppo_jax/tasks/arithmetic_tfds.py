"""The arithmetic problems as a TensorFlow Datasets builder.

Written and read as ArrayRecord files, which need no TensorFlow. TFDS writes
into a folder `incomplete.*` and renames it when it is done, so a killed process
leaves nothing that could be mistaken for data. Of two processes that prepare at
the same time one renames first and the other reads what it finds.
"""

import contextlib
import io
import os

from absl import logging
import tensorflow_datasets as tfds

from dppo_jax.tasks import arithmetic
from dppo_jax.tasks import base

_SPLITS = ('train', 'test')


class DppoArithmetic(tfds.core.GeneratorBasedBuilder):
  """Rows {'prompt': '47+38=', 'answer': '85'} in splits train and test."""

  # Must go up whenever arithmetic.problems changes: folders are reused by it.
  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=arithmetic.__doc__,
      features=tfds.features.FeaturesDict(
        {
          'prompt': tfds.features.Text(),
          'answer': tfds.features.Text(),
        }
      ),
      disable_shuffling=True,  # Keeps the order of arithmetic.problems.
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in _SPLITS}

  def _generate_examples(self, split: str):
    yield from enumerate(arithmetic.problems(split))


class TextSource:
  """A TFDS data source whose bytes are str."""

  def __init__(self, source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, str]:
    row = self._source[range(len(self))[index]]  # IndexError past the end.
    return {field: value.decode() for field, value in row.items()}


def sources(data_dir: str = '') -> dict[str, base.Source]:
  """Opens both splits, preparing them first if nobody has.

  Args:
    data_dir: a folder, made if it does not exist; TFDS's own if empty.

  Raises:
    OSError: the folder cannot be written.
    ValueError: the folder is there but incomplete.
  """
  data_dir = os.path.expanduser(data_dir) or None
  with _silence():
    builder = _builder(data_dir)
    if not os.path.exists(builder.data_dir):
      _prepare(builder)
      builder = _builder(data_dir)  # Reads what was written, by whomever.
    if any(split not in builder.info.splits for split in _SPLITS):
      raise ValueError(
          f'{builder.data_dir} is incomplete. Delete this folder; '
          'it is then prepared again.'
      )
    return {
        split: TextSource(builder.as_data_source(split)) for split in _SPLITS
    }


def _builder(data_dir: str | None) -> DppoArithmetic:
  return DppoArithmetic(data_dir=data_dir, file_format='array_record')


def _prepare(builder: DppoArithmetic) -> None:
  """Writes the files; quietly, for they are small."""
  try:
    builder.download_and_prepare()
  except Exception as error:
    if os.path.exists(builder.data_dir):
      return  # Another process was faster.
    if not isinstance(error, OSError):
      raise
    raise OSError(
      f'Cannot prepare the arithmetic problems in {builder.data_dir}: '
      f'{error}. Name a writable folder: config.task.data_dir, or the '
      'environment variable TFDS_DATA_DIR.'
    ) from error


@contextlib.contextmanager
def _silence():
  """TFDS logs, prints progress bars and colours; errors are raised anyway."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.WARNING)
  try:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
      yield
  finally:
    logging.set_verbosity(verbosity)
