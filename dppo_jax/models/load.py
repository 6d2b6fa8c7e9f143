"""Hugging Face folders in and out, without torch.

A folder holds `config.json`, one or several `*.safetensors`, and the tokenizer.
Projections are stored [outputs, inputs] there and [inputs, outputs] here; our
layers are stacked.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dppo_jax import registry
from dppo_jax.models import hf
from dppo_jax.models import layers
from dppo_jax.models import qwen3
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import PyTree

# model_type of config.json -> module of the architecture.
FAMILIES = {'qwen3': qwen3}

# The small model that ships with the package; see experiments/embedded_model.
EMBEDDED = pathlib.Path(__file__).parents[1] / 'assets' / 'arithmetic_qwen3'

_INDEX = 'model.safetensors.index.json'
_WEIGHTS = 'model.safetensors'


def from_pretrained(name: str | os.PathLike, *, dtype: Any = None) -> CausalLM:
  """Loads a Hugging Face folder.

  Args:
    name: 'embedded' for the model in this package, a folder, or a name on the
      Hugging Face hub, which is then downloaded.
    dtype: of the parameters and the computation; float32 if not given.

  Returns:
    the model, with its `params`.

  Raises:
    FileNotFoundError: no such folder, or a file is missing from it.
    ValueError: an architecture or a tensor that is not what it should be.
  """
  folder = resolve(name)
  dtype = jnp.dtype(dtype or jnp.float32)
  family, config = read_config(folder)
  expected = _expected_tensors(family, config)
  tensors = {}
  for key, tensor in _read_tensors(folder):
    if key in expected:
      tensors[key] = tensor
  missing = sorted(set(expected) - set(tensors))
  if missing:
    raise ValueError(
        f'{folder}: {len(missing)} of {len(expected)} tensors are missing, '
        f'first {missing[0]!r}. Is the folder complete?'
    )
  for key, shape in expected.items():
    if tensors[key].shape != shape:
      raise ValueError(
          f'{folder}: tensor {key!r} has shape {tensors[key].shape}, '
          f'config.json says {shape}.'
      )
  params = _to_params(family, config, tensors, dtype)
  return CausalLM(config=config, family=family, params=params, dtype=dtype)


def save_pretrained(
    model: CausalLM,
    folder: str | os.PathLike,
    *,
    params: PyTree = None,
    tokenizer: Any = None,
) -> None:
  """Writes a Hugging Face folder that transformers reads back.

  Args:
    model: the architecture; its own `params` are written unless given.
    folder: made if it does not exist.
    params: parameter tree, any float dtype, kept as it is.
    tokenizer: a transformers tokenizer, or a folder to copy its files from.
  """
  if not isinstance(model, CausalLM):
    raise TypeError(
        'The first argument is the model, which knows its sizes; pass a bare '
        'parameter tree as params=...'
    )
  params = model.params if params is None else params
  if params is None:
    raise ValueError('The model holds no params; pass params=...')
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = _from_params(model.family, model.config, params)
  hf_config = model.family.to_hf_config(model.config)
  hf_config.dtype = str(next(iter(tensors.values())).dtype)
  if isinstance(tokenizer, (str, os.PathLike)):
    for source in pathlib.Path(tokenizer).glob('*token*'):
      shutil.copy(source, folder / source.name)
  elif tokenizer is not None:
    tokenizer.save_pretrained(folder)
    hf_config.eos_token_id = tokenizer.eos_token_id
    hf_config.pad_token_id = tokenizer.pad_token_id
  hf_config.save_pretrained(folder)
  safetensors.numpy.save_file(
      tensors, folder / _WEIGHTS, metadata={'format': 'pt'}
  )


def resolve(name: str | os.PathLike) -> pathlib.Path:
  """The folder behind 'embedded', a path, or a hub name."""
  if str(name) == 'embedded':
    return EMBEDDED
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    return folder
  looks_like_hub_name = str(name).count('/') == 1 and not str(name).startswith(
      ('.', '/', '~')
  )
  if not looks_like_hub_name:
    raise FileNotFoundError(
        f"Model folder {str(name)!r} does not exist. Use 'embedded', a Hugging "
        'Face folder, or a hub name such as Qwen/Qwen3-0.6B.'
    )
  import huggingface_hub  # Only a download needs it.

  patterns = ['*.json', '*.safetensors', '*.model', '*.txt', '*.jinja']
  try:
    return pathlib.Path(
        huggingface_hub.snapshot_download(str(name), allow_patterns=patterns)
    )
  except Exception as error:
    raise FileNotFoundError(
        f'Model {str(name)!r} is neither a folder here nor could it be '
        f'downloaded from the Hugging Face hub: {error}'
    ) from error


def read_config(folder: pathlib.Path) -> tuple[Any, layers.ModelConfig]:
  """The family and the sizes that `config.json` describes."""
  path = folder / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(
        f'{folder} has no config.json; it is not a Hugging Face model folder.'
    )
  model_type = _read_json(path).get('model_type')
  if model_type not in FAMILIES:
    raise ValueError(
        registry.unknown(f'architecture in {path}:', model_type, FAMILIES)
    )
  family = FAMILIES[model_type]
  return family, family.from_hf_config(
      hf.transformers().AutoConfig.from_pretrained(folder)
  )


def load_tokenizer(name: str | os.PathLike) -> Any:
  """The transformers tokenizer of a model, checked for an end token."""
  folder = resolve(name)
  if not any(
      (folder / file).is_file()
      for file in ('tokenizer.json', 'tokenizer.model', 'vocab.json')
  ):
    raise FileNotFoundError(
        f'{folder} has no tokenizer.json. Is the folder complete?'
    )
  try:
    tokenizer = hf.transformers().AutoTokenizer.from_pretrained(folder)
  except Exception as error:
    raise ValueError(
        f"{folder}: the tokenizer's files cannot be read: {error}"
    ) from error
  if tokenizer.eos_token_id is None:
    raise ValueError(
        f'{folder}: the tokenizer has no eos_token, so no completion could '
        'ever end. Set eos_token in tokenizer_config.json.'
    )
  _, sizes = read_config(folder)
  if len(tokenizer) > sizes.vocab_size:
    raise ValueError(
        f'{folder}: the tokenizer has {len(tokenizer)} tokens, the model only '
        f'{sizes.vocab_size}. They do not belong together.'
    )
  if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.eos_token
  return tokenizer


def _read_tensors(folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
  """All tensors of a folder, one at a time."""
  index = folder / _INDEX
  if index.is_file():
    weight_map = _read_json(index).get('weight_map')
    if not isinstance(weight_map, dict):
      raise ValueError(f'{index} has no weight_map. Is the folder complete?')
    names = sorted(set(weight_map.values()))
    files = [folder / name for name in names]
  else:
    files = [folder / _WEIGHTS]
  for path in files:
    if not path.is_file():
      raise FileNotFoundError(
          f'{folder} has no {path.name}. Is the folder complete?'
      )
    with _naming(path), safetensors.safe_open(path, framework='numpy') as file:
      for key in file.keys():
        yield key, file.get_tensor(key)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    contents = json.loads(path.read_text())
  except ValueError as error:  # Not JSON, or not even UTF-8.
    raise ValueError(f'{path} is not valid JSON: {error}') from error
  if not isinstance(contents, dict):
    raise ValueError(f'{path} holds no JSON object.')
  return contents


@contextlib.contextmanager
def _naming(path: pathlib.Path):
  """Says which file was damaged; the library's own message does not."""
  try:
    yield
  except safetensors.SafetensorError as error:
    raise ValueError(
        f'{path} is damaged or not a safetensors file: {error}'
    ) from error


