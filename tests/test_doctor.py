"""The report agrees with the package's own metadata and with other ways of asking."""

import importlib.util
import json
import os
import re
import shutil
import tomllib

import pytest
import torch

from vlbeit import doctor


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def names(requirements):
    return {re.split(r"[<>=\[ ]", text)[0].lower() for text in requirements}


def test_the_core_it_looks_for_is_the_core_the_package_declares(project, report):
    assert set(report["core"]) == names(project["dependencies"])


def test_the_extras_it_looks_for_are_the_ones_the_package_declares(project):
    declared = {
        extra: {name.replace("-", "_") for name in names(requirements)}
        for extra, requirements in project["optional-dependencies"].items()
        if extra not in ("test", "dev", "e2e")
    }
    assert declared == {extra: set(modules) for extra, modules in doctor.EXTRAS.items()}


def test_what_it_finds_is_what_can_be_imported(report):
    assert report["core"]["torch"] == torch.__version__
    for modules in report["extras"].values():
        for module, found in modules.items():
            assert found == (importlib.util.find_spec(module) is not None)


def test_the_report_is_json_and_its_sizes_are_plausible(report):
    assert json.loads(json.dumps(report)) == report
    assert 1 <= report["cores"]["usable"] <= report["cores"]["machine"] == os.cpu_count()
    assert 0 < report["memory"]["free"] <= report["memory"]["total"]
    assert report["disk"]["total"] == shutil.disk_usage(".").total
    assert report["torch"]["devices"][0]["device"] == "cpu"
    assert len(report["torch"]["devices"]) == 1 + torch.cuda.device_count()


def test_a_missing_core_package_is_a_problem_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setitem(doctor._CORE, "nowhere-1", "no_such_module")
    assert doctor.main([]) == 78
    text = capsys.readouterr().out
    assert "nowhere-1 MISSING" in text
    assert "nowhere-1 is not installed; run: pip install" in text


def test_a_full_disk_and_a_blind_gpu_build_are_problems(report):
    sick = report | {
        "disk": {"total": 10**9, "free": 10**6},
        "torch": report["torch"] | {"build": "CUDA 13.0", "devices": [{"device": "cpu"}]},
    }
    found = " ".join(doctor._problems(sick))
    assert "checkpoints may not fit" in found and "sees no GPU" in found


def test_a_module_is_traced_to_the_extra_that_brings_it():
    assert doctor.extra_of("tensorboard.compat") == "train"
    assert doctor.extra_of("torch") is None
