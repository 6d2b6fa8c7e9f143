"""Checkpoints that survive a kill, and say so when one does not.

The only file that knows Orbax. One checkpoint is one folder named after its
step. Orbax writes the arrays into a temporary folder and renames it when all of
it is there, so a kill at any moment leaves a whole checkpoint or none. The last
file written before that rename is our `manifest.json`: the caller's host state,
every leaf's shape and dtype, and the size and CRC-32 of every file, because
Orbax itself does not notice a flipped bit in array data.

Orbax sees a flat dict from leaf names (`0/params/embedding`) to plain arrays.
Tuples, empty records and typed keys are the business of this file, so the
format depends neither on our types nor on how Orbax treats them. The v0 API is
used on purpose: v1 is still called experimental, and reads these files.
"""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import errno
import functools
import json
import logging as python_logging
import os
from typing import Any
import zlib

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from dppo_jax.types import PyTree

_MANIFEST = 'manifest.json'
# Orbax rewrites this file of timestamps after the manifest; nothing needs it.
_UNVERIFIED = frozenset({_MANIFEST, '_CHECKPOINT_METADATA'})
_NO_CHECKPOINT, _ALL_CORRUPT = -1, -2


class Checkpoints:
  """The latest `keep` checkpoints of a run, in one folder.

  In a run of several processes, every process makes the same calls with the
  same `host`, and `directory` is storage that all of them see.

  Use it in a `with` or call `close`: an interpreter that exits on its own does
  not finish the save in the background, which is then lost like in a kill.
  """

  def __init__(self, directory: epath.PathLike, *, keep: int = 3):
    if keep < 1:
      raise ValueError(f'keep={keep} would delete every checkpoint; try 1.')
    _quieten_orbax()
    self._directory = epath.Path(directory).expanduser().resolve()
    self._keep = keep
    self._orbax = ocp.AsyncCheckpointer(_Handler())
    self._has_saved = False

  def save(self, step: int, arrays: PyTree, host: dict[str, Any]) -> None:
    """Saves in the background; first waits for the previous save.

    When this returns, `arrays` have been copied and may be donated, and `host`
    may be changed. The files appear later, all at once; `wait` waits for them.

    Args:
      step: names the checkpoint; must not have been saved before.
      arrays: pytree of `jax.Array`, typed PRNG keys among them.
      host: what JSON can hold; tuples come back as lists.
    """
    self.wait()
    if not self._has_saved:  # Only who saves may sweep: others may be reading.
      self._remove_leftovers()
      self._has_saved = True
    if step in self.steps():
      raise ValueError(f'Step {step} is already saved in {self._directory}.')
    leaves = _named_leaves(arrays)
    for name, leaf in leaves.items():
      if not isinstance(leaf, jax.Array):
        raise TypeError(f'Leaf {name} is a {type(leaf).__name__}, not a'
                        ' jax.Array; put it into `host` or convert it.')
    contents = {
        'step': step,
        'host': json.loads(json.dumps(host)),
        'leaves': {name: _describe(leaf) for name, leaf in leaves.items()},
    }
    stored = {k: _without_key_type(v) for k, v in leaves.items() if v.size}
    self._orbax.save(self._path(step), args=_Save(stored, contents=contents))

  def restore_latest(
      self,
      abstract_arrays: PyTree,
      *,
      when_found: Callable[[int, dict[str, Any]], None] = lambda *_: None,
      goes_on: bool = True,
  ) -> tuple[int, PyTree, dict[str, Any]] | None:
    """Restores the newest good checkpoint, bit for bit.

    A newer one that is damaged is renamed to `corrupt-<step>`, with a warning,
    if the run goes on here. Who only reads may do so beside it: a checkpoint
    that it deletes meanwhile is not damaged, and a newer one is read.

    Args:
      abstract_arrays: pytree of `jax.ShapeDtypeStruct` or arrays, as saved.
        Arrays come back with these shardings, whatever they had when saved;
        on the first local device where none is given.
      when_found: called with step and host once there is a checkpoint that
        fits, before there is an array of it: time to refuse it, or make room.
        Called again for a newer one, should the first be deleted.
      goes_on: whether the caller will save here, so that nobody else does.

    Returns:
      (step, arrays, host), or None if nothing was ever saved.

    Raises:
      ValueError: if every checkpoint is damaged, or if the newest good one
        belongs to another model or config, or what several processes read
        was deleted meanwhile.
    """
    self.wait()
    step = self._newest_good_step(goes_on)
    while step is not None:
      try:
        return self._restore(step, abstract_arrays, when_found)
      except Exception as error:
        # Deleted, also by half, is what a run has saved a newer one than.
        if goes_on or step == self.latest_step():
          raise
        if jax.process_count() > 1:  # Some may have it, and wait for the rest.
          raise ValueError(
              f'Checkpoint {self._path(step)} could not be read ({error}), and '
              'the run in this folder has saved others since. Start again.'
          ) from error
        newer = self._newest_good_step(goes_on)
        if newer == step:
          raise
        step = newer
    return None

  def _restore(self, step, abstract_arrays, when_found):
    contents = _read_manifest(self._path(step))
    wanted = _named_leaves(abstract_arrays)
    try:
      _check_leaves_match(contents['leaves'], wanted)
    except ValueError as error:
      raise ValueError(f'Checkpoint {self._path(step)} is of another model or'
                       f' config: {error}') from None
    plain = {k: _plain_target(v) for k, v in wanted.items() if v.size}
    when_found(step, contents['host'])
    restored = self._orbax.restore(self._path(step), args=_Restore(plain))
    leaves = [_finish(restored.get(k), v) for k, v in wanted.items()]
    treedef = jax.tree.structure(abstract_arrays)
    return step, jax.tree.unflatten(treedef, leaves), contents['host']

  def steps(self) -> list[int]:
    """Steps whose checkpoint is complete, ascending."""
    if not self._directory.exists():
      return []
    return sorted(
        int(path.name)
        for path in self._directory.iterdir()
        if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)
    )

  def latest_step(self) -> int | None:
    """The last of `steps()`, if any."""
    return max(self.steps(), default=None)

  def latest_host(self) -> dict[str, Any] | None:
    """What the newest one has for the host, if there is one that can be read.

    Its arrays are not looked at: `restore_latest` says what is damaged.
    """
    try:
      step = self.latest_step()
      return None if step is None else _read_manifest(self._path(step))['host']
    except (OSError, ValueError):
      return None

  def wait(self) -> None:
    """Waits for the save in the background and raises what it raised.

    Raises:
      OSError: there is no space left.
    """
    try:
      self._orbax.wait_until_finished()
    except Exception as error:
      if os.strerror(errno.ENOSPC) not in str(error):
        raise
      raise OSError(
          f'A checkpoint does not fit into {self._directory}: no space is left.'
          ' Free some, or lower config.keep_checkpoints; the same command goes'
          ' on from the last one that did.'
      ) from error
    if self._has_saved and jax.process_index() == 0:
      for step in self.steps()[:-self._keep]:
        self._path(step).rmtree(missing_ok=True)

  def close(self) -> None:
    """Waits, then lets go of Orbax's threads."""
    self.wait()
    self._orbax.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _path(self, step: int) -> epath.Path:
    return self._directory / str(step)

  def _remove_leftovers(self) -> None:
    """Removes what a save that was killed has left."""
    if jax.process_index() == 0 and self._directory.exists():
      for path in self._directory.iterdir():
        # Not `corrupt-*`: on a file system without renames it looks the same.
        if path.name[0].isdigit() and ocp.utils.is_tmp_checkpoint(path):
          path.rmtree(missing_ok=True)

  def _newest_good_step(self, goes_on: bool) -> int | None:
    """What process 0 finds, told to all: they must restore the same step."""
    found = self._find_good(goes_on) if jax.process_index() == 0 else None
    if jax.process_count() > 1:
      message = np.int32(0 if found is None else found)
      found = int(multihost_utils.broadcast_one_to_all(message))
    if found == _ALL_CORRUPT:
      raise ValueError(
          f'Every checkpoint in {self._directory} is damaged (the log says'
          ' how). Restore one from a copy, or use another or an emptied folder'
          ' to start from scratch.'
      )
    return None if found == _NO_CHECKPOINT else found

  def _find_good(self, goes_on: bool) -> int:
    """The newest good step; renames the damaged ones after it for `goes_on`."""
    steps, damaged = self.steps(), {}
    while steps:
      step = steps.pop()
      reason = _find_damage(self._path(step))
      if reason is None:
        for bad_step, why in damaged.items():
          moved = ''
          if goes_on:
            moved = f'moved to {self._rename_corrupt(bad_step).name}, '
          logging.warning('Checkpoint of step %d is damaged (%s): %sfalling'
                          ' back to step %d.', bad_step, why, moved, step)
        return step
      now = self.steps()
      if step not in now or max(now) > max(damaged, default=step):
        steps, damaged = now, {}  # A run goes on here, and deleted it.
      else:
        damaged[step] = reason
    # Renamed, they would look like no checkpoint at all to the next start.
    for step, why in damaged.items():
      logging.error('Checkpoint of step %d is damaged (%s).', step, why)
    return _ALL_CORRUPT if damaged else _NO_CHECKPOINT

  def _rename_corrupt(self, step: int) -> epath.Path:
    aside = self._directory / f'corrupt-{step}'
    number = 1
    while aside.exists():
      number += 1
      aside = self._directory / f'corrupt-{step}-{number}'
    return self._path(step).rename(aside)


