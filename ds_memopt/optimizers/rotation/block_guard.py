"""Watch over a model of which only one block trains: what would make its gradients wrong, missing or costly.

Names of transformers used here, checked against 5.23: _gradient_checkpointing_func, a functools.partial over
torch.utils.checkpoint, and the forward hook make_inputs_require_grads; peft calls its own make_inputs_require_grad.
Private name of torch used here, checked against 2.13: DistributedDataParallel._active_ddp_module.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ds_memopt.blocks.hook import Hook
from ds_memopt.blocks.names import bare_modules
from ds_memopt.support import refuse

logger = logging.getLogger("ds_memopt")


class BlockGuard:
    """Forward hooks on a model that refuse, or put right, what does not go together with a block that changes.

    model: the model to watch from now on. method: the class of the optimizer, for its refusals.
    """

    def __init__(self, model: nn.Module, method: type) -> None:
        self._model, self._method = weakref.ref(model), method
        self._recording = False  # whether the model's forward was entered with gradients enabled
        self._handles: list[RemovableHandle] = []
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            refuse(method, "ddp")
        self._without: dict[str, bool] = {}  # of the active modules that ran in this forward: always without gradients?
        self._root_handles = [
            model.register_forward_pre_hook(Hook(self._enter_model)),
            model.register_forward_hook(Hook(self._leave_model), always_call=True),
        ]

    def watch(self, active: Iterable[nn.Parameter]) -> None:
        """From now on these parameters train, and no others of the model."""
        for handle in self._handles:
            handle.remove()
        identities = set(map(id, active))
        self._handles = [
            module.register_forward_pre_hook(Hook(functools.partial(self._enter_active_module, name)))
            for name, module in bare_modules(self._model()).items()
            if any(id(parameter) in identities for parameter in module.parameters(recurse=False))
        ]

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles + self._root_handles:
            handle.remove()

    def _enter_model(self, model: nn.Module, args: tuple) -> None:
        if DistributedDataParallel._active_ddp_module is not None:
            refuse(self._method, "ddp")
        self._recording = torch.is_grad_enabled()
        self._without.clear()
        if self._recording:
            make_checkpointing_stop_early(model)

    def _leave_model(self, model: nn.Module, args: tuple, output) -> None:
        recording, self._recording = self._recording, False
        names = [name for name, without in self._without.items() if without]
        if recording and names and output is not None:  # None: the forward raised
            raise ValueError(
                f"{names[0]} trains, but its forward runs without gradients: reentrant checkpointing finds no gradient "
                "where a layer's input needs none, or leads backward through all layers. Pass use_reentrant=False to "
                f"torch.utils.checkpoint; with {self._method.__name__} do not use DeepSpeed's activation checkpointing."
            )

    def _enter_active_module(self, name: str, module: nn.Module, args: tuple) -> None:
        # A reentrant checkpoint runs the first forward without gradients. A model may do so once, and once with them.
        if self._recording:
            self._without[name] = self._without.get(name, True) and not torch.is_grad_enabled()


def make_checkpointing_stop_early(model: nn.Module) -> None:
    """Let backward end at the lowest trained layer where transformers checkpoints activations.

    Sets use_reentrant=False, and takes back that the embedding's output requires a gradient, which transformers sets
    for reentrant checkpointing and which leads backward through every frozen layer.
    """
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant") is not False:
            keywords = checkpoint.keywords | {"use_reentrant": False}
            module._gradient_checkpointing_func = functools.partial(checkpoint.func, *checkpoint.args, **keywords)
            logger.info("%s: gradient checkpointing set to use_reentrant=False.", type(module).__name__)
        for number, hook in list(module._forward_hooks.items()):
            # transformers forgets its hook when checkpointing is enabled twice, as by a program and then by Trainer.
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del module._forward_hooks[number]
