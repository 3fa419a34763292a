"""The same numbers next year: what `requirements/` pins covers what setup.py asks for, and nothing of one machine."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OF_THE_MAKEFILE = {"torch", "triton"}  # installed first, or those of the machine


def pins(name: str) -> dict[str, str]:
    """Package -> version; raises where a line is anything else, such as a path or an address."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines())
    found = [re.fullmatch(r"([\w.-]+)==([\w.+]+)", line) or pytest.fail(f"{name}: {line}") for line in lines if line]
    return {canonicalize_name(pin[1]): pin[2] for pin in found}


@pytest.fixture(scope="module")
def wanted() -> list[Requirement]:
    """What `make test` installs of setup.py, and faiss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **_: None)
        module = runpy.run_path("setup.py")
    extras = re.search(r'-e "\.\[([\w,]+)\]"', (ROOT / "Makefile").read_text())[1].split(",")
    names = [*module["LOSS"], *(name for extra in (*extras, "faiss-cpu") for name in module["EXTRAS"][extra])]
    return [requirement for requirement in map(Requirement, names) if requirement.name not in OF_THE_MAKEFILE]


def test_the_lock_has_a_version_that_setup_py_allows_of_every_dependency(wanted):
    locked = pins("lock.txt")
    for requirement in (*wanted, Requirement("open_clip_torch>=3.3"), Requirement("setuptools")):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_the_lock_keeps_what_was_chosen(wanted):
    locked = pins("lock.txt")
    chosen = pins("chosen.txt")
    assert chosen["babel"] == "2.18.0"  # of README's demo table
    assert {name: locked.get(name, version) for name, version in chosen.items()} == chosen


def test_the_lock_leaves_a_machine_its_torch_and_its_faiss():
    locked = pins("lock.txt")
    free = ("torch", "triton", "faiss-gpu", "nvidia-", "cuda-", "hbt-fast", "pip")
    assert not [name for name in locked if name in free or name.startswith(("nvidia-", "cuda-"))]


def test_the_oldest_versions_are_the_floors_of_setup_py(wanted):
    """So that `make test-oldest` tests what setup.py promises."""
    oldest, floors = pins("oldest.txt"), {}
    for requirement in wanted:
        (floor,) = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        name = canonicalize_name(requirement.name)
        floors[name] = max(floors.get(name, floor), floor, key=Version)  # extras may want a newer one
    assert {name: oldest.get(name) for name in floors} == floors
