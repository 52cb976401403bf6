"""torchtitan's Llama 3.1 8B with our methods:

    PYTHONPATH=launch/examples torchrun --nproc_per_node 8 -m torchtitan.train \
        --module torchtitan_llama3 --config llama3_8b_adam_mini

All other options are torchtitan's. It was tried with torchtitan 0.3.0.
"""

from typing import Any

from torchtitan.components.optimizer import ParamGroupConfig
from torchtitan.models.llama3 import config_registry
from torchtitan.trainer import Trainer

from ds_memopt.torchtitan_optimizers import NamedOptimizersContainer


def llama3_8b_adam_mini() -> Trainer.Config:
    return _with_method(config_registry.llama3_8b(), "AdamMini", lr=3e-4)


def llama3_8b_gwt() -> Trainer.Config:
    return _with_method(config_registry.llama3_8b(), "GWT", lr=2.4e-3, dense_lr=3e-4, level=2)


def llama3_debugmodel_adam_mini() -> Trainer.Config:
    return _with_method(config_registry.llama3_debugmodel(), "AdamMini", lr=8e-4)


def _with_method(config: Trainer.Config, name: str, **hyper_parameters: Any) -> Trainer.Config:
    """The config with another optimizer. Norms get no weight decay."""
    shared = {"betas": (0.9, 0.95), "eps": 1e-8} | hyper_parameters
    config.optimizer = NamedOptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(
                pattern=pattern, optimizer_name=name, optimizer_kwargs=shared | {"weight_decay": weight_decay}
            )
            for pattern, weight_decay in ((r"norm", 0.0), (r".*", 0.1))
        ]
    )
    return config
