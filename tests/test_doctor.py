"""The doctor on this machine, and on fakes of all that can be broken; one real import of torch in all."""

import configparser
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dlgbench import doctor
from dlgbench.doctor import Finding, broken, examine

PAIR = "pip install --upgrade --force-reinstall torch torchvision"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_PROCID")
HEALTHY = '__version__ = "9.9"\n'
FAKE_TORCH = """
from types import SimpleNamespace as Space
__version__ = "9.9"
print("an import that chatters", end="")
version = Space(cuda=CUDA, hip=None)
class Matrix:
    def reshape(self, *_): return self
    def to(self, _): return self
    def cpu(self): return self
    def __matmul__(self, _): return self
def arange(_): return Matrix()
def get_num_threads(): return 3
def fail(*_): raise ERROR
cuda = Space(is_available=lambda: DEVICES > 0, device_count=lambda: DEVICES, current_device=fail,
             get_device_properties=lambda name: Space(name=f"Fake {name}", total_memory=80 * 2**30))
testing = Space(assert_close=fail if WRONG else lambda *_: None)
"""


def fake_torch(cuda: str | None = None, devices: int = 0, wrong: bool = False, error: str = "None") -> str:
    """Source of a torch of just the functions that the doctor calls."""
    facts = f"CUDA, DEVICES, WRONG, ERROR = {cuda!r}, {devices}, {wrong}, {error}\n"
    return facts + FAKE_TORCH


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put fake packages before the real ones of the child; at first all four of them, and healthy."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)

    def write(name: str, source: str) -> None:
        (tmp_path / "site" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name / "__init__.py").write_text(source)

    write("torch", fake_torch())
    for name in ("torchvision", "torchmetrics", "pytorch_lightning"):
        write(name, HEALTHY)
    return write


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions to pretend by package; None: not installed."""
    pretended: dict[str, str | None] = {}
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = pretended[name] if name in pretended else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return pretended


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi on the path, which is how the doctor knows of a driver."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def by_check(out: Path) -> dict[str, Finding]:
    findings = examine(out)
    assert len({found.check for found in findings}) == len(findings)
    assert all(found.detail for found in findings)
    assert all(found.remedy for found in findings if found.level == "error")
    return {found.check: found for found in findings}


def test_this_machine_is_sound(tmp_path: Path) -> None:
    findings = by_check(tmp_path / "results")
    assert not broken(findings.values()), findings
    imports = {check for check in findings if check.startswith("import ")}
    assert imports == {f"import {name}" for name in doctor.IMPORTED}
    assert findings["cpu"].detail.endswith("threads")
    assert {"python", "rich", "cuda", "photos", "output", "launcher"} <= findings.keys()


def test_the_doctor_itself_does_not_import_torch() -> None:
    code = "import sys, dlgbench.doctor; sys.exit(bool({'torch', 'rich', 'skimage'} & sys.modules.keys()))"
    root = Path(doctor.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_every_dependency_is_held_to_its_floor(versions: dict[str, str | None], tmp_path: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    needed = [Requirement(text) for text in setup["options"]["install_requires"].split()]
    versions |= {one.name: "0.0.1" for one in needed}
    findings = by_check(tmp_path)
    for one in needed:
        assert findings[one.name].level == "error"
        assert findings[one.name].detail == f"0.0.1, expected {one}"
    assert not findings.keys() & {"pytest", "hypothesis", "foolbox"}  # extras


def test_a_checkout_that_is_not_installed_is_told(versions: dict[str, str | None], tmp_path: Path) -> None:
    versions["dlgbench"] = None
    finding = by_check(tmp_path)["dlgbench"]
    assert (finding.level, finding.detail) == ("error", "not installed")
    assert finding.remedy.startswith("pip install .")


@pytest.mark.usefixtures("install")
def test_a_sound_installation_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for place in (out, out / "deep" / "deeper"):
        findings = by_check(place)
        assert not broken(findings.values())
        assert findings["cpu"].detail == "3 threads"
        assert list(out.iterdir()) == []


def test_an_operator_that_does_not_exist(install: Callable[[str, str], None], tmp_path: Path) -> None:
    install("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    findings = by_check(tmp_path)
    assert findings["import torch"].level == "ok"
    assert findings["import torchvision"].level == "error"
    assert "RuntimeError: operator torchvision::nms does not exist" in findings["import torchvision"].detail
    assert findings["import torchvision"].remedy == PAIR


def test_the_wrong_pair_is_named(
    install: Callable[[str, str], None],
    versions: dict[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    versions |= {"torch": "2.13.0+cpu", "torchvision": "0.29.2"}
    requires = {
        "dlgbench": ["torch>=2.11", "torchvision>=0.26"],
        "torchvision": ["numpy", "torch>=2.14.0", "torch==2.8; extra == 'dev'"],
    }
    monkeypatch.setattr(importlib.metadata, "requires", requires.get)
    detail = by_check(tmp_path)["import torchvision"].detail
    assert detail.endswith("(torchvision 0.29.2 needs torch>=2.14.0, not torch 2.13.0+cpu)")


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("raise ImportError('libcudart.so.12:\\ncannot open')", "ImportError: libcudart.so.12: cannot open"),
        ("raise OSError('too short')", "OSError: too short"),
        ("", "no attribute '__version__'"),
        ("import os; os.kill(os.getpid(), 11)", "exit status -11"),
        ("import os; os._exit(0)", "exit status 0"),
        ("raise SystemExit(7)", "exit status 7"),
        ("1 +", "SyntaxError: invalid syntax"),
    ],
)
def test_a_torch_that_cannot_be_imported(
    install: Callable[[str, str], None], tmp_path: Path, source: str, detail: str
) -> None:
    install("torch", source)
    findings = by_check(tmp_path)
    assert detail in findings["import torch"].detail
    assert findings["import torch"].level == "error"
    assert findings["import torch"].remedy == PAIR
    assert not findings.keys() & {"import torchvision", "cpu", "cuda"}


def test_a_broken_lightning_is_reinstalled_with_the_pair(
    install: Callable[[str, str], None], tmp_path: Path
) -> None:
    install("pytorch_lightning", "raise ImportError('half of it is gone')")
    assert by_check(tmp_path)["import pytorch-lightning"].remedy == f"{PAIR} pytorch-lightning"


def test_a_child_that_never_answers(
    install: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("torchmetrics", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "PATIENCE", 3.0)
    findings = by_check(tmp_path)
    assert findings["import torchmetrics"] == Finding(
        "import torchmetrics", "error", "no answer within 3 s", f"{PAIR} torchmetrics"
    )


@pytest.mark.usefixtures("install")
def test_a_child_that_dies_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "site" / "sitecustomize.py").write_text("import os; os._exit(9)")
    assert by_check(tmp_path)["import torch"].detail == "exit status 9"


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_a_malicious_release_is_named_and_never_imported(
    install: Callable[[str, str], None], versions: dict[str, str | None], tmp_path: Path, version: str
) -> None:
    install("pytorch_lightning", f"open({str(tmp_path / 'stolen')!r}, 'w')")
    versions["pytorch-lightning"] = version
    finding = by_check(tmp_path)["pytorch-lightning"]
    assert (finding.level, finding.detail) == ("error", f"{version} is malicious")
    assert finding.remedy.startswith('pip install --upgrade "pytorch-lightning>=2.6.4"')
    assert not (tmp_path / "stolen").exists()


@pytest.mark.usefixtures("install")
@pytest.mark.parametrize(
    ("name", "version", "detail", "remedy"),
    [
        ("pytorch-lightning", "2.5.0", "2.5.0, expected pytorch-lightning>=2.6.4", '"pytorch-lightning>=2'),
        ("torch", "2.10.1+cpu", "2.10.1+cpu, expected torch>=2.11", PAIR),
        ("torch", None, "not installed", PAIR),
        ("torchvision", "0.25.0", "0.25.0, expected torchvision>=0.26", PAIR),
        ("scipy", None, "not installed", 'pip install --upgrade "scipy>='),
        ("scikit-image", None, "not installed", 'pip install --upgrade "scikit-image>='),
        ("rich", "", "not installed", 'pip install --upgrade "rich>='),
    ],
)
def test_packages_too_old_or_missing(
    versions: dict[str, str | None], tmp_path: Path, name: str, version: str | None, detail: str, remedy: str
) -> None:
    versions[name] = version
    findings = by_check(tmp_path)
    assert (findings[name].level, findings[name].detail) == ("error", detail)
    assert remedy in findings[name].remedy
    assert f"import {name}" not in findings
    assert broken(findings.values())


@pytest.mark.usefixtures("install")
def test_an_old_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "3.10.2" if name == "python" else "99")
    assert by_check(tmp_path)["python"] == Finding(
        "python", "error", "3.10.2, expected python>=3.11", "install Python 3.11 or newer"
    )


@pytest.mark.usefixtures("install")
def test_the_samples_extra_is_optional(versions: dict[str, str | None], tmp_path: Path) -> None:
    versions["foolbox"] = None
    photos = by_check(tmp_path)["photos"]
    assert photos.level == "ok"
    assert 'pip install "dlgbench[samples]"' in photos.detail
    versions["foolbox"] = "3.3.4"
    assert by_check(tmp_path)["photos"].detail.endswith("3.3.4")


@pytest.mark.usefixtures("install")
def test_photos_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    photos = by_check(tmp_path)["photos"]
    assert photos.level == "error"
    assert photos.remedy.endswith("scikit-image")


@pytest.mark.usefixtures("install")
@pytest.mark.parametrize("below", ["", "deep/deeper"])
def test_an_output_that_cannot_be_written(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    output = by_check(file / below)["output"]
    assert output.level == "error"
    assert str(file / below) in output.detail
    assert "--out" in output.remedy
    assert file.read_text() == "kept"


@pytest.mark.usefixtures("install")
def test_variables_of_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.setenv(name, "1")
    launcher = by_check(tmp_path)["launcher"]
    assert launcher.level == "warning"
    assert launcher.detail.startswith("LOCAL_RANK RANK SLURM_* WORLD_SIZE would silence loggers")


def test_devices_are_listed(install: Callable[[str, str], None], tmp_path: Path) -> None:
    install("torch", fake_torch(cuda="13.2", devices=2))
    findings = by_check(tmp_path)
    assert findings["cuda"] == Finding("cuda", "ok", "CUDA 13.2 build, 2 devices")
    assert findings["cuda:1"] == Finding("cuda:1", "ok", "Fake cuda:1, 80 GiB")


def test_a_device_that_cannot_compute(install: Callable[[str, str], None], tmp_path: Path) -> None:
    error = "RuntimeError('CUDA error: no kernel image\\nCompile with TORCH_USE_CUDA_DSA.')"
    install("torch", fake_torch(cuda="13.2", devices=1, wrong=True, error=error))
    device = by_check(tmp_path)["cuda:0"]
    assert device.level == "error"
    assert "RuntimeError: CUDA error: no kernel image Compile" in device.detail
    assert device.remedy.endswith("--accelerator cpu")


@pytest.mark.usefixtures("nvidia")
def test_a_driver_that_torch_cannot_use(install: Callable[[str, str], None], tmp_path: Path) -> None:
    install("torch", fake_torch(error="AssertionError('Torch not compiled with CUDA enabled')"))
    findings = by_check(tmp_path)
    assert findings["cuda"].level == "warning"
    assert findings["cuda"].detail.endswith("AssertionError: Torch not compiled with CUDA enabled")
    assert "driver" in findings["cuda"].remedy
    assert not broken(findings.values())


def test_no_driver_is_no_fault(
    install: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert by_check(tmp_path)["cuda"] == Finding("cuda", "ok", "CPU only build, 0 devices")
    install("torch", fake_torch(cuda="13.2"))
    assert by_check(tmp_path)["cuda"] == Finding("cuda", "ok", "CUDA 13.2 build, 0 devices")
