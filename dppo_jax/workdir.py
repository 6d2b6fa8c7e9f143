"""The work directory: whose it is, and what describes the run in it."""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from typing import Any
import uuid

import jax

from dppo_jax import processes

# What may change between two starts of the same run: what is learned stays the
# same up to rounding.
FREE = (
    'compilation_cache',
    'profile_steps',
    'total_steps',
    'checkpoint_every',
    'keep_checkpoints',
    'max_nonfinite_updates',
    'tensorboard',
    'wandb',
    'eval.every',
    'eval.num_slots',
    'mode',
    'model.attention',
    'model.remat',
    'model.unroll_layers',
    'learner.chunk_size',
    'learner.num_microbatches',
    'sampling.attention',
    'sampling.num_slots',
    'sampling.num_halvings',
    'sampling.halving_steps',
    'sampling.num_stages',
    'sampling.num_devices',
    'sampling.mesh.tensor',
    'sampling.mesh.expert',
    'mesh.data',
    'mesh.fsdp',
    'mesh.tensor',
    'mesh.expert',
    'mesh.sequence',
    'scoring.num_workers',
    'scoring.timeout_s',
)
# What hosts may have of their own, in the same run.
_OF_A_HOST = (
    'compilation_cache', 'scoring.num_workers', 'task.data_dir',
    'task.train_path', 'task.test_path',
)
_APPEARS_WITHIN_S = 10  # What one host wrote, on another.
_MOST_NAMED = 4  # Settings that differ, in one message.
# Not with learner.reuse_forward, as a checkpoint holds what the sampler kept.
_SHAPE_WHAT_IS_KEPT = (
    'model.attention',
    'sampling.num_slots',
    'sampling.num_halvings',
    'sampling.halving_steps',
)


def check(
    folder: str | os.PathLike,
    config: Any,
    *,
    only: str = '',
    way_out: str = 'Choose another with --workdir, or delete it.',
) -> None:
  """Raises a ValueError if `prepare` would; makes and writes nothing.

  A run that failed before its first line has nothing that a config belongs to.

  Args:
    folder: of a run, which need not exist.
    config: ConfigDict.
    only: what the names of settings that must be the same begin with.
    way_out: for who has another config.
  """
  if '://' in str(folder):  # A path would take gs://a for the folder gs:/a.
    raise ValueError(
        f'Work directory {str(folder)!r} is a URL. Mount it and pass the path, '
        'or choose a folder with --workdir.'
    )
  folder = pathlib.Path(folder).expanduser()
  path = folder / 'config.json'
  if path.exists() and not _has_only_failed(folder):
    ours = to_json(config)
    theirs, flat = _flatten(_read(path)), _flatten(ours)
    if names := _changed(theirs, flat, ours, only):
      changes = ', '.join(
          f'{name} was {theirs.get(name)!r} and is {flat.get(name)!r} now'
          for name in names[:_MOST_NAMED]
      )
      if more := names[_MOST_NAMED:]:
        changes += f', and {len(more)} more'
      if names == ['total_steps']:
        way_out += (
            ' Its learning rate ends with the run, by optimizer.schedule='
            f'{flat["optimizer.schedule"]!r}: to train on, start another from '
            f"--config.model.name={folder / 'model'} in another --workdir, or "
            'use constant from the start.'
        )
      raise ValueError(
          f'Work directory {str(folder)!r} belongs to a different config: '
          f'{changes}. {way_out}'
      )


def check_same_start(config: Any, **others: Any) -> None:
  """Raises a ValueError on all processes if one was started otherwise.

  They would learn from different rows or by different rules, or wait for each
  other for ever. The work directory is compared by `check_shared`: it may have
  another name on another host.

  Args:
    config: of this process.
    others: by name what else must be the same, beside the commit.
  """
  settings = others | {
      f'config.{name}': value
      for name, value in _flatten(to_json(config)).items()
      if name not in _OF_A_HOST
  }
  commit = _commit()
  if all(processes.gather(commit)):  # Where it is known.
    settings['commit'] = commit
  found = processes.differences(settings)
  if not found:
    return
  named = ', '.join(
      f'{x.name}={x.value!r} and process 0 {x.of_first!r}'
      for x in found[:_MOST_NAMED]
  )
  if more := found[_MOST_NAMED:]:
    named += f', and {len(more)} more'
  way_out = 'start all with the same command'
  if [x.name for x in found] == ['commit']:
    way_out = 'check the same one out for all, with the same changes'
  raise ValueError(f'Process {found[0].process} has {named}; {way_out}.')


