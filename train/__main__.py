"""``python -m train fit | distill | export``."""

import sys
import warnings
from collections.abc import Callable

from spvla.actions import ActionSpace
from spvla.cli import guard, run
from spvla.generators.features import FeatureConfig
from train.distill import distill
from train.export import export


def fit(arguments: list[str]) -> None:
    """Lightning's own command line: ``--config`` names model, data and trainer."""
    import torch
    from jsonargparse import set_parsing_settings
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            for name in ("features", "space", "judges", "fold"):  # the last two are a gate's
                parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    set_parsing_settings(subclasses_enabled=[FeatureConfig, ActionSpace])  # linked as objects, not field by field
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", module="lightning")
    CLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=["fit", *arguments],
    )


COMMANDS: dict[str, Callable[..., None]] = {"fit": fit, "distill": distill, "export": export}


def main() -> int:
    """Dispatch: ``fit`` is Lightning's, the others are plain functions."""
    if sys.argv[1:2] == ["fit"]:
        return guard(lambda: fit(sys.argv[2:]))
    return run(COMMANDS, "Distil generators and gates, export them.")


if __name__ == "__main__":
    sys.exit(main())
