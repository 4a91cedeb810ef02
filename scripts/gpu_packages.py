"""The packages that the GPU check needs beside torch: into a folder of wheels, and from it on a machine offline.

    gpu_packages.py download --wheels FOLDER        # with a package index: wheels for Python 3.12 on Linux x86-64
    gpu_packages.py install --wheels FOLDER --target FOLDER [--all]    # without: what this Python lacks, or all

Torch and numpy are the machine's own and never touched: they are built to fit each other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINNED = {"megatron-core"}
"""Must be there in exactly the version of constraints.txt: the runtime patches it."""
PACKAGES = (
    "megatron-core",
    "packaging", "safetensors", "tokenizers",
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions",
    "pyyaml", "networkx", "scipy",
    "rich", "markdown-it-py", "mdurl", "pygments",
)  # fmt: skip
NEIGHBOURS = {"torch", "numpy", "huggingface-hub"}
"""The machine's own; and what tokenizers asks for only to fetch from the network."""
TAGS = ("2_28", "2_27", "2_24", "2_17")
LARGEST_MB = 60.0


def main() -> int:
    """Download or install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("download", "install"))
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--target", type=Path, help="folder to install into")
    parser.add_argument("--all", action="store_true", help="also what this Python has already")
    options = parser.parse_args()
    if options.action == "download":
        return download(options.wheels)
    if options.target is None:
        parser.error("install needs --target")
    return install(options.wheels, options.target, everything=options.all)


def pins() -> dict[str, str]:
    """Package -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return dict(line.split("==") for line in lines if "==" in line)


def download(folder: Path) -> int:
    """Fill the folder with one wheel per package, of the versions of constraints.txt; 1 when it is too large."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    found = pins()
    platforms = [word for tag in TAGS for word in ("--platform", f"manylinux_{tag}_x86_64")]
    words = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
    names = [f"{name}=={found[name]}" for name in PACKAGES]
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", *words]
    subprocess.run([*command, "--platform", "manylinux2014_x86_64", "-d", str(folder), *names], check=True)
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl")) / 1e6
    print(f"{len(PACKAGES)} wheels of {size:.1f} MB in {folder}", file=sys.stderr)
    if size > LARGEST_MB:
        print(f"error: more than {LARGEST_MB:g} MB", file=sys.stderr)
    return 1 if size > LARGEST_MB else 0


def missing() -> list[str]:
    """Packages that this Python lacks, or has in a version that the runtime does not run with."""
    found = pins()
    return [name for name in PACKAGES if not _present(name, found[name])]


def _present(name: str, pinned: str) -> bool:
    try:
        have = version(name)
    except PackageNotFoundError:
        return False
    return name not in PINNED or have == pinned


def install(folder: Path, target: Path, *, everything: bool) -> int:
    """Install what is missing into `target`, from the folder alone."""
    names = list(PACKAGES) if everything else missing()
    if not names:
        return 0
    if not any(folder.glob("*.whl")):
        print(f"error: this Python lacks {', '.join(names)}, and there are no wheels in `{folder}`", file=sys.stderr)
        print("hint: scripts/gpu_wheels.sh fills the folder on a machine with a network", file=sys.stderr)
        return 2
    words = ["--no-index", "--no-deps", "--find-links", str(folder), "--target", str(target), "--no-compile"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", *words]
    return subprocess.run([*command, *names]).returncode


def unmet(folder: Path) -> list[str]:
    """Requirements of the packages in a folder that neither the folder nor torch's environment meets."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    have = {canonicalize_name(found.name) for found in distributions(path=[str(folder)])} | NEIGHBOURS
    needs = [Requirement(text) for found in distributions(path=[str(folder)]) for text in found.requires or ()]
    applying = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return sorted({str(need) for need in applying if canonicalize_name(need.name) not in have})


if __name__ == "__main__":
    raise SystemExit(main())
