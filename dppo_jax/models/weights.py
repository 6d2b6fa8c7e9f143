"""Weights between safetensors files and our parameter tree, tensor by tensor.

Hugging Face stores a tensor for each layer (and each expert), projections as
[outputs, inputs]; our tree stacks layers (and experts) on leading axes and has
projections as [inputs, outputs]. Reading goes the way of our tree: for each
parameter, and of it only the part that a device holds, the tensors that it is
made of. Beside the parameters themselves no more than one of them is ever in
memory. Pickled weights are never read.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import PyTree

_INDEX = 'model.safetensors.index.json'
_WEIGHTS = 'model.safetensors'
_SHARD = 'model-{:05d}-of-{:05d}.safetensors'
_PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt')
_FLOATS = ('F64', 'F32', 'F16', 'BF16')
_ROWS_AT_ONCE = 4096

# Path in our tree -> name in a folder; those below `layers` are the family's.
_NAMES = {
    'embed/embedding': 'model.embed_tokens.weight',
    'norm/scale': 'model.norm.weight',
    'head/kernel': 'lm_head.weight',
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """One tensor of a folder, not read yet.

  Attributes:
    file: where it is, for error messages.
    shape: as stored.
    dtype: safetensors' name of it, for example 'BF16'.
    read: slices, one for each axis -> that part as a NumPy array.
  """

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: str
  read: Callable[[tuple[slice, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Parameter:
  """Where the parts of one of our parameters are in a folder.

  Attributes:
    path: in our tree, 'layers/mlp/up/kernel'.
    shape: of the whole, stacked.
    pattern: name with a {} for each stacked axis.
  """

  path: str
  shape: tuple[int, ...]
  pattern: str

  @property
  def num_stacked(self) -> int:
    """How many leading axes are spread over tensors."""
    return self.pattern.count('{}')

  @property
  def transposed(self) -> bool:
    """Whether the folder has the last two axes swapped."""
    return self.path.endswith('kernel')

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """Shape of one tensor in the folder."""
    inner = self.shape[self.num_stacked :]
    return inner[::-1] if self.transposed else inner

  def names(self) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name in the folder, which part of the parameter)."""
    for part in np.ndindex(self.shape[: self.num_stacked]):
      yield self.pattern.format(*part), part


def parameters(model: CausalLM) -> list[Parameter]:
  """All parameters of a model, from its architecture."""
  names = _NAMES | {
      f'layers/{ours}': f'model.layers.{{}}.{theirs}'
      for ours, theirs in model.family.HF_LAYER_NAMES.items()
  }
  shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
  return [Parameter(path, x.shape, names[path]) for path, x in shapes.items()]


def stored_in(folder: pathlib.Path) -> dict[str, StoredTensor]:
  """Name -> tensor, of all safetensors files of a folder; none is read yet."""
  stored = {}
  for path in _weights_files(folder):
    if not path.is_file():
      raise FileNotFoundError(
          f'{folder} has no {path.name}. Is the folder complete?'
          + _pickles(folder)
      )
    stored |= stored_in_file(path)
  return stored


def stored_in_file(path: pathlib.Path) -> dict[str, StoredTensor]:
  """The same of one file."""
  stored = {}
  with _opened(path) as file:
    for name in file.keys():
      view = file.get_slice(name)
      stored[name] = StoredTensor(
          file=path,
          shape=tuple(view.get_shape()),
          dtype=view.get_dtype(),
          read=functools.partial(_read_part, path, name),
      )
  return stored