# Integrity.


def _crc32(path: epath.Path) -> int:
  crc = 0
  with path.open('rb') as file:
    while chunk := file.read(1 << 22):
      crc = zlib.crc32(chunk, crc)
  return crc


def _files(directory: epath.Path, prefix: str = '') -> dict[str, epath.Path]:
  """All files below by relative name; epath knows no recursive glob."""
  files = {}
  for path in sorted(directory.iterdir()):
    if path.is_dir():
      files |= _files(path, f'{prefix}{path.name}/')
    elif path.name not in _UNVERIFIED:
      files[prefix + path.name] = path
  return files


def _fingerprints(directory: epath.Path) -> dict[str, list[int]]:
  """Size and CRC-32 of every file of a checkpoint, in parallel."""
  paths = _files(directory)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    pairs = pool.map(lambda p: [p.stat().length, _crc32(p)], paths.values())
    return dict(zip(paths, pairs, strict=True))


def _write_manifest(directory: epath.Path, contents: dict[str, Any]) -> None:
  contents = contents | {'files': _fingerprints(directory)}
  crc = zlib.crc32(json.dumps(contents).encode())
  text = json.dumps({'crc32': crc, 'contents': contents})
  (directory / _MANIFEST).write_text(text)


def _read_manifest(directory: epath.Path) -> dict[str, Any]:
  """Returns the manifest; raises ValueError or OSError if it is damaged."""
  manifest = json.loads((directory / _MANIFEST).read_text())
  try:
    crc, contents = manifest['crc32'], manifest['contents']
  except (KeyError, TypeError):
    raise ValueError('fields are missing') from None
  if crc != zlib.crc32(json.dumps(contents).encode()):
    raise ValueError('checksum differs')
  return contents


