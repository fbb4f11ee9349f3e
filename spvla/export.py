"""The exported folder: generators, their gates and calibration, ready for a robot.

    config.json                    action space, tolerance, defaults, calibration curves, provenance
    generators/<name>.safetensors  weights of the learned generators
    gates/<name>.safetensors       one action-type classifier per generator, the linear one included
    README.md                      model card

Loads with ``spvla`` alone; never holds a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from spvla.actions import ActionSpace
from spvla.card import measured, model_card
from spvla.errors import InputError
from spvla.fields import check_fields, check_values, naming
from spvla.files import building, explained, inside, read_bytes, read_json, write_bytes, write_text
from spvla.gates import GATES
from spvla.gates.calibration import Calibration
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig
from spvla.gates.eyes import EyesConfig
from spvla.generators import GENERATORS, is_learned, make_baseline, make_network, names_of
from spvla.generators.base import ActionGenerator
from spvla.generators.learned import LearnedGenerator
from spvla.hub import COMMIT, HUB, packaged, pinned, resolve_folder, upload_folder
from spvla.pruning.pruner import Pruner, make_pruner, with_current_names
from spvla.vlas.checkpoint import require_finite

M = TypeVar("M", bound=nn.Module)
FORMAT = 2  # 1 calls the default gate its scheduler and has no check sums
DEFAULTS = {"generator": str, "gate": str, "risk": float, "max_generated_run": int}
PRUNING = {"pruning": Pruner | Mapping[str, Any] | str | None}
CONFIG = {
    "format": int,
    "action_space": dict[str, Any],
    "tolerance": float,
    "defaults": dict[str, Any],
    "generators": dict[str, dict[str, Any]],
    "gates": dict[str, dict[str, Any]],
    "calibration": dict[str, dict[str, Any]],
    "provenance": dict[str, Any],
}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a generator
PARTS = ("generators", "gates", "README.md", "config.json")
WHOLE = ".whole"  # a version that a killed save had completed
WEIGHTS = (".safetensors", ".onnx")  # all that an export's subfolders hold


@dataclass(frozen=True)
class Export:
    """Everything distilled from one teacher.

    Args:
        space: action space with the jump limits seen in training.
        tolerance: error beyond which a step deviates, normalised units.
        generators: learned generators by name.
        gates: an action-type classifier per generator name (``ridge`` included).
        calibration: each gate's risk curve.
        defaults: ``generator``, ``gate``, ``risk``, ``max_generated_run``, and where the VLA is to run pruned
            ``pruning``: what :func:`~spvla.pruning.make_pruner` takes.
        provenance: teacher, data, commit, versions.
        source: the address, with its commit, of an export that was loaded from the hub.
    """

    space: ActionSpace
    tolerance: float
    generators: Mapping[str, LearnedGenerator]
    gates: Mapping[str, ActionTypeClassifier]
    calibration: Mapping[str, Calibration]
    defaults: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tolerance <= 0:
            raise InputError(f"tolerance must be positive, got {self.tolerance}")
        if missing := self.gates.keys() - self.calibration.keys():
            raise InputError(f"calibration for gate {min(missing)!r} is missing")
        with naming("defaults"):
            check_defaults(self.defaults, tuple(self.generators))
        modules: list[nn.Module] = [*self.generators.values(), *self.gates.values()]
        for module in modules:
            module.eval()  # with dropout, every call would decide differently
        for name in self.gates.keys() & self.generators.keys():
            generator, gate = self.generators[name].features, self.gates[name].features
            if generator.config == gate.config:
                self.gates[name].features = generator  # one module: what it computes for the generator serves the gate

    @property
    def eyes(self) -> EyesConfig | None:
        """What its gates see of the scene, which needs the camera at every step; None: nothing."""
        return next((gate.config.eyes for gate in self.gates.values() if gate.config.eyes is not None), None)

    @property
    def reads_error(self) -> bool:
        """Whether a gate reads its generator's error at the VLA's last call."""
        return any(gate.config.last_disagreement for gate in self.gates.values())

    def generator(self, name: str, space: ActionSpace) -> ActionGenerator:
        """A generator by name for a robot of ``space``: an exported one, ``ridge``, ``ridge_paper`` or ``last``; its normalised
        actions are in the export's scale."""
        acting = self.acting_space(space)
        if name in self.generators:
            return self.generators[name].bind(acting)
        if name not in GENERATORS:
            known = ", ".join(dict.fromkeys([*self.generators, *GENERATORS.names()]))
            raise InputError(f"generator {name!r} is unknown; available: {known}", code="unknown-generator", field="generator")
        if is_learned(name):
            held = ", ".join(self.generators) or "none"
            message = f"generator {name!r} is not in this export, which holds: {held}"
            raise InputError(message, code="not-in-export", field="generator")
        return make_baseline(name, acting)

    def acting_space(self, space: ActionSpace) -> ActionSpace:
        """The space in which generators and gates act on a robot of ``space``: its bounds and environment units, in the
        export's scale, which is the one that they were trained in."""
        return space.scaled_like(self.space)

    def limits(self, generator: str, space: ActionSpace) -> ActionSpace:
        """The limits on proposals of ``generator`` on a robot of ``space``: its bounds, and for a distilled one the largest
        jump that training saw; in the export's scale."""
        acting = self.acting_space(space)
        jump = self.space.max_jump if generator in self.generators else None
        return acting if jump is None else acting.with_max_jump(jump)

    @classmethod
    def from_hub(cls, name: str, revision: str) -> Export:
        """The export in the hub's repository ``owner/name``, at a commit. For a branch or a tag, which can be moved, a warning
        says which commit it is now; ``source`` records it either way.

        Raises:
            InputError: there is none, or it is damaged.
        """
        export = load_export(f"{HUB}{name}@{revision}")
        if not COMMIT.fullmatch(revision):
            warnings.warn(f"{name}: {revision!r} can come to mean other files; these are {export.source}", stacklevel=2)
        return export

    def push_to_hub(
        self, name: str, *, private: bool = True, results: str | Path | None = None, token: str | None = None
    ) -> str:
        """Upload this export to the hub's repository ``owner/name``.

        Args:
            name: of the repository, made if there is none.
            private: whether a new one is.
            results: a closed loop's ``summary.json`` of this export, for the card's metrics.
            token: the hub's; None: the one that ``hf auth login`` stored.

        Returns:
            its address with the commit, ``hf://owner/name@commit``: for :func:`~spvla.accelerate`, :func:`load_export`.

        Raises:
            InputError: results of another export (code ``other-export``), or the hub refuses (code ``hub-refused``).
        """
        with tempfile.TemporaryDirectory() as folder:
            saved = save_export(self, folder)
            if results is not None:
                summary = read_json(Path(results))
                if summary.get("export") != fingerprint(str(saved)):
                    message = f"{results}: are results of another export ({summary.get('export')})"
                    raise InputError(message, code="other-export", field="results")
                write_text(saved / "README.md", model_card(self, measured(summary)))
            return upload_folder(saved, name, private=private, message=f"SP-VLA export for {self.space.name}", token=token)

    def notes(self) -> list[str]:
        """Notes on the generators for the user of this export."""
        errors = self.provenance.get("calibration_error", {})
        last = errors.get("last", float("inf"))
        advice = "" if "last" in self.gates else "; add last to --baselines and distil again to compare their coverage"
        return [
            f"{name} is no better than repeating the last action: its error on the calibration episodes is "
            f"{errors[name]:.4f}, that of the baseline last is {last:.4f}{advice}"
            for name in self.generators
            if errors.get(name, 0.0) > last
        ]


def check_defaults(defaults: Mapping[str, Any], generators: tuple[str, ...]) -> None:
    """Raise :class:`InputError` unless ``defaults`` are complete and name one of ``generators`` or a built-in one."""
    if missing := DEFAULTS.keys() - defaults.keys():
        raise InputError(f"{min(missing)} is missing")
    check_values(defaults, DEFAULTS, at_least={"max_generated_run": 1})
    for name, known in (("generator", (*generators, *names_of(learned=False), "none")), ("gate", GATES.names())):
        if defaults[name] not in known and ":" not in defaults[name]:
            raise InputError(
                f"{name} {defaults[name]!r} is unknown; available: {', '.join(known)}", code=f"unknown-{name}", field=name
            )
    check_risk(defaults["risk"])
    check_values(defaults, PRUNING)
    make_pruner(defaults.get("pruning"))


def check_risk(risk: Any) -> None:
    """Raise :class:`InputError` unless ``risk`` is a number in (0, 1]."""
    check_values({"risk": risk}, {"risk": float})
    if not 0 < risk <= 1:
        raise InputError(f"risk must lie in (0, 1], got {risk}")


def save_export(export: Export, folder: str | Path) -> Path:
    """Write ``export`` to ``folder``, in the place of an older one. Killed at any moment, the folder holds one of the two.

    A new version is first written beside the old one; renaming it to ``.whole`` makes it the one that counts. Its parts then
    move to their places, and whoever reads meanwhile finds each part in one place or the other.

    Raises:
        InputError: ``folder`` holds something else, see :func:`require_export_folder`.
    """
    folder = require_export_folder(folder)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _move_in(folder)
        with building(folder / "new", named=folder) as new:
            _write(export, new)
            new.rename(folder / WHOLE)
        _move_in(folder)
    return folder


