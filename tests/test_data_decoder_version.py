"""What was begun with an earlier decoder goes on with it, and says so; what is new is in sRGB."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

import blackpoint.train.run
from blackpoint.data.files.errors import RunFailed
from blackpoint.data.images.decode import STORED_COLORS
from blackpoint.data.images.picture_size import READER_VERSION
from blackpoint.data.index.index import Index
from blackpoint.data.latents import Encoding
from blackpoint.data.module import CaptionedImages
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.shards.listing import ENCODING_FILE
from blackpoint.train.records.run_directory import IDENTITY, RunRecord, write_identity
from tests.data_images import encoded as image_bytes
from tests.data_images import picture
from tests.icc_profiles import ADOBE_RGB, gamma, rgb_profile
from tests.tiny_encode import encoded, stop_after, tree
from tests.tiny_run import Killed, assert_same_run, kill, stop_in_step, tiny_config

NOTE = "begun before images were converted to sRGB"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of six images in Adobe RGB."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "source").mkdir()
    profile = rgb_profile(ADOBE_RGB, gamma(2.2))
    for number in range(6):
        content = image_bytes(picture(number, (16, 16)), icc_profile=profile)
        (folder / "source" / f"{number}.png").write_bytes(content)
        (folder / "source" / f"{number}.txt").write_text("a gray background")
    pack(PackConfig(source=str(folder / "source"), output=str(folder / "shards")))
    return folder / "shards"


def earlier_decoder(patch: pytest.MonkeyPatch) -> None:
    """Makes new runs and encodings those of the version before."""
    for module in ("blackpoint.train.records.run_directory", "blackpoint.train.encode.settings"):
        patch.setattr(f"{module}.READER_VERSION", STORED_COLORS)


def forget_decoder(run_dir: Path) -> None:
    identity = json.loads((run_dir / IDENTITY).read_text())
    for data_set in identity["data"].values():
        del data_set["decoder"]
    (run_dir / IDENTITY).write_text(json.dumps(identity))


def test_an_index_is_the_same_for_both_but_for_its_luminance(wide: Path) -> None:
    luminance = Index(wide).records["luminance"]
    stored = [np.asarray(picture(n, (16, 16))).mean(axis=(0, 1)) / 255 for n in range(6)]
    weights = (0.299, 0.587, 0.114)
    assert (np.abs(luminance - np.array(stored) @ weights) > 1e-3).all()


def test_a_training_image_is_in_srgb_unless_the_run_began_otherwise(
    wide: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", tmp_path, wide).data
    pixels = {}
    for version in (STORED_COLORS, READER_VERSION):
        images = CaptionedImages(config, seed=0, batch_size=2, decoder=version)
        images.setup("fit")
        (reader,) = images.readers().values()
        pixels[version] = reader.read(0, 0, training=False)[0].pixels
        assert any(NOTE in line for line in images.summary()) == (version == STORED_COLORS)
        assert images.identity()["data.shards"]["decoder"] == version
    np.testing.assert_array_equal(pixels[STORED_COLORS], picture(0, (16, 16)))
    assert (pixels[READER_VERSION] != pixels[STORED_COLORS]).any()


def test_the_decoder_of_a_run_is_the_recorded_one(tmp_path: Path) -> None:
    assert RunRecord.read(tmp_path).decoder == READER_VERSION
    (tmp_path / "config.yaml").write_text("seed: 0")
    assert RunRecord.read(tmp_path).decoder == STORED_COLORS
    for version in (STORED_COLORS, READER_VERSION):
        write_identity(tmp_path, data={"data.shards": {"shards": [], "decoder": version}})
        assert RunRecord.read(tmp_path).decoder == version
    (tmp_path / "identity.json").unlink()
    assert RunRecord.read(tmp_path).decoder == STORED_COLORS
    (tmp_path / "environment.json").write_text(f'{{"starts": [{{"decoder": {READER_VERSION}}}]}}')
    assert RunRecord.read(tmp_path).decoder == READER_VERSION


@pytest.mark.slow
def test_a_run_from_before_goes_on_as_it_was(
    wide: Path,
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        blackpoint.train.run, "export", lambda source, output, weights: output.mkdir()
    )
    config = tiny_config(tmp_path / "run", pipeline, wide)
    unbroken = tiny_config(tmp_path / "unbroken", pipeline, wide)
    with pytest.MonkeyPatch.context() as patch:
        earlier_decoder(patch)
        blackpoint.train.run.fit(unbroken)
        stop_in_step(patch, 4, kill)
        with pytest.raises(Killed):
            blackpoint.train.run.fit(config)
    forget_decoder(tmp_path / "run")
    assert RunRecord.read(tmp_path / "run").decoder == STORED_COLORS
    assert RunRecord.read(tmp_path / "new").decoder == READER_VERSION
    capfd.readouterr()
    assert blackpoint.train.run.fit(config) == 0
    assert NOTE in capfd.readouterr().err
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    recorded = json.loads((tmp_path / "run" / IDENTITY).read_text())["data"]
    assert recorded["data.shards"]["decoder"] == STORED_COLORS
    blackpoint.train.run.fit(tiny_config(tmp_path / "new", pipeline, wide))
    assert NOTE not in capfd.readouterr().err
    assert RunRecord.read(tmp_path / "new").decoder == READER_VERSION


def test_latents_from_before_are_finished_as_they_were_begun(
    wide: Path,
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        earlier_decoder(patch)
        encoded(wide, pipeline, whole)
        stop_after(patch, 4, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(RunFailed):
            encoded(wide, pipeline, output)
    assert "decoder" not in json.loads((tmp_path / ".out.partial/settings.json").read_text())
    capfd.readouterr()
    assert encoded(wide, pipeline, output).num_kept_shards == 1
    assert NOTE in capfd.readouterr().err
    assert tree(output) == tree(whole)
    found = json.loads((whole / ENCODING_FILE).read_text())
    assert found.pop("decoder") == STORED_COLORS
    (whole / ENCODING_FILE).write_text(json.dumps(found))  # as before there was a record
    before = tree(whole)
    assert encoded(wide, pipeline, whole).num_kept_shards == 2
    assert NOTE in capfd.readouterr().err
    assert tree(whole) == before
    encoded(wide, pipeline, tmp_path / "new")
    assert NOTE not in capfd.readouterr().err
    assert Encoding.read(tmp_path / "new").decoder == READER_VERSION
    shard = "shard-000000.tar"
    assert (tmp_path / "new" / shard).read_bytes() != (whole / shard).read_bytes()
