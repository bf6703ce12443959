"""`blackpoint data encode`: shards of images -> shards of latents and prompt embeddings.

    moments = [mean, log variance] of q(z | image),   z = scale (mean + exp(log variance / 2) noise)

What is stored is the posterior, not a draw from it: training draws its own noise at every visit, so
that it computes from the cache what it would compute from the images (data/latents.py has the
format). A cache holds one view of each image: center crop, not flipped, of a square or a bucket.

Any number of processes, of any launcher and on any machines that share the disk, encode together,
each a shard at a time (train/encode/shards.py). Finished shards outlive whatever stops the others.
"""

import contextlib
import dataclasses
import functools
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from blackpoint.data.bad_samples import BadSample, read_list, refusal, too_many
from blackpoint.data.files.errors import RunFailed, UserError, WriteFailed, disk_writes
from blackpoint.data.files.signals import stop_if_asked
from blackpoint.data.files.whole_file import scratch_folder
from blackpoint.data.index.contents import ORIGINALS
from blackpoint.data.index.index import INDEX_FOLDER, Index, IndexWriter, has_index
from blackpoint.data.index.shard_set import index_shards, indexing_command, open_shards
from blackpoint.data.index.verify import compare_bytes, verify
from blackpoint.data.latents import DEFAULT_FORMATS, Encoding, read_empty
from blackpoint.data.order.buckets import bucket_table
from blackpoint.data.reader import Reader
from blackpoint.data.shards.listing import is_encoded
from blackpoint.data.shards.shard_digest import file_stamp
from blackpoint.data.shards.shard_file import shard_name
from blackpoint.data.work.part import part_path, read_part, shard_content_of
from blackpoint.data.work.partial import Partial, refuse_used_output
from blackpoint.data.work.progress import progress
from blackpoint.data.work.workers import run_in_processes
from blackpoint.sampling.checkpoints.fingerprint import text_encoder_digest, vae_digest
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.tasks import Task, this_task
from blackpoint.train.encode.config import EncodeConfig
from blackpoint.train.encode.settings import begun_decoder, settled, sized, tell, warn_of_enlarged
from blackpoint.train.encode.shards import EncodeRules, Share, encode_share
from blackpoint.train.encode.tasks import process_devices
from blackpoint.train.records.checkpoint_size import (
    check_buckets,
    check_max_tokens,
    check_side,
)

COUNT_EVERY_S = 1.0


@dataclass
class EncodeResult:
    """Contents of the output, and the samples left out of it."""

    num_samples: int
    num_shards: int
    num_bytes: int
    """Of all shards."""
    num_kept_shards: int
    """Shards that were finished when this command began."""
    resolution: int
    """Side of the images, in pixels."""
    bad: list[BadSample] = field(default_factory=list)


def encode(config: EncodeConfig) -> EncodeResult:
    """Encodes `config.source` into `config.output`, which appears when it is whole.

    Returns at once where the same command has made it already. Raises UserError for wrong input,
    such as too many bad samples, and RunFailed for a full disk or a killed process; finished shards
    are kept beside the output for the next call.
    """
    output, task = Path(config.output), this_task()
    config = sized(config)
    reader = open_source(config, task)
    devices = process_devices(config, task)
    config, is_recorded = settled(config, torch.device(devices[0]))
    encoding = planned_encoding(config, reader, devices[0].split(":")[0])
    places = reader.index.places_digest(reader.shards)
    earlier = dataclasses.replace(encoding, source_digest=places)
    stamps = compared_source(reader) if task.count == 1 else {}
    if _is_made(output):
        if task.count > 1 and task.rank == 0:
            compared_source(reader)
        check_output(output, encoding, earlier)
        return result_of(output, None)
    # What is kept there may know nothing of formats.
    left_out = () if is_recorded else DEFAULT_FORMATS
    settings, earlier_settings = (
        {name: value for name, value in one.settings().items() if name not in left_out}
        for one in (encoding, earlier)
    )
    with Partial(output, settings, earlier_settings, shared=True) as partial:
        rules = EncodeRules(config, encoding, reader, partial, earlier.key, uuid.uuid4().hex)
        num_kept = sum(rules.is_finished(number) for number in range(rules.num_shards))
        try:
            _fill(rules, task, devices, num_kept, stamps)
        except (WriteFailed, RunFailed, UserError, OSError) as error:
            # Another process may have been first, and moved what was in use here.
            if not partial.becomes_whole():
                if isinstance(error, WriteFailed | RunFailed):
                    raise partial.failure(error, "fewer num_processes need less memory") from error
                raise
    return result_of(output, num_kept)


