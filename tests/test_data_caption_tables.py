"""Laws of tables of captions: where they lie, which are one, and which are chosen."""

import itertools
import os
from pathlib import Path

import pytest

from tests.packed_captions import (
    captions_of,
    image_rows,
    packed,
    samples_of,
    write_images,
    write_parquet,
)


@pytest.mark.parametrize("where", ["in", "in/sub", "in/link", ".", "other"])
def test_a_table_means_the_same_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    images = write_images(tmp_path, ["in/0.png", "in/sub/0.png", "store/0.png", "other/0.png"])
    (tmp_path / "in" / "link").symlink_to(tmp_path / "store")
    (tmp_path / "alias").symlink_to(tmp_path / "in")
    table = tmp_path / where / "caps.csv"
    table.write_text("file_name,text\n0.png,meant\n")
    monkeypatch.chdir(tmp_path)
    meant = {"in/sub": "sub/0", "in/link": "link/0"}.get(where, "0")
    image = {"in/sub": "in/sub/0.png", "in/link": "store/0.png"}.get(where, "in/0.png")
    relative = os.path.relpath(table, "in")
    tables = [relative, f"./{relative}", str(table), os.path.realpath(table)]
    tables += [f"{tmp_path}/other/../{where}/caps.csv", str(table.with_name("c*.csv"))]
    for number, (source, name) in enumerate(itertools.product(["in", tmp_path / "alias"], tables)):
        packed(source, tmp_path / f"{number}", captions_file=name, max_bad_share=0.9)
        samples = samples_of(tmp_path / f"{number}")
        assert samples == {meant: (images[image], ("meant",))}, (source, name)


def test_keys_of_embedded_images_are_the_same_however_their_table_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "in" / "deep" / "a.parquet"
    write_parquet(table, image_rows(range(2)))
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["deep/a.parquet", str(table), "../in/deep/*.parquet"]):
        packed("in", tmp_path / f"{number}", captions_file=name)
        assert list(captions_of(tmp_path / f"{number}")) == [f"deep/a/{n:08d}" for n in range(2)]
