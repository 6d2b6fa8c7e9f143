"""Published sizes of models, for programs that are built without their files.

Each is what the model's `config.json` on the Hugging Face hub says, as far as
its family reads it. A run never looks here: it has the file itself.
"""

_QWEN3 = {
    'model_type': 'qwen3',
    'head_dim': 128,
    'max_position_embeddings': 32768,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'rope_theta': 1e6,
    'tie_word_embeddings': False,
    'vocab_size': 151936,
}
_QWEN3_8B = _QWEN3 | {
    'hidden_size': 4096,
    'intermediate_size': 12288,
    'num_hidden_layers': 36,
}
_QWEN3_30B_A3B = _QWEN3 | {
    'model_type': 'qwen3_moe',
    'hidden_size': 2048,
    'intermediate_size': 6144,
    'moe_intermediate_size': 768,
    'norm_topk_prob': True,
    'num_experts': 128,
    'num_experts_per_tok': 8,
    'num_hidden_layers': 48,
    'num_key_value_heads': 4,
}
_OF_A_CHAT_MODEL = {'max_position_embeddings': 40960}

# Name on the hub -> fields of its config.json.
PUBLISHED = {
    'Qwen/Qwen3-8B-Base': _QWEN3_8B,
    'Qwen/Qwen3-8B': _QWEN3_8B | _OF_A_CHAT_MODEL,
    'Qwen/Qwen3-30B-A3B-Base': _QWEN3_30B_A3B,
    'Qwen/Qwen3-30B-A3B': _QWEN3_30B_A3B | _OF_A_CHAT_MODEL,
    'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B': {
        'model_type': 'qwen2',
        'hidden_size': 1536,
        'intermediate_size': 8960,
        'max_position_embeddings': 131072,
        'num_attention_heads': 12,
        'num_hidden_layers': 28,
        'num_key_value_heads': 2,
        'rms_norm_eps': 1e-6,
        'rope_theta': 1e4,
        'tie_word_embeddings': False,
        'vocab_size': 151936,
    },
}
