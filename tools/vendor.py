"""Third-party libraries kept as files for the page and its tests: fetched once, pinned, verified.

`python -m tools.vendor` fetches every package of `PACKAGES` with npm, which checks what it gets,
and writes the files that are used, each package's licence, and `vendor.json` with the SHA-256 of
all of them. The page is served as it lies in the repository, so this runs only when a version
changes; a test compares the files with `vendor.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, TESTS = ROOT / "server/page/js/vendor", ROOT / "tests/page/vendor"


@dataclass(frozen=True)
class Package:
    """One package at one version: its files, their folder and their new names."""

    name: str
    version: str
    folder: Path
    files: dict[str, str]
    """New file name by path in the package."""

    replaced: dict[str, str] = field(default_factory=dict)
    """New text by old text in the files: a browser finds no module by a package's name."""


PACKAGES = (
    Package(
        "preact",
        "11.2.0",
        PAGE,
        {"dist/preact.mjs": "preact.js", "hooks/dist/hooks.mjs": "preact-hooks.js"},
        {'from"preact"': 'from"./preact.js"'},
    ),
    Package("htm", "3.1.1", PAGE, {"dist/htm.mjs": "htm.js"}),
    Package("axe-core", "4.14.1", TESTS, {"axe.min.js": "axe.min.js"}),
)


def main() -> None:
    """Fetch all packages, and write their files and records anew."""
    for folder in {package.folder for package in PACKAGES}:
        folder.mkdir(parents=True, exist_ok=True)
        record = [_fetch(package) for package in PACKAGES if package.folder == folder]
        (folder / "vendor.json").write_text(json.dumps(record, indent=2) + "\n")


def problems() -> list[str]:
    """What differs from the records: files that were changed, are missing, or are not listed."""
    found = []
    for folder in sorted({package.folder for package in PACKAGES}):
        record = json.loads((folder / "vendor.json").read_text())
        pinned = [[p.name, p.version] for p in PACKAGES if p.folder == folder]
        if [[entry["name"], entry["version"]] for entry in record] != pinned:
            found.append(f"{folder}/vendor.json records other versions than tools/vendor.py pins")
        listed = {name: digest for entry in record for name, digest in entry["files"].items()}
        lying = {path.name: path for path in folder.iterdir() if path.name != "vendor.json"}
        found += [f"{folder / name} is missing" for name in listed.keys() - lying.keys()]
        found += [f"{folder / name} is not listed" for name in lying.keys() - listed.keys()]
        found += [
            f"{path} was changed"
            for name, path in lying.items()
            if name in listed and _sha256(path.read_bytes()) != listed[name]
        ]
    return found


def _fetch(package: Package) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ["npm", "pack", "--json", f"{package.name}@{package.version}"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        [about] = json.loads(packed.stdout)
        with tarfile.open(Path(folder) / about["filename"]) as archive:
            archive.extractall(folder, filter="data")
        source = Path(folder) / "package"
        licence = json.loads((source / "package.json").read_text())["license"]
        wanted = package.files | {"LICENSE": f"{package.name}.LICENSE"}
        digests = {}
        for old, new in wanted.items():
            text = (source / old).read_text()
            for part, instead in package.replaced.items():
                text = text.replace(part, instead)
            # Source maps are not served, so no file may name one.
            content = re.sub(r"\n//# sourceMappingURL=.*", "", text).encode()
            (package.folder / new).write_bytes(content)
            digests[new] = _sha256(content)
    return {
        "name": package.name,
        "version": package.version,
        "licence": licence,
        "integrity": about["integrity"],
        "files": digests,
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
