"""Causal language models: Flax NNX blocks seen as pure functions of params."""
