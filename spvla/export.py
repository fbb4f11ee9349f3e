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
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.fields import check_fields, check_values, naming
from spvla.files import explained
from spvla.gates.base import Gate
from spvla.gates.calibration import Calibration
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig, LearnedGate
from spvla.gates.live import LiveGate, LiveOptions, identity_of
from spvla.gates.rules import PaperRule, ReleaseRule
from spvla.generators.base import ActionGenerator
from spvla.generators.learned import GeneratorConfig, LearnedGenerator
from spvla.generators.ridge import LastActionGenerator, RidgeGenerator
from spvla.policy import SPVLAPolicy
from spvla.pruning.pruner import TokenPruner, make_pruner
from spvla.vlas.checkpoint import read_json, require_finite
from spvla.vlas.foreign import as_vla

M = TypeVar("M", bound=nn.Module)
FORMAT = 1
PRETRAINED = Path(__file__).parent / "pretrained"
BUILT_IN_GENERATORS = ("ridge", "ridge_paper", "last")
GATES = ("learned", "live", "release", "paper")
DEFAULTS = {"generator": str, "gate": str, "risk": float, "max_generated_run": int}
PRUNING = {"pruning": TokenPruner | Mapping[str, Any] | str | None}
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
    """

    space: ActionSpace
    tolerance: float
    generators: Mapping[str, LearnedGenerator]
    gates: Mapping[str, ActionTypeClassifier]
    calibration: Mapping[str, Calibration]
    defaults: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tolerance <= 0:
            raise InputError(f"tolerance must be positive, got {self.tolerance}")
        if missing := self.gates.keys() - self.calibration.keys():
            raise InputError(f"calibration lacks gate {min(missing)!r}")
        with naming("defaults"):
            check_defaults(self.defaults, tuple(self.generators))
        modules: list[nn.Module] = [*self.generators.values(), *self.gates.values()]
        for module in modules:
            module.eval()  # dropout would decide otherwise at every call
        for name in self.gates.keys() & self.generators.keys():
            generator, gate = self.generators[name].features, self.gates[name].features
            if generator.config == gate.config:
                self.gates[name].features = generator  # one module: what it computes for the generator serves the gate

    def generator(self, name: str, space: ActionSpace) -> ActionGenerator:
        """A generator by name for a robot of ``space``: an exported one, ``ridge``, ``ridge_paper`` or ``last``; its normalised
        actions are in the export's scale."""
        acting = self.acting_space(space)
        if name in self.generators:
            return self.generators[name].bind(acting)
        return built_in_generator(name, acting, also=tuple(self.generators))

    def acting_space(self, space: ActionSpace) -> ActionSpace:
        """What generators and gates act in on a robot of action space ``space``: its bounds and environment units, in the
        export's scale, which is the one that they were trained in."""
        return space.scaled_like(self.space)

    def limits(self, generator: str, space: ActionSpace) -> ActionSpace:
        """What proposals of ``generator`` on a robot of ``space`` are held to: its bounds, and for a distilled one the largest
        jump that training saw; in the export's scale."""
        acting = self.acting_space(space)
        jump = self.space.max_jump if generator in self.generators else None
        return acting if jump is None else acting.with_max_jump(jump)

    def notes(self) -> list[str]:
        """What whoever uses this export should know of its generators."""
        errors = self.provenance.get("calibration_error", {})
        last = errors.get("last", float("inf"))
        advice = "" if "last" in self.gates else "; distil again with last among the baselines to compare their coverage"
        return [
            f"{name} is no better than repeating the last action: its error on the calibration episodes is "
            f"{errors[name]:.4f}, that of last {last:.4f}{advice}"
            for name in self.generators
            if errors.get(name, 0.0) > last
        ]

    def gate(self, generator: str, risk: float, space: ActionSpace) -> LearnedGate:
        """The gate of ``generator`` at an allowed ``risk``. A generator without a gate is refused."""
        if generator not in self.gates:
            raise InputError(f"export: generator {generator!r} has no gate; gates: {', '.join(sorted(self.gates))}")
        threshold = self.calibration[generator].threshold(risk)
        return LearnedGate(self.gates[generator], threshold, self.limits(generator, space))

    def live_gate(self, generator: str, risk: float, space: ActionSpace, options: LiveOptions) -> LiveGate:
        """The gate of ``generator`` under a live controller, which starts at the calibrated threshold of ``risk``; where the
        calibration episodes are too few for that risk it starts by calling the VLA on every step."""
        curve = self.calibration.get(generator)
        calibrated = curve is not None and risk >= curve.smallest_risk
        inner = self.gate(generator, risk if calibrated else 1.0, space)
        grid = self.calibration[generator].thresholds
        start = bisect_right(grid, inner.threshold) / len(grid) if calibrated else 0.0
        identity = identity_of(self.space, generator, self.calibration[generator].to_dict())
        return LiveGate(
            replace(inner, threshold=1.0), grid, start, risk, self.limits(generator, space), self.tolerance, options, identity
        )


