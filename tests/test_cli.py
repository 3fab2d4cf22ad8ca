"""The real command line in a temporary directory: runs, resumption, tables, errors and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dlgbench import cli, exits, records
from dlgbench.records import Record
from dlgbench.registry import DATASETS

from .clients import case

LENET = [
    "run",
    "architectures",
    "--only",
    "network=lenet_dlg",
    "--seeds",
    "1",
    "--images",
    "2",
    "--steps",
    "3",
]
Command = Callable[..., int]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one small run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert cli.main([*LENET, "--out", str(out)]) == exits.OK
    return out


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Every record less what differs between two undisturbed runs: its cost, date and digest."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        body = json.loads(path.read_text())
        del body["cost"], body["provenance"]["created"], body["digest"]
        found[path.name] = body
    return found


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dlgbench", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    while len(list(folder.glob("*.json"))) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_a_run_leaves_records_tables_plots_and_pictures(finished: Path) -> None:
    assert len(contents(finished / "records")) == len(list((finished / "pictures").iterdir())) == 2
    assert {path.suffix for path in (finished / "tables").iterdir()} == {".md", ".csv", ".tex", ".json"}
    assert (finished / "plots").is_dir()


def test_a_second_run_computes_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.json")}
    assert cli.main([*LENET, "--out", str(finished)]) == exits.OK
    assert "0 trials computed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before if path.parent.name != "plans"} == {
        path: stamp for path, stamp in before.items() if path.parent.name != "plans"
    }


def test_tensorboard_holds_scalars_images_and_hparams(finished: Path) -> None:
    for record in contents(finished / "records").values():
        events = EventAccumulator(str(finished / "tensorboard" / record["id"])).Reload()
        assert [event.step for event in events.Scalars("mse")] == [0, 1, 2, 3]
        assert [event.value for event in events.Scalars("mse")] == pytest.approx(record["history"]["mse"])
        assert [event.value for event in events.Scalars("objective")] == pytest.approx(
            record["history"]["objective"][:3]
        )
        assert {"psnr", "ssim", "final/psnr", "final/mse"} <= set(events.Tags()["scalars"])
        assert {"evolution", "private_and_reconstruction"} <= {
            tag.split("/")[0] for tag in events.Tags()["images"]
        }
        started = HParamsPluginData.FromString(
            events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        ).session_start_info
        assert started.hparams["seed"].number_value == record["case"]["seed"]
        assert started.hparams["network"].string_value.startswith("lenet_dlg:activation=sigmoid")
        (final,) = events.Scalars("final/psnr")
        assert final.value == pytest.approx(record["images"][0]["psnr"])


@pytest.mark.parametrize("form", ["rich", "md", "csv", "tex"])
def test_tables_show_the_run_and_its_baselines(
    finished: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["table", "--out", str(finished), "--format", form]) == exits.OK
    shown = capsys.readouterr().out.replace("\\", "")
    assert "lenet_dlg" in shown
    assert "(grey)" in shown


def test_show_prints_one_record(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, record = next(iter(contents(finished / "records").items()))
    assert cli.main(["show", name[:8], "--json", "--out", str(finished)]) == exits.OK
    assert json.loads(capsys.readouterr().out)["id"] == record["id"]
    assert cli.main(["show", "zz", "--out", str(finished)]) == exits.USAGE


def test_show_tells_what_a_training_came_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = case(dataset="digits", attack="none", channels=1, classes=10)
    records.save(Record(case=one, status="done", utility={"accuracy": 0.925}), tmp_path / "records")
    assert cli.main(["show", one.id, "--out", str(tmp_path)]) == exits.OK
    assert "0.925" in capsys.readouterr().out


def test_dry_run_tells_cached_from_missing_and_writes_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "run",
        "architectures",
        "--only",
        "network=lenet_dlg",
        "--seeds",
        "1",
        "--images",
        "3",
        "--steps",
        "3",
        "--dry-run",
        "--json",
    ]
    assert cli.main([*arguments, "--out", str(finished)]) == exits.OK
    states = [case["state"] for case in json.loads(capsys.readouterr().out)["cases"]]
    assert states == ["cached", "cached", "missing"]
    assert cli.main([*arguments, "--out", str(tmp_path / "new")]) == exits.OK
    assert not (tmp_path / "new").exists()


def test_a_limited_run_is_partial_and_in_no_leaderboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*LENET, "--limit", "1", "--out", str(tmp_path)]) == exits.OK
    assert "partial: 1 of 2" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["table", "--format", "md", "--out", str(tmp_path)]) == exits.OK
    shown = capsys.readouterr().out
    assert "Partial and therefore left out: lenet\\_dlg (1 of 2 trials)" in shown
    assert "| lenet" not in shown


def test_a_damaged_record_is_reported_left_out_and_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [*LENET[:6], "--images", "1", "--steps", "2", "--out", str(tmp_path)]
    assert cli.main(one) == exits.OK
    (path,) = (tmp_path / "records").iterdir()
    whole, before = path.read_text(), contents(path.parent)
    path.write_text(whole.replace('"closures": ', '"closures": 9'))
    capsys.readouterr()
    assert cli.main(["table", "--out", str(tmp_path)]) == exits.OK
    assert "digest" in capsys.readouterr().err
    assert cli.main(one) == exits.OK
    assert "damaged record" in capsys.readouterr().out
    assert contents(path.parent) == before


def test_a_skipped_case_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "run",
        "architectures",
        "--only",
        "network=inception_v3",
        "--set",
        "batch=1",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(arguments) == exits.OK
    assert "more than 1 value per channel" in " ".join(capsys.readouterr().out.split())


def test_a_network_too_deep_for_a_small_image_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of which several would fit one batch, if there were any."""
    small = ["--only", "network=resnet18", "--set", "resolution=32", "--images", "2"]
    assert cli.main(["run", "architectures", *small, "--out", str(tmp_path)]) == exits.OK
    assert "more than 1 value per channel" in " ".join(capsys.readouterr().out.split())


