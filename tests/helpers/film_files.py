"""Films of noise as files, losslessly coded, silent or with a sound."""

from pathlib import Path
from typing import Any

import numpy as np


def write_film(
    file: Path, *, frames: int, rate: int = 2, size: tuple[int, int] = (32, 48), seconds: float = 0.0, hertz: int = 440
) -> str:
    """A film of so many frames, `rate` a second, with a noisy tone of so many seconds at 8,000 samples a second; 0:
    silent. Its name.
    """
    import av

    random = np.random.default_rng(frames)
    with av.open(str(file), "w", format="matroska") as container:
        shown: Any = container.add_stream("ffv1", rate=rate)
        shown.height, shown.width, shown.pix_fmt = *size, "bgr0"
        heard: Any = container.add_stream("pcm_s16le", rate=8_000, layout="mono") if seconds else None
        for array in random.integers(0, 256, (frames, *size, 3), np.uint8):
            container.mux(shown.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(shown.encode(None))
        if heard is not None:
            at = np.arange(round(seconds * 8_000)) / 8_000
            wave = 0.4 * np.sin(2 * np.pi * hertz * at) + 0.05 * random.standard_normal(len(at))
            samples = (wave * 32_767).clip(-32_768, 32_767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = 8_000
            container.mux(heard.encode(frame))
            container.mux(heard.encode(None))
    return file.name
