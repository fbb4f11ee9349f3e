"""What a robot's computer gets with the package alone: its version, its types, and what an export holds."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import spvla
from spvla import InputError, load_export
from spvla.errors import needs_extra
from spvla.info import packaged_exports, print_info
from spvla.vlas import registry


def test_the_version_is_the_installed_one_and_types_are_marked() -> None:
    assert spvla.__version__ == version("spvla")
    assert (Path(spvla.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", packaged_exports())
def test_an_exports_parts_are_listed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_info(name, json=True)
    found, export = json.loads(capsys.readouterr().out), load_export(name)
    assert found["generators"].keys() == export.generators.keys() | export.gates.keys()
    assert found["action_space"] == json.loads(json.dumps(export.space.to_dict()))
    print_info(name)
    table = capsys.readouterr().out
    assert all(part in table for part in (*export.gates, export.space.name, str(export.defaults["risk"])))


def test_the_servers_help_needs_no_extra() -> None:
    code = (
        "import sys; sys.modules.update(vla_eval=None, websockets=None, msgpack=None); from spvla.__main__ import main; main()"
    )
    answer = subprocess.run([sys.executable, "-c", code, "serve", "--help"], capture_output=True, text=True)
    assert answer.returncode == 0 and "--max_sessions" in answer.stdout


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(InputError) as error, needs_extra("serve"):
        import no_such_package_at_all  # type: ignore[import-not-found]  # noqa: F401
    assert (error.value.code, error.value.field) == ("missing-extra", "serve")


def test_the_expert_is_no_policy_of_a_robots_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "expert" in registry.VLAS.names()
    monkeypatch.setattr(registry, "_in_repository", lambda: False)
    with pytest.raises(InputError) as error:
        registry.load_vla("expert")
    assert error.value.code == "needs-repository"