def _has_only_failed(folder: pathlib.Path) -> bool:
  """Whether a run opened its log here and wrote nothing."""
  metrics, checkpoints = folder / 'metrics.jsonl', folder / 'checkpoints'
  if not metrics.is_file() or metrics.stat().st_size:
    return False
  return not (checkpoints.is_dir() and any(checkpoints.iterdir()))


def prepare(folder: str | os.PathLike, config: Any) -> pathlib.Path:
  """Makes the directory, or makes sure that it belongs to this config.

  Args:
    folder: of the run.
    config: ConfigDict.

  Returns:
    the directory, with `config.json` in it.

  Raises:
    ValueError: it belongs to a run with another config, or is a URL.
    PermissionError: it cannot be written.
  """
  check(folder, config)
  folder = pathlib.Path(folder).expanduser()
  path = folder / 'config.json'
  run = describe_run()
  if path.exists() and not _has_only_failed(folder):
    if before := _before(_read(path).get('run'), run):
      run['before'] = before
  _make(folder)
  described = json.dumps(to_json(config) | {'run': run}, indent=2)
  # Replaced in one go: a kill in between must not leave half a file.
  temporary = path.with_suffix('.tmp')
  temporary.write_text(described + '\n')
  temporary.replace(path)
  return folder


def _before(theirs: Any, ours: dict[str, Any]) -> list[dict[str, Any]]:
  """What earlier starts of a run were, if of other code or machines.

  Args:
    theirs: what the last one wrote of itself, with those before it.
    ours: of this one.
  """
  theirs = dict(theirs) if isinstance(theirs, dict) else {}
  before = theirs.pop('before', [])
  names = ('commit', 'device', 'num_processes', 'versions')
  if not theirs or all(theirs.get(x) == ours[x] for x in names):
    return before
  return [*before, theirs]


