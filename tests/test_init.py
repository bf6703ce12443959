"""`blackpoint init`: what it finds, plans and writes; and that what it writes trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from blackpoint.scripts.cli import main
from blackpoint.scripts.config import load
from blackpoint.scripts.init.init import ADAPTERS, PLANNED_SHARE, RANK, WHOLE, choose, length
from blackpoint.scripts.init.look import look_at_photos
from blackpoint.train.config.config import DataConfig, TrainConfig
from blackpoint.train.plan.plan import RESERVED_GIB, Plan, planner_of

BASE = "assets/tiny_sd"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos, one of them smaller than the embedded base's 64 px."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for number, side in enumerate((32, 64, 200)):
        Image.new("RGB", (side, side + 9), (80 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a photo of {number}")
    return folder


@pytest.mark.slow
def test_the_written_config_is_that_of_the_commands_that_follow(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"source={photos}", f"checkpoint={BASE}", "output=mine.yaml"]
    assert main(["init", *arguments]) == 0
    out, err = capsys.readouterr()
    for text in (
        "3 images, captions from sidecar .txt",
        "about 1 are below 64 px",
        "epsilon, non-",
    ):
        assert text in out
    assert "blackpoint data pack source='" in err and "blackpoint train mine.yaml plan=true" in err
    config = load(TrainConfig, ["mine.yaml"])
    assert config.checkpoint and config.checkpoint.endswith("tiny_sd")
    assert (config.run_dir, config.data.shards) == ("runs/mine", "shards/my photos")
    images = config.batch_size * config.trainer.accumulate_grad_batches
    assert (images, config.trainer.max_steps) == (32, 5000)
    written = Path("mine.yaml").read_text()
    assert main(["init", *arguments]) == 2
    assert Path("mine.yaml").read_text() == written


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "holds no images (found nothing)"),
        ({"a.tar": b""}, "holds no images (found 1 .tar)"),
        ({"a.png": b"x"}, "no captions"),
        ({"a.png": b"x", "a.txt": b"a cat"}, "none of 1 images can be used"),
    ],
)
def test_folders_that_cannot_be_packed_are_refused(
    files: dict[str, bytes], message: str, tmp_path: Path, capsys: Any
) -> None:
    folder, output = tmp_path / "photos", tmp_path / "config.yaml"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert main(["init", f"source={folder}", f"checkpoint={BASE}", f"output={output}"]) == 2
    assert message in capsys.readouterr().err and not output.exists()


def test_a_checkpoint_that_is_none_is_refused(photos: Path, tmp_path: Path, capsys: Any) -> None:
    for name in ("nowhere", photos):
        output = tmp_path / "config.yaml"
        assert main(["init", f"source={photos}", f"checkpoint={name}", f"output={output}"]) == 2
        assert f"checkpoint={name}" in capsys.readouterr().err and not output.exists()


class OfSizes:
    """A planner whose plans need as many GiB as a table says, by portion, checkpointing, rank."""

    def __init__(self, needs: Any) -> None:
        self.needs = needs

    def plan(self, config: TrainConfig) -> Plan:
        trainer = config.trainer
        gib = self.needs(config.batch_size, trainer.gradient_checkpointing, config.lora.rank)
        return Plan({"all": (int(gib * 2**30), "")}, 0, None)

    def step(self, config: TrainConfig) -> Any:
        return type("Step", (), {"operations": config.batch_size})


def test_the_fastest_config_that_fits_is_chosen() -> None:
    def needs(images: int, recomputes: bool, rank: int | None) -> float:
        return (4 if rank else 16) + images * (0.5 if recomputes else 4)

    base = TrainConfig(run_dir="r", checkpoint="c", data=DataConfig(shards="s"))
    planner: Any = OfSizes(needs)
    for rank, portions in ((None, WHOLE), (RANK, ADAPTERS)):
        for images, recomputes in portions:
            card = needs(images, recomputes, rank) / PLANNED_SHARE + RESERVED_GIB + 1e-6
            chosen, _, operations = choose(base, planner, card)
            assert chosen.lora.rank == rank and operations == 32
            assert chosen.batch_size == images
            assert chosen.trainer.gradient_checkpointing is recomputes
    with pytest.raises(ValueError, match="need 4.8 GB"):
        choose(base, planner, 5)


@pytest.mark.slow
def test_operations_of_a_step_are_those_of_the_real_one() -> None:
    data = DataConfig(shards="nowhere", resolution=64)
    config = TrainConfig(run_dir="r", checkpoint=BASE, data=data, batch_size=2)
    planner = planner_of(config)
    model = planner.model
    unet = type(model.unet).from_config(model.unet.config).train()
    width = model.unet.config.cross_attention_dim
    x, texts = (
        torch.zeros(2, *model.latent_shape(64, 64)),
        torch.zeros(2, model.tokenizer.model_max_length, width),
    )
    with FlopCounterMode(display=False) as counter:
        unet(x, torch.zeros(2), encoder_hidden_states=texts).sample.square().mean().backward()
    assert planner.step(config).operations == counter.get_total_flops() > 0


def test_photos_that_cannot_be_used_are_counted(photos: Path) -> None:
    (photos / "3.png").write_bytes(b"torn")
    (photos / "3.txt").write_text("a torn photo")
    (photos / "4.png").write_bytes((photos / "2.png").read_bytes())
    found = look_at_photos(photos)
    assert (found.count, found.sides) == (5, [32, 64, 200])
    assert {one.key for one in found.bad} == {"3.png", "4.png"}
    assert found.num_below(64) == round(5 / 3)
    assert any("2 of the first 5 can't be used" in line for line in found.lines(64))


def test_many_epochs_are_warned_of() -> None:
    assert length(160_000) == "5,000 steps of 32 images, 1.0 epochs"
    assert length(3199).endswith("add others or end sooner") and "sooner" not in length(3200)
