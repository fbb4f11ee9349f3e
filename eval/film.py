"""Films of single episodes: what the VLA's encoders saw, the tokens it kept, and a bar of who acted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from eval.output import main_image
from spvla.history import Source
from spvla.steps import StepInfo
from spvla.vlas.base import VLAOutput

Image = NDArray[np.uint8]

COLOURS = {Source.VLA: (76, 120, 168), Source.GENERATOR: (245, 133, 24), Source.HELD: (153, 153, 153)}
COLOURS |= {Source.PLAN: (114, 183, 178)}  # RGB, as in the report
SIDE, BAR, BORDER = 320, 16, 6  # pixels; even, as H.264 wants it
STRIP = 8


def draw(image: Image, source: Source, output: VLAOutput | None) -> Image:
    """One frame (SIDE, SIDE, 3): dropped patches darkened, the border in the colour of who acted.

    Args:
        image: what the encoders see, uint8 (S, S, 3).
        source: who acted.
        output: the VLA's own output if it was asked.
    """
    frame = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    if output is not None and output.kept_tokens is not None and output.visual_tokens is not None:
        total = output.visual_tokens[1]
        kept = np.zeros(total, np.uint8)
        kept[output.kept_tokens] = 1
        mask = cv2.resize(main_image(kept), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
        frame = np.where(mask[..., None] > 0, frame, frame // 4)
    out = np.ascontiguousarray(frame, np.uint8)
    cv2.rectangle(out, (0, 0), (SIDE - 1, SIDE - 1), COLOURS[source], BORDER)
    return out


def bar(sources: Sequence[Source], now: int) -> Image:
    """Who acted at each step so far, (BAR, SIDE, 3); what is still to come is dark."""
    colours = np.array([COLOURS[s] if i <= now else (40, 40, 40) for i, s in enumerate(sources)], np.uint8)
    return np.repeat(colours[None, np.arange(SIDE) * len(sources) // SIDE], BAR, axis=0)


def write_film(
    folder: Path, name: str, images: Sequence[Image], steps: Sequence[StepInfo], outputs: Sequence[VLAOutput | None], fps: float
) -> None:
    """Write ``<name>.mp4`` (H.264) and ``<name>.jpg``, a strip of :data:`STRIP` frames.

    Args:
        folder: where to; made if it is not there.
        name: of the files.
        images: what the encoders see at each step, uint8 (S, S, 3) each.
        steps: what happened at each.
        outputs: the VLA's own outputs where it was asked.
        fps: control steps per second.
    """
    import av

    folder.mkdir(parents=True, exist_ok=True)
    sources = [s.source for s in steps]
    frames = [draw(*at) for at in zip(images, sources, outputs, strict=True)]
    with av.open(str(folder / f"{name}.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"crf": "28", "preset": "slow"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE + BAR, "yuv420p"
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.concatenate([frame, bar(sources, i)]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    chosen = np.linspace(0, len(frames) - 1, STRIP).round().astype(int)
    gap = np.full((SIDE, 4, 3), 255, np.uint8)
    row = [part for i in chosen for part in (frames[i], gap)][:-1]
    strip = np.concatenate(row, axis=1)
    who = cv2.resize(bar(sources, len(sources)), (strip.shape[1], BAR), interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(folder / f"{name}.jpg"), np.concatenate([strip, who])[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