def test_json_goes_to_standard_output_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*LENET, "--json", "--out", str(finished)]) == exits.OK
    body = json.loads(capsys.readouterr().out)
    assert body[0]["rows"][0]["name"] == "lenet_dlg"


WRONG = {
    "unknown plan 'architecture'": (["run", "architecture"], "did you mean 'architectures'?"),
    "unknown network": (["run", "all", "--only", "network=resnet81"], "did you mean 'resnet18'?"),
    "unknown option": (["run", "all", "--set", "network.activatoin=relu"], "did you mean 'activation'?"),
    "unknown value": (["run", "all", "--set", "network.activation=rellu"], "did you mean 'relu'?"),
    "unknown attack": (["run", "all", "--set", "attack=dgl"], "did you mean 'dlg'?"),
    "unknown dataset": (["run", "all", "--set", "dataset=photo"], "did you mean 'photos'?"),
    "unknown field": (["run", "all", "--only", "netwrok=lenet5"], "did you mean 'network'?"),
    "no field": (["run", "all", "--only", "lenet5"], "expected FIELD=VALUE"),
    "no such case": (["run", "all", "--only", "seed=99"], "expected at least one case with seed=99"),
    "no images": (["run", "all", "--set", "images=0"], "expected at least one case, got none"),
    "no such option": (
        ["run", "all", "--only", "network.activaton=relu"],
        "did you mean 'activation'?",
    ),
    "bad dtype": (["run", "all", "--dtype", "float16"], "expected one of float32, float64"),
    "bad number": (["run", "all", "--set", "batch=two"], "expected a whole number"),
    "bad range": (
        ["run", "all", "--only", "network=lenet5", "--set", "attack.history=0"],
        "expected history > 0",
    ),
    "two devices": (["run", "all", "--devices", "2"], "would average the gradients"),
    "no data root": (["run", "all", "--set", "dataset=cifar10"], "--data-root"),
    "too many images": (["run", "all", "--images", "99"], "expected at least 9 images, got 8"),
    "bad preparation": (["run", "all", "--set", "preparation=corp"], "did you mean 'crop'?"),
    "no folder": (["run", "all", "--set", "dataset=folder:/no/such/folder"], "/no/such/folder"),
    "bad init": (
        ["run", "all", "--set", "network.init=unifrom:0.5"],
        "expected one of default, uniform:BOUND",
    ),
}