def _move_in(folder: Path) -> None:
    """Move the parts of a version that was written whole to their places; config.json last."""
    whole = folder / WHOLE
    if not whole.is_dir():
        return
    for part in PARTS:
        if (whole / part).exists():
            if (folder / part).is_dir():
                shutil.rmtree(folder / part)
            (whole / part).rename(folder / part)
    whole.rmdir()


def _part(folder: Path, name: str) -> Path:
    """Where a part of the export lies: in its place, or where a save that was killed left it."""
    kind = name.partition("/")[0]
    return inside(folder, f"{WHOLE}/{name}" if (folder / WHOLE / kind).exists() else name)


def require_export_folder(folder: str | Path) -> Path:
    """``folder`` as one that :func:`save_export` may write to: new, empty but for hidden files, or an export.

    Raises:
        InputError: it holds something else, which would be lost.
    """
    folder = Path(folder)
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; an export is a folder")
    if any(not p.name.startswith(".") for p in folder.iterdir()):
        config = folder / "config.json"
        if not (config.exists() and {"format", "action_space"} <= read_json(config).keys()):
            raise InputError(f"{folder}: is neither empty nor an export; nothing is written to it")
    for kind in ("generators", "gates"):
        for path in sorted((folder / kind).glob("*")):
            if path.is_dir() or path.suffix not in WEIGHTS:
                raise InputError(f"{path}: is not part of an export and would be lost; move it elsewhere")
    return folder


def _write(export: Export, folder: Path) -> None:
    digests = {}
    for kind, modules in (("generators", export.generators), ("gates", export.gates)):
        (folder / kind).mkdir(parents=True)
        for name, module in modules.items():
            weights = save({k: v.contiguous() for k, v in module.state_dict().items()})
            write_bytes(folder / kind / f"{name}.safetensors", weights)
            digests[f"{kind}/{name}.safetensors"] = hashlib.sha256(weights).hexdigest()
    config = {
        "format": FORMAT,
        "action_space": export.space.to_dict(),
        "tolerance": export.tolerance,
        "defaults": dict(export.defaults),
        "generators": {k: asdict(v.config) for k, v in export.generators.items()},
        "gates": {k: asdict(v.config) for k, v in export.gates.items()},
        "calibration": {k: v.to_dict() for k, v in export.calibration.items()},
        "provenance": dict(export.provenance),
        "sha256": digests,
    }
    write_text(folder / "README.md", model_card(export))
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")


