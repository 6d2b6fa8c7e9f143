"""Reference logits of every model family, computed once by transformers.

    python -m venv torch && torch/bin/pip install torch==2.13.0 transformers
    torch/bin/python tests/golden/make_family_logits.py

writes `family_logits.npz` next to this file (made with transformers 5.23.0).
It holds `tokens` and `mask` [B, T], the same for all cases, and for each case
`NAME/tied` and `NAME/untied` float32 logits [real tokens, V] in row-major order
of the mask. The models themselves are made anew by `write`, from the names and
shapes below and a fixed seed.
"""

import json
import pathlib

import numpy as np
import safetensors.numpy

HERE = pathlib.Path(__file__).parent
PATH = HERE / 'family_logits.npz'

# Shorter than the rows of `batch`.
WINDOW = 5

SIZES = {
    'vocab_size': 64,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'rms_norm_eps': 1e-6,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4},
    'max_position_embeddings': 64,
    'dtype': 'float32',
}
GEMMA = {
    'hidden_activation': 'gelu_pytorch_tanh',
    # Neither the head's width nor the width over the heads.
    'head_dim': 16,
    'query_pre_attn_scalar': 24,
    'sliding_window': WINDOW,
}
# Waves of 6, 63, 628 and 6283 tokens: one kept, one in between, two stretched.
LLAMA3 = {
    'rope_type': 'llama3',
    'rope_theta': 1e4,
    'factor': 4.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 64,
}
# Waves of 6, 20, 63, ... tokens: some kept, some stretched, some in between.
YARN = {
    'rope_type': 'yarn',
    'rope_theta': 1e4,
    'factor': 4.0,
    'original_max_position_embeddings': 64,
    'beta_fast': 2.0,
    'beta_slow': 1.0,
}
CASES = {
    'llama2': {'model_type': 'llama', 'num_key_value_heads': 4},
    'llama3': {
        'model_type': 'llama',
        'rope_parameters': LLAMA3,
        'max_position_embeddings': 256,
    },
    'mistral': {'model_type': 'mistral', 'sliding_window': WINDOW},
    'qwen2': {'model_type': 'qwen2', 'use_sliding_window': False},
    'qwen2_window': {
        'model_type': 'qwen2',
        'use_sliding_window': True,
        'sliding_window': WINDOW,
        'max_window_layers': 1,
    },
    'qwen3': {'model_type': 'qwen3', 'head_dim': 16},
    'qwen3_yarn': {
        'model_type': 'qwen3',
        'head_dim': 16,
        'rope_parameters': YARN,
        'max_position_embeddings': 256,
    },
    'qwen3_moe': {
        'model_type': 'qwen3_moe',
        'num_experts': 5,
        'num_experts_per_tok': 3,
        'moe_intermediate_size': 24,
        'norm_topk_prob': False,
    },
    'qwen3_moe_norm': {
        'model_type': 'qwen3_moe',
        'num_experts': 5,
        'num_experts_per_tok': 3,
        'moe_intermediate_size': 24,
        'norm_topk_prob': True,
    },
    'mixtral': {
        'model_type': 'mixtral',
        'num_local_experts': 4,
        'num_experts_per_tok': 2,
        'sliding_window': None,
    },
    'gemma2': GEMMA | {
        'model_type': 'gemma2',
        # Small enough to bend scores and logits.
        'attn_logit_softcapping': 4.0,
        'final_logit_softcapping': 6.0,
    },
    'gemma3': GEMMA | {
        'model_type': 'gemma3_text',
        'num_hidden_layers': 3,
        'layer_types': [
            'sliding_attention', 'full_attention', 'sliding_attention'
        ],
        'rope_parameters': {
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e2},
            'full_attention': {
                'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 8.0,
            },
        },
    },
}


def config_of(name, *, tied):
  """The contents of config.json."""
  return SIZES | CASES[name] | {'tie_word_embeddings': tied}


