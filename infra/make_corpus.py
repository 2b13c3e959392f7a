"""Writes the bundled corpus: the documentation that ships inside the CPython which runs this script.

Topics of the language reference contain one another and docstrings repeat, so each exact paragraph is kept only where
it stands first; otherwise a held-out document could be copied from a training one. Nothing is imported: docstrings are
read from the syntax trees. The same version of Python writes the same text.

    python3.11 infra/make_corpus.py [FOLDER]
"""

import ast
import json
import lzma
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

STDLIB = Path(sysconfig.get_path("stdlib"))
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "pydoc_data"}
NAME = "python-docs"

NOTICE = """\
{name}.jsonl.xz holds parts of the documentation of Python {version}: the topics of pydoc and the
docstrings of the standard library. It was made by infra/make_corpus.py.

Changes: docstrings were taken out of their modules, one document a module; of paragraphs that stand in
several places only the first was kept; trailing blanks were removed.

{copyright}
Licence: PSF-2.0, which follows.


{licence}
"""


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, in the order of the source."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return walk(ast.parse(path.read_bytes()))


def sources() -> dict[str, str]:
    """Raw text by document id."""
    found = {f"topics/{name}": text for name, text in topics.items()}
    for path in STDLIB.rglob("*.py"):
        parts = path.relative_to(STDLIB).with_suffix("").parts
        if SKIPPED.isdisjoint(parts) and not parts[0].startswith("config-"):
            module = ".".join(parts).removesuffix(".__init__")
            found[f"stdlib/{module}"] = "\n\n".join(docstrings(path))
    return found


def documents() -> list[dict[str, str]]:
    """The documents by id, without repeated paragraphs; what has none left is dropped."""
    seen: set[str] = set()
    result = []
    raw = sources()
    for name in sorted(raw):
        kept = []
        for paragraph in re.split(r"\n\s*?\n", raw[name]):
            # The blanks before the first word stay: they are the indentation of a code block.
            text = "\n".join(line.rstrip() for line in paragraph.splitlines()).strip("\n")
            if text and text.strip() not in seen:
                seen.add(text.strip())
                kept.append(text)
        if kept:
            result.append({"id": name, "text": "\n\n".join(kept)})
    return result


def notice() -> str:
    """The notice: what was taken, what was changed, and the licence as this Python states it."""
    text = (STDLIB / "LICENSE.txt").read_text(encoding="utf-8")
    licence = re.search(r"PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n-+\n.*?(?=\n\n\n)", text, re.DOTALL)
    copyright_line = re.search(r'"(Copyright \(c\) 2001,.*?All Rights Reserved)"', text, re.DOTALL)
    if licence is None or copyright_line is None:
        raise SystemExit(f"{STDLIB / 'LICENSE.txt'} does not state the PSF licence where it is expected; read it and mend this")
    return NOTICE.format(name=NAME, version=platform.python_version(), copyright=copyright_line[1], licence=licence[0].rstrip())


def main(folder: Path) -> None:
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents()]
    data = "".join(lines).encode()
    packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.jsonl.xz").write_bytes(packed)
    (folder / "NOTICE").write_text(notice(), encoding="utf-8")
    print(f"{len(lines)} documents of Python {platform.python_version()}: {len(data):,} bytes, {len(packed):,} compressed")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "tasks" / "corpus")
