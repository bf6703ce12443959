"""Members of shards that are elsewhere: from the local cache, or each by a range of the URL.

Training reads samples in an order that runs across all shards at once. So a cache that holds the
whole data set fetches each shard once, and one that does not would fetch a whole shard for nearly
every sample: n samples cost n (1 - cache/data) shards. Then members are read where they are, one
range request per sample, and no shard is fetched at all. (A server without ranges sends whole
shards; a reader in order, such as `data encode`, is well served by whole shards in any case.)
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from blackpoint.data.files.errors import UserError
from blackpoint.data.record import Span
from blackpoint.data.shards.remote import Changed, read_range, shown
from blackpoint.data.shards.shard_cache import RemoteShard, ShardCache

NUM_NAMED = 4
MAX_GAP_BYTES = 1 << 16
"""Members of a sample are read by one request if no more than this lies between them."""


@dataclass(frozen=True)
class RemoteShards:
    """Shards, where they are kept, and how members are read."""

    shards: dict[str, RemoteShard]
    """By name."""
    cache: ShardCache
    index_folder: Path
    by_range: bool = False
    anew: bool = False
    """Whether shards are fetched even if they are in the cache."""

    def read(self, name: str, spans: Sequence[Span]) -> list[bytes]:
        """Returns the bytes of spans of one shard; a span beyond its end comes short.

        Raises UserError if the shard is absent or not the one that was indexed, and RunFailed.
        """
        shard = self.shards[name]
        try:
            if self.by_range:
                descriptor = self.cache.find(shard)
                if descriptor is None:
                    return _read_ranges(shard.source, spans)
            else:
                descriptor = self.cache.open(shard)
        except (FileNotFoundError, Changed) as error:
            raise self.unlike_the_index(shard, error) from None
        try:
            return [os.pread(descriptor, span.size, span.offset) for span in spans]
        finally:
            os.close(descriptor)

    @contextmanager
    def held(self, name: str) -> Iterator[Path]:
        """Is the context in which a shard is a local file, fetched first if need be."""
        with ExitStack() as stack:
            try:
                path = stack.enter_context(self.cache.held(self.shards[name], self.anew))
            except (FileNotFoundError, Changed) as error:
                raise self.unlike_the_index(self.shards[name], error) from None
            yield path

    def only(self, name: str) -> "RemoteShards":
        """Returns one shard of these, which is small to send to a process."""
        return replace(self, shards={name: self.shards[name]})

    def stamp(self, name: str) -> str:
        """Returns size and server's version of a shard that is held; "" where it gives none."""
        copy = self.cache.copy(self.shards[name].source)
        return server_stamp(copy.num_bytes, copy.version) if copy else ""

    def unlike_the_index(
        self, shard: RemoteShard, error: Exception, others: Sequence[RemoteShard] = ()
    ) -> UserError:
        """Returns the error for a shard, and others, that are not there or have changed."""
        source, is_absent = shown(shard.source), isinstance(error, FileNotFoundError)
        if is_absent and shard.num_bytes is None:
            return UserError(f"{source} does not exist; name the shards that are there")
        what = "does not exist" if is_absent else f"has changed: {error}"
        if others:
            names = ", ".join(shown(other.source) for other in others[:NUM_NAMED])
            what += f" ({len(others)} more differ: {names})"
        return UserError(
            f"{source} {what}; put the shard back, or have the shards indexed anew: remove "
            f"the index beside them, if there is one, and {self.index_folder}"
        )


def server_stamp(num_bytes: int | None, version: str) -> str:
    """Returns the stamp of a shard on a server; "" where that tells no versions apart."""
    return f"{num_bytes}/{version}" if version else ""


def _read_ranges(source: str, spans: Sequence[Span]) -> list[bytes]:
    start = min(span.offset for span in spans)
    stop = max(span.offset + span.size for span in spans)
    if stop - start > sum(span.size for span in spans) + MAX_GAP_BYTES:
        return [read_range(source, span.offset, span.size) for span in spans]
    whole = read_range(source, start, stop - start)
    return [whole[span.offset - start :][: span.size] for span in spans]