def _is_made(output: Path) -> bool:
    """Tells whether the output is there; raises UserError where something else is."""
    Partial(output, {}, shared=True).tidy()
    if is_encoded(output):
        return True
    try:
        refuse_used_output(output)
    except UserError:
        if not is_encoded(output):  # by another task, since the look before
            raise
        return True
    return False


def _fill(
    rules: EncodeRules, task: Task, devices: list[str], num_kept: int, stamps: Mapping[Path, str]
) -> None:
    """Encodes unfinished shards, and gives the output its name unless another task has."""
    num_left = rules.num_shards - num_kept
    if num_left and task.rank == 0:
        warn_of_enlarged(rules.config, rules.reader)
    if num_left or not rules.is_finished(rules.num_shards):
        _encode_shards(rules, task, devices, num_left)
    with rules.partial.alone():
        if not rules.partial.is_whole:
            stop_if_asked()
            compared_source(rules.reader, stamps)
            _finish(rules)


def open_source(config: EncodeConfig, task: Task) -> Reader:
    """Returns the reader of the source's images, indexed first where they were not."""
    shards = open_shards(config.source, "source", config, in_order=True)
    if is_encoded(shards.folder):
        raise UserError(f"source={config.source}: holds latents already; name shards of images")
    if not has_index(shards.folder):
        if task.count > 1:
            raise UserError(
                f"source={config.source}: has no index, and each of {task.count} tasks would make "
                f"one; make it first: {indexing_command(shards, config.source, config)}"
            )
        index_shards(shards, config)
        shards = open_shards(config.source, "source", config, in_order=True)
    for note in verify(shards):
        tell(note)
    buckets = None
    if config.buckets.enabled:
        buckets = bucket_table(config.buckets, config.resolution, None)
    return Reader(
        Index(shards.folder, shards.kept),
        shards.paths,
        seed=0,
        resolution=config.resolution,
        crop="center",
        max_image_pixels=config.max_image_pixels,
        remote=shards.remote,
        buckets=buckets,
        decoder=begun_decoder(Path(config.output)),
    )


def compared_source(reader: Reader, stamps: Mapping[Path, str] | None = None) -> dict[Path, str]:
    """Compares all bytes of local shards with their index, but for those that still have `stamps`.

    Returns their stamps; raises UserError for shards that have changed. Those on a server are known
    by their version, and compared as they are fetched.
    """
    if reader.remote is not None:
        return {}
    now = {path: file_stamp(path.stat()) for path in reader.shards}
    compare_bytes(reader.index, [path for path in now if now[path] != (stamps or {}).get(path)])
    return now


def check_output(output: Path, encoding: Encoding, earlier: Encoding) -> None:
    """Raises UserError unless a finished output is of `encoding`.

    One that was made of the same source before its content was known is taken over, with a note.
    """
    stored = Encoding.read(output)
    if stored.key == encoding.key:
        return
    if stored.key != earlier.key:
        then, now = stored.settings(), encoding.settings()
        names = [
            f"{name}={then[name]} (now {now[name]})" for name in now if then[name] != now[name]
        ]
        raise UserError(
            f"output={output}: is not empty: it holds latents that were made with "
            f"{', '.join(names)}; name another output, or remove that folder to encode anew"
        )
    tell(
        f"{output} was made before its source was known by its content; it is taken to be of the "
        "source as it is now"
    )
    with contextlib.suppress(OSError), scratch_folder(output) as working:
        dataclasses.replace(stored, source_digest=encoding.source_digest).write(output, working)


