"""Laws of the choice of members: which are image and caption, and that an index keeps it."""

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from blackpoint.data.check.check import CheckConfig, check
from blackpoint.data.config import DataConfig
from blackpoint.data.files.errors import UserError
from blackpoint.data.identity import identity
from blackpoint.data.images.decode import BadImage
from blackpoint.data.index.index import INDEX_FOLDER, Index, build_index
from blackpoint.data.index.scan import APART
from blackpoint.data.module import CaptionedImages
from blackpoint.data.shards.listing import find_shards
from blackpoint.data.shards.sample_keys import SampleKeys
from tests.data_images import encoded, picture
from tests.packed_captions import captions_of, reader_of, samples_of


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return path.parent


def image(number: int) -> bytes:
    return encoded(picture(number))


def module(shards: Path, **options: Any) -> CaptionedImages:
    config = DataConfig(str(shards), resolution=8, num_workers=0, caption_dropout=0, **options)
    images = CaptionedImages(config, seed=1, batch_size=1)
    images.prepare_data()
    images.setup("fit")
    return images


def test_names_like_input_jpg_are_images(tmp_path: Path) -> None:
    members = {}
    for number in range(3):
        members |= {f"{number}.input.png": image(number), f"{number}.prompt.txt": b"a cat"}
    write_tar(tmp_path / "a.tar", members)
    assert build_index(tmp_path) == []
    assert samples_of(tmp_path) == {f"{n}": (image(n), ("a cat",)) for n in range(3)}


def test_of_several_images_or_captions_one_must_be_chosen(tmp_path: Path) -> None:
    members = {"0.input.png": image(0), "0.edited.png": image(1)}
    members |= {"0.prompt.txt": b"a cat", "0.instruction.txt": b"make it a dog"}
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=r"several images: input.png, edited.png.*image_key"):
        build_index(tmp_path)
    with pytest.raises(UserError, match=r"several captions: prompt.txt, .*caption_key"):
        build_index(tmp_path, keys=SampleKeys("input.png"))
    module(tmp_path, image_key="edited.png", caption_key="instruction.txt")
    assert samples_of(tmp_path) == {"0": (image(1), ("make it a dog",))}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (None, ("from txt",)),
        ("txt", ("from txt",)),
        ("caption", ("from caption",)),
        ("json", ("from json",)),
        ("json.blip", ("from blip",)),
        ("json.Several", ("one", "two")),
        ("meta.json.a.b", ("nested name",)),
    ],
)
def test_a_caption_key_chooses_the_member(
    tmp_path: Path, key: str | None, expected: tuple[str, ...]
) -> None:
    values = {"caption": "from json", "blip": "from blip", "Several": ["one", "two"]}
    members = {"0.png": image(0), "0.txt": b"from txt", "0.caption": b"from caption"}
    members |= {"0.json": json.dumps(values).encode(), "0.meta.json": b'{"a.b": "nested name"}'}
    write_tar(tmp_path / "a.tar", members)
    module(tmp_path, caption_key=key)
    assert captions_of(tmp_path) == {"0": expected}
    assert module(tmp_path).readers()[f"data.shards={tmp_path}"].members(0)[1] == expected
    state = check(CheckConfig(str(tmp_path), num_processes=1)).index
    assert (state.state, state.notes) == ("valid", [])


def test_without_a_choice_captions_are_found_where_rivals_put_them() -> None:
    keys = SampleKeys()
    for members, expected in {
        ("png", "txt", "json", "caption"): "txt",
        ("png", "json", "caption"): "json",
        ("png", "caption"): "caption",
        ("png", "prompt.txt", "cls"): "prompt.txt",
    }.items():
        assert keys.caption_member(members)[0] == expected
    with pytest.raises(BadImage, match="no caption"):
        keys.caption_member(("png", "cls"))
    assert keys.image_member(("mask.png", "jpg")) == "jpg"
    with pytest.raises(BadImage, match="no image"):
        keys.image_member(("txt",))


def test_another_choice_than_the_index_has_is_refused_with_remedies_that_work(
    tmp_path: Path,
) -> None:
    members = {"0.png": image(0), "0.json": b'{"caption": "a", "blip": "b"}'}
    shards = write_tar(tmp_path / "set" / "a.tar", members)
    module(shards)
    with pytest.raises(UserError, match=r"^data.caption_key=json.blip: .* without caption_key"):
        module(shards, caption_key="json.blip")
    with pytest.raises(UserError, match=r"^caption_key=json.blip: .* without caption_key"):
        check(CheckConfig(str(shards), caption_key="json.blip", num_processes=1))
    (shards / INDEX_FOLDER).rename(tmp_path / "before")
    module(shards, caption_key="json.blip")
    assert captions_of(shards) == {"0": ("b",)}
    with pytest.raises(UserError, match=r"was made with caption_key=json.blip"):
        module(shards, caption_key="json")


def test_another_field_of_the_same_member_is_another_content(tmp_path: Path) -> None:
    members = {"0.png": image(0), "0.json": b'{"caption": "a", "blip": "b", "llava": "c"}'}
    digests, identities = set(), []
    for key in (None, "json.blip", "json.llava"):
        shards = write_tar(tmp_path / str(key) / "a.tar", members)
        build_index(shards, keys=SampleKeys(caption=key))
        paths = find_shards(str(shards))
        digests |= {Index(shards).content_digest(paths), Index(shards).places_digest(paths)}
        identities.append(identity(reader_of(shards)))
        (shards / INDEX_FOLDER / "digests.json").unlink()  # as of an index from before
        assert identity(reader_of(shards))["shards"][0][3] == identities[-1]["shards"][0][3]
    assert len(digests) == 6
    assert len({str(found) for found in identities}) == 3


def test_an_image_apart_from_its_caption_is_called_that(tmp_path: Path) -> None:
    members = {f"{number}.png": image(number) for number in range(3)} | {"4.png": image(4)}
    members |= {f"{number}.txt": b"a cat" for number in range(3)} | {"5.txt": b"a dog"}
    write_tar(tmp_path / "a.tar", members | {"6.png": image(6), "6.txt": b"a cow"})
    bad = dict(build_index(tmp_path, max_bad_share=1))
    assert {bad[f"a.tar:{number}"] for number in range(3)} == {APART}
    assert bad["a.tar:4"].startswith("no caption") and bad["a.tar:5"].startswith("no image")
    assert captions_of(tmp_path) == {"6": ("a cow",)}


@pytest.mark.parametrize("name", ["image_key", "caption_key"])
@pytest.mark.parametrize("value", ["", ".txt", "a/b.txt", "json."])
def test_keys_that_are_no_extension_are_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"data.{name}={value}: must be an extension"):
        DataConfig("shards", **{name: value})