def test_a_truncated_image_is_refused_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    photo = DATASETS.make(DATASETS.spec("photos"), None).image(1)
    photo.save(tmp_path / "photos" / "whole.png")
    (tmp_path / "photos" / "broken.png").write_bytes((tmp_path / "photos" / "whole.png").read_bytes()[:5000])
    arguments = [*LENET, "--set", f"dataset=folder:{tmp_path / 'photos'}", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == exits.USAGE
    assert "broken.png" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", WRONG)
def test_bad_requests_end_with_code_2_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = WRONG[name]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == exits.USAGE
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "expected"), [
    ("[grid]\nnetwork = [", "line 2"),
    ("[grid]\nnetwork = 'lenet5'", "network: expected a list of values"),
    ("[grid]\nnetworks = ['lenet5']", "network = [...]"),
    ("[grid]\nnetwork = ['lenet6']", "did you mean 'lenet5'?"),
    ("[[grid]]\nnetwork = ['lenet5']\n[[grid]]\nbatch = [2]", "network = [...]"),
    ("[[grid]]\nnetwork = ['lenet5']\nquick = { step = 1 }", "did you mean 'steps'?"),
    ("[[grid]]\nnetwork = ['lenet5']\nquick = {}\n[quick]\nstep = 1", "did you mean 'steps'?"),
    ("[grid]\nnetwork = ['lenet5']\n[quik]\n", "did you mean 'quick'?"),
    ("[grid]\nnetwork = ['lenet5']\n[quick]\nsteps = 0\n", "quick.steps: expected a whole number >= 1"),
])  # fmt: skip
def test_a_malformed_plan_names_its_fault(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    assert cli.main(["run", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "out")]) == exits.USAGE
    assert expected in capsys.readouterr().err


def test_what_is_there_is_computed_anew_on_demand(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "records").iterdir()}
    assert cli.main([*LENET, "--force", "--out", str(tmp_path / "out")]) == exits.OK
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


def test_a_missing_accelerator_is_code_4_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cli.main([*LENET, "--accelerator", "cuda", "--out", str(tmp_path / "out")]) == exits.BROKEN
    assert "use --accelerator cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_is_read_by_people_too(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*LENET, "--images", "3", "--dry-run", "--out", str(finished)]) == exits.OK
    told = capsys.readouterr().out
    assert (told.count("cached"), told.count("missing")) == (2, 2)  # one row, and the sum
    assert "1 of 3 cases are missing; at most" in told