def load_export(path: str | Path) -> Export:
    """Read an exported folder, one that comes with the package by its name (``generator_nano``,
    ``generator_libero_expert``), or download one from hf://owner/name.

    Raises :class:`InputError` that names the missing, truncated or ill-fitting file.
    """
    folder = resolve_folder(path)
    config_path = _part(folder, "config.json")
    if not config_path.exists():
        raise InputError(f"{config_path}: missing; {folder} is not an export", code="missing", field=str(config_path))
    config = read_json(config_path)
    for name in CONFIG:
        if name not in config:
            raise InputError(f"{config_path}: field {name!r} is missing")
    with naming(config_path):
        check_values(config, CONFIG)
        if not 1 <= config["format"] <= FORMAT:
            raise InputError(f"export format {config['format']} is too new; this version reads up to {FORMAT}", code="format")
        space = ActionSpace.from_dict(config["action_space"], "action_space")
        calibration = {k: Calibration.from_dict(v, f"calibration.{k}") for k, v in config["calibration"].items()}
        digests = config.get("sha256", {}) if config["format"] > 1 else None
        check_values({"sha256": digests}, {"sha256": dict[str, str] | None})
    networks: dict[str, dict[str, Any]] = {"generators": {}, "gates": {}}
    for kind, make in (("generators", make_network), ("gates", _make_gate)):
        for name, values in config[kind].items():
            if not NAME.fullmatch(name):
                raise InputError(f"{config_path}: {kind}: {name!r} is not a valid name (letters, digits, _ - .)", field=kind)
            weights = f"{kind}/{name}.safetensors"
            tensors = _read_weights(_part(folder, weights), None if digests is None else digests.get(weights, ""))
            with naming(config_path), naming(f"{kind}.{name}"):
                networks[kind][name] = _build(make, values, tensors, _part(folder, weights))
    defaults = {"gate" if name == "scheduler" else name: value for name, value in config["defaults"].items()}
    if "pruning" in defaults:
        defaults["pruning"] = with_current_names(defaults["pruning"])
    with naming(config_path):
        return Export(
            space,
            config["tolerance"],
            networks["generators"],
            networks["gates"],
            calibration,
            defaults,
            config["provenance"],
            pinned(path, folder),
        )


def fingerprint(export: str | None) -> str | None:
    """Short hash of an export folder's ``config.json``, which holds the check sums of the weights (in format 1 their
    calibration): tells whether results are of the same export, wherever it lies. A hub address stands for itself."""
    config = _part(packaged(export or ""), "config.json")
    return hashlib.sha256(config.read_bytes()).hexdigest()[:16] if export and config.exists() else export


def _make_gate(config: Mapping[str, Any]) -> ActionTypeClassifier:
    return ActionTypeClassifier(ClassifierConfig(**config))


def _read_weights(path: Path, digest: str | None) -> dict[str, Tensor]:
    """The tensors of a safetensors file with that SHA-256 (None: unknown), all finite."""
    data = read_bytes(path)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: incomplete or damaged safetensors file ({error})", code="damaged", field=str(path)) from None
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        message = f"{path}: is not the file that belongs to config.json (the SHA-256 differs)"
        raise InputError(message, code="damaged", field=str(path))
    for name, tensor in tensors.items():
        require_finite(tensor, name, path)
    return tensors


def _build(make: Callable[[Mapping[str, Any]], M], config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> M:
    """The network of ``config`` with ``tensors`` as its weights. Sizes are compared before any memory is taken for them."""
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in make(config).state_dict().items()}
    if expected != found:
        odd = min(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        raise InputError(
            f"{path}: tensor {odd!r} has shape {found.get(odd)}, config.json asks for {expected.get(odd)}",
            code="shape-mismatch",
            field=str(path),
        )
    network = make(config)
    network.load_state_dict(tensors)
    return network.eval()
