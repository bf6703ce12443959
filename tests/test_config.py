"""One run's configuration: precedence, types, and a message that helps for every mistake."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import MISSING

from blackpoint.data.files.errors import UserError
from blackpoint.scripts.config import load, to_yaml
from blackpoint.scripts.config_fields import describe, fields_of


@dataclass
class OptimizerConfig:
    """AdamW and its warm-up."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    warmup_steps: int = 0
    """Optimizer steps until the peak."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps = {self.warmup_steps}: must be 0 or more")


@dataclass
class CropConfig:
    """Where to cut."""

    size_px: int = 64
    """Side of the square
    that is kept."""
    mode: Literal["center", "random"] = "center"
    """Which part is kept."""


@dataclass
class Variant:
    name: str = MISSING
    """Its name in the report."""
    num_steps: int = 25
    """Sampling steps."""


@dataclass
class RunConfig:
    """A run."""

    run_dir: str = MISSING
    """Folder that is written."""
    seed: int = 0
    """Seed of every draw."""
    output: Path | None = None
    """Folder of the export."""
    negative_prompt: str = ""
    """What to avoid."""
    name: str | None = None
    """Name in wandb."""
    verify: bool = True
    """Whether to verify."""
    shift: float | None = None
    """Shift of the SNR."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format."""
    eta: int | str = "auto"
    """Noise share."""
    prompts: list[str] = field(default_factory=list)
    """What to paint."""
    weights: dict[str, float] = field(default_factory=lambda: {"mean": 1.0})
    """Weight of each metric."""
    variants: list[Variant] = field(default_factory=list)
    """What is compared."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    crop: CropConfig | None = None
    """Cropping."""


def build(*argv: str, run_dir: str = "runs/x") -> RunConfig:
    return load(RunConfig, [*argv, f"run_dir={run_dir}"])


def complaint(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(RunConfig, list(argv))
    return str(caught.value)


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_then_yaml_then_key_value(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\noptimizer:\n  learning_rate: 1e-4\n  warmup_steps: 5\n")
    config = load(RunConfig, [path, "run_dir=a", "seed=2", "optimizer.warmup_steps=7", "seed=3"])
    assert config == RunConfig(
        run_dir="a", seed=3, optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=7)
    )


def test_numbers_without_a_dot_are_floats(tmp_path: Path) -> None:
    path = write(tmp_path, "run_dir: a\noptimizer: {learning_rate: 1e-5}\nshift: 2\n")
    assert load(RunConfig, [path]).optimizer.learning_rate == 1e-5
    assert load(RunConfig, [path]).shift == 2.0
    assert build("optimizer.learning_rate=3e-4").optimizer.learning_rate == 3e-4


def test_every_kind_of_field_from_the_command_line() -> None:
    config = build(
        "prompts=[a red four, 'one, two']",
        "optimizer.betas=[0.5, 0.9]",
        "weights.std=2",
        "variants=[{name: a}, {name: b, num_steps: 3}]",
        "verify=false",
        "eta=3",
        "dtype=bfloat16",
        "output=runs/lr=1e-4/out",
        "crop.mode=random",
    )
    assert config.prompts == ["a red four", "one, two"]
    assert config.optimizer.betas == (0.5, 0.9)
    assert config.weights == {"mean": 1.0, "std": 2.0}
    assert config.variants == [Variant("a"), Variant("b", 3)]
    assert config.verify is False and config.eta == 3 and config.dtype == "bfloat16"
    assert config.output == Path("runs/lr=1e-4/out")
    assert config.crop == CropConfig(mode="random")
    assert build("crop={size_px: 8}", "crop=null").crop is None
    assert build("prompts=[a, b]", "prompts[1]=c").prompts == ["a", "c"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e5", "1e5"),
        ("010", "010"),
        ("a: b", "a: b"),
        ("", ""),
        ("'q: r'", "'q: r'"),
        ("#1", "#1"),
    ],
)
def test_text_on_the_command_line_is_taken_as_it_stands(text: str, value: str) -> None:
    assert build(f"negative_prompt={text}").negative_prompt == value


def test_null_unsets_optional_text_only() -> None:
    assert build("name=null").name is None
    assert build("negative_prompt=null").negative_prompt == "null"


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = build("shift=2", "crop.size_px=3", "output=a/b", "variants=[{name: a}]")
    assert load(RunConfig, [write(tmp_path, to_yaml(config))]) == config


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("sed", "seed"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizer.learningrate", "optimizer.learning_rate"),
        ("optimiser.warmup_steps", "optimizer.warmup_steps"),
        ("crop.modes", "crop.mode"),
        ("seed.x", "seed"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, meant: str) -> None:
    message = complaint(f"{key}=1", "run_dir=a")
    assert f"`{key}`" in message and f"did you mean `{meant}`?" in message


def test_unknown_keys_in_yaml_and_in_list_items(tmp_path: Path) -> None:
    path = write(tmp_path, "run_dir: a\noptimizer:\n  lr_warmup_steps: 3\n")
    message = complaint(path)
    assert "`optimizer.lr_warmup_steps`" in message and path in message
    assert "did you mean `optimizer.warmup_steps`?" in message
    message = complaint("variants=[{nam: a}]", "run_dir=a")
    assert "variants[0]" in message and "`name`" in message
    assert "see --help" in complaint("zzzzzzzz=1")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("seed=abc", ["seed = 'abc'", "is str", "expected int", "Seed of every draw."]),
        ("seed=1.5", ["1.5", "is float", "expected int"]),
        ("seed=null", ["is null", "expected int"]),
        ("verify=maybe", ["expected bool"]),
        ("shift=x", ["expected float or null"]),
        ("dtype=fp16", ["'fp16'", "float32 | bfloat16"]),
        ("crop.mode=left", ["crop.mode = 'left'", "center | random"]),
        ("optimizer.betas=[1, 2, 3]", ["[1, 2, 3]", "list [float, float]"]),
        ("optimizer.betas=[1, a]", ["[1, 'a']", "list [float, float]"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate", "Peak learning rate."]),
        ("optimizer=3", ["optimizer = 3", "section of learning_rate, betas"]),
        ("prompts=7", ["expected list of str"]),
        ("weights.std=heavy", ["weights.std = 'heavy'"]),
        ("weights=3", ["mapping of str to float"]),
        ("variants=[{name: a, num_steps: x}]", ["variants", "'x'"]),
        ("prompts[4]=a", ["prompts[4]"]),
    ],
)
def test_wrong_type_names_field_value_and_type(argument: str, parts: list[str]) -> None:
    message = complaint(argument, "run_dir=a")
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_missing_fields_are_listed_with_meaning() -> None:
    message = complaint()
    assert "required and not set" in message
    assert "run_dir=...  Folder that is written." in message
    assert "variants[0].name" in complaint("variants=[{num_steps: 3}]", "run_dir=a")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: [1,\nrun_dir: a\n", "line "),
        ("seed: 1\nseed: 2\n", "line 2"),
        ("seed:\n\t- 1\n", "line 2"),
        ("- 1\n- 2\n", "`key: value` lines"),
        ("3\n", "not a YAML config"),
    ],
)
def test_malformed_yaml_names_file_and_line(tmp_path: Path, text: str, part: str) -> None:
    path = write(tmp_path, text)
    message = complaint(path)
    assert path in message and part in message, message


def test_files_that_are_no_config(tmp_path: Path) -> None:
    assert "there is no such file" in complaint("configs/absent.yaml")
    assert str(Path.cwd()) in complaint("configs/absent.yaml")
    assert "there is no such file" in complaint(str(tmp_path))
    binary = tmp_path / "weights.yaml"
    binary.write_bytes(b"\x80\x81\xff\x00")
    assert "not a YAML config" in complaint(str(binary))


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["seed=1", "run_dir"], "`run_dir`: `=` is missing"),
        (["--seed=3"], "without dashes"),
        (["seed=1", "b.yaml"], "comes before every key=value"),
        (["optimizer.betas=[1,"], "optimizer.betas=[1,: the value is not valid YAML"),
        (["run_dir=a", "shift=${nowhere}"], "does not resolve"),
        (["run_dir=a", "optimizer.warmup_steps=-1"], "must be 0 or more"),
    ],
)
def test_other_mistakes(argv: list[str], part: str) -> None:
    message = complaint(*argv)
    assert part in message, message


def test_a_second_yaml_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "run_dir: a\n")
    assert "one YAML file is read" in complaint(path, path)


def test_empty_yaml_is_the_defaults(tmp_path: Path) -> None:
    assert load(RunConfig, [write(tmp_path, "# nothing\n"), "run_dir=a"]) == build(run_dir="a")


def test_help_shows_every_field_with_type_default_and_meaning() -> None:
    text = describe(RunConfig, "train", "Trains.")
    assert text.startswith("usage: blackpoint train [CONFIG.yaml] [key=value ...]")
    for path, entry in fields_of(RunConfig).items():
        assert f"{path}" in text and entry.meaning in " ".join(text.split())
    assert "run_dir  (str; required)" in text
    assert "optimizer.learning_rate  (float; default 1e-05)" in text
    assert "dtype  (float32 | bfloat16; default float32)" in text
    assert "verify  (bool; default true)" in text
    assert 'negative_prompt  (str; default "")' in text
    assert "crop: Cropping. (null: off)" in text
    assert "optimizer.betas  (list [float, float]; default [0.9, 0.999])" in text
    assert "weights  (mapping of str to float; default {mean: 1.0})" in text
    assert "variants[].name" in text
    assert "Side of the square that is kept." in text
    assert max(map(len, text.splitlines())) <= 100


@dataclass
class ShardsConfig:
    """Where images come from."""

    shards: str = MISSING
    """Pattern of the shards."""


@dataclass
class NestedConfig:
    shards_of: ShardsConfig = field(default_factory=ShardsConfig)


def test_missing_in_a_section_and_help_without_docstrings() -> None:
    with pytest.raises(UserError, match=r"shards_of\.shards=\.\.\.  Pattern of the shards\."):
        load(NestedConfig, [])
    assert load(NestedConfig, ["shards_of={shards: a.tar}"]).shards_of.shards == "a.tar"
    assert "shards_of: Where images come from." in describe(NestedConfig, "toy", "Plays.")


def test_help_of_a_section_shows_it_alone() -> None:
    text = describe(RunConfig, "train", "Trains.", "optimizer")
    assert text.startswith("optimizer: ") and "optimizer.betas" in text
    assert "run_dir" not in text and "usage" not in text
    assert describe(RunConfig, "train", "Trains.", "optimizer.betas").count("\n") <= 2
    with pytest.raises(UserError, match="--help optimiser: `train` has no such .*see optimizer"):
        describe(RunConfig, "train", "Trains.", "optimiser")


def test_what_is_required_comes_first_in_the_help() -> None:
    text = describe(RunConfig, "train", "Trains.")
    assert text.index("required:") < text.index("run_dir  (str; required)") < text.index("others:")
    assert text.count("  run_dir  (") == 1


def test_a_required_mapping_takes_its_entries_one_by_one() -> None:
    @dataclass
    class Named:
        folders: dict[str, str] = MISSING

    loaded = load(Named, ["folders.first=a", "folders.second=b"])
    assert loaded.folders == {"first": "a", "second": "b"}
    with pytest.raises(UserError, match="required and not set"):
        load(Named, [])


def test_an_entry_of_a_mapping_of_sections_is_given_as_a_whole(tmp_path: Path) -> None:
    """From a file or the command line, beside its single keys."""

    @dataclass
    class Crops:
        crops: dict[str, CropConfig] = field(default_factory=dict)

    path = tmp_path / "crops.yaml"
    path.write_text("crops.first:\n  size_px: 5\n")
    loaded = load(Crops, [str(path), "crops.second={size_px: 6}", "crops.third={}"]).crops
    assert loaded == {"first": CropConfig(5), "second": CropConfig(6), "third": CropConfig()}
    assert load(Crops, [str(path), "crops.first.size_px=7"]).crops == {"first": CropConfig(7)}
    with pytest.raises(UserError, match=r"crops\.first\.sise_px.*size_px"):
        load(Crops, ["crops.first={sise_px: 5}"])