def check_defaults(defaults: Mapping[str, Any], generators: tuple[str, ...]) -> None:
    """Raise :class:`InputError` unless ``defaults`` are complete and name one of ``generators`` or a built-in one."""
    if missing := DEFAULTS.keys() - defaults.keys():
        raise InputError(f"{min(missing)} is missing")
    check_values(defaults, DEFAULTS, at_least={"max_generated_run": 1})
    for name, known in (("generator", (*generators, *BUILT_IN_GENERATORS, "none")), ("gate", GATES)):
        if defaults[name] not in known:
            raise InputError(f"{name} {defaults[name]!r} is unknown; there are: {', '.join(known)}")
    check_risk(defaults["risk"])
    check_values(defaults, PRUNING)
    make_pruner(defaults.get("pruning"))


def check_risk(risk: Any) -> None:
    """Raise :class:`InputError` unless ``risk`` is a number in (0, 1]."""
    check_values({"risk": risk}, {"risk": float})
    if not 0 < risk <= 1:
        raise InputError(f"risk must lie in (0, 1], got {risk}")


def built_in_generator(name: str, space: ActionSpace, also: tuple[str, ...] = ()) -> ActionGenerator:
    """``ridge`` (the published release form), ``ridge_paper`` or ``last``; ``also`` only completes the error's list."""
    if name == "ridge":
        return RidgeGenerator(space, form="release" if space.translation else "paper")
    if name == "ridge_paper":
        return RidgeGenerator(space, form="paper")
    if name == "last":
        return LastActionGenerator(space)
    raise InputError(f"generator {name!r} is unknown; there are: {', '.join((*also, *BUILT_IN_GENERATORS))}")


def accelerate(
    vla: Any,
    export: str | Path | Export | None = None,
    risk: float | None = None,
    *,
    generator: str | None = None,
    gate: str | None = None,
    rule: Mapping[str, float] | None = None,
    pruning: TokenPruner | Mapping[str, Any] | str | None = None,
    max_generated_run: int | None = None,
    shadow: bool = False,
    record: str | Path | None = None,
    when_unavailable: str = "raise",
    scheduler: str | None = None,
) -> SPVLAPolicy:
    """Put a frozen VLA, a distilled generator and its gate together.

    Args:
        vla: the frozen policy, unmodified: a :class:`~spvla.vlas.base.VLA`, a LeRobot policy, or any object with
            ``select_action(observation)`` and ``reset()``; the latter two act in the export's action space
            (:mod:`spvla.vlas.foreign` has the adapters, with their options).
        export: an exported folder, a hub id, or a loaded :class:`Export`; None for built-in parts alone.
        risk: the one knob: allowed share of an episode's steps that are generated and deviate; the export's default if
            None.
        generator: an exported or built-in generator; the export's default if None, ``"none"`` switches scheduling off.
        gate: ``learned``, ``live`` (the learned one under a controller that keeps the risk by audits; ``policy.live`` saves and
            loads what it has learned), ``release`` or ``paper``; the export's default if None.
        rule: constants of a hand-set rule, or :class:`~spvla.gates.live.LiveOptions` of the live gate.
        pruning: visual tokens that the VLA's own pass keeps: a :class:`~spvla.pruning.TokenPruner`, its fields, ``release``
            or ``readme``; the export's default if None, ``"none"`` switches pruning off. A VLA that cannot prune is refused.
        max_generated_run: generated actions in a row; the export's default if None.
        shadow: the VLA acts on every step, what would have been skipped is recorded.
        record: folder of a rollout store for finished episodes.
        when_unavailable: what to do while a remote VLA does not answer: ``raise``, ``stop``, ``hold`` or ``generator``, see
            :class:`~spvla.policy.SPVLAPolicy`.
        scheduler: the former name of ``gate``.
    """
    if scheduler is not None:
        if gate is not None:
            raise InputError("accelerate: scheduler is the former name of gate; give gate alone", field="scheduler")
        warnings.warn("accelerate: scheduler is now called gate", DeprecationWarning, stacklevel=2)
        gate = scheduler
    loaded = load_export(export) if isinstance(export, str | Path) else export
    if not isinstance(loaded, Export | None):
        raise InputError(f"accelerate: export must be a folder, a hub id or an Export, got {type(loaded).__name__}")
    if risk is not None:
        check_risk(risk)
    check_values({"pruning": pruning}, PRUNING)
    defaults = dict(loaded.defaults) if loaded else {}
    vla = as_vla(vla, None if loaded is None else replace(loaded.space, max_jump=None))
    if loaded is not None:
        loaded.space.require_compatible(vla.action_space, "accelerate")
    generator = generator or defaults.get("generator", "ridge")
    gate = gate or defaults.get("gate", "release")
    if gate not in GATES:
        raise InputError(f"gate {gate!r} is unknown; there are: {', '.join(GATES)}")
    if rule and (gate == "learned" or generator == "none"):
        raise InputError(f"rule: there is no hand-set rule that its constants ({', '.join(rule)}) would belong to")
    space = vla.action_space if loaded is None else loaded.acting_space(vla.action_space)
    if loaded is not None and (far := loaded.space.scale_difference(vla.action_space)):
        warnings.warn(
            f"the export's actions have another scale than the VLA's, in {len(far)} of {space.dim} dimensions: {far[0]}. The "
            "generator keeps the export's; check that both mean the same units",
            stacklevel=2,
        )
    pruner = make_pruner(defaults.get("pruning") if pruning is None else pruning)
    options: dict[str, Any] = {
        "max_generated_run": defaults.get("max_generated_run", 20) if max_generated_run is None else max_generated_run,
        "tolerance": loaded.tolerance if loaded else 0.2,
        "shadow": shadow,
        "record": record,
        "when_unavailable": when_unavailable,
    }
    if generator == "none":
        return SPVLAPolicy(vla, None, None, pruner, **options)
    part = loaded.generator(generator, space) if loaded else built_in_generator(generator, space)
    if loaded is not None:
        options["space"] = loaded.limits(generator, space)
    decider: Gate
    if gate == "learned":
        if loaded is None:
            raise InputError("accelerate: the learned gate needs an export with a gate")
        decider = loaded.gate(generator, defaults["risk"] if risk is None else risk, space)
    elif gate == "live":
        decider = _live_gate(loaded, generator, defaults.get("risk", 0.05) if risk is None else risk, space, rule or {})
    else:
        with naming("accelerate"):
            decider = {"release": ReleaseRule, "paper": PaperRule}[gate](space, **(rule or {}))
    return SPVLAPolicy(vla, part, decider, pruner, **options)


