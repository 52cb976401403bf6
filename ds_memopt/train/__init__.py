"""The library behind launch/pretrain.py and launch/finetune.py: data, models, settings, the loop, the comparison."""
