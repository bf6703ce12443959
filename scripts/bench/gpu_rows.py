"""The rows of the GPU bench: each times its contestants and hands on one result of each.

A training is timed alone, the bare loop first, so that its peak of memory is its own; contestants
that share a model take turns. A result stands beside two floors: the FLOPs of the UNet over the
matrix products that the device was measured at in that number format, and the bytes that must move
over its measured bandwidth. Of a training those are the optimizer's: gradient, weight and two
moments are read, the last three written, and an average is read and written beside them. Of a call
of the UNet they are its weights, read once.
"""

import contextlib
import functools
import importlib.util
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch.utils.data import DataLoader

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.encoders import dtype_of
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.options import SamplingOptions
from blackpoint.sampling.runtime.speed import prepare_unet
from blackpoint.sampling.search.problem import Seeded, Trial
from blackpoint.sampling.search.runner import TrialRunner
from blackpoint.sampling.verifiers.load import VerifierConfig, load_verifier
from blackpoint.sampling.verifiers.verifier import of_images
from blackpoint.scripts.bench.bare import bare_update
from blackpoint.scripts.bench.gpu_models import Family, Work, build, conditioning, unet_flops
from blackpoint.scripts.bench.sampling import (
    AROUND,
    GUIDANCE,
    LOOP,
    NAMES,
    PIPELINE,
    SAMPLE,
    UNET,
    contestants_of,
)
from blackpoint.scripts.config import load
from blackpoint.train.config.config import Precision, TrainConfig

if TYPE_CHECKING:  # the command imports its rows
    from blackpoint.scripts.bench.gpu import Bench

COMPUTED_IN = {
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "32-true": torch.float32,
}
RANK = 16
PROMPT = "a white three on a black background"


def training(bench: "Bench", name: str, work: Work, precision: str) -> None:
    """Steps of a fine-tune from cached latents: the bare loop, then the run as `train` has it."""
    family, dtype = bench.families[name], COMPUTED_IN[precision]
    if work == "lora" and importlib.util.find_spec("peft") is None:
        bench.emit({"note": "peft is not installed"})
        return
    if dtype not in bench.flops_per_s:
        bench.emit({"note": "this GPU does not compute in bfloat16"})
        return
    flops = float(family.images * unet_flops(family, work))
    settings = {
        "run_dir": "unused",
        "checkpoint": "random",
        "data.shards": "unused",
        "data.resolution": family.resolution,
        "batch_size": family.images,
        "optimizer.warmup_steps": 0,
        "lora.rank": RANK if work == "lora" else "null",
        "trainer.precision": precision if precision in get_args(Precision) else "32-true",
    }
    config = load(TrainConfig, [f"{key}={value}" for key, value in settings.items()])
    bench.clear()
    base, moved = _bare(bench, family, config, precision)
    bench.result("bare loop", base, family.images, flops, moved, dtype)
    reason = _not_ours(bench.device, precision)
    if reason:
        bench.emit({"what": "ours", "note": reason})
        return
    bench.clear()
    seconds, moved = _ours(bench, family, config)
    bench.result("ours, with EMA", seconds, family.images, flops, moved, dtype, base)


def _not_ours(device: torch.device, precision: str) -> str | None:
    if importlib.util.find_spec("lightning") is None:
        return "lightning is not installed"
    if precision not in get_args(Precision):
        return f"trainer.precision has no {precision}"
    if precision == "16-mixed" and device.type != "cuda":
        return "trainer.precision=16-mixed needs a GPU"
    return None


def _trained(model: DiffusionModel, config: TrainConfig, dtype: torch.dtype) -> list[Any]:
    from blackpoint.train.dropout import SampleSeeds
    from blackpoint.train.lora import trained_part

    part = trained_part(model.unet, config.lora, config.seed, dtype, SampleSeeds())
    model.unet.train()
    return list(part.parameters())