def _find_damage(directory: epath.Path) -> str | None:
  """Says in a few words what is wrong with a checkpoint, None if it is good."""
  try:
    files = _read_manifest(directory)['files']
  except FileNotFoundError:
    return f'{_MANIFEST} is missing'
  except (OSError, ValueError) as error:
    return f'{_MANIFEST} is unreadable: {error}'
  try:
    found = _fingerprints(directory)
  except OSError as error:
    return str(error)
  for name, (size, crc) in files.items():
    if name not in found:
      return f'{name} is missing'
    if found[name][0] != size:
      return f'{name} has {found[name][0]} bytes instead of {size}'
    if found[name][1] != crc:
      return f'{name} has a wrong checksum'
  return None


# Leaves.


def _named_leaves(tree: PyTree) -> dict[str, Any]:
  """Leaves in the tree's order by their path, such as `0/params/embedding`."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  leaves = {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf
      for path, leaf in flat
  }
  if len(leaves) != len(flat):
    raise ValueError('Two leaves have the same path; rename keys with a "/".')
  return leaves


def _describe(leaf: Any) -> str:
  """Dtype and shape, as in `bfloat16[2, 3]`."""
  return f'{leaf.dtype}{list(leaf.shape)}'


def _check_leaves_match(saved: dict[str, str], wanted: dict[str, Any]) -> None:
  """Raises ValueError naming the first leaf that differs."""
  for name, leaf in wanted.items():
    if name not in saved:
      raise ValueError(f'leaf {name}, {_describe(leaf)}, is not in it.')
    if saved[name] != _describe(leaf):
      raise ValueError(
          f'leaf {name} is {saved[name]} in it, {_describe(leaf)} here.'
      )
  for name, description in saved.items():
    if name not in wanted:
      raise ValueError(f'leaf {name}, {description} in it, is not here.')


def _is_key(leaf: Any) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(target: Any) -> Any:
  """`jax.random.key_impl`, which takes tracers but no ShapeDtypeStruct."""
  impls = []
  jax.eval_shape(
      lambda key: impls.append(jax.random.key_impl(key)), _abstract(target)
  )
  return impls[0]


def _without_key_type(leaf: jax.Array) -> jax.Array:
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _sharding(target: Any) -> jax.sharding.Sharding:
  sharding = getattr(target, 'sharding', None)
  return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _plain_target(target: Any) -> jax.ShapeDtypeStruct:
  """What Orbax is asked for: shape, dtype, sharding; a key as its integers."""
  plain = jax.eval_shape(_without_key_type, _abstract(target))
  return jax.ShapeDtypeStruct(
      plain.shape, plain.dtype, sharding=_sharding(target)
  )


def _abstract(target: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(target.shape, target.dtype)


def _finish(restored: jax.Array | None, target: Any) -> jax.Array:
  """Makes a restored plain array what was saved: a key, or an empty array."""
  if restored is None:  # Orbax stores no arrays of size 0.
    return jax.device_put(np.zeros(target.shape, target.dtype),
                          _sharding(target))
  if _is_key(target):
    wrap = functools.partial(jax.random.wrap_key_data, impl=_key_impl(target))
    return jax.jit(wrap, out_shardings=_sharding(target))(restored)
  return restored


# Orbax.


class _Handler(ocp.StandardCheckpointHandler):
  """Orbax's handler of pytrees, with our manifest as the last file."""

  async def async_save(self, directory, args):
    self._contents = args.contents
    return await super().async_save(directory, args=args)

  def finalize(self, directory):
    """Runs on process 0 once all have written, just before the commit."""
    super().finalize(directory)
    _write_manifest(directory, self._contents)


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclasses.dataclass
class _Save(ocp.args.StandardSave):
  contents: dict[str, Any] = dataclasses.field(kw_only=True)


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclasses.dataclass
class _Restore(ocp.args.StandardRestore):
  pass


def _is_worth_logging(record: python_logging.LogRecord) -> bool:
  is_orbax = '/orbax/' in record.pathname
  return not is_orbax or record.levelno >= python_logging.WARNING


def _quieten_orbax() -> None:
  """Drops Orbax's INFO lines, dozens a save; adding a filter twice is safe."""
  logging.get_absl_logger().addFilter(_is_worth_logging)
