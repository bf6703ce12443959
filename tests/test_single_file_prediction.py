"""Laws of what a single file's UNet is taken to predict: the order of evidence, what is said."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.prediction_evidence import (
    STATISTIC,
    V_STATISTIC,
    Evidence,
    prediction_of,
)
from blackpoint.sampling.choices import SingleFileConfig
from blackpoint.sampling.model import DiffusionModel
from tests.tiny_single_file import RESOLUTION, make_folder, tensors_of, write_file

EMPTY = torch.tensor([])
LDM = "model:\n  target: ldm.LatentDiffusion\n  params:\n    linear_start: 0.00085\n"
V_YAML = LDM + '    parameterization: "v"\n'
EPS_YAML = LDM + "    parameterization: eps\n"


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return tensors_of(make_folder(tmp_path_factory.mktemp("sd") / "sd1", "sd1"))


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return tensors_of(make_folder(tmp_path_factory.mktemp("sd") / "sd2", "sd2"))


def bias(deviation: float) -> Tensor:
    """A bias whose standard deviation, of the population, is `deviation`."""
    return torch.tensor([deviation, -deviation] * 160)


def found(
    folder: Path,
    keys: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    yaml: str | None = None,
    is_sd2: bool = True,
    said: str | None = None,
) -> Evidence | None:
    path = folder / "model.safetensors"
    if yaml is not None:
        path.with_suffix(".yaml").write_text(yaml)
    tensors = keys or {}
    return prediction_of(
        path,
        tensors,
        metadata or {},
        is_sd2,
        said,  # type: ignore[arg-type]
        lambda key: tensors[key],
    )


def test_evidence_has_an_order(tmp_path: Path) -> None:
    """Each piece contradicts those after it, and is taken while it is there."""
    v, epsilon = "v_prediction", "epsilon"
    keys = {"v_pred": EMPTY, STATISTIC: bias(0.2)}
    metadata = {"modelspec.prediction_type": "epsilon", "modelspec.architecture": "x"}
    steps = [
        (dict(keys=keys, metadata=metadata, yaml=V_YAML, said=epsilon), epsilon, "single_file."),
        (dict(keys=keys, metadata=metadata, yaml=EPS_YAML), v, "its key v_pred"),
        (dict(keys={STATISTIC: bias(0.2)}, metadata=metadata, yaml=V_YAML), epsilon, "modelspec."),
        (dict(keys={STATISTIC: bias(0.2)}, yaml=EPS_YAML), epsilon, "model.yaml beside it"),
    ]
    for number, (given, expected, source) in enumerate(steps):
        folder = tmp_path / str(number)
        folder.mkdir()
        evidence = found(folder, **given)  # type: ignore[arg-type]
        assert evidence is not None and evidence.prediction_type == expected
        assert source in evidence.source
    (tmp_path / "last").mkdir()
    last = found(tmp_path / "last", keys={STATISTIC: bias(0.2)})
    assert last is not None and last.prediction_type == v and "statistic" in last.source


def test_the_statistic_is_comfyuis_and_decides_only_for_v(tmp_path: Path) -> None:
    """torch.std(bias, unbiased=False) > 0.09 (ComfyUI comfy/supported_models.py, SD20)."""
    assert V_STATISTIC == 0.09
    above, below = found(tmp_path, {STATISTIC: bias(0.0901)}), {STATISTIC: bias(0.0899)}
    assert above is not None and above.prediction_type == "v_prediction"
    assert found(tmp_path, below) is None
    sd1 = found(tmp_path, {STATISTIC: bias(0.2)}, is_sd2=False)
    assert sd1 is not None and sd1.prediction_type == "epsilon"


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.predict_key": "epsilon"}, "epsilon"),
        ({"modelspec.predict_key": "v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
    ],
)
def test_metadata_of_modelspec_and_of_comfyui_count(
    metadata: dict[str, str], expected: str, tmp_path: Path
) -> None:
    evidence = found(tmp_path, metadata=metadata)
    assert evidence is not None and evidence.prediction_type == expected


@pytest.mark.parametrize(
    "yaml, expected",
    [(V_YAML, "v_prediction"), (EPS_YAML, "epsilon"), (LDM, "epsilon")],
)
def test_the_config_of_latent_diffusion_beside_the_file_counts(
    yaml: str, expected: str, tmp_path: Path
) -> None:
    """Its parameterization is eps where it says none."""
    evidence = found(tmp_path, yaml=yaml)
    assert evidence is not None and evidence.prediction_type == expected


def test_a_yaml_of_something_else_is_no_evidence(tmp_path: Path) -> None:
    assert found(tmp_path, yaml="steps: 3\n") is None
    assert found(tmp_path, yaml="- a\n- b\n") is None


@pytest.mark.parametrize(
    "given, message",
    [
        ({"metadata": {"modelspec.prediction_type": "flow"}}, r"'flow' in its metadata is no"),
        ({"yaml": "a: [1\n"}, r"model\.yaml beside the checkpoint can't be read as YAML"),
        ({"yaml": LDM + "    parameterization: w\n"}, r"parameterization='w' is none of v, eps"),
        (
            {"yaml": LDM + "    parameterization: [v]\n"},
            r"is none of v, eps, x0; correct it, or",
        ),
    ],
)
def test_evidence_that_makes_no_sense_is_refused(
    given: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        found(tmp_path, **given)  # type: ignore[arg-type]


def test_sd2_that_nothing_tells_is_refused_and_asks(
    sd2: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_file(tmp_path / "sd2.safetensors", sd2)
    with pytest.raises(UserError, match=r"set single_file\.prediction_type=v_prediction or"):
        DiffusionModel.load(path)
    for word in ("v_prediction", "epsilon"):
        said = SingleFileConfig(prediction_type=word)  # type: ignore[arg-type]
        model = DiffusionModel.load(path, with_unet=False, single_file=said)
        assert model.process.prediction_type == word
    assert not caplog.records  # who says it knows it
    # encoders need no process
    assert DiffusionModel.load(path, with_unet=False, undecided="epsilon").tokenizer is not None


def test_it_is_said_once_what_was_taken(
    sd1: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_file(tmp_path / "sd1.safetensors", sd1)
    for _ in range(2):
        process = DiffusionModel.load(path, with_unet=False).process
    assert process.prediction_type == "epsilon" and process.timestep_spacing == "leading"
    [record] = caplog.records
    assert "Stable Diffusion 1.x as published; the file says nothing" in record.message


def test_markers_make_the_zero_snr_process(
    sd1: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    markers = {"v_pred": EMPTY, "ztsnr": EMPTY}
    path = write_file(tmp_path / "zero.safetensors", sd1 | markers)
    process = DiffusionModel.load(path, with_unet=False).process
    assert process.schedule.is_zero_terminal_snr and process.prediction_type == "v_prediction"
    assert process.timestep_spacing == "trailing" and process.set_alpha_to_one
    assert "its key v_pred; zero terminal SNR, from its key ztsnr" in caplog.text
    path = write_file(tmp_path / "v.safetensors", sd1 | {"v_pred": EMPTY}, RESOLUTION)
    process = DiffusionModel.load(path, with_unet=False).process
    assert not process.schedule.is_zero_terminal_snr and process.timestep_spacing == "leading"


@pytest.mark.parametrize("said", [True, False])
def test_the_user_says_zero_snr_over_the_marker(
    said: bool, sd1: dict[str, Tensor], tmp_path: Path
) -> None:
    """Most trainers write no marker, whatever they trained to."""
    markers = {"v_pred": EMPTY} if said else {"v_pred": EMPTY, "ztsnr": EMPTY}
    path = write_file(tmp_path / "file.safetensors", sd1 | markers)
    options = SingleFileConfig(zero_terminal_snr=said)
    process = DiffusionModel.load(path, with_unet=False, single_file=options).process
    assert process.schedule.is_zero_terminal_snr is said
    assert process.timestep_spacing == ("trailing" if said else "leading")