def _bare(
    bench: "Bench", family: Family, config: TrainConfig, precision: str
) -> tuple[list[float], float]:
    """Returns the seconds per step of each round, and the bytes that the optimizer moves."""
    dtype, device = COMPUTED_IN[precision], bench.device
    held = dtype if precision == "bf16-true" else torch.float32
    model = build(family, device, held)
    parameters = _trained(model, config, dtype)
    optimizer = torch.optim.AdamW(parameters, 1e-5, fused=True)
    autocast: Any = contextlib.nullcontext
    if precision.endswith("mixed"):
        autocast = functools.partial(torch.autocast, device.type, dtype)
    scaler = torch.amp.GradScaler(device.type) if precision == "16-mixed" else None
    unet, clip = model.unet, config.trainer.gradient_clip
    update = bare_update(unet, parameters, model.process, optimizer, clip, autocast, scaler, held)
    x0 = torch.randn(family.images, *model.latent_shape(), device=device)
    condition = conditioning(family, family.images, device).to(held)
    others = condition.unet_arguments(*model.image_sides)

    def block() -> None:
        for _ in range(bench.config.steps):
            update(x0, condition.prompt_embeds, **others)

    seconds = bench.seconds({"bare": block}, warm_ups=2)["bare"]
    return [s / bench.config.steps for s in seconds], 7.0 * sum(p.nbytes for p in parameters)


def _ours(bench: "Bench", family: Family, config: TrainConfig) -> tuple[list[float], float]:
    """Returns the same of FineTuner in Lightning's Trainer, with the average and the watch."""
    from lightning.pytorch import Callback, Trainer

    from blackpoint.train.callbacks.trainer import lightning_precision
    from blackpoint.train.callbacks.watch import Watch
    from blackpoint.train.draws import Draws
    from blackpoint.train.ema import Ema
    from blackpoint.train.module import FineTuner

    class Blocks(Callback):
        """Takes the time every few steps, when the device is done."""

        def __init__(self) -> None:
            self.times_s: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step % bench.config.steps == 0:
                bench.wait()
                self.times_s.append(time.perf_counter())

    model = build(family, bench.device, torch.float32)
    module, blocks = FineTuner(model, config), Blocks()
    count = family.images
    condition = conditioning(family, count, "cpu")
    batch: dict[str, Any] = {
        "moments": torch.randn(count, 8, *model.latent_shape()[1:]),
        "prompt_embeds": condition.prompt_embeds,
        **{name: torch.arange(count) for name in ("index", "position")},
        "epoch": torch.zeros(count, dtype=torch.long),
        "key": [str(number) for number in range(count)],
    }
    if condition.pooled is not None:
        side = float(family.resolution)
        sizes = torch.tensor([side, side, 0, 0, side, side]).expand(count, 6).contiguous()
        batch |= {"pooled": condition.pooled, "sizes": sizes}
    draws = module.draw(batch)
    if bench.device.type == "cuda":  # as the loader's batches are
        batch |= {k: v.pin_memory() for k, v in batch.items() if isinstance(v, torch.Tensor)}
        draws = Draws(*(v if v is None else v.pin_memory() for v in draws))  # type: ignore[arg-type]
    batch["draws"] = draws
    rounds_before = 1 + 1 // bench.config.steps  # two steps or more that are not timed
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="gpu" if bench.device.type == "cuda" else "cpu",
            devices=1,
            max_steps=(rounds_before + bench.config.rounds) * bench.config.steps,
            precision=lightning_precision(config.trainer.precision),
            gradient_clip_val=config.trainer.gradient_clip,
            callbacks=[Ema(config.ema.decay), Watch(10, count), blocks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, DataLoader([batch] * trainer.max_steps, batch_size=None))  # type: ignore[arg-type]
    times = blocks.times_s[rounds_before - 1 :]
    seconds = [(b - a) / bench.config.steps for a, b in zip(times, times[1:], strict=False)]
    return seconds, 10.0 * sum(p.nbytes for p in module.unet.parameters())


def sampling(bench: "Bench", name: str) -> None:
    """A guided batch of images: the UNet's calls alone, ours, the stock pipeline."""
    family = bench.families[name]
    model = build(family, bench.device, bench.half)
    parts = contestants_of(model, [PROMPT] * family.samples, bench.config.num_steps)
    ours, theirs = parts[SAMPLE](), parts[PIPELINE]()
    assert isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor)
    difference = (ours - theirs.cpu()).abs().max().item()
    note = f"pixels differ from the pipeline's by up to {difference:.2g}"
    del parts[AROUND]
    seconds = bench.seconds(parts, warm_ups=0)
    floors = _floors(
        bench, family, model, 2 * family.samples * bench.config.num_steps, bench.config.num_steps
    )
    for part in (UNET, LOOP, SAMPLE, PIPELINE):
        base = seconds[UNET] if part != UNET else ()
        words = note if part == SAMPLE else ""
        bench.result(NAMES[part], seconds[part], family.samples, *floors, base=base, note=words)


