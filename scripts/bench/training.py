"""Training in the benchmark: a run of `train`, stopped every few steps for as many of the others.

Ours is what `blackpoint train` runs: it reads shards, draws for each sample by itself, averages the
weights, checks every loss and logs. The others are the bare loop (scripts/bench/bare.py) and the
accelerate loop (scripts/bench/accelerate.py), this with and without an average of its weights. Each
has its own copy of the model; nothing reads ahead in another process, so that no block is paid for
in another's time.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from blackpoint.scripts.bench.accelerate import accelerate_loop
from blackpoint.scripts.bench.bare import Steps, bare_loop
from blackpoint.scripts.bench.inputs import Inputs, training_config
from blackpoint.scripts.bench.timing import Row, Seconds, ratio_row, row, time_round
from blackpoint.train import module as train_module
from blackpoint.train.run import train

OURS, BARE, PEER, PEER_EMA = "ours", "bare", "accelerate", "accelerate_ema"
NAMES = {
    OURS: "ours, with EMA",
    BARE: "bare loop",
    PEER: "accelerate loop",
    PEER_EMA: "accelerate loop, with EMA",
}


class InterleavedBlocks(Callback):
    """Times blocks of the run and of the others in turn."""

    def __init__(
        self, others: Mapping[str, Steps], warmup_steps: int, block_steps: int, rounds: int
    ) -> None:
        self.others: dict[str, Callable[[], None]] = {
            name: partial(steps, block_steps) for name, steps in others.items()
        }
        self.warmup_steps, self.block_steps, self.rounds = warmup_steps, block_steps, rounds
        self.seconds: Seconds = {OURS: []}
        self._started_s = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now_s = time.perf_counter()
        number, between = divmod(trainer.global_step - self.warmup_steps, self.block_steps)
        if number < 0 or number > self.rounds or between:
            return
        if number:
            self.seconds[OURS].append(now_s - self._started_s)
        time_round(self.others, number, self.seconds if number else {})
        self._started_s = time.perf_counter()


def time_training(
    yaml: str,
    inputs: Inputs,
    folder: Path,
    cached: bool,
    warmup_steps: int,
    block_steps: int,
    rounds: int,
    keeps_captions: bool = True,
) -> Seconds:
    """Returns the seconds of each contestant's blocks, one per round.

    The run's first `warmup_steps` are not timed: it keeps the embeddings of captions that it has
    seen, unless `keeps_captions` is false: then each counts as new, as in a set that has no two
    alike. One step more than the rounds need, so that no block holds the last checkpoint.
    """
    max_steps = warmup_steps + rounds * block_steps + 1
    changes = {"data.shards": inputs.encoded_shards} if cached else {}
    name = f"{cached}_{keeps_captions}"
    config = training_config(yaml, folder / f"run_{name}", max_steps, **changes)
    unpacked = inputs.encoded if cached else inputs.images
    others = {BARE: bare_loop(config, unpacked, cached)}
    for peer in (PEER, PEER_EMA):
        log = folder / f"{peer}_{name}.csv"
        others[peer] = accelerate_loop(config, unpacked, cached, peer == PEER_EMA, log)
    blocks = InterleavedBlocks(others, warmup_steps, block_steps, rounds)
    limit = train_module.CAPTION_CACHE_BYTES
    train_module.CAPTION_CACHE_BYTES = limit if keeps_captions else 0
    try:
        train(config, Path(config.run_dir), 0, watchers=[blocks])
    finally:
        train_module.CAPTION_CACHE_BYTES = limit
    return blocks.seconds


def training_rows(group: str, seconds: Seconds, images: int, is_bound: bool) -> list[Row]:
    """Returns images/s of all and ours over each; `images` is the number in a block.

    `is_bound` says whether the ratios have a bound to keep.
    """
    rows = [
        row(group, NAMES[name], "images/s", [images / s for s in seconds[name]])
        for name in (OURS, BARE, PEER, PEER_EMA)
    ]
    wanted = {BARE: 0.97, PEER: 1.0, PEER_EMA: 1.0}
    for name, bound in wanted.items():  # images/s of ours over theirs: their seconds over ours
        what = f"ours / {NAMES[name]}"
        at_least = bound if is_bound else None
        rows.append(ratio_row(group, what, seconds[name], seconds[OURS], at_least=at_least))
    return rows
