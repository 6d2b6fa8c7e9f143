"""GGUF files in, without torch: llama.cpp's one file for a whole model.

Its metadata hold the sizes and the tokenizer, its tensors are mostly quantised
in blocks along the last axis. They are presented under Hugging Face's names, in
Hugging Face's layout and as float32, so `weights.py` reads them like any other:
tensor by tensor, and of each only the rows that are asked for. Format:
github.com/ggml-org/ggml/blob/master/docs/gguf.md.

The `gguf` package (extra `[gguf]`) knows the types and undoes the quantisation.
The header is parsed here: its own reader needs 28 times the time (measured, on
SmolLM2, whose vocabulary is long), and of a damaged file it says nothing clear.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import mmap
import pathlib
import struct
import types
from typing import Any

import numpy as np

from dppo_jax import registry
from dppo_jax.models import hf
from dppo_jax.models.weights import StoredTensor

SUFFIX = '.gguf'
EOS = 'tokenizer.ggml.eos_token_id'
# Those of a turn and of a message, where they are others.
_MORE_ENDS = 'tokenizer.ggml.eot_token_id', 'tokenizer.ggml.eom_token_id'

# Architectures whose GGUF tensors are Hugging Face's under other names.
ARCHITECTURES = ('llama', 'qwen2', 'qwen3')

_NAMES = {
    'token_embd': 'model.embed_tokens',
    'output_norm': 'model.norm',
    'output': 'lm_head',
}
_LAYER_NAMES = {
    'attn_norm': 'input_layernorm',
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'attn_q_norm': 'self_attn.q_norm',
    'attn_k_norm': 'self_attn.k_norm',
    'ffn_norm': 'post_attention_layernorm',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
}

# Numbers of GGUF's value types -> struct's letters; 8 is a string, 9 an array.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), 'BbHhIif?Qqd'))
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_ROWS_AT_ONCE = 4096

# A split that all newer tokenizers share but for the length of numbers.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_CONTROL, _USER_DEFINED = 3, 4  # Values of tokenizer.ggml.token_type.


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one tensor lies.

  Attributes:
    shape: slowest axis first, as in Hugging Face's files.
    kind: number of its quantisation type.
    offset: bytes from the start of the file.
  """

  shape: tuple[int, ...]
  kind: int
  offset: int


@dataclasses.dataclass(frozen=True)
class Header:
  """What stands before the tensors: metadata by key, tensors by name."""

  path: pathlib.Path
  metadata: dict[str, Any]
  tensors: dict[str, Entry]

  @property
  def architecture(self) -> str:
    return self.metadata.get('general.architecture', '')

  def get(self, key: str, default: Any = None) -> Any:
    """A size of the architecture, 'block_count'. No default: it must be."""
    value = self.metadata.get(f'{self.architecture}.{key}', default)
    if value is None:
      raise ValueError(
          f'{self.path} has no {self.architecture}.{key} in its metadata. '
          'Convert the model anew with a recent llama.cpp.'
      )
    return value


def read_header(path: pathlib.Path) -> Header:
  """The header of a file; parsed once for each state of the file."""
  stat = path.stat()
  return _read_header(path, stat.st_size, stat.st_mtime_ns)


def end_tokens(header: Header) -> list[tuple[str, int]]:
  """All that the metadata name, behind where they do."""
  return [
      (f'{header.path}: {key}', header.metadata[key])
      for key in (EOS, *_MORE_ENDS)
      if key in header.metadata
  ]


