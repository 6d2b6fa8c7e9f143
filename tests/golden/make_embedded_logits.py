"""Reference logits of Qwen3, computed once by torch and transformers.

    python -m venv torch && torch/bin/pip install torch==2.13.0 transformers
    torch/bin/python tests/golden/make_embedded_logits.py

writes `embedded_logits.npz` next to this file (made with transformers 5.23.0;
torch is no dependency of anything else). Run it again only when the embedded
model changes.

Each case has tokens [B, T], mask [B, T] and float32 logits [real tokens, V] in
row-major order of the mask: `embedded/...` for the model in this package,
`tied/...` and `untied/...` for two random ones that `write_tiny` makes anew.
"""

import json
import pathlib
import struct

import numpy as np

HERE = pathlib.Path(__file__).parent
PATH = HERE / 'embedded_logits.npz'
EMBEDDED = HERE.parents[1] / 'dppo_jax' / 'assets' / 'arithmetic_qwen3'

# Heads wider than hidden / heads, and groups of two queries, as Qwen3 has.
TINY = {
    'architectures': ['Qwen3ForCausalLM'],
    'model_type': 'qwen3',
    'vocab_size': 64,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 16,
    'rms_norm_eps': 1e-6,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6},
    'max_position_embeddings': 64,
    'use_sliding_window': False,
    'attention_bias': False,
    'hidden_act': 'silu',
    'dtype': 'float32',
}


def tiny_tensors(tied):
  """Random weights by their Hugging Face names, the same on every machine."""
  config, rng = TINY, np.random.RandomState(0)  # Its numbers are frozen.
  width, inner = config['hidden_size'], config['intermediate_size']
  queries = config['num_attention_heads'] * config['head_dim']
  keys = config['num_key_value_heads'] * config['head_dim']
  shapes = {'model.embed_tokens.weight': (config['vocab_size'], width)}
  for i in range(config['num_hidden_layers']):
    shapes |= {
        f'model.layers.{i}.{name}.weight': shape
        for name, shape in {
            'input_layernorm': (width,),
            'self_attn.q_proj': (queries, width),
            'self_attn.k_proj': (keys, width),
            'self_attn.v_proj': (keys, width),
            'self_attn.o_proj': (width, queries),
            'self_attn.q_norm': (config['head_dim'],),
            'self_attn.k_norm': (config['head_dim'],),
            'post_attention_layernorm': (width,),
            'mlp.gate_proj': (inner, width),
            'mlp.up_proj': (inner, width),
            'mlp.down_proj': (width, inner),
        }.items()
    }
  shapes['model.norm.weight'] = (width,)
  if not tied:
    shapes['lm_head.weight'] = (config['vocab_size'], width)
  # Norms around 1, everything else so that a layer changes its input a lot.
  return {
      name: (
          (len(shape) == 1) + 0.3 * rng.standard_normal(shape)
      ).astype(np.float32)
      for name, shape in shapes.items()
  }


def write_tiny(folder, *, tied):
  """A Hugging Face folder, byte by byte: no library's idea of the format."""
  folder.mkdir(parents=True, exist_ok=True)
  config = TINY | {'tie_word_embeddings': tied}
  (folder / 'config.json').write_text(json.dumps(config))
  header, data = {}, b''
  for name, tensor in tiny_tensors(tied).items():
    end = len(data) + tensor.nbytes
    header[name] = {
        'dtype': 'F32',
        'shape': list(tensor.shape),
        'data_offsets': [len(data), end],
    }
    data += tensor.tobytes()
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  size = struct.pack('<Q', len(text))
  (folder / 'model.safetensors').write_bytes(size + text + data)


def batches(vocab_size):
  """Tokens and mask [4, 12]: whole, padded left, right and on both sides."""
  rng = np.random.RandomState(1)
  tokens = rng.randint(2, vocab_size, (4, 12)).astype(np.int32)
  place = np.arange(12)
  mask = np.stack(
      [place >= 0, place >= 5, place < 8, (place >= 2) & (place < 9)]
  )
  return np.where(mask, tokens, 0).astype(np.int32), mask


def main():
  import tempfile

  import torch
  import transformers

  def logits_of(folder, tokens, mask):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation='eager'
    ).eval()
    rows = []
    with torch.no_grad():
      # One row at a time and without its padding: nothing to get wrong.
      for row, keep in zip(tokens, mask, strict=True):
        ids = torch.tensor(row[keep][None], dtype=torch.int64)
        rows.append(model(input_ids=ids).logits[0].numpy())
    return np.concatenate(rows)

  arrays = {}
  with tempfile.TemporaryDirectory() as scratch:
    folders = {'embedded': EMBEDDED}
    for name in ('tied', 'untied'):
      folders[name] = pathlib.Path(scratch) / name
      write_tiny(folders[name], tied=name == 'tied')
    for name, folder in folders.items():
      sizes = json.loads((folder / 'config.json').read_text())
      tokens, mask = batches(sizes['vocab_size'])
      arrays |= {
          f'{name}/tokens': tokens,
          f'{name}/mask': mask,
          f'{name}/logits': logits_of(folder, tokens, mask),
      }
  np.savez_compressed(PATH, **arrays)
  print({k: v.shape for k, v in arrays.items()}, PATH.stat().st_size)


if __name__ == '__main__':
  main()
