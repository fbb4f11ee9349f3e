"""``python -m train fit | distill | export``."""

import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spvla.actions import ActionSpace
from spvla.cli import guard, run
from spvla.errors import InputError
from spvla.gates.eyes import EyesConfig
from spvla.generators.features import FeatureConfig
from train.distill import distill
from train.export import export

LINKED = ("features", "space", "residual", "judges", "fold", "eyes", "last_disagreement")  # the last four are a gate's


def fit(arguments: list[str]) -> None:
    """Lightning's own command line: ``--config`` names model, data and trainer."""
    import torch
    from jsonargparse import set_parsing_settings
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            for name in LINKED:
                parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

        def parse_arguments(self, *args: Any, **kwargs: Any) -> None:
            super().parse_arguments(*args, **kwargs)
            options = self.config["fit"]
            options.weights_only = True  # a checkpoint never runs code
            if options.ckpt_path not in (None, "best", "last", "hpc", "registry"):
                require_checkpoint(Path(options.ckpt_path))

    set_parsing_settings(subclasses_enabled=[FeatureConfig, ActionSpace, EyesConfig])  # linked as objects, not field by field
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", module="lightning")
    try:
        CLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            args=["fit", *arguments],
        )
    except MisconfigurationException as error:
        raise InputError(str(error).splitlines()[0]) from error
    except pickle.UnpicklingError as error:  # of a checkpoint that Lightning found itself
        raise _not_ours("the checkpoint to continue from", error) from None
    except ValueError as error:  # what model and data refuse comes wrapped by the parser
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        raise (cause or error) from None


def require_checkpoint(path: Path) -> None:
    """Raise :class:`InputError` unless ``path`` is a training's checkpoint: tensors and plain values.

    Reading it runs no code. Lightning would make the class that a checkpoint's hyper-parameters name; ours have none.
    """
    import torch

    if not path.is_file():
        raise InputError(f"ckpt_path: {path} does not exist", code="missing", field="ckpt_path")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if "state_dict" not in checkpoint or "hyper_parameters" in checkpoint:
            raise ValueError("its entries are not those of a training here")
    except Exception as error:  # zip, pickle and torch raise many types for damaged files
        raise _not_ours(str(path), error) from None


def _not_ours(what: str, error: Exception) -> InputError:
    reason = "it holds more than tensors and plain values" if isinstance(error, pickle.UnpicklingError) else error
    return InputError(
        f"ckpt_path: {what} is not a whole checkpoint of a training here ({reason})", code="damaged", field="ckpt_path"
    )


COMMANDS: dict[str, Callable[..., None]] = {"fit": fit, "distill": distill, "export": export}


def main() -> int:
    """Dispatch: ``fit`` is Lightning's, the others are plain functions."""
    if sys.argv[1:2] == ["fit"]:
        return guard(lambda: fit(sys.argv[2:]))
    return run(COMMANDS, "Distil generators and gates, export them.")


if __name__ == "__main__":
    sys.exit(main())
