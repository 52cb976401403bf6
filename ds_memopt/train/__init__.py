"""The library behind launch/pretrain.py: data, model presets, configuration, the training loop, the comparison."""