def _live_gate(
    export: Export | None, generator: str, risk: float, space: ActionSpace, options: Mapping[str, Any]
) -> LiveGate:
    """A live controller around the learned gate of ``generator``, or where it has none around the published release rule."""
    with naming("accelerate"):
        chosen = LiveOptions(**options)
        if export is not None and generator in export.gates:
            return export.live_gate(generator, risk, space, chosen)
        identity = identity_of(space, generator, {"gate": "release"})
        tolerance = 0.2 if export is None else export.tolerance
        return LiveGate(ReleaseRule(space), (), 1.0, risk, space, tolerance, chosen, identity)


def save_export(export: Export, folder: str | Path) -> Path:
    """Write ``export`` to ``folder``, in the place of an older one.

    It is written beside that one and swapped in when it is whole; config.json comes last, so that a folder with one is whole.

    Raises:
        InputError: ``folder`` holds something else, see :func:`require_export_folder`.
    """
    folder = require_export_folder(folder)
    with explained(folder):
        _replace(export, folder)
    return folder


def _replace(export: Export, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = ("generators", "gates", "README.md", "config.json")
    with TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        old.mkdir()
        _write(export, new)
        for part in reversed(parts):
            if (folder / part).exists():
                (folder / part).rename(old / part)
        for part in parts:
            (new / part).rename(folder / part)


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
                raise InputError(f"{path}: is no part of an export and would be lost; move it elsewhere")
    return folder


def _write(export: Export, folder: Path) -> None:
    for kind, modules in (("generators", export.generators), ("gates", export.gates)):
        (folder / kind).mkdir(parents=True)
        for name, module in modules.items():
            save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / kind / f"{name}.safetensors")
    config = {
        "format": FORMAT,
        "action_space": export.space.to_dict(),
        "tolerance": export.tolerance,
        "defaults": dict(export.defaults),
        "generators": {k: asdict(v.config) for k, v in export.generators.items()},
        "gates": {k: asdict(v.config) for k, v in export.gates.items()},
        "calibration": {k: v.to_dict() for k, v in export.calibration.items()},
        "provenance": dict(export.provenance),
    }
    (folder / "README.md").write_text(model_card(export))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_export(path: str | Path) -> Export:
    """Read an exported folder, one that comes with the package by its name (``generator_nano``,
    ``generator_libero_expert``), or download one by its hub id.

    Raises :class:`InputError` that names the missing, truncated or ill-fitting file.
    """
    folder = _packaged(path)
    if not folder.is_dir():
        folder = _download(str(path))
    config_path = folder / "config.json"
    if not config_path.exists():
        raise InputError(f"{config_path}: missing; {folder} is not an export (or its writing was cut short)")
    config = read_json(config_path)
    for name in CONFIG:
        if name not in config:
            raise InputError(f"{config_path}: field {name!r} is missing")
    with naming(config_path):
        check_values(config, CONFIG)
        if config["format"] != FORMAT:
            raise InputError(f"export format {config['format']}, this version reads {FORMAT}")
        space = ActionSpace.from_dict(config["action_space"], "action_space")
        calibration = {k: Calibration.from_dict(v, f"calibration.{k}") for k, v in config["calibration"].items()}
        generators = {
            k: _build(LearnedGenerator, GeneratorConfig, v, f"generators.{k}") for k, v in config["generators"].items()
        }
        gates = {k: _build(ActionTypeClassifier, ClassifierConfig, v, f"gates.{k}") for k, v in config["gates"].items()}
    for kind, modules in (("generators", generators), ("gates", gates)):
        for name, module in modules.items():
            _load(module, folder / kind / f"{name}.safetensors")
    defaults = {"gate" if name == "scheduler" else name: value for name, value in config["defaults"].items()}
    with naming(config_path):
        return Export(space, config["tolerance"], generators, gates, calibration, defaults, config["provenance"])


def fingerprint(export: str | None) -> str | None:
    """Short hash of an export folder's ``config.json``, whose calibration differs when its weights do: tells whether results
    are of the same export, wherever it lies. A hub id stands for itself."""
    config = _packaged(export or "") / "config.json"
    return hashlib.sha256(config.read_bytes()).hexdigest()[:16] if export and config.exists() else export


def _build(network: Callable[[Any], M], config: Callable[..., Any], values: Mapping[str, Any], where: str) -> M:
    with naming(where):
        return network(config(**values))


def _load(module: nn.Module, path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path}: missing from the export")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    if expected != found:
        odd = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))[0]
        raise InputError(f"{path}: tensor {odd!r} has shape {found.get(odd)}, config.json asks for {expected.get(odd)}")
    for name, tensor in tensors.items():
        require_finite(tensor, name, path)
    module.load_state_dict(tensors)
    module.eval()


def _packaged(path: str | Path) -> Path:
    """``path``, or the folder of that name in the package where there is none here."""
    inside = PRETRAINED / path
    return inside if not Path(path).is_dir() and len(Path(path).parts) == 1 and inside.is_dir() else Path(path)


def _download(hub_id: str) -> Path:
    if hub_id.startswith((".", "/", "~")) or hub_id.count("/") != 1:
        raise InputError(f"{hub_id}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{hub_id}: neither a folder nor reachable on the hub ({type(error).__name__})") from None


def model_card(export: Export) -> str:
    """The export's README.md."""
    lines = [
        "---",
        "library_name: spvla",
        "tags: [robotics, vision-language-action, sp-vla]",
        "license: mit",
        "---",
        "",
        f"# SP-VLA generator and gates for {export.space.name}",
        "",
        f"Action generators distilled from the teacher **{export.provenance.get('teacher', 'unknown')}** and one calibrated "
        "action-type classifier per generator. Use with the same VLA, in the same action space:",
        "",
        "```python",
        'policy = spvla.accelerate(vla, "this/folder")',
        "```",
        "",
        "| generator | gate | calibration episodes | smallest risk | coverage at the default risk |",
        "|---|---|---|---|---|",
    ]
    risk = float(export.defaults.get("risk", 0.05))
    for name, curve in export.calibration.items():
        lines.append(f"| {name} | learned | {curve.episodes} | {curve.smallest_risk:.4f} | {curve.coverage_at(risk):.1%} |")
    lines += [
        "",
        f"Defaults: `{json.dumps(dict(export.defaults))}`. A step deviates if the largest error over the continuous "
        f"dimensions exceeds {export.tolerance} (normalised units) or a gripper is wrong. Risk is the expected share of an "
        "episode's steps that are generated and deviate; the bound holds for trajectories like those of the calibration "
        "set. Steps in unfamiliar states, and those whose proposal is refused (out of bounds, or a larger jump than any in "
        "training), are the VLA's.",
        *(f"\nNote: {note}." for note in export.notes()),
        "",
        "Provenance:",
        "",
        "```json",
        json.dumps(dict(export.provenance), indent=1),
        "```",
    ]
    return "\n".join(lines) + "\n"