def hf_config(header: Header) -> Any:
  """The transformers config that the metadata describe."""
  path, architecture = header.path, header.architecture
  if architecture not in ARCHITECTURES:
    raise ValueError(
        registry.unknown(
            f'architecture in {path}:', architecture, ARCHITECTURES
        )
        + " Other architectures are read from Hugging Face's folder."
    )
  _refuse(header)
  heads = header.get('attention.head_count')
  width = header.get('embedding_length')
  head_dim = header.get('attention.key_length', width // heads)
  if header.get('rope.dimension_count', head_dim) != head_dim:
    raise ValueError(
        f'{path}: {architecture}.rope.dimension_count='
        f'{header.get("rope.dimension_count")} rotates a part of each head, '
        f'which is not supported, only {head_dim}.'
    )
  _check_complete(header)
  return hf.transformers().AutoConfig.for_model(
      architecture,
      vocab_size=header.tensors['token_embd.weight'].shape[0],
      hidden_size=width,
      intermediate_size=header.get('feed_forward_length'),
      num_hidden_layers=header.get('block_count'),
      num_attention_heads=heads,
      num_key_value_heads=header.get('attention.head_count_kv', heads),
      head_dim=head_dim,
      rms_norm_eps=_shortest(header.get('attention.layer_norm_rms_epsilon')),
      rope_parameters=_rope_parameters(header),
      max_position_embeddings=header.get('context_length'),
      tie_word_embeddings='output.weight' not in header.tensors,
  )


def stored_in(path: pathlib.Path) -> dict[str, StoredTensor]:
  """Hugging Face's name -> tensor, in its layout; none is read yet."""
  header, stored = read_header(path), {}
  gguf = _package(path)
  _check_types(header, gguf)
  heads = header.get('attention.head_count')
  permuted = {
      'attn_q': heads, 'attn_k': header.get('attention.head_count_kv', heads)
  }
  for name, entry in header.tensors.items():
    order = None
    part = name.split('.')[-2] if '.' in name else name
    if header.architecture == 'llama' and part in permuted:
      order = _order_of_halves(entry.shape[0], permuted[part])
    stored[_hf_name(name)] = StoredTensor(
        file=path,
        shape=entry.shape,
        dtype='F32',  # Once it is read.
        read=functools.partial(_read_part, gguf, path, entry, order),
    )
  return stored


def load_tokenizer(path: pathlib.Path) -> Any:
  """The transformers tokenizer that the metadata hold, and chat template."""
  import tokenizers
  from tokenizers import models

  metadata = read_header(path).metadata
  kind = metadata.get('tokenizer.ggml.model')
  if kind != 'gpt2':
    raise ValueError(
        f'{path}: tokenizer.ggml.model={kind!r} is not supported, only '
        "'gpt2' (byte-level BPE). Use the Hugging Face folder of the model."
    )
  pre = metadata.get('tokenizer.ggml.pre', '')
  if pre not in _SPLITS:
    raise ValueError(
        registry.unknown(
            f'tokenizer.ggml.pre (how text is split) in {path}:', pre, _SPLITS
        )
        + ' Use the Hugging Face folder of the model.'
    )
  tokens = _tokenizer_field(path, metadata, 'tokens')
  merges = _tokenizer_field(path, metadata, 'merges')
  fast = tokenizers.Tokenizer(
      models.BPE(
          vocab={token: i for i, token in enumerate(tokens)},
          merges=[tuple(merge.split(' ', 1)) for merge in merges],
          ignore_merges=pre == 'llama-bpe',
      )
  )
  if pre == 'qwen2':
    fast.normalizer = tokenizers.normalizers.NFC()
  fast.pre_tokenizer = _SPLITS[pre]()
  fast.decoder = tokenizers.decoders.ByteLevel()
  types_ = metadata.get('tokenizer.ggml.token_type', [1] * len(tokens))
  for token, what in zip(tokens, types_):
    if what in (_CONTROL, _USER_DEFINED):
      fast.add_tokens([
          tokenizers.AddedToken(
              token, special=what == _CONTROL, normalized=False
          )
      ])
  special = _special_tokens(metadata, tokens)
  # llama.cpp starts with <bos> if told to, and Llama 3 unless told not to.
  if metadata.get('tokenizer.ggml.add_bos_token', pre == 'llama-bpe'):
    _start_with(fast, special.get('bos_token'))
  tokenizer = hf.transformers().PreTrainedTokenizerFast(
      tokenizer_object=fast,
      model_max_length=read_header(path).get('context_length'),
      clean_up_tokenization_spaces=False,
      **special,
  )
  tokenizer.chat_template = metadata.get('tokenizer.chat_template')
  return tokenizer


# What is in the header.


class _Cursor:
  """Reads little-endian values one after the other; never past the end."""

  def __init__(self, data: Any):
    self.data, self.at = data, 0

  def take(self, layout: str) -> Any:
    """One value of struct's layout."""
    [value] = struct.unpack_from('<' + layout, self.data, self.at)
    self.at += struct.calcsize('<' + layout)
    return value

  def string(self) -> str:
    length = self.take('Q')
    if length > len(self.data) - self.at:
      raise struct.error('a string goes beyond the end')
    self.at += length
    return self.data[self.at - length : self.at].decode()

  def value(self, kind: int) -> Any:
    """A value of one of GGUF's types."""
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      return self.take(_SCALARS[kind])
    inner, count = self.take('I'), self.take('Q')
    if count > len(self.data) - self.at:  # Each takes at least one byte.
      raise struct.error('an array goes beyond the end')
    return [self.value(inner) for _ in range(count)]


@functools.lru_cache(maxsize=2)
def _read_header(path: pathlib.Path, size: int, _: int) -> Header:
  if size == 0:
    raise ValueError(f'{path} is empty. Download or copy it again.')
  with (
      open(path, 'rb') as file,
      mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
  ):
    if data[:4] != b'GGUF':
      raise ValueError(f'{path} is not a GGUF file.')
    try:
      return _parse(path, _Cursor(data))
    except (struct.error, UnicodeDecodeError, KeyError) as error:
      raise ValueError(
          f'{path} is damaged or cut off within its header ({error}). '
          'Download or copy it again.'
      ) from error


def _parse(path: pathlib.Path, cursor: _Cursor) -> Header:
  cursor.at = 4
  version = cursor.take('I')
  if version not in (2, 3):
    # A big-endian 3 reads as 3 << 24.
    raise ValueError(
        f'{path} has version {version} of GGUF; only 2 and 3, little-endian, '
        'are supported. Convert the model anew with a recent llama.cpp.'
    )
  num_tensors, num_values = cursor.take('Q'), cursor.take('Q')
  metadata = {}
  for _ in range(num_values):
    key = cursor.string()
    metadata[key] = cursor.value(cursor.take('I'))
  found = {}
  for _ in range(num_tensors):
    name = cursor.string()
    shape = [cursor.take('Q') for _ in range(cursor.take('I'))]
    found[name] = Entry(tuple(shape[::-1]), cursor.take('I'), cursor.take('Q'))
  align = metadata.get('general.alignment', _DEFAULT_ALIGNMENT)
  start = -(-cursor.at // align) * align
  tensors = {
      name: dataclasses.replace(entry, offset=start + entry.offset)
      for name, entry in found.items()
  }
  return Header(path, metadata, tensors)


def _refuse(header: Header) -> None:
  """Raises ValueError for what would silently change the model."""
  path, architecture = header.path, header.architecture
  if header.get('expert_count', 0):
    raise ValueError(
        f'{path}: experts ({architecture}.expert_count='
        f'{header.get("expert_count")}) are not read from GGUF. Use the '
        'Hugging Face folder of the model.'
    )
  if 'rope_freqs.weight' in header.tensors:
    raise ValueError(
        f'{path}: rope_freqs.weight (the stretched rotary frequencies of Llama '
        '3.1 and later) is not read from GGUF. Use the Hugging Face folder of '
        'the model.'
    )
  for key in ('attention.head_count', 'attention.head_count_kv',
              'feed_forward_length'):
    if isinstance(header.get(key, 0), list):
      raise ValueError(
          f'{path}: {architecture}.{key} differs from layer to layer, which is '
          'not supported.'
      )


def _check_complete(header: Header) -> None:
  """Raises ValueError for tensors that are missing, by their GGUF names."""
  wanted = ['token_embd.weight', 'output_norm.weight']
  for layer in range(header.get('block_count')):
    wanted += [
        f'blk.{layer}.{part}.weight'
        for part in _LAYER_NAMES
        if not part.endswith(('q_norm', 'k_norm'))
        or header.architecture == 'qwen3'
    ]
    if header.architecture == 'qwen2':
      wanted += [f'blk.{layer}.attn_{part}.bias' for part in 'qkv']
  missing = [name for name in wanted if name not in header.tensors]
  if missing:
    raise ValueError(
        f'{header.path}: {len(missing)} of {len(wanted)} tensors are missing, '
        f'first {missing[0]!r}. Convert the model anew, and if it is split '
        'into several GGUF files, join them with llama-gguf-split --merge.'
    )


def _check_types(header: Header, gguf: types.ModuleType) -> None:
  """Raises ValueError for what cannot be dequantised or is cut off."""
  size = header.path.stat().st_size
  known: dict[int, tuple[int, int]] = {}  # Elements and bytes of a block.
  for name, entry in header.tensors.items():
    if entry.kind not in known:
      known[entry.kind] = _block(header.path, name, entry.kind, gguf)
    elements, width = known[entry.kind]
    if entry.shape[-1] % elements:
      raise ValueError(
          f'{header.path}: rows of {name!r} have {entry.shape[-1]} elements, '
          f'not a multiple of the {elements} of a block. The file is damaged.'
      )
    end = entry.offset + math.prod(entry.shape) // elements * width
    if end > size:
      raise ValueError(
          f'{header.path} is cut off: it has {size} bytes, {name!r} ends at '
          f'{end}. Download or copy it again.'
      )


def _block(
    path: pathlib.Path, name: str, kind: int, gguf: types.ModuleType
) -> tuple[int, int]:
  label = kind
  try:
    quantisation = gguf.GGMLQuantizationType(kind)
    label = quantisation.name
    elements, width = gguf.GGML_QUANT_SIZES[quantisation]
    gguf.quants.dequantize(np.zeros((1, width), np.uint8), quantisation)
  except (ValueError, KeyError, NotImplementedError) as error:
    raise ValueError(
        f'{path}: tensor {name!r} has quantisation type {label}, which the '
        'gguf package cannot undo. Upgrade it (pip install -U gguf), or use '
        'a file in Q8_0, Q4_K_M or F16.'
    ) from error
  return elements, width


# Tensors.


def _hf_name(name: str) -> str:
  """GGUF's name of a tensor -> Hugging Face's; unknown ones stay."""
  stem, _, suffix = name.rpartition('.')
  if stem in _NAMES:
    return f'{_NAMES[stem]}.{suffix}'
  start, _, rest = stem.partition('.')
  layer, _, part = rest.partition('.')
  if start == 'blk' and part in _LAYER_NAMES:
    return f'model.layers.{layer}.{_LAYER_NAMES[part]}.{suffix}'
  return name


def _order_of_halves(rows: int, heads: int) -> np.ndarray:
  """Hugging Face's row -> row in a GGUF of a Llama.

  llama.cpp rotates neighbours against each other, Hugging Face and we the two
  halves of a head, so its converter interleaved the halves.
  """
  pairs = np.arange(rows).reshape(heads, -1, 2)  # [H, E / 2, first or second]
  return pairs.swapaxes(1, 2).reshape(-1)


def _read_part(
    gguf: types.ModuleType,
    path: pathlib.Path,
    entry: Entry,
    order: np.ndarray | None,
    index: tuple[slice, ...],
) -> np.ndarray:
  """A part of a tensor as float32; of it, only the rows are read."""
  kind = gguf.GGMLQuantizationType(entry.kind)
  elements, width = gguf.GGML_QUANT_SIZES[kind]
  *rows, columns = entry.shape
  raw = np.memmap(
      path,
      np.uint8,
      mode='r',
      offset=entry.offset,
      shape=(math.prod(rows), columns // elements * width),
  )
  if not rows:
    return gguf.quants.dequantize(np.array(raw), kind)[0][index]
  wanted = np.arange(rows[0])[index[0]]
  out = np.empty((len(wanted), columns), np.float32)
  for start in range(0, len(wanted), _ROWS_AT_ONCE):
    some = wanted[start : start + _ROWS_AT_ONCE]
    block = raw[some if order is None else order[some]]
    out[start : start + _ROWS_AT_ONCE] = gguf.quants.dequantize(
        np.asarray(block), kind
    )
  return out[:, index[1]]


def _rope_parameters(header: Header) -> dict[str, Any]:
  # A factor without a type is linear to llama.cpp; older files call it
  # scale_linear.
  old = header.get('rope.scale_linear', 0.0)
  factor = header.get('rope.scaling.factor', old)
  kind = header.get('rope.scaling.type', 'linear' if factor else 'none')
  magnitude = header.get('rope.scaling.attn_factor', 1.0)
  if magnitude != 1:
    raise ValueError(
        f'{header.path}: {header.architecture}.rope.scaling.attn_factor='
        f'{magnitude} is not supported, only 1.0.'
    )
  parameters = {
      'rope_type': 'default',
      'rope_theta': _shortest(header.get('rope.freq_base', 10000.0)),
  }
  if kind == 'none':
    return parameters
  if kind != 'linear':
    raise ValueError(
        f'{header.path}: {header.architecture}.rope.scaling.type={kind!r} is '
        "not supported, only 'none' and 'linear'."
    )
  factor = _shortest(factor or header.get('rope.scaling.factor'))
  return parameters | {'rope_type': 'linear', 'factor': factor}


def _shortest(value: float) -> float:
  """The number that was meant: 1e-05 instead of 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def _package(path: pathlib.Path) -> types.ModuleType:
  try:
    import gguf
    import gguf.quants
  except ImportError as error:
    raise ImportError(
        f"{path} is a GGUF file, which needs the package gguf: pip install "
        "'dppo_jax[gguf]'."
    ) from error
  return gguf


# The tokenizer.


def _bytes(*before: Any, use_regex: bool) -> Any:
  from tokenizers import pre_tokenizers

  last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
  return pre_tokenizers.Sequence([*before, last])


def _split_gpt2() -> Any:
  return _bytes(use_regex=True)


def _split_smollm() -> Any:
  """As GPT-2, every digit by itself."""
  from tokenizers import pre_tokenizers

  digits = pre_tokenizers.Digits(individual_digits=True)
  return _bytes(digits, use_regex=True)


def _split_words(digits: str) -> Callable[[], Any]:
  """By a pattern, numbers by `digits`, for example three at a time."""

  def make():
    import tokenizers
    from tokenizers import pre_tokenizers

    pattern = tokenizers.Regex(_WORDS % digits)
    return _bytes(
        pre_tokenizers.Split(pattern, behavior='isolated'), use_regex=False
    )

  return make


# tokenizer.ggml.pre -> how text is split before BPE, as in llama.cpp's
# src/llama-vocab.cpp.
_SPLITS = {
    'gpt-2': _split_gpt2,
    'llama-bpe': _split_words('{1,3}'),
    'qwen2': _split_words(''),
    'smollm': _split_smollm,
}


def _tokenizer_field(path: pathlib.Path, metadata: Any, name: str) -> list:
  value = metadata.get(f'tokenizer.ggml.{name}')
  if not isinstance(value, list):
    raise ValueError(
        f'{path} has no tokenizer.ggml.{name} in its metadata. Use the '
        'tokenizer of the Hugging Face folder.'
    )
  return value


def _special_tokens(metadata: Any, tokens: list[str]) -> dict[str, str]:
  """What the metadata name, as keyword arguments of a tokenizer."""
  keys = {
      'bos_token': 'bos_token_id',
      'eos_token': 'eos_token_id',
      'pad_token': 'padding_token_id',
      'unk_token': 'unknown_token_id',
  }
  ids = {
      name: metadata.get(f'tokenizer.ggml.{key}') for name, key in keys.items()
  }
  return {
      name: tokens[i]
      for name, i in ids.items()
      if i is not None and i < len(tokens)
  }


def _start_with(fast: Any, token: str | None) -> None:
  from tokenizers import processors

  if token is not None:
    fast.post_processor = processors.TemplateProcessing(
        single=f'{token} $A',
        pair=f'{token} $A {token} $B',
        special_tokens=[(token, fast.token_to_id(token))],
    )