def _make(folder: pathlib.Path) -> None:
  """Makes the directory, if there is none that can be written."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.writable-{os.getpid()}'
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    why = 'there is a file' if folder.is_file() else error.strerror
    raise PermissionError(
        f'Work directory {str(folder)!r} cannot be written: {why}. Choose '
        'another with --workdir.'
    ) from error


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Holds the directory while a run is in it; two would destroy each other.

  If it is made for that, and nothing else is put into it, it goes again.

  Raises:
    BlockingIOError: another process holds it.
    PermissionError: it cannot be written.
  """
  new = not folder.exists()
  _make(folder)
  lock = folder / '.lock'
  with open(lock, 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # Or it was another's, who has just taken it away, see below.
      if not os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
        raise BlockingIOError
    except (BlockingIOError, FileNotFoundError) as error:
      raise BlockingIOError(
          f'Another run is working in {str(folder)!r}. Wait for it, stop it, '
          'or choose another directory with --workdir.'
      ) from error
    try:
      yield
    finally:
      with contextlib.suppress(OSError):  # Never in place of what failed.
        if new and list(folder.iterdir()) == [lock]:
          lock.unlink()
          folder.rmdir()


def check_shared(folder: pathlib.Path) -> None:
  """Raises an OSError on all processes if one has another folder of this name.

  Its checkpoints would be there, and process 0 would wait for them here. For a
  moment there is a file of process 0, which holds the directory.
  """
  if jax.process_count() == 1:
    return
  probe = folder / f'.shared-{uuid.uuid4().hex}'
  try:
    with processes.failing_together():
      if processes.is_main():
        probe.touch()
    [name, *_] = processes.gather(probe.name)
    places = processes.gather(
        None if _appears(folder / name) else str(folder.absolute())
    )
  finally:
    with contextlib.suppress(OSError):
      probe.unlink(missing_ok=True)
  for process, place in enumerate(places):
    if place is not None:
      raise OSError(
          f'Work directory {place!r} of process {process} is not the folder of '
          'process 0; it must be storage that all see. Choose another with '
          '--workdir.'
      )


def check_same_run(folder: str | os.PathLike) -> None:
  """Raises an OSError on all processes if one has another run in its folder.

  For who only reads, who leaves no file in it.
  """
  path = pathlib.Path(folder).expanduser() / 'config.json'
  with processes.failing_together():
    text = path.read_text() if path.is_file() else ''
  for x in processes.differences({'run': text}):
    raise OSError(
        f'Work directory {str(folder)!r} holds for process {x.process} '
        f'{"another run than" if x.value else "no run, but one"} for process '
        '0; it must be storage that all see.'
    )


def _appears(path: pathlib.Path) -> bool:
  """Whether there is such a file, for which others may have to be asked."""
  give_up = time.monotonic() + _APPEARS_WITHIN_S
  while time.monotonic() < give_up:
    with contextlib.suppress(OSError):  # Not there for this process either.
      if path.exists():
        return True
    time.sleep(0.1)
  return False


def to_json(config: Any) -> dict[str, Any]:
  """A config as standard JSON: tuples become lists, infinities strings."""

  def convert(value):
    if isinstance(value, dict):
      return {key: convert(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
      return [convert(x) for x in value]
    if isinstance(value, float) and abs(value) == float('inf'):
      return str(value)
    return value

  return convert(config.to_dict())


def describe_run() -> dict[str, Any]:
  """Command, commit, machine and versions: what a result needs to be known."""
  device = jax.devices()[0]
  versions = {'python': platform.python_version()}
  for name in ('jax', 'flax', 'optax', 'orbax.checkpoint', 'transformers'):
    module = sys.modules.get(name)
    if module is not None:
      versions[name] = module.__version__
  return {
      'command': _command(),
      'commit': _commit(),
      'device': f'{jax.device_count()} x {device.device_kind}',
      'num_processes': jax.process_count(),
      'cpu_count': os.cpu_count(),
      'versions': versions,
  }


def _command() -> str:
  """The command line, with the module's name instead of its path."""
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  program = f'-m {spec.name}' if spec else sys.argv[0]
  return shlex.join(['python', *program.split(), *sys.argv[1:]])


def _commit() -> str:
  """The commit of this source tree, '+' if it was changed; '' if unknown."""
  here = pathlib.Path(__file__).parent
  git = lambda *arguments: subprocess.run(
      ['git', *arguments], cwd=here, capture_output=True, text=True, check=True
  ).stdout.strip()
  try:
    # Fails where the package was installed into somebody else's repository.
    git('ls-files', '--error-unmatch', pathlib.Path(__file__).name)
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', '--short', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return ''


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
    if isinstance(content, dict):
      return content
    problem = 'not a JSON object'
  except json.JSONDecodeError as error:
    problem = str(error)
  raise ValueError(
      f'{path} is damaged ({problem}). Restore or delete it, or choose another '
      'directory with --workdir.'
  )


def _changed(theirs, ours, nested, only) -> list[str]:
  """The settings that must be the same and are not."""
  free = set(FREE)
  # A decaying schedule ends with the run, so the run's end is part of it.
  if nested['optimizer'].get('schedule', 'constant') != 'constant':
    free.discard('total_steps')
  if nested['learner']['reuse_forward']:
    free -= set(_SHAPE_WHAT_IS_KEPT)
  if nested['extras']['router_balance']:  # A mean over the parts.
    free.discard('learner.num_microbatches')
  return [
      name for name in sorted(theirs.keys() | ours.keys())
      if name not in free and name.startswith(only)
      and not name.startswith('run.') and theirs.get(name) != ours.get(name)
  ]


def _flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat
