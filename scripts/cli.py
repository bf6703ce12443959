"""The `blackpoint` command: finds the verb, loads its config, runs it, turns errors into status.

Exit status: 0 done, 2 the user's input is wrong, 75 stopped early but resumable, 130 interrupted,
1 anything else. Nothing heavy is imported before a verb needs it, so that help is instant.
"""

import difflib
import importlib
import importlib.metadata
import itertools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType

from blackpoint.data.files.errors import NOT_WRITABLE, Resumable, RunFailed, UserError
from blackpoint.data.files.notes import for_terminal, tell_counts
from blackpoint.data.files.signals import RESUMABLE_STATUS, Stopped, listen

# verb: (module with config_class() and run(config) -> int, purpose)
VERBS: dict[str, tuple[str, str]] = {
    "init": (
        "blackpoint.scripts.init.init",
        "Writes a config for your photos, checkpoint and card; tells memory, epochs and time.",
    ),
    "train": (
        "blackpoint.scripts.verbs.train",
        "Fine-tunes a Stable Diffusion UNet to zero terminal SNR and v-prediction by default.",
    ),
    "sample": (
        "blackpoint.scripts.verbs.sample",
        "Generates images from prompts and seeds with a checkpoint.",
    ),
    "search": (
        "blackpoint.scripts.verbs.search",
        "Searches over initial noises for the image that verifiers score highest.",
    ),
    "evaluate": (
        "blackpoint.scripts.verbs.evaluate",
        "Measures a checkpoint: FID, KID, IS, verifier scores, brightness.",
    ),
    "sweep": (
        "blackpoint.scripts.verbs.sweep",
        "Trains, evaluates and searches every cell of a grid, here or as a SLURM array.",
    ),
    "export": (
        "blackpoint.scripts.verbs.export",
        "Writes a diffusers folder from a run and verifies it with the stock pipeline.",
    ),
    "data pack": (
        "blackpoint.scripts.verbs.data_pack",
        "Packs a folder of captioned images into WebDataset shards with an index.",
    ),
    "data encode": (
        "blackpoint.scripts.verbs.data_encode",
        "Encodes shards into latents and prompt embeddings, for training without the encoders.",
    ),
    "data check": (
        "blackpoint.scripts.verbs.data_check",
        "Reports contents and unusable samples of shards; indexes shards made elsewhere.",
    ),
    "demo": (
        "blackpoint.scripts.miniature.demo",
        "Applies the zero-SNR fix to a small model and writes runs/demo/report.html.",
    ),
    "report": (
        "blackpoint.scripts.verbs.report",
        "Writes one self-contained HTML page about a run, an evaluation, a search or a sweep.",
    ),
    "show": (
        "blackpoint.scripts.verbs.show",
        "Serves a local page: a checkpoint beside its base, luminance, live searches.",
    ),
    "prefetch": (
        "blackpoint.scripts.prefetch.prefetch",
        "Fills a folder with all of the hub that a config needs, for nodes without network.",
    ),
    "doctor": (
        "blackpoint.scripts.verbs.doctor",
        "Looks at this installation and machine: what works, what does not, and the remedy.",
    ),
}