def test_a_plan_that_is_no_utf8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_bytes('title = "Café"\n[grid]\nnetwork = ["lenet5"]\n'.encode("latin-1"))
    assert cli.main(["run", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "out")]) == exits.USAGE
    assert "expected TOML, got 'utf-8' codec can't decode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("only", "count"),
    [("network=resnet18", 1), ("dataset=folder", 2), ("network.width=3", 0), ("network.activation=none", 0)],
)
def test_of_several_plans_those_are_run_that_have_such_cases(
    only: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = DATASETS.make(DATASETS.spec("photos"), None).image(1)
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "mine.png")
    for network, dataset in (
        ("lenet5", f"folder:{tmp_path}/photos"),
        ("resnet18", f"folder:{tmp_path}/photos"),
    ):
        text = f'[grid]\nnetwork = ["{network}"]\ndataset = ["{dataset}"]\n'
        (tmp_path / f"{network}.toml").write_text(text)
    plans = [str(tmp_path / f"{name}.toml") for name in ("lenet5", "resnet18")]
    arguments = ["run", *plans, "--only", only, "--dry-run", "--json", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == (exits.OK if count else exits.USAGE)
    told = capsys.readouterr().out
    assert len(json.loads(told)["cases"] if told else []) == count


def test_an_unwritable_output_directory_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main([*LENET, "--out", str(tmp_path / "file" / "out")]) == exits.USAGE
    assert "expected a directory to write to" in capsys.readouterr().err


def test_a_plan_of_ones_own_runs_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text(
        "[grid]\nnetwork = ['lenet_dlg:activation=tanh']\n[quick]\nsteps = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "mine.toml"]) == exits.OK
    (record,) = contents(tmp_path / "runs" / "records").values()
    assert record["case"]["network"]["activation"] == "tanh"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_a_run_with_their_codes(number: signal.Signals, code: int, tmp_path: Path) -> None:
    some = ["--only", "network=lenet5", "--steps", "2000", "--compile", "off"]
    process = start("run", "architectures", *some, "--out", str(tmp_path))
    while not list(tmp_path.glob("tensorboard/*/events*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "the same command goes on" in output


def test_a_killed_run_resumes_to_the_same_records(tmp_path: Path) -> None:
    networks = ["--only", "network=lenet5", "--only", "network=lenet_dlg"]  # which cannot share a batch
    arguments = ["run", "architectures", *networks, "--images", "1", "--steps", "12"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert cli.main([*arguments, "--out", str(undisturbed)]) == exits.OK
    process = start(*arguments, "--out", str(killed))
    wait_for(killed / "records", 1, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(contents(killed / "records")) < 2
    assert cli.main([*arguments, "--out", str(killed)]) == exits.OK
    assert contents(killed / "records") == contents(undisturbed / "records")


@pytest.mark.parametrize("victim", ["records/*.json", "tables/*.json", "plots/*/gallery.png"])
def test_whatever_a_kill_left_undone_is_done_by_the_next_run(victim: str, tmp_path: Path) -> None:
    arguments = [*LENET[:6], "--images", "1", "--steps", "2", "--out", str(tmp_path)]
    assert cli.main(arguments) == exits.OK
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*") if "events" not in path.name}
    before = contents(tmp_path / "records")
    (lost,) = tmp_path.glob(victim)
    lost.unlink()
    for table in (tmp_path / "tables").glob(
        "*.json"
    ):  # written last, so it is missing with all that precedes
        table.unlink()
    (lost.parent / f".{lost.name}.half").write_text("what a kill leaves of a file that was being written")
    assert cli.main(arguments) == exits.OK
    assert files <= {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")}
    assert contents(tmp_path / "records") == before


def test_plots_and_tables_that_someone_deleted_are_made_again(finished: Path) -> None:
    before = {path.relative_to(finished) for path in finished.rglob("*.*")}
    shutil.rmtree(finished / "plots")
    for table in (finished / "tables").glob("*.md"):
        table.unlink()
    assert cli.main([*LENET, "--out", str(finished)]) == exits.OK
    assert before <= {path.relative_to(finished) for path in finished.rglob("*.*")}


def test_running_out_of_time_is_code_3_and_leaves_no_record(tmp_path: Path) -> None:
    arguments = [
        "run",
        "architectures",
        "--only",
        "network=lenet_dlg",
        "--steps",
        "500",
        "--set",
        "image=1",
        "--out",
        str(tmp_path),
    ]
    assert cli.main([*arguments, "--time-limit", "0.01"]) == exits.OUT_OF_TIME
    assert not contents(tmp_path / "records")


def test_a_broken_trial_is_code_1_and_is_retried_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*LENET[:6], "--images", "1", "--steps", "400", "--compile", "off", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--trial-timeout", "0.0001"]) == exits.FAILED
    assert next(iter(contents(tmp_path / "records").values()))["status"] == "timeout"
    assert "1 broken" in " ".join(capsys.readouterr().out.split())
    assert cli.main(arguments) == exits.FAILED
    assert "0 trials computed" in capsys.readouterr().out
    assert cli.main([*arguments, "--retry-failed", "--trial-timeout", "0.0001"]) == exits.FAILED
    assert "1 trials computed" in capsys.readouterr().out


def test_help_list_and_table_do_not_import_torch(finished: Path) -> None:
    for arguments in (["list"], ["list", "--json"], ["table", "--out", str(finished)]):
        code = (
            f"import sys; from dlgbench import cli; cli.main({arguments!r}); sys.exit('torch' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    code = "import sys, dlgbench.cli, dlgbench.doctor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_broken_torch_is_code_4_with_the_way_to_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "dlgbench", *LENET, "--out", str(tmp_path / "out")],
        text=True,
        env=environment,
        capture_output=True,
    )
    assert done.returncode == exits.BROKEN
    assert "dlgbench doctor" in done.stderr


def test_the_lists_name_every_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == exits.OK
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("lenet5", "lenet_dlg", "resnet18", "densenet121", "inception_v3"))
    assert cli.main(["list", "--json"]) == exits.OK
    assert json.loads(capsys.readouterr().out)["networks"]["resnet18"]["facts"]["resolution"] == 224