def search(bench: "Bench", name: str) -> None:
    """Candidates of a search in batches of several sizes: denoised, decoded, scored."""
    family = bench.families[name]
    model = build(family, bench.device, bench.half)
    dark = load_verifier(VerifierConfig("luminance", target=0.0), model.device)
    verifier = of_images({"dark": dark})["dark"]
    options = SamplingOptions(num_steps=bench.config.num_steps, guidance_rescale=GUIDANCE.rescale)
    one: list[float] = []
    for size in (1, family.samples, 4 * family.samples):
        runner = TrialRunner(model, {0: PROMPT}, options, [verifier], {verifier.name: 1.0}, size)
        trials = [
            (0, Trial(0, number, Seeded(number), bench.config.num_steps, "final", number))
            for number in range(size)
        ]
        calls = functools.partial(lambda runner, trials: list(runner.run(trials)), runner, trials)
        seconds = bench.seconds({"run": calls})["run"]
        one = one or seconds
        floors = _floors(
            bench, family, model, 2 * size * bench.config.num_steps, bench.config.num_steps
        )
        base = [size * s for s in one] if size > 1 else ()
        bench.result(f"{size} candidates at once", seconds, size, *floors, base=base)


def attention(bench: "Bench", name: str) -> None:
    """Calls of the UNet with torch's own attention, and with that of xformers."""
    options = {kernel: {"attention": kernel} for kernel in ("sdpa", "xformers")}
    unet_options(bench, name, options)


def compilation(bench: "Bench", name: str, work: Work) -> None:
    """Calls of the UNet, or a forward and a backward pass, without and with torch.compile."""
    off, on = {"attention": "sdpa"}, {"attention": "sdpa", "compile": True}
    unet_options(bench, name, {"compile off": off, "compile on": on}, work)


def unet_options(
    bench: "Bench", name: str, options: Mapping[str, Mapping[str, Any]], work: Work = "forward"
) -> None:
    """Times one evaluation of a guided batch's rows, or of a training batch, for each option."""
    family, base = bench.families[name], list[float]()
    is_training = work != "forward"
    rows = family.images if is_training else 2 * family.samples
    for what, option in options.items():
        bench.clear()
        model = build(family, bench.device, bench.half)
        unet = model.unet.requires_grad_(is_training)
        try:
            prepare_unet(unet, **option, training=is_training)
        except UserError as error:
            bench.emit({"what": what, "note": str(error)})
            continue
        x = torch.randn(rows, *model.latent_shape(), device=bench.device, dtype=bench.half)
        condition = conditioning(family, rows, bench.device).to(bench.half)
        arguments = (x, torch.full((rows,), 500, device=bench.device), condition.prompt_embeds)
        others = condition.unet_arguments(*model.image_sides)

        def call(unet: Any = unet, arguments: Any = arguments, others: Any = others) -> None:
            with torch.set_grad_enabled(is_training):
                output = unet(*arguments, **others, return_dict=False)[0]
                if is_training:
                    output.float().square().mean().backward()

        seconds = bench.seconds({what: call}, warm_ups=2)[what]
        floors = _floors(bench, family, model, rows, 1, work)
        bench.result(what, seconds, rows, *floors, base=base)
        base = base or seconds


def _floors(
    bench: "Bench",
    family: Family,
    model: DiffusionModel,
    rows: int,
    num_calls: int,
    work: Work = "forward",
) -> tuple[float, float, torch.dtype]:
    """Returns FLOPs, bytes and number format of `num_calls` calls of the UNet on `rows` in all."""
    weights = sum(p.nbytes for p in model.unet.parameters())
    return float(rows * unet_flops(family, work)), float(num_calls * weights), dtype_of(model.unet)
