"""``python -m train fit | distill | export``."""

import argparse
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from spvla.actions import ActionSpace
from spvla.cli import guard, run
from spvla.errors import InputError
from spvla.generators.features import FeatureConfig
from train.distill import distill
from train.export import export


def fit(arguments: list[str]) -> None:
    """Lightning's own command line: ``--config`` names model, data and trainer."""
    import torch
    from jsonargparse import set_parsing_settings
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            for name in ("features", "space", "residual", "judges", "fold"):  # the last two are a gate's
                parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    set_parsing_settings(subclasses_enabled=[FeatureConfig, ActionSpace])  # linked as objects, not field by field
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", module="lightning")
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--ckpt_path")
    path = options.parse_known_args(arguments)[0].ckpt_path
    if path is not None and path not in ("best", "last", "hpc", "registry", "null"):
        require_checkpoint(Path(path))
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
    except ValueError as error:  # what model and data refuse comes wrapped by the parser
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        raise (cause or error) from None


def require_checkpoint(path: Path) -> None:
    """Raise :class:`InputError` unless ``path`` is a training's checkpoint."""
    import torch

    if not path.is_file():
        raise InputError(f"ckpt_path: {path} does not exist")
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=False)["state_dict"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"ckpt_path: {path} is not a whole checkpoint ({type(error).__name__}: {error})") from None


COMMANDS: dict[str, Callable[..., None]] = {"fit": fit, "distill": distill, "export": export}


def main() -> int:
    """Dispatch: ``fit`` is Lightning's, the others are plain functions."""
    if sys.argv[1:2] == ["fit"]:
        return guard(lambda: fit(sys.argv[2:]))
    return run(COMMANDS, "Distil generators and gates, export them.")


if __name__ == "__main__":
    sys.exit(main())
