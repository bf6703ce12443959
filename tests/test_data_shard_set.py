"""Laws of data sets by URL: they give the batches of the same shards here, or say what to do."""

import errno
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import blackpoint.data.shards.remote
from blackpoint.data.check.check import CheckConfig, check
from blackpoint.data.config import DataConfig
from blackpoint.data.files.errors import RunFailed, Unreachable, UserError
from blackpoint.data.index.contents import DIGESTS_FILE
from blackpoint.data.index.index import INDEX_FOLDER, Index, IndexWriter, has_index
from blackpoint.data.index.shard_set import open_shards
from blackpoint.data.latents import Encoding, to_bytes, write_empty
from blackpoint.data.module import CaptionedImages
from blackpoint.data.pack.pack import PackConfig, pack
from blackpoint.data.record import ShardRecords
from blackpoint.data.shards.shard_file import ShardFile
from blackpoint.sampling.runtime.tasks import Task
from blackpoint.scripts.cli import main
from blackpoint.train.encode.config import EncodeConfig
from blackpoint.train.encode.encode import open_source
from tests.data_images import write_folder
from tests.shard_server import ShardServer, answers, cut_short, drops_after, serving

NUM_IMAGES = 30
BRACES = "shard-{000000..000003}.tar"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images in four shards."""
    folder = tmp_path_factory.mktemp("packed")
    write_folder(folder / "in", NUM_IMAGES)
    pack(PackConfig(str(folder / "in"), str(folder / "out"), samples_per_shard=8))
    return folder / "out"


@pytest.fixture
def server(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    """Serves a copy of the shards."""
    monkeypatch.setattr(blackpoint.data.shards.remote, "PAUSES_S", (0.01,) * 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    shutil.copytree(packed, tmp_path / "served" / "set")
    with serving(tmp_path / "served") as server:
        yield server


def module(shards: str, cache: Path, **options: Any) -> CaptionedImages:
    options = {"num_workers": 0, "resolution": 16, "cache_dir": str(cache), **options}
    images = CaptionedImages(DataConfig(shards, **options), seed=3, batch_size=6)
    images.prepare_data()
    images.setup("fit")
    return images


def batches(images: CaptionedImages, count: int = 8) -> list[tuple[Any, ...]]:
    """Returns all that identifies each sample of the first batches."""
    return [
        (epoch, index, key, caption, image.numpy().tobytes())
        for batch in itertools.islice(iter(images.train_dataloader()), count)
        for epoch, index, key, caption, image in zip(
            batch["epoch"].tolist(),
            batch["index"].tolist(),
            batch["key"],
            batch["caption"],
            batch["image"],
            strict=True,
        )
    ]


def local(packed: Path, tmp_path: Path) -> list[tuple[Any, ...]]:
    return batches(module(str(packed), tmp_path / "unused"))


def partial_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial*"))


def size_of(packed: Path) -> float:
    return sum(path.stat().st_size for path in packed.glob("*.tar")) / 1e9


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("pattern", [f"set/{BRACES}", "set", "set/", "set/*.tar", "b/../set"])
def test_a_url_gives_what_the_folder_gives(
    indexed: bool, pattern: str, server: ShardServer, packed: Path, tmp_path: Path
) -> None:
    server.lists = "{" not in pattern
    if not indexed:
        shutil.rmtree(server.folder / "set" / INDEX_FOLDER)
    found = batches(module(f"{server.url}/{pattern}", tmp_path / "cache"))
    assert found == local(packed, tmp_path)
    shards = [name for name in server.num_gets if name.endswith(".tar")]
    assert {server.num_gets[name] for name in shards} == {1} and len(shards) == 4
    server.num_gets.clear()
    assert batches(module(f"{server.url}/{pattern}", tmp_path / "cache")) == found
    assert not [name for name in server.num_gets if name.endswith(".tar")]
    assert not partial_files(tmp_path / "cache")


def test_other_protocols_and_commands_give_the_same(packed: Path, tmp_path: Path) -> None:
    expected = local(packed, tmp_path)
    store = fsspec.filesystem("memory")
    store.put(f"{packed}/", f"/{tmp_path.name}/", recursive=True)
    for number, pattern in enumerate((f"memory://{tmp_path.name}", f"file://{packed}/{BRACES}")):
        assert batches(module(pattern, tmp_path / f"cache{number}")) == expected
        small = {"cache_gigabytes": 0}
        assert batches(module(pattern, tmp_path / f"none{number}", **small)) == expected
    command = f"pipe:cat {packed}/{BRACES}"
    allowed = module(command, tmp_path / "commands", allow_shell_urls=True)
    found = batches(allowed)
    assert found == expected
    assert batches(module(command, tmp_path / "commands", allow_shell_urls=True)) == found


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("small", [True, False])
def test_a_bad_server_changes_nothing(
    small: bool,
    num_workers: int,
    server: ShardServer,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One download may meet nearly all of the faults, while another takes the good answers.
    monkeypatch.setattr(blackpoint.data.shards.remote, "PAUSES_S", (0.01,) * 21)
    server.faults = [
        answers(503),
        drops_after(500),
        cut_short(900),
        drops_after(10),
        answers(500),
        cut_short(5),
        lambda handler, part: False,
    ] * (3 if small else 1)
    options = {"num_workers": num_workers, "cache_gigabytes": 0.9 * size_of(packed) if small else 1}
    images = module(f"{server.url}/set/{BRACES}", tmp_path / "cache", **options)
    assert batches(images) == local(packed, tmp_path)
    assert not server.faults and not partial_files(tmp_path / "cache")
    kept = list((tmp_path / "cache" / "shards").rglob("*.tar"))
    assert all(path.read_bytes() == (packed / path.name).read_bytes() for path in kept)
    assert len(kept) == (0 if small else 4)


def test_a_small_cache_reads_samples_by_range(
    server: ShardServer, packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url, total = f"{server.url}/set/{BRACES}", size_of(packed)
    bound = {"cache_gigabytes": 0.9 * total}
    images = module(url, tmp_path / "cache", **bound)
    expected = local(packed, tmp_path)
    assert batches(images) == expected
    told = capfd.readouterr().err
    assert f"{total:.3g} GB, above data.cache_gigabytes=" in told and "range request" in told
    # One request a sample, image and caption together, and no whole shard.
    assert len(server.ranges) == len(expected)
    assert not list((tmp_path / "cache").rglob("*.tar"))
    # Where ranges are not served it is whole shards, a few at a time.
    server.serves_ranges = False
    assert batches(module(url, tmp_path / "cache", **bound)) == expected
    told = capfd.readouterr().err
    assert "10% of the samples cost a whole shard each" in told and "set data.cache_g" in told
    assert size_of(next((tmp_path / "cache").glob("shards"))) <= 0.9 * total
    with pytest.raises(UserError, match="which .* does not serve; set data.cache_gigabytes="):
        module(url, tmp_path / "cache", cache_gigabytes=0)
    with pytest.raises(UserError, match="alone has .* GB; set data.cache_gigabytes at least"):
        module(url, tmp_path / "cache", cache_gigabytes=1e-6)


def test_an_index_that_changes_is_fetched_again(
    server: ShardServer, packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url, cache = f"{server.url}/set", tmp_path / "cache"
    assert len(module(url, cache)._training) == NUM_IMAGES  # type: ignore[arg-type]
    write_folder(tmp_path / "in", 12)
    shutil.rmtree(server.folder / "set")
    pack(PackConfig(str(tmp_path / "in"), str(server.folder / "set")))
    assert len(module(url, cache)._training) == 12  # type: ignore[arg-type]
    assert batches(module(url, cache)) == batches(module(str(server.folder / "set"), cache))
    server.is_down = True
    capfd.readouterr()
    assert len(batches(module(url, cache))) == 48
    assert "is used as it is" in capfd.readouterr().err
    with pytest.raises(Unreachable, match="same command again"):
        module(url, tmp_path / "another")


def test_errors_name_the_url_and_the_remedy(
    server: ShardServer, packed: Path, tmp_path: Path
) -> None:
    url = f"{server.url}/set"

    def message(shards: str, cache: str = "cache", **options: Any) -> str:
        with pytest.raises(UserError) as error:
            batches(module(shards, tmp_path / cache, **options))
        return str(error.value)

    assert "1 shards are not in the index" in message(f"{url}/shard-{{000000..000004}}.tar")
    assert "several folders" in message(f"{{{url}/a,{server.url}/b}}.tar")
    assert "braces do not match" in message(f"{url}/a-{{0..3.tar")
    assert "a.zip is no .tar file; " in message(f"{url}/a.zip")
    assert "a folder whose name has a dot ends with /" in message(f"{url}/v1.5")
    assert "data.cache_gigabytes=-1" in message(url, cache_gigabytes=-1)
    for shards in (f"pipe:cat {packed}/{BRACES}", "PIPE:x", "exec:x.tar", "!x.tar", "|x.tar"):
        assert "refused unless data.allow_shell_urls=true" in message(shards)
    assert "written pipe:COMMAND" in message("exec:x.tar", allow_shell_urls=True)
    shard = server.folder / "set" / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    assert "shard-000002.tar has changed: " in message(url)
    shard.unlink()
    assert "shard-000002.tar does not exist; put the shard back" in message(url, "cache2")
    (server.folder / "set" / INDEX_FOLDER / "keys.bin").unlink()
    assert "keys.bin is missing" in message(url, "cache3")
    shutil.rmtree(server.folder / "set" / INDEX_FOLDER)
    none = message(f"{url}/a.tar", "cache4", cache_gigabytes=0)
    assert "has no index" in none and "set data.cache_gigabytes above 0" in none
    assert "name the shards with braces" in message(url, "cache4")
    assert "does not exist; name the shards that are" in message(f"{url}/absent.tar", "cache4")
    not_found = "pipe:no_such_program_at_all {0..1}.tar"
    assert "can't run it" in message(not_found, allow_shell_urls=True)
    with pytest.raises(RunFailed, match="5 tries .exit status 3"):
        module("pipe:exit 3", tmp_path / "cache", allow_shell_urls=True)
    with pytest.raises(RunFailed, match="it printed nothing"):
        module("pipe:true", tmp_path / "cache", allow_shell_urls=True)


def test_a_foreign_index_can_not_lead_out_of_the_cache(server: ShardServer, tmp_path: Path) -> None:
    description = server.folder / "set" / INDEX_FOLDER / "shards.json"
    text = description.read_text()
    description.write_text(text.replace("shard-000001.tar", "../../../shard-000001.tar"))
    with pytest.raises(UserError, match="which is no file name"):
        module(f"{server.url}/set", tmp_path / "cache")
    description.write_text("{}")
    with pytest.raises(UserError, match="can't be used .*write that index anew"):
        module(f"{server.url}/set", tmp_path / "cache")
    assert not list(tmp_path.rglob("cache/indices/*/index"))


def test_a_worker_that_gives_up_ends_the_run_in_one_line(
    server: ShardServer, tmp_path: Path
) -> None:
    images = module(f"{server.url}/set", tmp_path / "cache", num_workers=1)
    server.faults = [answers(503)] * 50
    with pytest.raises(Unreachable, match="after 5 tries") as error:
        batches(images)
    assert "Traceback" not in str(error.value) and "\n" not in str(error.value)


def write_latents(folder: Path, num_samples: int) -> None:
    """Writes a shard of latents, with its index and encoding.json."""
    folder.mkdir(parents=True)
    records, shard = ShardRecords(), ShardFile(folder / "shard-000000.tar")
    for number in range(num_samples):
        latents = to_bytes(
            {"moments": torch.full((2, 3, 3), float(number)), "prompt_embeds": torch.zeros(4, 5)}
        )
        spans = shard.write(f"{number:03d}", {"safetensors": latents, "txt": b"words"})
        records.add(f"{number:03d}", spans["safetensors"], spans["txt"], 24, 24, 0.5)
    content = shard.close()
    with IndexWriter(folder) as index:
        index.append("shard-000000.tar", records, content)
        index.close()
    encoding = Encoding(
        source="x",
        checkpoint="x",
        source_digest="s",
        vae="v",
        text_encoder="t",
        resolution=24,
        crop="center",
        dtype="float32",
        batch_size=1,
        samples_per_shard=8,
        max_image_pixels=10**6,
        device="cpu",
        moments_shape=(2, 3, 3),
        scaling_factor=1.0,
        prompt_embeds_shape=(4, 5),
    )
    encoding.write(folder, folder)
    write_empty(folder, {"prompt_embeds": torch.ones(4, 5)}, folder)


def test_latents_fit_their_index_which_alone_knows_their_sizes(tmp_path: Path) -> None:
    write_latents(tmp_path / "latents", 3)
    digests = tmp_path / "latents" / INDEX_FOLDER / DIGESTS_FILE
    before = digests.read_bytes()
    for notes in ([], ["had no digests"]):
        report = check(CheckConfig(str(tmp_path / "latents"), num_processes=1))
        assert report.index.state == "valid" and report.sizes["width"]["median"] == 24
        assert [note[:14] for note in report.index.notes] == notes
        assert digests.read_bytes() == before
        digests.unlink()


def test_latents_are_known_as_such_from_afar(server: ShardServer, tmp_path: Path) -> None:
    write_latents(server.folder / "latents", 8)
    images = module(f"{server.url}/latents", tmp_path / "cache", resolution=24)
    ((where, encoding),) = images.encodings()
    assert encoding is not None and encoding.vae == "v" and "latents" in where
    batch = next(iter(images.train_dataloader()))
    assert batch["moments"][:, 0, 0, 0].tolist() == [int(key) for key in batch["key"]]
    shutil.rmtree(server.folder / "latents" / INDEX_FOLDER)
    with pytest.raises(UserError, match="can't be indexed anew; encode the images again"):
        module(f"{server.url}/latents/shard-000000.tar", tmp_path / "other", resolution=24)


def test_check_and_encode_read_urls(
    server: ShardServer, packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url, here = f"{server.url}/set", str(tmp_path / "cache")
    found = check(CheckConfig(url, num_processes=1, cache_dir=here))
    expected = check(CheckConfig(str(packed), num_processes=1))
    assert found.index.state == "valid" == expected.index.state
    differing = {"shards", "index"}
    assert {k: v for k, v in found.as_json().items() if k not in differing} == {
        k: v for k, v in expected.as_json().items() if k not in differing
    }
    shutil.rmtree(server.folder / "set" / INDEX_FOLDER)
    for processes, state in ((2, "written"), (1, "valid")):
        config = CheckConfig(f"{url}/{BRACES}", num_processes=processes, cache_dir=f"{here}2")
        assert check(config).index.state == state
    server.num_gets.clear()
    assert batches(module(f"{url}/{BRACES}", Path(f"{here}2"))) == local(packed, tmp_path)
    assert not any(name.endswith(".tar") for name in server.num_gets)

    # Read in order, a cache of two shards serves without fetching any twice.
    bound = max(path.stat().st_size for path in packed.glob("*.tar")) * 2.5 / 1e9
    options = {"cache_dir": f"{here}3", "cache_gigabytes": bound, "resolution": 16}
    config = EncodeConfig(f"{url}/{BRACES}", "x", "y", **options)  # type: ignore[arg-type]
    source = open_source(config, Task())
    server.num_gets.clear()
    plain = open_source(EncodeConfig(str(packed), "x", "y", resolution=16), Task())
    for index in range(NUM_IMAGES):
        assert source.members(index) == plain.members(index)
    assert max(server.num_gets.values()) == 1
    assert main(["data", "check", "shards=pipe:true"]) == 2
    assert "unless allow_shell_urls=true" in capfd.readouterr().err


@pytest.fixture
def read_only(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy without index, in which no folder can be made, whoever asks."""
    folder = tmp_path / "read_only"
    shutil.copytree(packed, folder, ignore=shutil.ignore_patterns(INDEX_FOLDER))
    mkdir = Path.mkdir

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if path.is_relative_to(folder):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    return folder


def test_the_index_of_a_read_only_disk_is_kept_in_the_cache(
    read_only: Path, packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert batches(module(str(read_only), cache)) == local(packed, tmp_path)
    assert f"note: {read_only} has no index; that in {cache}" in capfd.readouterr().err
    kept = open_shards(str(read_only), "data.shards", DataConfig("x", cache_dir=str(cache)))
    before = (kept.folder / INDEX_FOLDER / "records.npy").stat().st_mtime_ns
    assert batches(module(str(read_only), cache, num_workers=1)) == local(packed, tmp_path)
    assert (kept.folder / INDEX_FOLDER / "records.npy").stat().st_mtime_ns == before
    assert not has_index(read_only) and len(Index(kept.folder)) == NUM_IMAGES
    pattern = f"{read_only}/{BRACES.replace('3', '1')}"
    assert len(module(pattern, cache)._training) == 16  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written to .Read-only.*or set cache_dir"):
        module(str(read_only), tmp_path / "file" / "cache")
