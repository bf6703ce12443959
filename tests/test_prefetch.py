"""Laws of `blackpoint prefetch`: what it fetched is all that a verb asks for without network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from blackpoint.data.files.errors import UserError
from blackpoint.sampling.verifiers.load import KINDS, VerifierConfig
from blackpoint.scripts.cli import main
from blackpoint.scripts.config_fields import fields_of
from blackpoint.scripts.prefetch.prefetch import PrefetchConfig, settings_of, wanted_of
from tests.fake_hub import fake_hub
from tests.tiny_pipeline import make_tiny_pipeline

ROOT = Path(__file__).resolve().parents[1]
SEARCH = """
checkpoint: ours/tiny
lora: [ours/style, {path: ours/other, scale: 0.5}, assets]
verifiers:
  faithful: {checkpoint: openai/clip-vit-large-patch14}
  pretty: {kind: aesthetic, checkpoint: head.pth}
held_out:
  reward: {kind: image_reward, checkpoint: THUDM/ImageReward}
  here: {kind: classifier, checkpoint: assets/digit_reader, module: a:b}
  local: {kind: hpsv2, checkpoint: HPS/file}
diversity: {checkpoint: facebook/dinov2-base}
"""


def wanted(config: Path | str) -> set[tuple[str, str]]:
    given = settings_of(PrefetchConfig(config=str(config), output="out"))
    return {(key, hub_id) for key, hub_id, _ in wanted_of(given)}


def test_every_key_that_names_a_hub_id_is_fetched(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(SEARCH)
    expected = {
        ("checkpoint", "ours/tiny"),
        ("lora", "ours/style"),
        ("lora", "ours/other"),
        ("verifiers.faithful.checkpoint", "openai/clip-vit-large-patch14"),
        ("verifiers.pretty.base", "openai/clip-vit-large-patch14"),
        ("held_out.reward.checkpoint", "THUDM/ImageReward"),
        ("held_out.reward.base", "google-bert/bert-base-uncased"),
        ("diversity.checkpoint", "facebook/dinov2-base"),
    }
    assert wanted(path) == expected
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"search: {{config: {path}, lora: []}}\n"
        "evaluate: {sets: {inception: ours/inception, features.checkpoint: ours/features}}\n"
        "arms: {a: {search.checkpoint: ours/one}}\n"
        "grid: {search.checkpoint: [ours/two, ours/three]}\n"
    )
    told = {(f"search.{key}", name) for key, name in expected if key != "lora"}
    assert wanted(sweep) == told | {
        ("evaluate.sets.inception", "ours/inception"),
        ("evaluate.sets.features.checkpoint", "ours/features"),
        ("arms.a.search.checkpoint", "ours/one"),
        ("grid.search.checkpoint", "ours/two"),
        ("grid.search.checkpoint", "ours/three"),
    }


def test_kinds_of_verifiers_may_be_a_grid_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("grid: {search.verifiers.a.kind: [clip_score, image_reward]}\n")
    base = KINDS["image_reward"].defaults["base"]
    assert wanted(path) == {("grid.search.verifiers.a.base", base)}
    path.write_text("verifiers: {a: {kind: clip_scor, checkpoint: a/b}}\n")
    with pytest.raises(UserError, match="verifiers.a.kind=clip_scor is no verifier; use clip_s"):
        wanted(path)


def test_of_our_configs_the_ids_in_them_are_fetched() -> None:
    """Whatever key holds it: a text with one slash that is no path of ours is a hub id."""
    for path in (ROOT / "configs").glob("*.yaml"):
        text = re.sub(r"^ *#.*", "", path.read_text(), flags=re.M)
        ids = set(re.findall(r": ([\w.-]+/[\w.-]+)[,}]?$", text, re.M))
        ours = ("runs/", "shards/", "latents/", "verifiers/")
        ids = {i for i in ids if not (i.startswith(ours) or (ROOT / i).exists())}
        assert not ids or ids <= {name for _, name in wanted(path)}, path.name


def test_verifiers_declare_keys_that_they_have() -> None:
    for kind in KINDS.values():
        keys = fields_of(VerifierConfig).keys()
        assert {*kind.files, *kind.defaults} <= keys and set(kind.defaults) <= set(kind.files)


def test_ids_that_need_a_licence_or_are_not_there_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["prefetch", "configs/sd15_zero_snr.yaml", f"output={tmp_path / 'models'}"]
    cache = constants.HF_HUB_CACHE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with fake_hub(tmp_path, gated=("ours/gated",)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for name, reason in (
            ("gated", "needs a login: accept its licence"),
            ("unknown", "is neither a local folder nor a model on the hub"),
        ):
            assert main([*given, f"checkpoint=ours/{name}"]) == 2
            (told,) = capsys.readouterr().err.splitlines()
            assert f"checkpoint=ours/{name} {reason}" in told
    assert cache == constants.HF_HUB_CACHE
    given[1] = "configs/tiny_zero_snr.yaml"
    assert main(given) == 0 and "nothing to fetch" in capsys.readouterr().out
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_what_was_fetched_samples_without_network(tmp_path: Path) -> None:
    hub, home, work = (tmp_path / name for name in ("hub", "home with space", "work"))
    make_tiny_pipeline(hub / "ours" / "tiny")
    (hub / "ours" / "tiny" / "README.md").write_text("not needed")
    (hub / "ours" / "tiny" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not needed")
    work.mkdir()
    config = work / "sample.yaml"
    config.write_text("checkpoint: ours/tiny\nprompts: a red one\nnum_steps: 1\noutput: out\n")

    def run(verb: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "verb_process.py"), verb, str(config)]
        given = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment
        return subprocess.run([*command, *arguments], cwd=work, env=given, text=True,
                              capture_output=True)  # fmt: skip

    with fake_hub(hub) as server:
        online = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "usual")}
        done = run("prefetch", f"output={home}", **online)
    assert done.returncode == 0, done.stderr
    assert f"export HF_HOME='{home}' HF_HUB_OFFLINE=1" in done.stdout
    assert "ours/tiny/unet/diffusion_pytorch_model.safetensors" in server.fetched
    assert not [file for file in server.fetched if file.endswith((".bin", ".md"))]
    sampled = run("sample", HF_HOME=str(home), HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert sampled.returncode == 0, sampled.stderr
    assert (work / "out" / "grid.png").is_file()