def to_params(
    model: CausalLM,
    stored: dict[str, StoredTensor],
    folder: pathlib.Path,
    *,
    dtype: Any,
    shardings: Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
  """Checks all tensors, then reads them. See `load.from_pretrained`."""
  wanted = parameters(model)
  _check(model, wanted, stored, folder)
  if model.config.tie_word_embeddings:
    _check_tied(stored)
  placed: dict[str, Any] = {}
  if shardings is not None:
    tree = {p.path: jax.ShapeDtypeStruct(p.shape, dtype) for p in wanted}
    placed = flatten(shardings(unflatten(tree)))
  flat = {}
  for parameter in wanted:
    read = _reader(parameter, stored, dtype)
    if shardings is None:
      whole = (slice(None),) * len(parameter.shape)
      flat[parameter.path] = jnp.asarray(read(whole))
    else:
      flat[parameter.path] = jax.make_array_from_callback(
          parameter.shape, placed[parameter.path], read
      )
  return unflatten(flat)


def save(
    model: CausalLM,
    params: PyTree,
    folder: pathlib.Path,
    *,
    max_shard_bytes: int,
) -> None:
  """Writes the weights files of a folder, and removes those it had."""
  flat = flatten(params)
  wanted = parameters(model)
  different = sorted(set(flat) ^ {parameter.path for parameter in wanted})
  if different:
    raise ValueError(
        f'params do not belong to this {model.config.model_type}: '
        f'{different[0]!r} is in one of them only.'
    )
  for old in (*folder.glob('model-*-of-*.safetensors'), folder / _INDEX):
    old.unlink(missing_ok=True)
  shards = _plan(wanted, flat, max_shard_bytes)
  files = [_SHARD.format(i + 1, len(shards)) for i in range(len(shards))]
  files = files if len(shards) > 1 else [_WEIGHTS]
  weight_map = {}
  for file, shard in zip(files, shards, strict=True):
    tensors = {
        name: _as_stored(flat[parameter.path], part, parameter)
        for name, part, parameter in shard
    }
    safetensors.numpy.save_file(
        tensors, folder / file, metadata={'format': 'pt'}
    )
    weight_map |= dict.fromkeys(tensors, file)
  if len(shards) > 1:
    (folder / _WEIGHTS).unlink(missing_ok=True)
    total = sum(x.size * x.dtype.itemsize for x in flat.values())
    contents = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    (folder / _INDEX).write_text(json.dumps(contents, indent=2))


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file."""
  try:
    contents = json.loads(path.read_text())
  except ValueError as error:  # Not JSON, or not even UTF-8.
    raise ValueError(f'{path} is not valid JSON: {error}') from error
  if not isinstance(contents, dict):
    raise ValueError(f'{path} holds no JSON object.')
  return contents


def _weights_files(folder: pathlib.Path) -> list[pathlib.Path]:
  index = folder / _INDEX
  if not index.is_file():
    return [folder / _WEIGHTS]
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict):
    raise ValueError(f'{index} has no weight_map. Is the folder complete?')
  names = sorted(set(weight_map.values()))
  for name in names:
    if pathlib.Path(name).name != name or not name.endswith('.safetensors'):
      raise ValueError(
          f'{index} names {name!r}; only safetensors files in the same folder '
          'are read.'
      )
  if (folder / _WEIGHTS).is_file() and _WEIGHTS not in names:
    # Of readers, some take the one and some the other.
    raise ValueError(
        f'{folder} has {_WEIGHTS} and, in {_INDEX}, {names[0]}; which are the '
        'weights? Take the older ones out of the folder.'
    )
  return [folder / name for name in names]


def _pickles(folder: pathlib.Path) -> str:
  """What to do about a folder that has weights, but pickled ones."""
  found = [path.name for kind in _PICKLES for path in folder.glob(kind)]
  if not found:
    return ''
  return (
      f' {sorted(found)[0]} is never read, as unpickling runs code: convert it '
      'with transformers, from_pretrained(...) and save_pretrained(...).'
  )


def _check(
    model: CausalLM,
    wanted: list[Parameter],
    stored: dict[str, StoredTensor],
    folder: pathlib.Path,
) -> None:
  """Raises ValueError unless the tensors are those of the architecture."""
  expected = {name: p.stored_shape for p in wanted for name, _ in p.names()}
  missing = sorted(set(expected) - set(stored))
  if missing:
    raise ValueError(
        f'{folder}: {len(missing)} of {len(expected)} tensors are missing, '
        f'first {missing[0]!r}. Is the folder complete?'
    )
  extra = sorted(
      name
      for name in set(stored) - set(expected)
      # A tied head that was stored all the same, and a table of old Llamas.
      if name != _NAMES['head/kernel'] and not name.endswith('.inv_freq')
  )
  if extra:
    raise ValueError(
        f'{stored[extra[0]].file}: {len(extra)} tensors that '
        f'{model.config.model_type} does not have, first {extra[0]!r}. Does '
        'the config belong to these weights?'
    )
  for name, shape in expected.items():
    tensor = stored[name]
    if tensor.shape != shape:
      raise ValueError(
          f'{tensor.file}: tensor {name!r} has shape {tensor.shape}, '
          f'its config says {shape}. Do the two belong together?'
      )
    if tensor.dtype not in _FLOATS:
      raise ValueError(
          f'{tensor.file}: tensor {name!r} has dtype {tensor.dtype}, only '
          f'{", ".join(_FLOATS)} are supported. Use the folder of the original '
          'weights if these are quantised.'
      )


def _check_tied(stored: dict[str, StoredTensor]) -> None:
  """Raises ValueError if there is a head that is not the embedding.

  transformers 5 then uses that head, 4 did not.
  """
  head = stored.get(_NAMES['head/kernel'])
  embedding = stored[_NAMES['embed/embedding']]
  if head is None:
    return
  rows, width = embedding.shape
  same = head.shape == embedding.shape and all(
      np.array_equal(*(
          tensor.read((slice(i, min(i + _ROWS_AT_ONCE, rows)), slice(0, width)))
          for tensor in (head, embedding)
      ))
      for i in range(0, rows, _ROWS_AT_ONCE)
  )
  if not same:
    raise ValueError(
        f'{head.file}: tensor {_NAMES["head/kernel"]!r} is not the embedding, '
        'though tie_word_embeddings of its config is true. Set that to false '
        'if the head is meant, or take the tensor out.'
    )


def _reader(
    parameter: Parameter, stored: dict[str, StoredTensor], dtype: Any
) -> Callable[[tuple[slice, ...]], np.ndarray]:
  """A function that reads the part of a parameter that slices select."""
  stacked = parameter.num_stacked

  def read(index: tuple[slice, ...]) -> np.ndarray:
    ranges = [
        range(*where.indices(size))
        for where, size in zip(index, parameter.shape, strict=True)
    ]
    # Written out, as readers need not understand slice(None).
    inner = tuple(slice(r.start, r.stop) for r in ranges[stacked:])
    inner = inner[::-1] if parameter.transposed else inner
    out = np.empty([len(r) for r in ranges], dtype)
    places = np.ndindex(out.shape[:stacked])
    parts = itertools.product(*ranges[:stacked])
    for place, part in zip(places, parts, strict=True):
      values = stored[parameter.pattern.format(*part)].read(inner)
      if parameter.transposed:
        _copy_transposed(values, out[place])
      else:
        out[place] = values
    return out

  return read


def _copy_transposed(values: np.ndarray, out: np.ndarray) -> None:
  """Copies values.T, in tiles that fit a cache: 2.5 times faster, measured."""
  tile = 256
  for i in range(0, out.shape[0], tile):
    for j in range(0, out.shape[1], tile):
      part = values[j : j + tile, i : i + tile]
      out[i : i + tile, j : j + tile] = part.T


def _plan(
    wanted: list[Parameter], flat: dict[str, Any], max_bytes: int
) -> list[list[tuple[str, tuple[int, ...], Parameter]]]:
  """Which tensors go into which file: as they come, until one is full."""
  shards: list[list] = [[]]
  size = 0
  for parameter in wanted:
    itemsize = flat[parameter.path].dtype.itemsize
    more = int(np.prod(parameter.stored_shape)) * itemsize
    for name, part in parameter.names():
      if shards[-1] and size + more > max_bytes:
        shards.append([])
        size = 0
      shards[-1].append((name, part, parameter))
      size += more
  return shards


def _as_stored(
    leaf: Any, part: tuple[int, ...], parameter: Parameter
) -> np.ndarray:
  """One tensor of a parameter, on the host."""
  # Sliced before it is copied: JAX keeps the host's copy of a whole array.
  tensor = np.asarray(leaf[part] if part else leaf)
  return np.ascontiguousarray(tensor.T if parameter.transposed else tensor)


def _read_part(
    path: pathlib.Path, name: str, index: tuple[slice, ...]
) -> np.ndarray:
  # Opened anew: what was read through an open file stays mapped in memory.
  with _opened(path) as file:
    return file.get_slice(name)[index]


@contextlib.contextmanager
def _opened(path: pathlib.Path):
  """A safetensors file; says which one is damaged, as the library does not."""
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      yield file
  except safetensors.SafetensorError as error:
    raise ValueError(
        f'{path} is damaged or not a safetensors file: {error}. Download or '
        'copy it again.'
    ) from error


def flatten(tree: PyTree, prefix: str = '') -> dict[str, Any]:
  """Nested dicts -> {'a/b': leaf}."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{key}/')
    else:
      flat[prefix + key] = value
  return flat


def unflatten(flat: dict[str, Any]) -> PyTree:
  """{'a/b': leaf} -> nested dicts."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree
