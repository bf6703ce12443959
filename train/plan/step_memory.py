"""Memory of a training step, measured without any: on tensors of a shape and a format alone.

Parameters are counted as they are. For the rest the UNet goes forward and backward in torch's
FakeTensorMode, while every storage counts from its making to its end: activations that wait for the
backward pass, what checkpointing computes again, copies that autocast makes, gradients as they
appear. So no weight is read, and the device that is planned for need not be here.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from blackpoint.sampling.checkpoints.architecture import NUM_SIZES
from blackpoint.sampling.choices import SAMPLED_AT_ONCE
from blackpoint.sampling.conditioning import Conditioning
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.speed import checkpoint_gradients
from blackpoint.sampling.text_encoding import chunks_of
from blackpoint.train.cluster.device import COMPUTE_DTYPE
from blackpoint.train.config.config import PreviewConfig, TrainConfig
from blackpoint.train.dropout import SampleSeeds, add_dropout
from blackpoint.train.lora import trained_part
from blackpoint.train.uncertainty import LearnedUncertainty


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live: `now`, and the `peak`.

    Those of `known` tensors, which operations may return views of, don't count. `operations` are
    those of products and convolutions, as torch counts them; its own counter hooks modules, which
    keeps what a checkpointed block would free.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._ended, key, size)

    def _ended(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process, without the optimizer's states and the average."""

    frozen: int
    """Weights of the UNet that are not trained."""
    trained: int
    peak: int
    """Of the two passes, beside the weights; gradients are in it as far as they are there."""
    sampling: int
    """Peak of a step of sampling previews, beside the weights; 0 without them."""
    parameters: tuple[Parameter, ...]
    """Trained ones, without memory."""
    operations: int
    """Of the products and convolutions of both passes; a multiplication and an addition are two."""


def step_memory(
    config: TrainConfig, model: DiffusionModel, images: int, on_gpu: bool
) -> StepMemory:
    """Measures the step of `images` images per process; `model` needs no weights."""
    side = config.data.resolution
    with init_empty_weights():
        unet: Any = UNet2DConditionModel.from_config(model.unet.config)
    dtype = COMPUTE_DTYPE[config.trainer.precision]
    seeds = SampleSeeds()
    add_dropout(unet, config.dropout, side // model.downsampling_factor, seeds)
    part = trained_part(unet, config.lora, 0, dtype, seeds)
    held = dtype if config.trainer.precision == "bf16-true" else torch.float32
    if held != torch.float32:
        nn.Module.to(unet, held)
    unet.train()
    if config.trainer.gradient_checkpointing:
        checkpoint_gradients(unet, config.trainer.gradient_checkpointing_levels)
    mixed = config.trainer.precision.endswith("mixed")
    if mixed and on_gpu:
        _norms_in_float32(unet)

    def output_of(x: Tensor) -> Tensor:
        condition = _condition(model, len(x), config.data.max_tokens).to(held)
        steps = torch.zeros(len(x), dtype=torch.long)
        with torch.autocast("cpu", dtype, enabled=mixed):
            return _network(model, unet, x.to(held), steps, condition)

    shape = model.latent_shape(side, side)
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        _as_fake(unet, part)
        seeds.of_batch = torch.zeros(images, dtype=torch.long)
        parameters = [*part.parameters()]
        if config.loss.uncertainty:
            parameters += LearnedUncertainty(1).parameters()
        others = [p for p in unet.parameters() if not p.requires_grad]
        trained, frozen = (sum(p.nbytes for p in group) for group in (parameters, others))
        if config.optimizer.fused_backward:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        live = LiveBytes(unet.parameters())
        with live:
            if config.trainer.accumulate_grad_batches > 1:  # those of the batches before
                for parameter in part.parameters():
                    parameter.grad = torch.zeros_like(parameter)
            x = torch.empty(images, *shape)
            noise, target = torch.empty_like(x), torch.empty_like(x)
            (output_of(x + noise).float() - target).square().mean().backward()
        unet.eval()
        with torch.no_grad(), LiveBytes(unet.parameters()) as sampling:
            if rows := preview_images(config.preview):
                is_guided = config.preview.guidance_scale != 1 and not model.is_unconditional
                output_of(torch.empty((1 + is_guided) * rows, *shape))
    sizes = frozen, trained, live.peak, sampling.peak
    return StepMemory(*sizes, tuple(parameters), live.operations)


def preview_images(preview: PreviewConfig) -> int:
    """Returns how many images previews sample at once."""
    return min(
        SAMPLED_AT_ONCE, len(preview.prompts) * preview.num_images * bool(preview.every_steps)
    )


def autoencoder_memory(
    model: DiffusionModel, images: int, side: int, dtype: torch.dtype, decodes: bool = False
) -> int:
    """Measures the peak of encoding pictures, or of decoding them, beside the weights."""
    assert model.pipeline is not None
    with init_empty_weights():
        vae: Any = AutoencoderKL.from_config(model.pipeline.read_json("vae/config.json"))
    vae.to(dtype)
    with FakeTensorMode(), torch.no_grad():
        _as_fake(vae)
        with LiveBytes(vae.parameters()) as live:
            if decodes:
                vae.decode(torch.empty(images, *model.latent_shape(side, side), dtype=dtype))
            else:
                vae.encode(torch.empty(images, 3, side, side, dtype=dtype))
    return live.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _as_fake(*roots: nn.Module) -> None:
    """Puts fake parameters, of a CPU, in the place of those on the meta device."""
    fake: dict[Parameter, Parameter] = {}
    for module in (module for root in roots for module in root.modules()):
        for name, given in module.named_parameters(recurse=False):
            if given not in fake:
                empty = torch.empty(given.shape, dtype=given.dtype)
                fake[given] = Parameter(empty, given.requires_grad)
            module.register_parameter(name, fake[given])


def _norms_in_float32(unet: nn.Module) -> None:
    """Lets norms compute in float32, as autocast does on a GPU and not on a CPU."""

    def in_float32(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())

    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.forward = partial(in_float32, module.forward)  # type: ignore[method-assign]


def _network(
    model: DiffusionModel, unet: nn.Module, x: Tensor, t: Tensor, condition: Conditioning
) -> Tensor:
    """Evaluates `unet` in the place of the model's own."""
    own, model.unet = model.unet, unet
    try:
        return model.network(x, t, condition)
    finally:
        model.unet = own


def _condition(model: DiffusionModel, images: int, max_tokens: int | None) -> Conditioning:
    """Returns what a batch is conditioned on, without numbers."""
    config = model.unet.config
    if model.tokenizer is None:
        return model.encode_prompts([""] * images)
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    tokens = model.tokenizer.model_max_length * chunks_of(max_tokens, model.tokenizer)
    embeds = torch.empty(images, tokens, width)
    if not model.is_xl:
        return Conditioning(embeds)
    pooled = config.projection_class_embeddings_input_dim
    pooled -= NUM_SIZES * config.addition_time_embed_dim
    return Conditioning(embeds, torch.empty(images, pooled), torch.empty(images, NUM_SIZES))
