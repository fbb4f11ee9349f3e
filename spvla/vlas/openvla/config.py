"""A checkpoint's configuration: ``config.json``, and the image normalisation of ``preprocessor_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spvla.errors import InputError
from spvla.fields import check_fields, check_values, naming
from spvla.files import read_json
from spvla.vlas.checkpoint import refuse_quantised
from spvla.vlas.vision import MAX_DEPTH, ViTConfig, vit_config

SPACE_TOKEN = 29871  # Llama's lone space; the published models were trained with it between prompt and action
RESIZE = "resize-naive"  # resize to a square, ignoring the aspect ratio
INTERPOLATIONS = ("bicubic", "bilinear")
NUMBERS = tuple[tuple[float, float, float], ...]
PREPROCESSOR = {"means": NUMBERS, "stds": NUMBERS, "interpolations": tuple[str, ...]}  # what is read of the file


@dataclass(frozen=True)
class OpenVLAConfig:
    """A checkpoint's ``config.json``, with what ``preprocessor_config.json`` says of the image normalisation.

    Args:
        timm_model_ids: the vision encoders, two if fused.
        image_sizes: input side in pixels per encoder.
        text_config: a transformers ``LlamaConfig`` as a dict; what it leaves out is Llama-2 7B's.
        norm_stats: {data set: {"action": {"q01", "q99", "mask"}}}, environment units (D,).
        use_fused_vision_backbone: two encoders, features joined on the channels; else one.
        timm_model_kwargs: ours: one dict per encoder that overrides its architecture, see
            :class:`~spvla.vlas.vision.ViTConfig`; lets small models use this class.
        timm_override_act_layers: activation per encoder, or null.
        image_resize_strategy: ``resize-naive`` is the one in use.
        n_action_bins: edges of the action bins; there is one bin less.
        pad_to_multiple_of: padding ids at the vocabulary's end; action tokens count down from before them.
        llm_max_length: longest sequence, visual tokens included.
        append_space_token: ours: end the prompt with Llama's token 29871, as published; off for other tokenizers.
        image_means, image_stds: RGB normalisation per encoder; empty: the architecture's own.
        interpolations: resize filter per encoder; empty: bicubic.
    """

    timm_model_ids: tuple[str, ...]
    image_sizes: tuple[int, ...]
    text_config: dict[str, Any]
    norm_stats: dict[str, Any] = field(default_factory=dict)
    use_fused_vision_backbone: bool = True
    timm_model_kwargs: tuple[dict[str, Any] | None, ...] = ()
    timm_override_act_layers: tuple[str | None, ...] = ()
    image_resize_strategy: str = RESIZE
    n_action_bins: int = 256
    pad_to_multiple_of: int = 64
    llm_max_length: int = 2048
    append_space_token: bool = True
    image_means: tuple[tuple[float, float, float], ...] = ()
    image_stds: tuple[tuple[float, float, float], ...] = ()
    interpolations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        with naming("config.json"):
            positive = ("image_sizes", "llm_max_length")
            check_fields(self, at_least={**dict.fromkeys(positive, 1), "n_action_bins": 2, "pad_to_multiple_of": 0})
        expected = 2 if self.use_fused_vision_backbone else 1
        if len(self.timm_model_ids) != expected:
            raise InputError(f"config.json: timm_model_ids has {len(self.timm_model_ids)} encoders, expected {expected}")
        optional = ("timm_model_kwargs", "timm_override_act_layers", "image_means", "image_stds", "interpolations")
        for name in ("image_sizes", *optional):
            count = len(getattr(self, name))
            if count != expected and (count or name == "image_sizes"):
                raise InputError(f"config.json: {name} has {count} entries for {expected} encoders")
        if self.image_resize_strategy != RESIZE:
            raise InputError(
                f"config.json: image_resize_strategy {self.image_resize_strategy!r} is not supported, only {RESIZE!r}"
            )
        for name in self.interpolations:
            if name not in INTERPOLATIONS:
                raise InputError(f"preprocessor_config.json: interpolation {name!r} is not one of {', '.join(INTERPOLATIONS)}")
        if any(std <= 0 for stds in self.image_stds for std in stds):
            raise InputError(f"preprocessor_config.json: stds must be positive, got {self.image_stds}")
        if not isinstance(self.text_config.get("vocab_size", 32000), int):
            raise InputError("config.json: text_config.vocab_size must be an integer")
        if self.n_action_bins > self.vocab:
            raise InputError(
                f"config.json: n_action_bins {self.n_action_bins} do not fit the vocabulary of {self.vocab} ids "
                f"(vocab_size less pad_to_multiple_of {self.pad_to_multiple_of})"
            )
        grids = {vit.grid for vit in self.encoders}
        if len(grids) > 1:
            raise InputError(f"config.json: the encoders cut the image into different grids, {sorted(grids)}")
        if self.append_space_token and self.vocab <= SPACE_TOKEN:
            raise InputError(
                f"config.json: append_space_token needs Llama's vocabulary, this one has {self.vocab} ids; "
                "set append_space_token to false"
            )

    @property
    def encoders(self) -> tuple[ViTConfig, ...]:
        """Architecture of each vision encoder."""
        kwargs = self.timm_model_kwargs or (None,) * len(self.timm_model_ids)
        acts = self.timm_override_act_layers or (None,) * len(self.timm_model_ids)
        return tuple(
            vit_config(model_id, size, kw, act)
            for model_id, size, kw, act in zip(self.timm_model_ids, self.image_sizes, kwargs, acts, strict=True)
        )

    @property
    def grid(self) -> int:
        """Patches along one side; grid x grid visual tokens."""
        return self.encoders[0].grid

    @property
    def vocab(self) -> int:
        """Token ids in use, without padding; action tokens are the last ones below."""
        return int(self.text_config.get("vocab_size", 32000)) - self.pad_to_multiple_of

    @classmethod
    def read(cls, folder: Path) -> OpenVLAConfig:
        """A checkpoint's configuration; ``dataset_statistics.json``, if there is one, replaces its statistics."""
        values = dict(read_json(folder / "config.json"))
        refuse_quantised(values, folder / "config.json")
        statistics = folder / "dataset_statistics.json"
        if statistics.exists():
            values["norm_stats"] = read_json(statistics)
        preprocessor = folder / "preprocessor_config.json"
        with naming(folder):
            return cls.from_dicts(values, read_json(preprocessor) if preprocessor.exists() else None)

    @classmethod
    def from_dicts(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> OpenVLAConfig:
        """Read ``config.json``'s and ``preprocessor_config.json``'s content. Keys not listed above are ignored.

        Raises:
            InputError: another model type, a missing key, or a value that does not fit; the message names it.
        """
        if config.get("model_type") != "openvla":
            raise InputError(f"config.json: model_type is {config.get('model_type')!r}, expected 'openvla'")
        values = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        preprocessor = preprocessor or {}
        with naming("preprocessor_config.json"):
            check_values(preprocessor, PREPROCESSOR)
        for name, key in (("image_means", "means"), ("image_stds", "stds"), ("interpolations", "interpolations")):
            if key in preprocessor:
                values[name] = preprocessor[key]
        if missing := {"timm_model_ids", "image_sizes", "text_config"} - values.keys():
            raise InputError(f"config.json: field {min(missing)!r} is missing")
        return cls(**values)

    def to_dicts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """``config.json``'s and ``preprocessor_config.json``'s content; :meth:`from_dicts` reads them back."""
        config = {"model_type": "openvla", "architectures": ["OpenVLAForActionPrediction"], **asdict(self)}
        del config["image_means"], config["image_stds"], config["interpolations"]
        encoders = self.encoders
        preprocessor = {
            "image_processor_type": "PrismaticImageProcessor",
            "image_resize_strategy": self.image_resize_strategy,
            "input_sizes": [[3, size, size] for size in self.image_sizes],
            "interpolations": self.interpolations or ("bicubic",) * len(encoders),
            "means": self.image_means or [vit.mean for vit in encoders],
            "stds": self.image_stds or [vit.std for vit in encoders],
            "use_fused_vision_backbone": self.use_fused_vision_backbone,
        }
        return config, preprocessor


def llama_config(config: OpenVLAConfig) -> Any:
    """transformers' ``LlamaConfig`` for ``text_config``; raises :class:`InputError` for values it refuses."""
    from transformers import LlamaConfig

    values = {k: v for k, v in config.text_config.items() if k not in ("model_type", "torch_dtype", "dtype")}
    try:
        text = LlamaConfig(**{**values, "attn_implementation": "sdpa"})
    except Exception as error:  # transformers' strict dataclasses raise types of their own
        raise InputError(f"config.json: text_config: {' '.join(str(error).split())}") from None
    with naming("config.json: text_config"):
        check_values(
            {"num_hidden_layers": text.num_hidden_layers}, {"num_hidden_layers": int}, at_most={"num_hidden_layers": MAX_DEPTH}
        )
    if not isinstance(text.bos_token_id, int) or not 0 <= text.bos_token_id < text.vocab_size:
        raise InputError(f"config.json: text_config: bos_token_id {text.bos_token_id} is not one of {text.vocab_size} ids")
    return text