def shapes_of(config):
  """Hugging Face name -> shape, written down for each architecture."""
  kind, width = config['model_type'], config['hidden_size']
  gemma = kind.startswith('gemma')
  head_dim = config['head_dim']
  queries = config['num_attention_heads'] * head_dim
  keys = config['num_key_value_heads'] * head_dim

  layer = {
      'input_layernorm.weight': (width,),
      'self_attn.q_proj.weight': (queries, width),
      'self_attn.k_proj.weight': (keys, width),
      'self_attn.v_proj.weight': (keys, width),
      'self_attn.o_proj.weight': (width, queries),
      'post_attention_layernorm.weight': (width,),
  }
  if gemma:
    layer['pre_feedforward_layernorm.weight'] = (width,)
    layer['post_feedforward_layernorm.weight'] = (width,)
  if kind in ('qwen3', 'qwen3_moe', 'gemma3_text'):
    layer['self_attn.q_norm.weight'] = (head_dim,)
    layer['self_attn.k_norm.weight'] = (head_dim,)
  if kind == 'qwen2':
    layer['self_attn.q_proj.bias'] = (queries,)
    layer['self_attn.k_proj.bias'] = (keys,)
    layer['self_attn.v_proj.bias'] = (keys,)
  if kind == 'qwen3_moe':
    inner = config['moe_intermediate_size']
    layer['mlp.gate.weight'] = (config['num_experts'], width)
    for i in range(config['num_experts']):
      layer[f'mlp.experts.{i}.gate_proj.weight'] = (inner, width)
      layer[f'mlp.experts.{i}.up_proj.weight'] = (inner, width)
      layer[f'mlp.experts.{i}.down_proj.weight'] = (width, inner)
  elif kind == 'mixtral':
    inner, count = config['intermediate_size'], config['num_local_experts']
    layer['block_sparse_moe.gate.weight'] = (count, width)
    for i in range(count):
      layer[f'block_sparse_moe.experts.{i}.w1.weight'] = (inner, width)
      layer[f'block_sparse_moe.experts.{i}.w2.weight'] = (width, inner)
      layer[f'block_sparse_moe.experts.{i}.w3.weight'] = (inner, width)
  else:
    inner = config['intermediate_size']
    layer['mlp.gate_proj.weight'] = (inner, width)
    layer['mlp.up_proj.weight'] = (inner, width)
    layer['mlp.down_proj.weight'] = (width, inner)

  shapes = {'model.embed_tokens.weight': (config['vocab_size'], width)}
  for i in range(config['num_hidden_layers']):
    shapes |= {f'model.layers.{i}.{name}': x for name, x in layer.items()}
  shapes['model.norm.weight'] = (width,)
  if not config['tie_word_embeddings']:
    shapes['lm_head.weight'] = (config['vocab_size'], width)
  return shapes


def tensors_of(config):
  """Random weights by their names, the same on every machine."""
  rng = np.random.RandomState(0)  # Its numbers are frozen.
  gemma = config['model_type'].startswith('gemma')

  def draw(name, shape):
    # Norms around 1, which Gemma stores as 0; everything else so that a layer
    # changes its input a lot.
    middle = 1.0 if name.endswith('norm.weight') and not gemma else 0.0
    return (middle + 0.3 * rng.standard_normal(shape)).astype(np.float32)

  return {name: draw(name, shape) for name, shape in shapes_of(config).items()}


def write(folder, name, *, tied):
  """A Hugging Face folder of the case."""
  folder.mkdir(parents=True, exist_ok=True)
  config = config_of(name, tied=tied)
  (folder / 'config.json').write_text(json.dumps(config))
  safetensors.numpy.save_file(
      tensors_of(config), folder / 'model.safetensors', {'format': 'pt'}
  )


def batch():
  """Tokens and mask [4, 16]: whole, padded left, right and on both sides."""
  rng = np.random.RandomState(1)
  tokens = rng.randint(2, SIZES['vocab_size'], (4, 16)).astype(np.int32)
  place = np.arange(16)
  mask = np.stack(
      [place >= 0, place >= 5, place < 11, (place >= 2) & (place < 11)]
  )
  return np.where(mask, tokens, 0).astype(np.int32), mask


def torch_model(folder):
  """The model as transformers reads it, every tensor accounted for."""
  import torch
  import transformers

  model, info = transformers.AutoModelForCausalLM.from_pretrained(
      folder,
      dtype=torch.float32,
      attn_implementation='eager',
      output_loading_info=True,
  )
  wrong = {kind: names for kind, names in info.items() if names}
  if wrong:
    raise ValueError(f'{folder}: {wrong}')
  return model.eval()


def torch_logits(folder, tokens, mask):
  """[real tokens, V]; one row at a time and without its padding."""
  import torch

  model, rows = torch_model(folder), []
  with torch.no_grad():
    for row, keep in zip(tokens, mask, strict=True):
      ids = torch.tensor(row[keep][None], dtype=torch.int64)
      rows.append(model(input_ids=ids).logits[0].numpy())
  return np.concatenate(rows)


def main():
  import tempfile

  tokens, mask = batch()
  arrays = {'tokens': tokens, 'mask': mask}
  with tempfile.TemporaryDirectory() as scratch:
    for name in CASES:
      for head in ('tied', 'untied'):
        folder = pathlib.Path(scratch) / name / head
        write(folder, name, tied=head == 'tied')
        logits = torch_logits(folder, tokens, mask)
        arrays[f'{name}/{head}'] = logits
        print(name, head, logits.shape, logits.std())
  np.savez_compressed(PATH, **arrays)
  print(PATH.stat().st_size)


if __name__ == '__main__':
  main()