def planned_encoding(config: EncodeConfig, reader: Reader, device: str) -> Encoding:
    """Returns the encoding of the source by the checkpoint; loads no weights."""
    model = DiffusionModel.load(
        config.checkpoint,
        with_unet=False,
        single_file=config.single_file,
        undecided="epsilon",
        loras=config.lora,
    )
    if model.pixels:
        raise UserError(
            f"checkpoint={config.checkpoint} is a pixel-space model, which has no autoencoder: "
            "train it on the shards of images themselves"
        )
    channels, height, width = check_side(model, "resolution", config.resolution)
    check_buckets(model, config.buckets, reader.buckets.sizes if reader.buckets else ())
    check_max_tokens(model, "max_tokens", config.max_tokens)
    assert model.pipeline is not None
    return Encoding(
        source=config.source,
        checkpoint=config.checkpoint,
        source_digest=reader.index.content_digest(reader.shards)
        + (f" {ORIGINALS}" if reader.has_original_sizes else ""),
        vae=vae_digest(model.pipeline),
        text_encoder=text_encoder_digest(model.pipeline),
        resolution=config.resolution,
        crop=config.crop,
        dtype=config.dtype,
        encoder_dtype=config.encoder_dtype,
        tf32=config.tf32 is True,
        batch_size=config.batch_size,
        samples_per_shard=config.samples_per_shard,
        max_image_pixels=config.max_image_pixels,
        device=device,
        moments_shape=(2 * channels, height, width),
        scaling_factor=model.scaling_factor,
        decoder=reader.decoder,
        buckets=config.buckets.record(),
        max_tokens=config.max_tokens,
    )


def result_of(output: Path, num_kept_shards: int | None) -> EncodeResult:
    """Reads the contents of a finished output; None: all of it was there before."""
    index = Index(output)
    num_shards = len(index.shard_names)
    return EncodeResult(
        index.num_samples,
        num_shards,
        sum(index.shard_bytes.values()),
        num_shards if num_kept_shards is None else num_kept_shards,
        Encoding.read(output).resolution,
        read_list(output / INDEX_FOLDER / "bad_samples.jsonl"),
    )


def _encode_shards(rules: EncodeRules, task: Task, devices: list[str], num_left: int) -> None:
    """Returns when every shard is finished; raises the error that stopped a process."""
    if not rules.config.num_processes and len(devices) > rules.num_shards:
        note = (
            f"{rules.num_shards} shards for {len(devices)} processes: a smaller samples_per_shard"
        )
        print(f"{note} would keep all at work", file=sys.stderr)
    devices = devices[: max(1, num_left)]
    count = len(devices)
    shares = [
        Share(task.rank * count + number, task.count * count, device)
        for number, device in enumerate(devices)
    ]
    total = len(rules.reader) if task.local_rank == 0 else None
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(progress("encoding", total)) if total else _silent
        advance = _counting_others(rules, shown)
        advance(0)
        work = functools.partial(encode_share, rules)
        outcomes = run_in_processes(work, shares, count, advance, may_start_others=True)
        with contextlib.closing(outcomes):
            for error in outcomes:
                if error is not None:
                    raise error
        advance(0)


def _counting_others(rules: EncodeRules, shown: Callable[[int], None]) -> Callable[[int], None]:
    """Returns an advance that also counts, once a second, the shards that others have finished."""
    unseen = set(range(rules.num_shards))
    next_look_s = 0.0

    def advance(count: int) -> None:
        nonlocal next_look_s
        if count:
            shown(count)
        elif time.monotonic() >= next_look_s:
            next_look_s = time.monotonic() + COUNT_EVERY_S
            for number in [number for number in unseen if rules.partial.has_part(number)]:
                unseen.discard(number)
                if rules.partial.claimant(number) != rules.command:
                    shown(len(rules.samples(number)))

    return advance


def _finish(rules: EncodeRules) -> None:
    """Writes the index of the finished shards and gives them the output's name."""
    config, partial, num_samples = rules.config, rules.partial, len(rules.reader)
    parts = [read_part(part_path(partial.parts, number)) for number in range(rules.num_shards)]
    bad = [sample for part, _ in parts for sample in part.bad]
    if too_many(len(bad), num_samples, config.max_bad_share) or len(bad) == num_samples:
        if len(bad) == num_samples:
            shutil.rmtree(partial.parts)  # nothing that is worth keeping
        raise refusal(
            f"source={config.source}", bad, num_samples, config.max_bad_share, "max_bad_share"
        )
    with disk_writes():
        with IndexWriter(partial.shards, partial.working) as index:
            index.bad = bad
            for part, records in parts:
                name = shard_name(part.number)
                content = shard_content_of(part, partial.shards / name, records)
                index.append(name, records, content)
            index.close()
        empty = read_empty(partial.shards)
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.items()}
        encoding = dataclasses.replace(
            rules.encoding,
            prompt_embeds_shape=shapes["prompt_embeds"],
            pooled_shape=shapes.get("pooled", ()),
        )
        with scratch_folder(partial.working) as working:
            encoding.write(partial.shards, working)
    partial.finish()


def _silent(count: int) -> None:
    """Shows nothing: the first task of a machine shows the bar."""
