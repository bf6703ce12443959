"""The shards that one process encodes, of an output that several fill (data/work/partial.py).

A process takes shards that nobody has, from its own place in their order on, until all are
finished; while others are at work it waits, and takes over what they leave unfinished.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from blackpoint.data.bad_samples import BadSample, refusal, too_many
from blackpoint.data.files.errors import RunFailed, UserError, WriteFailed, disk_writes
from blackpoint.data.files.signals import (
    leave_signals_to_parent,
    signals_held_back,
    sleep,
    stop_if_asked,
)
from blackpoint.data.latents import EMPTY_FILE, Encoding, write_empty
from blackpoint.data.reader import Reader
from blackpoint.data.shards.shard_file import shard_name
from blackpoint.data.work.part import Part, write_part
from blackpoint.data.work.partial import Partial
from blackpoint.data.work.workers import loader_workers
from blackpoint.sampling.model import DiffusionModel
from blackpoint.sampling.runtime.precision import set_tf32
from blackpoint.train.encode.config import EncodeConfig
from blackpoint.train.encode.sample_encoder import Decoded, SampleEncoder, SourceBatches

NUM_BAD_BEFORE_STOP = 100
LOOK_EVERY_S = 0.5
Advance = Callable[[int], None]


@dataclass(frozen=True)
class EncodeRules:
    """Settings that all processes of one command share."""

    config: EncodeConfig
    encoding: Encoding
    reader: Reader
    partial: Partial
    earlier_key: str
    """Of the same encoding, its source known by sizes and places alone, as before digests."""
    command: str
    """Tells this command's processes from others at work on the same output."""

    @property
    def num_shards(self) -> int:
        return -(-len(self.reader) // self.config.samples_per_shard)

    def samples(self, shard: int) -> range:
        """Returns which samples of the source belong into a shard of the output."""
        size = self.config.samples_per_shard
        return range(shard * size, min((shard + 1) * size, len(self.reader)))

    def is_finished(self, number: int) -> bool:
        """Tells whether a shard, or after the last one the empty caption, is there and whole."""
        if number == self.num_shards:
            return (self.partial.shards / EMPTY_FILE).exists()
        keys = (self.encoding.key, self.earlier_key)
        return any(self.partial.finished(number, key) for key in keys)


@dataclass(frozen=True)
class Share:
    """One process of `count`, and its device."""

    rank: int
    count: int
    device: str


def encode_share(rules: EncodeRules, share: Share, advance: Advance) -> Exception | None:
    """Encodes shards until all are finished, by any process; returns a foreseen error or None."""
    try:
        _encode_share(rules, share, advance)
    except (UserError, RunFailed, WriteFailed) as error:
        return error
    return None


def _encode_share(rules: EncodeRules, share: Share, advance: Advance) -> None:
    partial = rules.partial
    todo = _in_order(rules.num_shards, share)
    encoder: SampleEncoder | None = None
    bad: list[BadSample] = []
    num_threads = torch.get_num_threads()
    # On a CPU the last bits of a matrix product depend on the number of threads: with one each,
    # the same bytes come out on any number of processes and cores.
    torch.set_num_threads(1 if share.device == "cpu" else num_threads)
    working: Path | None = None
    try:
        while todo:
            before = len(todo)
            for number in list(todo):
                stop_if_asked()
                if not partial.is_whole and not rules.is_finished(number):
                    with partial.claim(number, rules.command) as is_ours:
                        # Looked at again: who had it may just have finished it, or everything.
                        if not is_ours:
                            continue
                        if not rules.is_finished(number) and not partial.is_whole:
                            encoder = encoder or _encoder(rules.config, share.device)
                            working = working or partial.own_folder()
                            _make(rules, number, encoder, working, bad, advance)
                todo.remove(number)
            advance(0)
            if len(todo) == before:
                sleep(LOOK_EVERY_S)
    finally:
        torch.set_num_threads(num_threads)


def _in_order(num_shards: int, share: Share) -> list[int]:
    """Lists the empty caption's number, then the shards: every count-th from rank on, the rest."""
    assigned = list(range(share.rank, num_shards, share.count))
    following = [*range(share.rank, num_shards), *range(min(share.rank, num_shards))]
    taken = set(assigned)
    return [num_shards, *assigned, *(number for number in following if number not in taken)]


def _encoder(config: EncodeConfig, device: str) -> SampleEncoder:
    set_tf32(config.tf32 is True)
    encoder_dtype = getattr(torch, config.encoder_dtype)
    model = DiffusionModel.load(
        config.checkpoint,
        device,
        encoder_dtype,
        with_unet=False,
        single_file=config.single_file,
        loras=config.lora,
        undecided="epsilon",
    )
    model.load_encoders()
    return SampleEncoder(model, getattr(torch, config.dtype), config.max_tokens)


def _make(
    rules: EncodeRules,
    number: int,
    encoder: SampleEncoder,
    working: Path,
    bad: list[BadSample],
    advance: Advance,
) -> None:
    """Encodes one shard, or the empty caption, and moves it into place; raises WriteFailed."""
    partial = rules.partial
    if number == rules.num_shards:
        with disk_writes():
            (empty,) = encoder.embed([("",)])
            write_empty(partial.shards, empty, working)
        return
    config, samples = rules.config, rules.samples(number)
    batches = DataLoader(
        SourceBatches(rules.reader, config.batch_size, samples),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=(num_workers := loader_workers(config.num_workers)),
        # Processes that are spawned, as this one may be, would spawn theirs and import all anew.
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=leave_signals_to_parent(),
    )
    path, own_bad = working / shard_name(number), list[BadSample]()
    try:
        with signals_held_back():  # the loader's processes start here
            loaded = iter(batches)
        watched = _watched(loaded, rules, bad, own_bad, advance)
        records, content = encoder.write_shard(path, watched)
        counts = content.num_bytes, len(records), len(samples)
        part = Part(number, rules.encoding.key, *counts, own_bad, content)
        # A part file that is there is of the same bytes. It stays until it is replaced: without
        # locks, another process may be reading it.
        with disk_writes():
            path.replace(partial.shards / shard_name(number))
            write_part(part, records, partial.parts, working)
    finally:
        path.unlink(missing_ok=True)


def _watched(
    batches: Iterable[Decoded],
    rules: EncodeRules,
    bad: list[BadSample],
    own_bad: list[BadSample],
    advance: Advance,
) -> Iterator[Decoded]:
    """Passes batches on, and afterwards counts them and their bad samples."""
    share, num_samples = rules.config.max_bad_share, len(rules.reader)
    for batch in batches:
        count = len(batch.keys) + len(batch.bad)
        yield batch
        stop_if_asked()
        own_bad += batch.bad
        bad += batch.bad
        advance(count)
        # A source that is bad throughout is not read to its end to say so.
        if len(bad) >= NUM_BAD_BEFORE_STOP and too_many(len(bad), num_samples, share):
            where = f"source={rules.config.source}"
            raise refusal(where, bad, num_samples, share, "max_bad_share")


def _as_it_is(batch: Any) -> Any:
    return batch