def _to_hf_names(
    family: Any, config: layers.ModelConfig
) -> dict[tuple[str, int | None], tuple[str, bool]]:
  """(our path, layer or None) -> (Hugging Face name, transposed)."""
  names = {
      ('embed/embedding', None): ('model.embed_tokens.weight', False),
      ('norm/scale', None): ('model.norm.weight', False),
  }
  if not config.tie_word_embeddings:
    names['head/kernel', None] = ('lm_head.weight', True)
  for ours, theirs in family.HF_LAYER_NAMES.items():
    for layer in range(config.num_hidden_layers):
      names[f'layers/{ours}', layer] = (
          f'model.layers.{layer}.{theirs}',
          ours.endswith('kernel'),
      )
  return names


def _expected_tensors(
    family: Any, config: layers.ModelConfig
) -> dict[str, tuple[int, ...]]:
  """Hugging Face name -> shape, from the architecture."""
  model = CausalLM(config=config, family=family)
  shapes = _flatten(jax.eval_shape(model.init, jax.random.key(0)))
  expected = {}
  for (path, layer), (name, transposed) in _to_hf_names(family, config).items():
    shape = shapes[path].shape[0 if layer is None else 1 :]
    expected[name] = shape[::-1] if transposed else shape
  return expected


def _to_params(
    family: Any, config: layers.ModelConfig, tensors: dict, dtype: Any
) -> PyTree:
  flat: dict[str, Any] = {}
  for (path, layer), (name, transposed) in _to_hf_names(family, config).items():
    tensor = tensors.pop(name).astype(dtype)
    tensor = tensor.T if transposed else tensor
    if layer is None:
      flat[path] = jnp.asarray(tensor)
    else:
      flat.setdefault(path, []).append(tensor)
  stacked = {
      path: jnp.asarray(np.stack(value)) if isinstance(value, list) else value
      for path, value in flat.items()
  }
  return _unflatten(stacked)


def _from_params(
    family: Any, config: layers.ModelConfig, params: PyTree
) -> dict[str, np.ndarray]:
  flat = {path: np.asarray(x) for path, x in _flatten(params).items()}
  tensors = {}
  for (path, layer), (name, transposed) in _to_hf_names(family, config).items():
    tensor = flat[path] if layer is None else flat[path][layer]
    tensors[name] = np.ascontiguousarray(tensor.T if transposed else tensor)
  return tensors


def _flatten(tree: PyTree, prefix: str = '') -> dict[str, Any]:
  """Nested dicts -> {'a/b': leaf}."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f'{prefix}{key}/')
    else:
      flat[prefix + key] = value
  return flat


def _unflatten(flat: dict[str, Any]) -> PyTree:
  """{'a/b': leaf} -> nested dicts."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree
