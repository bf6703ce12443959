"""Makes the parts of the embedded Stable Diffusion: a small base with non-zero terminal SNR.

Three trainings, each of the published kind at a small size: an autoencoder (reconstruction and a
slight KL term, Rombach et al. 2022), a text encoder (contrastive with an image tower, Radford et
al. 2021) and a UNet with epsilon-prediction on the published betas (Ho et al. 2020), whose terminal
SNR is not zero: the fine-tunes of this project start from it to apply the zero-SNR fix.
"""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from blackpoint.data.files.whole_file import whole_file
from blackpoint.sampling.prediction import add_noise, training_target
from blackpoint.sampling.schedule import NoiseSchedule

TEXT_WIDTH, TEXT_TOKENS = 64, 16
Report = Iterator[tuple[int, float]]  # (step, loss)


def build_tokenizer(folder: Path, words: list[str]) -> CLIPTokenizer:
    """Writes a CLIP byte-pair vocabulary in which each given word is one token."""
    byte_tokens = [chr(code) for code in range(33, 127)]
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words), key=lambda word: (-len(word), word)):  # long words merge first
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            if (symbols[0], symbols[1]) not in merges:
                merges.append((symbols[0], symbols[1]))
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    vocabulary = byte_tokens + [token + "</w>" for token in byte_tokens]
    vocabulary += [left + right for left, right in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    numbered = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(numbered, indent=0), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(numbered, merges, model_max_length=TEXT_TOKENS)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_vae() -> AutoencoderKL:
    """Builds an autoencoder of 64 px images to 4 x 32 x 32 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Builds the noise predictor on 4 x 32 x 32 latents."""
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(24, 48, 96, 128),
        down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Builds a two-layer CLIP text model whose token embeddings start well apart."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter)
    return encoder


def to_floats(images: np.ndarray) -> Tensor:
    """Turns (N, H, W, 3) uint8 into (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(vae: AutoencoderKL, images: np.ndarray, num_steps: int, seed: int) -> Report:
    """Trains on mean absolute and squared error and 1e-6 KL; sets the scaling factor at the end."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.1)
    for step in range(num_steps):
        batch = to_floats(images[rng.choice(len(images), 16, replace=False)])
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        loss = error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield step, loss.item()
    moments = encode_moments(vae, images[:1024])
    vae.register_to_config(scaling_factor=round(1 / moments.chunk(2, 1)[0].std().item(), 5))


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Encodes to posterior means and log-variances (N, 8, 32, 32), unscaled."""
    batches = [images[start : start + 64] for start in range(0, len(images), 64)]
    return torch.cat([vae.encode(to_floats(batch)).latent_dist.parameters for batch in batches])


class ImageTower(nn.Module):
    """The image half of the contrastive training; not kept."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96)
        layers: list[nn.Module] = [nn.AvgPool2d(2)]
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.BatchNorm2d(after),
                nn.GELU(),
            ]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, TEXT_WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def train_text_encoder(
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    images: np.ndarray,
    captions: list[str],
    num_steps: int,
    seed: int,
) -> Report:
    """Trains with the contrastive loss; pairs with equal captions in a batch count as matches."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tower, project = ImageTower(), nn.Linear(TEXT_WIDTH, TEXT_WIDTH, bias=False)
    log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
    parameters = [
        *encoder.parameters(), *tower.parameters(), *project.parameters(), log_scale,
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    for step in range(num_steps):
        rows = rng.choice(len(images), 128, replace=False)
        texts = [captions[row] for row in rows]
        tokens = tokenizer(texts, padding="max_length", return_tensors="pt")
        text = F.normalize(project(encoder(tokens.input_ids).pooler_output), dim=1)
        image = F.normalize(tower(to_floats(images[rows])), dim=1)
        logits = log_scale.exp().clamp(max=100) * image @ text.T
        same = torch.tensor([[left == right for right in texts] for left in texts]).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step, loss.item()


@torch.no_grad()
def encode_captions(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]
) -> dict[str, Tensor]:
    """Encodes each distinct caption once to (tokens, width)."""
    distinct = sorted(set(captions))
    tokens = tokenizer(distinct, padding="max_length", return_tensors="pt")
    states = encoder(tokens.input_ids).last_hidden_state
    return dict(zip(distinct, states, strict=True))


def train_unet(
    unet: UNet2DConditionModel,
    schedule: NoiseSchedule,
    moments: Tensor,
    scaling_factor: float,
    captions: list[str],
    embeddings: dict[str, Tensor],
    num_steps: int,
    seed: int,
    state_file: Path,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.998,
    save_every_steps: int = 250,
) -> Report:
    """Trains epsilon-prediction with cosine decay; leaves the averaged weights in `unet`.

    Each step's draws come from (seed, step) and the state is saved every `save_every_steps`, so a
    killed training continues where it was saved. Captions are dropped with probability 0.1.
    """
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, num_steps):
        rng = np.random.default_rng([seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        warm_up = min(1.0, (step + 1) / 100)
        decay = 0.02 + 0.49 * (1 + math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm_up * decay
        rows = rng.choice(len(moments), batch_size, replace=False)
        texts = ["" if rng.random() < 0.1 else captions[row] for row in rows]
        mean, log_variance = moments[rows].chunk(2, 1)
        spread = (0.5 * log_variance.clamp(-30, 20)).exp()
        x0 = scaling_factor * (mean + spread * torch.randn(mean.shape, generator=generator))
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randint(schedule.num_steps, (batch_size,), generator=generator)
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in schedule.at(t))
        embeds = torch.stack([embeddings[text] for text in texts])
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(add_noise(x0, eps, alpha, sigma), t, embeds).sample
        loss = F.mse_loss(output.float(), training_target("epsilon", x0, eps, alpha, sigma))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - keep)
        if (step + 1) % save_every_steps == 0 or step + 1 == num_steps:
            with whole_file(state_file) as unfinished:
                torch.save(
                    {
                        "step": step + 1,
                        "unet": unet.state_dict(),
                        "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    },
                    unfinished,
                )
        yield step, loss.item()
    unet.load_state_dict(average.state_dict())
