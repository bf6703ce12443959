"""The projection of SDXL's second text encoder in single files, which may be transposed or not."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.checkpoints.fingerprint import text_encoder_digest
from blackpoint.sampling.checkpoints.ldm_keys import XL_OPEN_CLIP_PREFIX
from blackpoint.sampling.checkpoints.resolve import resolve
from blackpoint.sampling.choices import SingleFileConfig
from blackpoint.sampling.export.export import export
from blackpoint.sampling.model import DiffusionModel
from tests.tiny_sdxl import make_carried_sdxl
from tests.tiny_single_file import make_folder, tensors_of, write_file

PROMPT = "a photo of snow on a black background"
PROJECTION = f"{XL_OPEN_CLIP_PREFIX}text_projection"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_carried_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.mark.slow
def test_a_projection_that_is_not_transposed_is_read_by_option(
    folder: Path, tmp_path: Path
) -> None:
    """As OneTrainer writes it; the model is then the folder's, and its export is a right file."""
    model = DiffusionModel.load(folder)
    file = export(folder, tmp_path / "right.safetensors", verify=False, dtype="float32")
    tensors = load_file(file)
    turned = {PROJECTION: tensors[PROJECTION].T.contiguous()}
    path = write_file(tmp_path / "x.safetensors", tensors | turned)
    as_is, plain = (
        DiffusionModel.load(path, with_unet=False, single_file=SingleFileConfig(**options))
        for options in ({"text_projection": "as_is"}, {})
    )
    expected = model.encode_prompts([PROMPT]).pooled
    pooled = [model.encode_prompts([PROMPT]).pooled for model in (as_is, plain)]
    assert expected is not None and pooled[0] is not None and pooled[1] is not None
    assert_close(pooled[0], expected, rtol=0, atol=1e-5)
    assert (pooled[1] - expected).abs().max() > 1e-2
    assert as_is.pipeline is not None and model.pipeline is not None
    assert text_encoder_digest(as_is.pipeline) == text_encoder_digest(model.pipeline)


def test_a_projection_belongs_to_files_of_sdxl(folder: Path, tmp_path: Path) -> None:
    options = SingleFileConfig(text_projection="as_is")
    with pytest.raises(UserError, match="single_file.text_projection=as_is: .* no single file"):
        resolve(folder, single_file=options)
    other = write_file(tmp_path / "x.safetensors", tensors_of(make_folder(tmp_path / "sd", "sd1")))
    with pytest.raises(UserError, match="single_file.text_projection=as_is: .* is no SDXL"):
        resolve(other, single_file=options)