# Environment that keeps libraries quiet; what the user has set stays.
QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",  # workers are forked after the tokenizer is used
}
# Library warnings that tell a user nothing to act on, by the start of their message.
NOISE = (
    r"Metric `.*` will save all extracted features in buffer",
    r"The '.*_dataloader' does not have many workers",
    r"Checkpoint directory .* exists and is not empty",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status; prints errors, never raises them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        _complain(str(error))
        return 2
    except (Resumable, Stopped) as error:
        _complain(str(error))
        return RESUMABLE_STATUS
    except RunFailed as error:
        _complain(str(error))
        return 1
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            return _not_foreseen()
        _complain(
            f"{error.filename or 'the disk'}: {error.strerror}; make room or restore the rights"
        )
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except Exception:
        return _not_foreseen()
    finally:
        tell_counts()


def _not_foreseen() -> int:
    traceback.print_exc()
    _complain("unexpected error; please report it with the traceback above")
    return 1


def entry() -> None:
    """Runs the console script."""
    if sys.argv[1:2] == ["train"]:
        # Seconds before a trainer listens: a signal during the imports must not be a crash.
        listen()
    sys.exit(main())


def usage() -> str:
    """Writes the help text of the command itself."""
    width = max(map(len, VERBS))
    verbs = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: blackpoint VERB [CONFIG.yaml] [key=value ...]",
            "",
            *verbs,
            "",
            "blackpoint VERB --help         every key of the verb: type, default, meaning",
            "blackpoint VERB --help SECTION the keys of one section, such as data",
            "blackpoint VERB --print-config the resolved config, without running it",
            "blackpoint --version",
            "",
        ]
    )


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from blackpoint.train.records.environment import git_state

        commit = git_state()["git_commit"]
        version = importlib.metadata.version("blackpoint")
        print(f"blackpoint {version}" + (f", commit {commit}" if commit else ""))
        return 0
    verb, rest = _split_verb(arguments)
    if verb is None:
        return 0
    flags = {argument for argument in rest if argument in ("-h", "--help", "--print-config")}
    section = _section(rest)
    rest = [argument for argument in rest if argument not in (*flags, section)]
    _quiet_libraries()
    module_name, verb_purpose = VERBS[verb]
    module = importlib.import_module(module_name)
    rest = getattr(module, "arguments", list)(rest)
    if flags - {"--print-config"}:
        from blackpoint.scripts.config_fields import describe

        print(describe(chosen_config_class(module, rest), verb, verb_purpose, section), end="")
        return 0
    from blackpoint.scripts.config import check_outputs, load, to_yaml

    config: object = load(chosen_config_class(module, rest), rest)
    if flags:
        print(to_yaml(config), end="")
        return 0
    check_outputs(config)
    try:
        status = int(module.run(config) or 0)
        if not status:
            from blackpoint.scripts.next_steps import next_steps

            for line in next_steps(verb, config, rest):
                print(line, file=sys.stderr, flush=True)
        return status
    except (Resumable, RunFailed, UserError):
        raise
    except Exception as error:
        from blackpoint.scripts.out_of_memory import explained

        text = explained(config, error)
        if text is None:
            raise
        raise RunFailed(text) from error


def chosen_config_class(module: ModuleType, arguments: list[str]) -> type:
    """Returns the verb's config; a verb with several has config_class_of."""
    choose = getattr(module, "config_class_of", None)
    chosen: type = module.config_class() if choose is None else choose(arguments)
    return chosen


def _split_verb(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Takes the verb, of one word or two, off the front; None where its help was printed."""
    for length in (2, 1):
        verb = " ".join(arguments[:length])
        if verb in VERBS:
            return verb, arguments[length:]
    group = [verb for verb in VERBS if verb.startswith(f"{arguments[0]} ")]
    if group and arguments[1:2] and arguments[1] in ("-h", "--help"):
        print("\n".join(f"  {verb}  {VERBS[verb][1]}" for verb in group))
        return None, []
    given = " ".join(arguments[:2]) if group else arguments[0]
    close = difflib.get_close_matches(given, VERBS, n=1, cutoff=0.5) or group[:1]
    remedy = f"did you mean `blackpoint {close[0]}`?" if close else "see blackpoint --help"
    raise UserError(f"`{given}` is not a verb; {remedy}")


def _section(arguments: Sequence[str]) -> str:
    """Returns the word behind --help; "" where there is none, or what a verb takes."""
    for flag, word in itertools.pairwise(arguments):
        if flag in ("-h", "--help") and not word.startswith("-") and "=" not in word:
            return "" if word.endswith((".yaml", ".yml")) else word
    return ""


def _quiet_libraries() -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():  # a log file keeps our bars only
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # diffusers imports it where it is installed; what it then warns of is for 4-bit inference.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


def _complain(message: str) -> None:
    print(f"blackpoint: {for_terminal(message)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry()
