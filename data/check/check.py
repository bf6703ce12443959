"""`blackpoint data check`: reads every sample of a data set and reports its contents.

The shards may be ours or anyone's (img2dataset's, say). What is counted is in data/check/report.py;
here the shards are read, an index that exists is compared with what was read, and where there is
none it is written, as training would do at its start.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from omegaconf import MISSING

from blackpoint.data.bad_samples import BadSample, too_many, write_list
from blackpoint.data.check.report import CheckReport, IndexState, summarize
from blackpoint.data.files.errors import RunFailed, UserError, WriteFailed, disk_writes
from blackpoint.data.files.paths import OutputText, PathText
from blackpoint.data.files.rules import check_ranges
from blackpoint.data.files.whole_file import scratch_folder, whole_file, whole_folder, write_whole
from blackpoint.data.index.contents import ShardDigests, add_stamps, read_stamps, write_digests
from blackpoint.data.index.index import INDEX_FOLDER, Index, IndexWriter, has_index
from blackpoint.data.index.scan import FACT, scan_shards
from blackpoint.data.index.shard_set import ShardSet, open_shards
from blackpoint.data.index.verify import changed_on_server, check_index_keys
from blackpoint.data.index.writer import put_index
from blackpoint.data.shards.listing import ENCODING_FILE, is_encoded
from blackpoint.data.shards.options import ShardOptions
from blackpoint.data.shards.remote_address import shown
from blackpoint.data.shards.sample_keys import SampleKeys
from blackpoint.data.shards.shard_digest import samples_digest
from blackpoint.data.work.workers import usable_cores

REPORT_FILE = "report.json"
BAD_FILE = "bad_samples.jsonl"


@dataclass
class CheckConfig(ShardOptions):
    """The shards to read, and where the report goes."""

    shards: PathText = MISSING
    """Shards, ours or made elsewhere: a folder, a pattern such as shards/{00000..00009}.tar, or the
    same as a URL (https://, s3://, gs://)."""
    output: OutputText | None = None
    """Folder for report.json and bad_samples.jsonl; null: the report is only printed."""
    resolution: int | None = None
    """Counts images whose shorter side is below this many pixels, which training would enlarge."""
    num_processes: int = 0
    """Processes that read shards, one shard at a time; 0: one per usable CPU core."""
    full: bool = False
    """Reads shards from URLs where they are, also those that are in the cache. All that is read is
    compared with the index byte for byte in any case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "", resolution=">= 1", num_processes=">= 0")


def check(config: CheckConfig) -> CheckReport:
    """Reads the shards, whatever is wrong with them, and returns the report.

    Writes it into `config.output`, the index of shards that have none into their folder, or the
    cache's, and the digests that an index lacks beside it.
    Raises UserError where there are no shards to read or the output can't be written.
    """
    chosen = open_shards(config.shards, "shards", config, in_order=True)
    folder, output = chosen.folder, _prepared(config.output)
    latents = is_encoded(folder)
    try:
        with _scratch(folder) as scratch:
            bad = _read_shards(config, chosen, scratch)
            scanned, facts = Index(scratch), np.fromfile(scratch / "facts", FACT)
            state = _index_state(scanned, chosen, latents)
            # The size and luminance of what was encoded stand only in the index that it came with.
            measured = Index(folder) if latents and state.state == "valid" else scanned
            report = summarize(config.shards, scanned, measured, facts, bad, config.resolution)
            report.index = state
            if latents:
                report.encoding = _encoding(folder)
            elif state.state == "absent":
                _publish(scratch, chosen, report, config.max_bad_share)
    except WriteFailed as error:
        raise RunFailed(f"shards={config.shards}: the check could not write: {error}") from None
    if output:
        _write(output, report)
    return report


def _read_shards(config: CheckConfig, chosen: ShardSet, scratch: Path) -> list[BadSample]:
    """Reads the shards into an index and a file of FACT in `scratch`; returns the bad samples."""
    keys = _keys(chosen)
    remote = chosen.remote and replace(chosen.remote, anew=config.full)
    num_processes = config.num_processes or usable_cores()
    limits = (config.max_image_pixels, num_processes, is_encoded(chosen.folder))
    with ExitStack() as stack:
        with disk_writes():
            writer = stack.enter_context(IndexWriter(scratch, keys=keys))
        for name, scan in scan_shards("checking", chosen.paths, *limits, remote, keys):
            with disk_writes(), (scratch / "facts").open("ab") as facts_file:
                facts_file.write(scan.facts.tobytes())
                writer.append(name, scan.records, scan.content)
            writer.bad += scan.bad
        with disk_writes():
            writer.close()
    return writer.bad


def _keys(shards: ShardSet) -> SampleKeys:
    """Returns the members to read: those asked for, or those that the index was made with."""
    if not has_index(shards.folder):
        return shards.keys
    try:
        index = Index(shards.folder)
    except UserError:
        return shards.keys  # named in the report
    check_index_keys(shards, index)
    return index.keys


def _prepared(output: str | None) -> Path | None:
    if output is None:
        return None
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output={output}: can't be written: {error.strerror}; name a folder"
        ) from None
    return Path(output)


def _write(output: Path, report: CheckReport) -> None:
    try:
        with whole_file(output / BAD_FILE) as path:
            write_list(path, report.bad)
        write_whole(output / REPORT_FILE, json.dumps(report.as_json(), indent=1) + "\n")
    except OSError as error:
        raise RunFailed(f"output={output}: can't be written: {error.strerror}") from None


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside the shards, or among the system's if that can't be written."""
    with ExitStack() as stack:
        try:
            scratch = stack.enter_context(scratch_folder(folder))
        except OSError:
            with disk_writes():
                scratch = stack.enter_context(scratch_folder(Path(tempfile.gettempdir())))
        yield scratch


def _index_state(scanned: Index, shards: ShardSet, latents: bool) -> IndexState:
    """Compares the index of the shards, if there is one, with their contents."""
    folder = str(shards.folder / INDEX_FOLDER)
    remedy = f"Remove {folder} and check again: it is then written anew"
    if latents:
        remedy = "Encode the images again with `blackpoint data encode`"
    if not has_index(shards.folder):
        return IndexState("absent", folder, [remedy] if latents else [])
    try:
        index = Index(shards.folder, shards.kept)
        if len(index.records) != index.num_samples:
            raise ValueError(f"{len(index.records)} records for {index.num_samples} samples")
    except (UserError, OSError, ValueError) as error:
        return IndexState("stale", folder, [f"can't be read: {error}", remedy])
    notes, num_damaged, num_new = [], 0, 0
    for path in shards.paths:
        name, size = path.name, scanned.shard_bytes[path.name]
        if name not in index.shard_bytes:
            notes.append(f"{name} is not in it")
        elif index.shard_bytes[name] != size:
            notes.append(f"{name} had {index.shard_bytes[name]} bytes when indexed, has {size}")
        else:
            before, now = (part.rows(name)["image_offset"] for part in (index, scanned))
            num_damaged += len(np.setdiff1d(before, now))
            num_new += len(np.setdiff1d(now, before))
            notes += _differences(index, scanned, name, len(before) == len(now))
    if shards.remote is not None:
        changed, _ = changed_on_server(index, shards.remote)
        remote = shards.remote.shards
        notes += [f"{shown(remote[name].source)}: {error}" for name, error in changed.items()]
    if shards.is_whole:
        absent = sorted(set(index.shard_names) - {path.name for path in shards.paths})
        notes += [f"{name} is in it but not in the folder" for name in absent]
    if num_new:
        notes.append(f"{num_new} usable samples are not in it")
    if num_damaged:
        damage = f"{num_damaged} of its samples can't be used; training replaces them"
        return IndexState("stale" if notes else "valid", folder, [*notes, damage, remedy])
    if notes:
        return IndexState("stale", folder, [*notes, remedy])
    return IndexState("valid", folder, _completed(index, scanned))


def _differences(index: Index, scanned: Index, name: str, same_number: bool) -> list[str]:
    """Says how a shard of the right size differs from the one that was indexed."""
    now = scanned.digests.get(name)
    if now is None:
        return []  # unreadable, and named among what is bad
    then = index.digests.get(name)
    if then is None:  # indexed before there were digests: its samples are all there is to compare
        then = ShardDigests(now.whole, now.text, samples_digest(index.rows(name), index.keys.field))
    if then.whole != now.whole:
        what = "images have" if then.text == now.text else "headers, captions or images have"
        return [f"{name}: its {what} changed since it was indexed"]
    if same_number and then.samples != _samples_digest(index, scanned, name):
        return [f"{name}: its captions or images are not where they were when it was indexed"]
    return []


def _samples_digest(index: Index, scanned: Index, name: str) -> str:
    """Returns the digest of the samples of a shard as it is now; latents say nothing of sizes,
    which stand in the index alone."""
    now, then = scanned.rows(name).copy(), index.rows(name)
    unmeasured = now["width"] == 0
    for side in ("width", "height"):
        now[side][unmeasured] = then[side][unmeasured]
    return samples_digest(now, index.keys.field)


def _completed(index: Index, scanned: Index) -> list[str]:
    """Adds digests that an index lacks, and how its shards look now; returns notes of those."""
    absent = {
        name: row._replace(samples=_samples_digest(index, scanned, name))
        for name, row in scanned.digests.items()
        if name not in index.digests
    }
    known = read_stamps(index.places)
    seen = {name: stamps.pop() for name, stamps in read_stamps(scanned.places).items()}
    fresh = {name: stamp for name, stamp in seen.items() if stamp not in known.get(name, ())}
    notes = []
    if absent:
        written = write_digests(index.places, index.places[0], index.digests | absent)
        notes = [f"had no digests of {len(absent)} shards; they are in {written}"]
        if written is None:
            notes = [f"has no digests of {len(absent)} shards, and they can't be written to it"]
    if fresh:
        add_stamps(index.places, fresh)
    return notes


def _publish(scratch: Path, shards: ShardSet, report: CheckReport, max_bad_share: float) -> None:
    """Moves the index that was made on the way to where training looks for it, if it may."""
    state = report.index
    num_seen = report.num_samples + len(report.bad)
    if not report.num_samples:
        state.notes.append("not written: no sample can be used")
    elif too_many(len(report.bad), num_seen, max_bad_share):
        state.notes.append(
            f"not written: {len(report.bad)} of {num_seen} samples can't be used, above "
            f"max_bad_share={max_bad_share:g}; repair or remove them, or raise max_bad_share"
        )
    elif not shards.is_whole:
        state.notes.append(
            f"not written: an index covers a whole folder; check shards={shards.folder} to write it"
        )
    else:
        try:
            put_index(scratch / INDEX_FOLDER, shards.folder / INDEX_FOLDER)
        except OSError as error:
            _keep(scratch, shards, state, error.strerror)
            return
        state.state = "written"


def _keep(scratch: Path, shards: ShardSet, state: IndexState, reason: str | None) -> None:
    """Copies the index of shards whose folder can't be written to where training looks next."""
    target = shards.kept / INDEX_FOLDER
    try:
        shards.kept.mkdir(parents=True, exist_ok=True)
        with whole_folder(target) as folder:
            shutil.copytree(scratch / INDEX_FOLDER, folder, dirs_exist_ok=True)
    except OSError:
        if not has_index(shards.kept):
            state.notes.append(f"not written: {shards.folder} can't be written to ({reason})")
            return
    state.state, state.folder = "written", str(target)


def _encoding(folder: Path) -> dict[str, object]:
    try:
        encoding = json.loads((folder / ENCODING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"error": f"{ENCODING_FILE} can't be read: {error}"}
    return encoding if isinstance(encoding, dict) else {"error": f"{ENCODING_FILE} is no object"}
