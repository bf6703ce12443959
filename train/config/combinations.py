"""Options of a training that exclude each other; free of torch, for the help."""

from typing import TYPE_CHECKING

from blackpoint.data.files.errors import UserError

if TYPE_CHECKING:
    from blackpoint.train.config.config import TrainConfig


def check_combinations(config: "TrainConfig") -> None:
    """Raises UserError for options that do not combine."""
    if config.optimizer.name == "adamw_8bit" and config.trainer.channels_last:
        raise UserError(
            "optimizer.name=adamw_8bit and trainer.channels_last=true do not combine: "
            "bitsandbytes puts the weights back in its own order at every step; drop one"
        )
    if config.trainer.compile_mode != "default":
        mode = f"trainer.compile_mode={config.trainer.compile_mode}"
        if not config.trainer.compile:
            raise UserError(f"{mode} is of trainer.compile=true; set it, or leave the mode out")
        if config.data.buckets.enabled:
            raise UserError(
                f"{mode} and data.buckets.enabled=true do not combine: graphs and timings are "
                "of one size, and buckets have many; use trainer.compile_mode=default"
            )
    _check_memory_options(config)
    if config.trainer.strategy == "fsdp":
        _check_sharding(config)


def _check_memory_options(config: "TrainConfig") -> None:
    trainer, max_steps = config.trainer, config.trainer.max_steps
    if config.ema.enabled and config.ema.every_steps > max_steps:
        raise UserError(
            f"ema.every_steps={config.ema.every_steps}: must be at most trainer.max_steps="
            f"{max_steps}, or nothing is averaged; lower it, or set ema.enabled=false"
        )
    levels = trainer.gradient_checkpointing_levels
    if levels and not trainer.gradient_checkpointing:
        raise UserError(
            f"trainer.gradient_checkpointing_levels={levels}: set "
            "trainer.gradient_checkpointing=true with it, or leave it out"
        )
    if not config.optimizer.fused_backward:
        return
    world_size = trainer.devices * trainer.num_nodes
    conflicts = {
        f"trainer.gradient_clip={trainer.gradient_clip:g} (the norm of all gradients is known "
        "only after the last update); set trainer.gradient_clip=0": trainer.gradient_clip > 0,
        f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} (no gradient is "
        "left to add to); set trainer.accumulate_grad_batches=1": (
            trainer.accumulate_grad_batches > 1
        ),
        f"{world_size} processes (each would update by its own gradients); train in one, "
        "trainer.devices=1 trainer.num_nodes=1": world_size > 1,
        "trainer.precision=16-mixed (whether scaled gradients are finite is known only after "
        "the last update); use trainer.precision=bf16-mixed": trainer.precision == "16-mixed",
    }
    for conflict, is_there in conflicts.items():
        if is_there:
            raise UserError(
                "optimizer.fused_backward=true updates each weight in the backward pass, which "
                f"does not combine with {conflict}, or leave optimizer.fused_backward out"
            )


def _check_sharding(config: "TrainConfig") -> None:
    trainer, rank = config.trainer, config.lora.rank
    refused = {
        "trainer.precision=16-mixed do not combine: its loss scaler sees the gradients of one "
        "process alone; use bf16-mixed or 32-true": trainer.precision == "16-mixed",
        f"lora.rank={rank} do not combine: what adapters leave frozen would be whole in every "
        "process, and they are small; use trainer.strategy=ddp": rank is not None,
        "trainer.channels_last or trainer.compile do not combine: shares are rows of weights "
        "in their usual order, gathered block by block; set both to false": (
            trainer.channels_last or trainer.compile
        ),
        "optimizer.name=adamw_8bit do not combine: its blocks of 256 values would not end "
        "where a share does; use adamw, whose state is sharded": (
            config.optimizer.name == "adamw_8bit"
        ),
        "optimizer.name=adafactor do not combine: its means are over whole rows and columns; "
        "use adamw, whose state is sharded": config.optimizer.name == "adafactor",
        "trainer.precision=bf16-true do not combine: its rounding steps whole weights; use "
        "bf16-mixed": trainer.precision == "bf16-true",
        "ema.device=cpu do not combine: the average is shared out as it is; leave it out": (
            config.ema.device == "cpu"
        ),
    }
    for reason in (reason for reason, is_set in refused.items() if is_set):
        raise UserError(f"trainer.strategy=fsdp and {reason}")
