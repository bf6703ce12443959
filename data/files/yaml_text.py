"""YAML of configs: a plain word is text unless it is true, false, null or a number.

That is YAML 1.2's core schema without its octal and hexadecimal numbers. YAML 1.1, which PyYAML
reads, takes `no` for false, 010 for 8 and 1:30 for 90; and 1e-5, as Python writes it, for text.
What is written here reads the same in both.
"""

import dataclasses
import re
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import yaml

_FLOAT = re.compile(
    r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_SCALARS = {
    "bool": (re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile("^[-+]?(?:0|[1-9][0-9_]*)$"), "-+0123456789"),
    "float": (_FLOAT, "-+.0123456789"),
}


class _Loader(yaml.SafeLoader):
    """The scalars above, and every key of a mapping once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys: set[str] = set()
        for key, _ in node.value:
            if key.tag.endswith(":str") and key.value in keys:
                problem = f"found duplicate key {key.value}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            keys.add(key.value if isinstance(key.value, str) else "")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> Any:
        # Quoted and escaped, for line breaks other than \n would not come back.
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag in _KEPT]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, list(_first))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", *(_FLOAT, list("-+.0123456789")))
_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_text(str(path)))
_Dumper.add_multi_representer(Enum, lambda dumper, choice: dumper.represent_text(choice.name))


def read_yaml(text: str) -> Any:
    """Returns plain containers; raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def read_yaml_file(path: Path) -> Any:
    """Reads a file as `read_yaml` does."""
    return read_yaml(path.read_text(encoding="utf-8"))


def to_yaml(content: Any) -> str:
    """Writes a config dataclass, or plain containers, in the order that they have."""
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        content = dataclasses.asdict(content)
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
