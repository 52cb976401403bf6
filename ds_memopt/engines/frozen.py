"""For methods whose parameters do not all require gradients at every moment: DeepSpeed takes those for frozen ones.

Private names of DeepSpeed used here, checked against 0.19.8:
  DeepSpeedEngine._common_checkpoint_state, .module_state_dict, ._zero3_consolidated_16bit_state_dict, .destroy
      (all wrapped)
"""

from __future__ import annotations

from ds_memopt.optimizers import BAdam, InPlaceOptimizer


def common_checkpoint_state(original, engine, module_state_dict, zero_optimizer_state, save_frozen_param):
    """What a checkpoint says of the run: at ZeRO-1 too, all frozen weights.

    DeepSpeed writes them at ZeRO-2 and 3 only, and without them zero_to_fp32 would lose them.
    """
    if isinstance(engine.basic_optimizer, (BAdam, InPlaceOptimizer)):
        save_frozen_param = save_frozen_param or zero_optimizer_state
    return original(module_state_dict, zero_optimizer_state, save_frozen_param)


def with_all_trained(original, engine, *arguments, **keywords):
    """A method of the engine that leaves frozen parameters out on request."""
    trained = [p for p in getattr(engine.basic_optimizer, "trained_parameters", list)() if not p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        return original(*arguments, **keywords)
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)


def destroy(original, engine) -> None:
    """The engine's destroy; then the model is as it was before the method."""
    original()
    if isinstance(engine.basic_optimizer, (BAdam, InPlaceOptimizer)):
        engine.basic_optimizer.release()


WRAPPERS = {
    "_common_checkpoint_state": common_checkpoint_state,
    "module_state_dict": with_all_trained,
    "_zero3_consolidated_16bit_state_dict": with_all_trained,
    "destroy": destroy,
}
