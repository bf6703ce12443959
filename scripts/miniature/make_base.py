"""Makes the embedded base and the digit reader: python -m blackpoint.scripts.miniature.make_base
[key=value ...].

Each stage leaves its result in `work` and is skipped when the result is there; the UNet continues
from its last saved state. About an hour on two CPU cores.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.progress import track
from transformers import CLIPTextModel, CLIPTokenizer

from blackpoint.sampling.checkpoints.saving import STABLE_DIFFUSION, write_json
from blackpoint.sampling.schedule import NoiseSchedule
from blackpoint.scripts.miniature import embedded_base as base
from blackpoint.scripts.miniature.digit_readers import DigitReader, save_weights, train_reader
from blackpoint.scripts.miniature.digits import BACKGROUNDS, DIGIT_NAMES, INKS, digit_samples

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


@dataclass
class BaseConfig:
    """How the embedded base is trained."""

    output: str = "assets/tiny_sd"
    """Folder of the finished pipeline."""
    digit_reader: str = "assets/digit_reader"
    """Folder of the digit classifier that judges samples."""
    work: str = "runs/base"
    """Folder of the intermediate states."""
    seed: int = 0
    """Seed of data and weights."""
    num_images: int = 18000
    """Composed training images (four compositions of each of 4,500 digits)."""
    vae_steps: int = 700
    """Optimizer steps of the autoencoder, 16 images each."""
    text_steps: int = 400
    """Optimizer steps of the text encoder, 128 pairs each."""
    unet_steps: int = 2000
    """Optimizer steps of the UNet, 32 images each."""
    reader_steps: int = 2500
    """Optimizer steps of the digit classifier, 128 images each."""


def stage(work: Path, name: str, report: base.Report, num_steps: int) -> None:
    """Runs one training and writes its losses to `work`, a row per step."""
    with (work / f"{name}_loss.csv").open("a", encoding="utf-8") as file:
        for step, loss in track(report, description=name, total=num_steps):
            file.write(f"{step},{loss:.6f}\n")


def make(config: BaseConfig) -> None:
    """Trains what is missing and writes the pipeline folder."""
    work, output = Path(config.work), Path(config.output)
    work.mkdir(parents=True, exist_ok=True)
    make_digit_reader(config)
    images, captions, _ = digit_samples(config.num_images, config.seed)
    torch.manual_seed(config.seed)

    def once(folder: Path, train: Callable[[], Any]) -> None:
        if not (folder / "config.json").exists():
            train().save_pretrained(folder)

    def vae() -> torch.nn.Module:
        model = base.build_vae()
        report = base.train_vae(model, images, config.vae_steps, config.seed)
        stage(work, "vae", report, config.vae_steps)
        return model

    once(work / "vae", vae)
    words = " ".join(["a on background", *DIGIT_NAMES, *BACKGROUNDS, *INKS]).split()
    tokenizer = base.build_tokenizer(work / "tokenizer", words)

    def text_encoder() -> torch.nn.Module:
        model = base.build_text_encoder(tokenizer)
        report = base.train_text_encoder(
            model, tokenizer, images, captions, config.text_steps, config.seed
        )
        stage(work, "text_encoder", report, config.text_steps)
        return model

    once(work / "text_encoder", text_encoder)

    def unet() -> torch.nn.Module:
        encoder = CLIPTextModel.from_pretrained(work / "text_encoder").eval()
        autoencoder = AutoencoderKL.from_pretrained(work / "vae").eval()
        torch.manual_seed(config.seed)
        model = base.build_unet()
        report = base.train_unet(
            model,
            NoiseSchedule.from_diffusers(SCHEDULER),
            base.encode_moments(autoencoder, images),
            autoencoder.config.scaling_factor,
            captions,
            base.encode_captions(encoder, tokenizer, ["", *captions]),
            config.unet_steps,
            config.seed,
            work / "unet_state.pt",
        )
        stage(work, "unet", report, config.unet_steps)
        return model

    once(work / "unet", unet)
    write_pipeline(work, output)


def make_digit_reader(config: BaseConfig) -> None:
    """Trains the classifier on composed training digits and says how it reads held-out ones."""
    folder = Path(config.digit_reader)
    if folder.exists():
        return
    images, _, labels = digit_samples(9000, config.seed + 1)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    reader = train_reader(DigitReader, pixels, labels.tolist(), config.seed, config.reader_steps)
    save_weights(reader, folder)
    images, _, labels = digit_samples(2000, config.seed + 1, "held_out")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    right = reader.read(pixels.float() / 255) == torch.from_numpy(labels)
    print(f"digit reader: {right.float().mean():.2%} of {len(labels)} held-out images")


def write_pipeline(work: Path, output: Path) -> None:
    """Writes the fp16 pipeline folder from the trained parts."""
    unet = UNet2DConditionModel.from_pretrained(work / "unet")
    autoencoder = AutoencoderKL.from_pretrained(work / "vae")
    encoder = CLIPTextModel.from_pretrained(work / "text_encoder")
    for name, part in {"unet": unet, "vae": autoencoder, "text_encoder": encoder}.items():
        part.half().save_pretrained(output / name)
    CLIPTokenizer.from_pretrained(work / "tokenizer").save_pretrained(output / "tokenizer")
    write_json(output / "scheduler" / "scheduler_config.json", SCHEDULER)
    scheduler = {"scheduler": ["diffusers", SCHEDULER["_class_name"]]}
    write_json(output / "model_index.json", STABLE_DIFFUSION | scheduler)


if __name__ == "__main__":
    from blackpoint.scripts.config import load

    make(load(BaseConfig, sys.argv[1:]))
